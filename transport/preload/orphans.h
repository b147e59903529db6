/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What becomes of this program's guest mappings when their backend is gone for good: SIGBUS for whoever touches what is
 * not there, and one line (transport/core/guest/orphan.h).  And when it says that the guest is elsewhere now: moves.h.
 */
#ifndef COWSHED_PRELOAD_ORPHANS_H
#define COWSHED_PRELOAD_ORPHANS_H

/* Watches what the table has; to be called when its links have changed, by whoever holds the lock. */
void orphans_look(void);

/* This process owns what is in its table from now on: at its start, and in a copy that begins with an empty one. */
void orphans_begin(void);

/* In a copy of the process, where the thread is not, before anything else is done there. */
void orphans_forget(void);

/* A link that is about to be closed on purpose: its end says nothing of the backend. Watched again by orphans_look. */
void orphans_let_go(unsigned link_no);

/* For a move, by the thread: nobody answers for a link's ranges any more, until another has taken them on. */
void orphans_leave(unsigned link_no);
void orphans_take_on(unsigned link_no);

#endif
