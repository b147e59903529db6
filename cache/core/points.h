/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Named places in the core where a test can stop a thread until released, fail with an errno, add a delay, or kill the
 * process. Unarmed, a point costs one relaxed load.
 */
#ifndef COWSHED_POINTS_H
#define COWSHED_POINTS_H

#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>

/* cdef-begin */
enum point {
	POINT_LOAD_READ,        /* a loader is about to read the source; an error counts as the source's */
	POINT_LOAD_SHORT,       /* about to read bytes of the source; an error makes the read short */
	POINT_LOAD_FILL,        /* source read; about to write the frames; an error counts as the memfd's */
	POINT_LOAD_PUBLISH,     /* frames written; extents still LOADING */
	POINT_LOAD_ANSWER,      /* extents published; no waiter answered yet */
	POINT_FETCH_TAKEN,      /* a fetch is taken, with room; the thread does not have it yet */
	POINT_FETCH_FILL,       /* bytes of extents are given, none of them in the frames; an error fails the extents */
	POINT_EVICT_PUNCH,      /* extents EVICTING; frames still mapped */
	POINT_PUNCHED,          /* frames are punched, nothing says yet that they are no huge page */
	POINT_EVICT_REVOKE,     /* frames gone; grants not yet revoked */
	POINT_STANDBY_FILL,     /* an extent EVICTING, about to be copied to the standby list; an error drops it */
	POINT_STANDBY_READ,     /* about to copy bytes back; an error makes the loader read the source instead */
	POINT_COLLAPSE,         /* about to collapse the frames of a region; an error counts as the kernel's */
	POINT_COLLAPSED,        /* the frames of a region are one huge page, and still lent */
	POINT_DISSOLVE,         /* a region's frames are read, and about to be punched and written again */
	POINT_OPEN_CHARGED,     /* a region's pages are reserved, it is guarded as before; under write_lock */
	POINT_OPEN_BARE,        /* a region is unregistered, and not registered anew; under write_lock */
	POINT_OPEN_DONE,        /* a region is open, not yet checked; under write_lock */
	POINT_CLOSE_GUARDED,    /* a region is registered for all faults, not protected yet; under write_lock */
	POINT_CLOSE_PROTECTED,  /* a region is protected, its reserved pages still charged; under write_lock */
	POINT_FAULT_READ,       /* events read, none answered */
	POINT_FAULT_HELD,       /* an extent is held, not yet mapped */
	POINT_FRAMES_READ,      /* about to copy frames for a populated guest; an error counts as the memfd's */
	POINT_WRITE_TAKEN,      /* pages taken from the quota, not charged yet; under write_lock */
	POINT_WRITE_CHARGED,    /* pages charged, still write-protected */
	POINT_SETTLE_PROTECTED, /* pages protected again, not yet looked at */
	POINT_TRACK_CLEARED,    /* dirty bits taken, their pages not protected yet; under write_lock */
	POINT_PRELOAD_PUSH,     /* the fault thread is about to copy preloaded pages ahead; an error prevents it */
	POINT_OVERLAY_OPEN,     /* an overlay's files are open, about to be read */
	POINT_OVERLAY_TAKEN,    /* quota is taken for a request, no byte changed */
	POINT_OVERLAY_WRITTEN,  /* a page's bytes are stored, its bit not changed yet */
	POINT_OVERLAY_ZEROED,   /* pages are punched, their private bits not set yet */
	POINT_OVERLAY_TRIMMED,  /* private bits are cleared, the bytes still there */
	POINT_OVERLAY_FLUSH,    /* changed bits are copied, nothing is durable yet */
	POINT_OVERLAY_SYNCED,   /* pages are durable, the map is not written */
	POINT_OVERLAY_MAPPED,   /* the map is written, and not durable */
	POINT_WAKE_EVICTOR,     /* room is short; about to wake the evictor; an error prevents it */
	POINT_WAKE_SERVICE,     /* a guest stopped or broke; about to wake the service; an error prevents it */
	POINT_WAKE_GUEST,       /* about to wake a fault thread; an error prevents it */
	POINT_WAKE_NBD,         /* a connection is queued; about to wake a thread for it; an error prevents it */
	POINT_WAKE_NBD_ENDED,   /* a connection ended; about to wake the service; an error prevents it */
	POINT_GUEST_THREAD,     /* about to start a guest's fault thread; an error makes that fail */
	POINT_NR
};

enum point_action { POINT_OFF, POINT_STOP, POINT_FAIL, POINT_KILL, POINT_DELAY };

/* Arms a point for the next nr_times threads that reach it (0: every one); arg is the errno to fail with, or the delay
 * in milliseconds. Arming again replaces the earlier action and releases threads stopped there. */
int point_arm(int point, int action, int arg, uint32_t nr_times);
/* The same, for about permille in 1000 of the threads that reach it, chosen from seed; the others pass. */
int point_arm_some(int point, int action, int arg, uint32_t nr_times, uint32_t permille, uint64_t seed);
/* Waits until at least nr_threads have reached an armed point since it was armed; -ETIMEDOUT if not. */
int point_wait(int point, uint32_t nr_threads, int timeout_ms);
/* Disarms the point and releases threads stopped there. Never fails for a valid point. */
int point_release(int point);
/* cdef-end */

extern _Atomic int point_actions[POINT_NR];

int point_reach_armed(int point);

/* Returns 0, or the -errno that a test armed the point with. */
static inline int point_reach(int point)
{
	if (__builtin_expect(atomic_load_explicit(&point_actions[point], memory_order_relaxed) == POINT_OFF, 1))
		return 0;
	return point_reach_armed(point);
}

#endif
