/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one lock of the library.
 *
 * The thread that holds it is "inside": the C library's calls that it makes go straight through.  Meanwhile nothing of
 * the program's runs in that thread: signals that have a handler wait, and so does cancellation, asynchronous too.
 * Signals without a handler act at once, as they would without us: they end the process, stop it, or do nothing.
 *
 * The thread that waits for the lock holds nothing, and its signals are let in.
 */
#ifndef COWSHED_PRELOAD_LOCK_H
#define COWSHED_PRELOAD_LOCK_H

#include <signal.h>
#include <stdbool.h>

/* Not twice by one thread.  signals_out is for lock_release. */
void lock_take(sigset_t *signals_out);
void lock_release(const sigset_t *signals);
bool lock_is_inside(void);

#endif
