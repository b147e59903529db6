/* SPDX-License-Identifier: Apache-2.0 */
#ifndef COWSHED_PRELOAD_HOOKS_CHANGE_H
#define COWSHED_PRELOAD_HOOKS_CHANGE_H

/* Finds the C library's own calls, so that none is looked up in a signal handler. */
void change_find(void);

#endif
