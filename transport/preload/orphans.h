/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Watches this program's guest mappings for the end of their backend: once it is gone for good, absent pages are
 * SIGBUS, and one line is reported (transport/core/guest/orphan.h).  Also for the event that the guest moved: moves.h.
 */
#ifndef COWSHED_PRELOAD_ORPHANS_H
#define COWSHED_PRELOAD_ORPHANS_H

#include <stdbool.h>

#include "transport/core/guest/json.h"

/* Watches the table's links.  The holder of the lock must call this when links have changed. */
void orphans_look(void);

/* Makes this process watch its table from now on: at its start, and in a copy that begins with an empty table. */
void orphans_begin(void);

/* Must be the first call in a copy of the process, where the thread does not exist. */
void orphans_forget(void);

/* Stops watching a link that is about to be closed on purpose. orphans_look watches it again. */
void orphans_let_go(unsigned link_no);

/* Before and after a caller asks something over a link's connection: the thread does not read it meanwhile. */
void orphans_ask(unsigned link_no, bool on);
/* An event that such a caller received. */
void orphans_hear(unsigned link_no, struct json event);

/* For a move, by the thread: no backend serves a link's ranges any more, until orphans_take_on. */
void orphans_leave(unsigned link_no);
void orphans_take_on(unsigned link_no);

#endif
