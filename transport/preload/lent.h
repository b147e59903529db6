/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The image's source for a user who may not open it: {image} is /proc/self/fd/N, of a descriptor that the
 * backend lent.  To the kernel that name is a link to a path at which this user finds nothing, and a
 * program that resolves names before it opens them (SQLite, realpath(3)) would be led there.  So to the program it
 * is a file, with a name that leads nowhere else, and each open of it asks the backend.
 *
 * All of it is false unless the source is lent, and of no path (NULL).  Needs no lock; keeps errno where it
 * says no otherwise.
 */
#ifndef COWSHED_PRELOAD_LENT_H
#define COWSHED_PRELOAD_LENT_H

#include <stdbool.h>

/* Whether this is {image}, word for word, or that of a process that has ended: the image even to a process that has
   closed the descriptor. */
bool lent_is_image(const char *path);

/* Whether this names the link itself, in whatever words: /dev/fd/N, /proc/PID/fd/N, N in that folder. */
bool lent_is_name(int folder, const char *path);

/* Whether this leads to the image, whatever links are on the way. */
bool lent_leads(int folder, const char *path);

/* A link of /proc to the image: one that other descriptors of it have, or the one that is its name. */
bool lent_is_magic(int folder, const char *path);

/* A descriptor from the backend, with O_CLOEXEC if flags have it; -1 with errno. */
int lent_open(int flags);

#endif
