/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What becomes of a mapping that nobody will answer for any more: what is not there is SIGBUS, and no wait.
 *
 * While a successor can come, somebody holds the other end of the connection: the keeper, or systemd.  So its end says
 * that none will.
 */
#ifndef COWSHED_ORPHAN_H
#define COWSHED_ORPHAN_H

#include <stdbool.h>

/* Whether nobody has the other end of a connection any more; false for a descriptor that is none, or is closed. */
bool orphan_is(int connection_fd);

/* Has whoever waits for an answer of the userfaultfd ask again. */
void orphan_wake(int uffd);

/* Answers what is asked by now, without waiting: pages that are not there are SIGBUS from then on, pages that are may
   be written.  0, or -errno once the userfaultfd is of no use. */
int orphan_answer(int uffd);

/* One line to stderr, which nobody waits for. */
void orphan_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
