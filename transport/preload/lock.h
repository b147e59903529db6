/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one lock of the library.
 *
 * The thread that holds it is "inside": its calls of the C library bypass the hooks.  No program code runs in that
 * thread meanwhile: signals with a handler are blocked, and deferred cancellation waits.  Asynchronous cancellation,
 * which POSIX does not allow in mmap, may leave the lock held.  Signals without a handler act at once, as they would
 * without us: they end or stop the process, or do nothing.
 *
 * A thread that waits for the lock holds nothing, and takes signals.  A holder that waits for the backend releases
 * everything when a handler is due, and starts over after that.
 */
#ifndef COWSHED_PRELOAD_LOCK_H
#define COWSHED_PRELOAD_LOCK_H

#include <signal.h>
#include <stdbool.h>

/* Takes the lock; not recursive.  signals_out is for lock_release. */
void lock_take(sigset_t *signals_out);
void lock_release(const sigset_t *signals);
bool lock_is_inside(void);

/* For the library's own thread, which blocks all signals: takes the lock without waiting.  False if it is taken. */
bool lock_try(sigset_t *signals_out);

/* Frees the lock in a copy of the process, whose one thread does not hold it. */
void lock_renew(void);

/* The holder must call this after each moment of waiting for the backend.  0: wait on.  -EINTR: a signal handler of the
   program is due; undo what is half done, lock_yield, start over.  -ETIMEDOUT: this call has waited limit_seconds. */
int lock_wait(unsigned limit_seconds);

/* Releases the lock so that due handlers run, and takes it again: everything may have changed. */
void lock_yield(sigset_t *signals);

/* Makes handlers wait until the lock is released or yielded: for a step that cannot be undone half way. */
void lock_insist(void);

/* While on, lock_wait never times out: for a step that only the backend can complete. */
void lock_be_patient(bool on);

#endif
