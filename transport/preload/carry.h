/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Carries what is private in a mapping over to another, of the frames of another backend.  Only for whoever holds the
 * lock.  Functions return >= 0 or -errno.
 */
#ifndef COWSHED_PRELOAD_CARRY_H
#define COWSHED_PRELOAD_CARRY_H

#include "transport/preload/leave.h"

#define CARRY_MAX_AREAS 128

/* A part of a range that the kernel has as one mapping. */
struct area {
	uintptr_t start, end;
	int prot;
};

/* What of a range is mapped from its frames, at their place, in order: how many areas.  The program may have unmapped
   or replaced the rest by calls that nobody saw.  -E2BIG if there are more. */
int carry_areas(const struct range *range, struct area areas_out[static CARRY_MAX_AREAS]);

/* Whether anything between is mapped from such frames. */
bool carry_is_any(uintptr_t start, uintptr_t end, struct frames frames);

/* Whether this process may look at its own pages: -EACCES if it changed its user since it was executed. */
int carry_check(void);

/* From now on who writes to an area waits, until its userfaultfd is asked otherwise.  Nobody else answers for that. */
int carry_freeze(int uffd, const struct area *area);

/* Copies the private pages of an area to an address where nothing is yet, which to_uffd guards. */
int carry_private(const struct area *area, int to_uffd, uintptr_t to);

/* In a forked child: the frames of a leave, guarded, come in the place of those that a range was inherited with, whose
   private pages stay.  On failure the range is of no use. */
int carry_inherited(const struct leave *leave, struct range *range);

#endif
