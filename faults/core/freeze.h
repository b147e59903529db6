/* SPDX-License-Identifier: Apache-2.0 */
/* The fault thread's part of a freeze (freeze.c). */
#ifndef COWSHED_FREEZE_H
#define COWSHED_FREEZE_H

#include "faults/core/guest.h"

/* Between two batches of messages: whether discards are held back. */
bool pause_turn(struct guest *guest);
/* Reads one fault, and never an event; -EAGAIN if there is none. */
ssize_t pause_read(struct guest *guest, struct uffd_msg *message);
void pause_sleep(struct guest *guest);

#endif
