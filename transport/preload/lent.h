/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The image's source for a user who may not open it: {image} is /proc/self/fd/N, of a descriptor that the
 * backend lent.  For the kernel that name is a link to a path that this user cannot reach, and a program that resolves
 * names before it opens them (SQLite, realpath(3)) would follow it.  So the hooks present it as a plain file, and each
 * open asks the backend for a descriptor.
 *
 * The predicates are false unless the source is lent, and for a path of NULL.  They need no lock, and keep errno.
 */
#ifndef COWSHED_PRELOAD_LENT_H
#define COWSHED_PRELOAD_LENT_H

#include <stdbool.h>

/* Whether path is {image} verbatim, or that of a process that has ended: the image even to a process that has closed
   the descriptor. */
bool lent_is_image(const char *path);

/* Whether path names the link itself, in any spelling: /dev/fd/N, /proc/PID/fd/N, N in that folder. */
bool lent_is_name(int folder, const char *path);

/* Whether path resolves to the image, through any links. */
bool lent_leads(int folder, const char *path);

/* Whether path is a link of /proc to the image: its name, or the link of another descriptor. */
bool lent_is_magic(int folder, const char *path);

/* Returns a descriptor from the backend, with O_CLOEXEC if flags have it; -1 with errno. Takes the lock. */
int lent_open(int flags);

#endif
