/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Carries the private pages of a mapping over to a mapping of another backend's frames.  The caller must hold the lock.
 * Functions return >= 0 or -errno.
 */
#ifndef COWSHED_PRELOAD_CARRY_H
#define COWSHED_PRELOAD_CARRY_H

#include "transport/preload/leave.h"

#define CARRY_MAX_AREAS 128

/* A part of a range that is one mapping of the kernel's. */
struct area {
	uintptr_t start, end;
	int prot;
};

/* Finds the areas of a range that still map its frames at their offsets, in order; returns how many, or -E2BIG if there
   are more.  The program may have unmapped or replaced the rest by calls that no hook saw. */
int carry_areas(const struct range *range, struct area areas_out[static CARRY_MAX_AREAS]);

/* Whether anything from start to end is mapped from these frames. */
bool carry_is_any(uintptr_t start, uintptr_t end, struct frames frames);

/* 0 if this process may read its own page tables and memory; -EACCES if it changed its user since exec. */
int carry_check(void);

/* Write-protects the mapped pages of an area: writers wait until its userfaultfd lifts that.  No backend may serve it
   any more. */
int carry_freeze(int uffd, const struct area *area);

/* Copies the private pages of an area to an address that to_uffd guards, and where no page is yet. */
int carry_private(const struct area *area, int to_uffd, uintptr_t to);

/* In a forked child: replaces the frames that a range was inherited with by those of leave, guarded, and keeps its
   private pages.  On failure the range is unusable. */
int carry_inherited(const struct leave *leave, struct range *range);

#endif
