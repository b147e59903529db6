/* SPDX-License-Identifier: Apache-2.0 */
#ifndef COWSHED_PRELOAD_HOOKS_LOOK_H
#define COWSHED_PRELOAD_HOOKS_LOOK_H

/* Finds the C library's own calls, so that none is looked up in a signal handler. */
void look_find(void);

#endif
