/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Looking for work for some microseconds before sleeping.
 *
 * The next piece of work often comes within microseconds, and a thread that is still awake does it without the price of
 * a wake-up. That only works if the one who gives it runs on another CPU meanwhile. So a spin that finds work earns
 * credit, and one that does not costs it; without credit few sleeps are preceded by a spin, to see whether it pays
 * again. One thread in the process spins at a time: each takes a CPU from the guests.
 */
#ifndef COWSHED_SPIN_H
#define COWSHED_SPIN_H

#include <stdbool.h>
#include <stdint.h>

/* Of one thread, or of one that serves a connection at a time. */
struct spin {
	int32_t credit;
	uint32_t nr_skipped;
};

void spin_init(struct spin *spin);
/* Whether to spin now; if so, spin_end must follow. */
bool spin_begin(struct spin *spin);
void spin_end(struct spin *spin, bool found);

#endif
