/* SPDX-License-Identifier: Apache-2.0 */
/* A child of fork(3) has its parent's mappings of the image, as of the fork, and guards them itself. */
#ifndef COWSHED_PRELOAD_FORKS_H
#define COWSHED_PRELOAD_FORKS_H

/* Handles every fork of this process and of its children from now on. */
void forks_watch(void);

#endif
