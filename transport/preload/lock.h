/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one lock of the library.
 *
 * The thread that holds it is "inside": the C library's calls that it makes go straight through.  Meanwhile nothing of
 * the program's runs in that thread: signals that have a handler wait, and so does cancellation, where the thread may
 * be cancelled in mmap at all: POSIX allows that of a deferred cancellation only, and an asynchronous one may leave the
 * lock. Signals without a handler act at once, as they would without us: they end the process, stop it, or do nothing.
 *
 * The thread that waits for the lock holds nothing, and its signals are let in.  The holder that waits for the backend
 * lets go of everything when a handler is due, and begins again after that.
 */
#ifndef COWSHED_PRELOAD_LOCK_H
#define COWSHED_PRELOAD_LOCK_H

#include <signal.h>
#include <stdbool.h>

/* Not twice by one thread.  signals_out is for lock_release. */
void lock_take(sigset_t *signals_out);
void lock_release(const sigset_t *signals);
bool lock_is_inside(void);

/* For a thread of ours, which lets no signals in: without waiting.  False if somebody has it. */
bool lock_try(sigset_t *signals_out);

/* In a copy of the process, which has one thread: nobody holds it. */
void lock_renew(void);

/* For the holder, each time that the backend has kept it waiting for a moment.  0: wait on.  -EINTR: a handler of the
   program's is due; undo what is half done, lock_yield, begin again.  -ETIMEDOUT: waited for so long in this call. */
int lock_wait(unsigned limit_seconds);

/* Runs the handlers that are due, without the lock, and takes it again: everything may have changed. */
void lock_yield(sigset_t *signals);

/* Until the lock is released or yielded handlers wait: what is half done cannot be undone. */
void lock_insist(void);

/* While this is on, lock_wait never gives up: for a step after which nobody but the backend can go on. */
void lock_be_patient(bool on);

#endif
