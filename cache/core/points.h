/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Named places in the core where a test can make something happen: stop there until told to go on,
 * fail with an errno, be late, or kill the process.  Unarmed, a point costs one relaxed load.
 */
#ifndef COWSHED_POINTS_H
#define COWSHED_POINTS_H

#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>

/* cdef-begin */
enum point {
	POINT_LOAD_READ,  /* a loader is about to read the source; an error is the source's */
	POINT_LOAD_SHORT, /* about to ask the source for bytes; an error: it gives some of them only, and the rest next
	                   */
	POINT_LOAD_FILL,  /* read; about to write the frames; an error is the memfd's */
	POINT_LOAD_PUBLISH,     /* frames written; extents still LOADING */
	POINT_LOAD_ANSWER,      /* extents published; nobody who waited is answered yet */
	POINT_EVICT_PUNCH,      /* extents EVICTING; frames still mapped */
	POINT_EVICT_REVOKE,     /* frames gone; grants not yet revoked */
	POINT_FAULT_READ,       /* events read, none answered */
	POINT_FAULT_HELD,       /* an extent is held, not yet mapped */
	POINT_WRITE_TAKEN,      /* pages taken from the quota, not charged yet; under write_lock */
	POINT_WRITE_CHARGED,    /* pages charged, still write-protected */
	POINT_SETTLE_PROTECTED, /* pages protected again, not yet looked at */
	POINT_TRACK_CLEARED,    /* dirty bits taken, their pages not protected yet; under write_lock */
	POINT_PRELOAD_PUSH,  /* the fault thread is about to copy seeds nobody asked for; an error keeps it from that */
	POINT_OVERLAY_OPEN,  /* the files of an overlay are open, and are about to be read */
	POINT_OVERLAY_TAKEN, /* quota is taken for a request, no byte is changed */
	POINT_OVERLAY_WRITTEN, /* an overlay has a page's bytes, and does not say so yet */
	POINT_OVERLAY_ZEROED,  /* pages hold no bytes, and are not said to be private zeros yet */
	POINT_OVERLAY_TRIMMED, /* pages are the image's again, their bytes are still there */
	POINT_OVERLAY_FLUSH,   /* what changed is known, nothing is durable yet */
	POINT_OVERLAY_SYNCED,  /* pages are durable, the map is not written */
	POINT_OVERLAY_MAPPED,  /* the map is written, and not durable */
	POINT_WAKE_EVICTOR,    /* room is short, and the evictor is about to be told; an error: it is not */
	POINT_WAKE_SERVICE,    /* a guest stopped or broke, and the daemon is about to be told; an error: it is not */
	POINT_WAKE_GUEST,      /* a fault thread is about to be woken; an error: it is not */
	POINT_WAKE_NBD, /* a connection is put in line, and a thread about to be woken for it; an error: none is */
	POINT_WAKE_NBD_ENDED, /* a connection ended, and the daemon is about to be told; an error: it is not */
	POINT_GUEST_THREAD,   /* a guest's fault thread is about to be started; an error: it cannot be */
	POINT_NR
};

enum point_action { POINT_OFF, POINT_STOP, POINT_FAIL, POINT_KILL, POINT_DELAY };

/* Arms a point for the next nr_times threads that reach it (0: every one); arg is the errno to fail with, or the
 * milliseconds to be late by.
 * Arming anew forgets what was armed before and lets go whoever was stopped there. */
int point_arm(int point, int action, int arg, uint32_t nr_times);
/* The same, for about permille in 1000 of those that reach it, as the seed has it; the others pass. */
int point_arm_some(int point, int action, int arg, uint32_t nr_times, uint32_t permille, uint64_t seed);
/* Waits until at least nr_threads have reached an armed point since it was armed; -ETIMEDOUT if not. */
int point_wait(int point, uint32_t nr_threads, int timeout_ms);
/* Disarms: everybody stopped there goes on. Never fails for a valid point. */
int point_release(int point);
/* cdef-end */

extern _Atomic int point_actions[POINT_NR];

int point_reach_armed(int point);

/* 0, or the -errno a test asked for. */
static inline int point_reach(int point)
{
	if (__builtin_expect(atomic_load_explicit(&point_actions[point], memory_order_relaxed) == POINT_OFF, 1))
		return 0;
	return point_reach_armed(point);
}

#endif
