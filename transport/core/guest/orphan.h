/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Faults of a mapping whose backend is gone for good: touching an absent page is SIGBUS, and no thread waits for it.
 *
 * While a successor can come, the keeper or systemd holds the other end of the connection.  So the connection's end
 * proves that no successor will.
 */
#ifndef COWSHED_ORPHAN_H
#define COWSHED_ORPHAN_H

#include <stdbool.h>

/* Whether every descriptor of the connection's other end is closed; false if connection_fd is no open descriptor. */
bool orphan_is(int connection_fd);

/* Wakes every pending fault of the userfaultfd; the kernel raises each again. */
void orphan_wake(int uffd);

/* Answers the faults that are pending now, without waiting: absent pages become SIGBUS, present ones writable.
   0, or -errno if the userfaultfd cannot be read any more. */
int orphan_answer(int uffd);

/* Writes one line to stderr without waiting; a full pipe loses it. */
void orphan_report(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
