/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A futex and not a mutex of the C library: that one waits with the caller's signals either blocked, so that nothing
 * ends a program whose other thread waits for the backend, or let in for an instant too long, so that a handler runs
 * with the lock held and may leave by siglongjmp.
 */
#define _GNU_SOURCE
#include "transport/preload/lock.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

enum lock_state { FREE = 0, TAKEN = 1, AWAITED = 2 };
static _Atomic int lock_state;

/* initial-exec: dynamic TLS would allocate at first use. */
#define OF_THREAD __thread __attribute__((tls_model("initial-exec")))
static OF_THREAD bool is_inside;

struct cancellation {
	int state, type;
};

/* Of the holder: guarded by the lock. */
static struct cancellation cancellation_before;

/* The kernel's struct sigaction begins with the handler.  By a bare call, since programs put functions of their own
   before the C library's. */
static bool has_handler(int number)
{
	union {
		void (*handler)(int);
		char room[64];
	} action = {.handler = SIG_DFL};

	if (syscall(SYS_rt_sigaction, number, NULL, &action, (size_t)_NSIG / 8) < 0)
		return false;
	return action.handler != SIG_DFL && action.handler != SIG_IGN;
}

/* pthread_sigmask leaves the two signals of the C library itself alone. */
static void hold_signals_back(sigset_t *before_out)
{
	sigset_t held;

	sigemptyset(&held);
	for (int number = 1; number < _NSIG; number++)
		if (has_handler(number))
			sigaddset(&held, number);
	pthread_sigmask(SIG_BLOCK, &held, before_out);
}

/* Nothing is held meanwhile: a handler may leave by siglongjmp, and the thread may be cancelled. */
static void await(void)
{
	int expected = TAKEN;

	if (atomic_compare_exchange_strong(&lock_state, &expected, AWAITED) || expected == AWAITED)
		syscall(SYS_futex, &lock_state, FUTEX_WAIT_PRIVATE, AWAITED, NULL, NULL, 0);
}

static void hold_cancellation_back(struct cancellation *before_out)
{
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before_out->state);
	pthread_setcanceltype(PTHREAD_CANCEL_DEFERRED, &before_out->type);
}

static void let_in(const sigset_t *signals, struct cancellation cancellation)
{
	/* The state first: a cancellation that acts in pthread_setcancelstate gives pthread_join the wrong result
	   (glibc 2.36). The signals last: a handler may leave by siglongjmp. */
	pthread_setcancelstate(cancellation.state, NULL);
	pthread_setcanceltype(cancellation.type, NULL);
	pthread_sigmask(SIG_SETMASK, signals, NULL);
}

void lock_take(sigset_t *signals_out)
{
	int state = TAKEN;

	for (;;) {
		struct cancellation cancellation;
		int expected = FREE;

		hold_signals_back(signals_out);
		hold_cancellation_back(&cancellation);
		if (atomic_compare_exchange_strong(&lock_state, &expected, state)) {
			cancellation_before = cancellation;
			is_inside = true;
			return;
		}
		let_in(signals_out, cancellation);
		await();
		/* Others may be waiting too. */
		state = AWAITED;
	}
}

void lock_release(const sigset_t *signals)
{
	struct cancellation cancellation = cancellation_before;

	is_inside = false;
	/* All of them: the one that is woken may run a handler first, which never comes back. */
	if (atomic_exchange(&lock_state, FREE) == AWAITED)
		syscall(SYS_futex, &lock_state, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
	let_in(signals, cancellation);
}

bool lock_is_inside(void)
{
	return is_inside;
}
