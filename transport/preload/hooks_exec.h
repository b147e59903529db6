/* SPDX-License-Identifier: Apache-2.0 */
#ifndef COWSHED_PRELOAD_HOOKS_EXEC_H
#define COWSHED_PRELOAD_HOOKS_EXEC_H

/* Finds the C library's own calls, and the name under which this library is preloaded. */
void exec_find(void);

#endif
