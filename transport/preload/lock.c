/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The library's lock is a futex, not a pthread mutex.  A mutex would wait either with signals blocked, so that no
 * handler could end a program whose other thread waits for the backend, or with signals open for an instant too long,
 * so that a handler could run with the lock held and leave by siglongjmp.
 *
 * lock_wait interrupts a waiting holder at once for the first handler.  After that the intervals without interruption
 * double, so that a call makes progress with a slow backend however often a timer's signal comes.
 */
#define _GNU_SOURCE
#include "transport/preload/lock.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SECOND_NS ((int64_t)1000000000)
#define FIRST_DEAF_NS (SECOND_NS / 10)

enum lock_state { FREE = 0, TAKEN = 1, AWAITED = 2 };
static _Atomic int lock_state;

/* initial-exec: dynamic TLS would allocate at first use. */
#define OF_THREAD __thread __attribute__((tls_model("initial-exec")))
static OF_THREAD bool is_inside;

struct cancellation {
	int state, type;
};

/* The holder's; guarded by the lock. */
static struct cancellation cancellation_before;
static sigset_t blocked;

/* State of one call of the program, in the thread that makes it. */
struct patience {
	int64_t since_ns; /* when it first waited; 0: it has not */
	int64_t deaf_until_ns, deaf_ns;
	bool insists, has_no_end;
};
static OF_THREAD struct patience patience;

/* The kernel's struct sigaction begins with the handler.  A bare system call, since programs may interpose the C
   library's sigaction. */
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

/* pthread_sigmask never blocks the C library's two internal signals. */
static void block_signals(sigset_t *blocked_out, sigset_t *before_out)
{
	sigemptyset(blocked_out);
	for (int number = 1; number < _NSIG; number++)
		if (has_handler(number))
			sigaddset(blocked_out, number);
	pthread_sigmask(SIG_BLOCK, blocked_out, before_out);
	for (int number = 1; number < _NSIG; number++)
		if (sigismember(before_out, number))
			sigdelset(blocked_out, number);
}

/* The thread must hold nothing here: a handler may leave by siglongjmp, and the thread may be cancelled. */
static void await(void)
{
	int expected = TAKEN;

	if (atomic_compare_exchange_strong(&lock_state, &expected, AWAITED) || expected == AWAITED)
		syscall(SYS_futex, &lock_state, FUTEX_WAIT_PRIVATE, AWAITED, NULL, NULL, 0);
}

static void disable_cancellation(struct cancellation *before_out)
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
		sigset_t blocked_here;

		block_signals(&blocked_here, signals_out);
		disable_cancellation(&cancellation);
		if (atomic_compare_exchange_strong(&lock_state, &expected, state)) {
			cancellation_before = cancellation;
			blocked = blocked_here;
			patience = (struct patience){0};
			is_inside = true;
			return;
		}
		let_in(signals_out, cancellation);
		await();
		/* Others may be waiting too. */
		state = AWAITED;
	}
}

bool lock_try(sigset_t *signals_out)
{
	int expected = FREE;

	pthread_sigmask(SIG_BLOCK, NULL, signals_out);
	if (!atomic_compare_exchange_strong(&lock_state, &expected, TAKEN))
		return false;
	disable_cancellation(&cancellation_before);
	sigemptyset(&blocked);
	patience = (struct patience){.insists = true};
	is_inside = true;
	return true;
}

void lock_release(const sigset_t *signals)
{
	struct cancellation cancellation = cancellation_before;

	is_inside = false;
	/* Wake all waiters: a single one might first run a handler that never returns. */
	if (atomic_exchange(&lock_state, FREE) == AWAITED)
		syscall(SYS_futex, &lock_state, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
	let_in(signals, cancellation);
}

bool lock_is_inside(void)
{
	return is_inside;
}

void lock_renew(void)
{
	atomic_store(&lock_state, FREE);
}

static bool is_handler_due(void)
{
	sigset_t pending;

	sigpending(&pending);
	for (int number = 1; number < _NSIG; number++)
		if (sigismember(&pending, number) && sigismember(&blocked, number))
			return true;
	return false;
}

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * SECOND_NS + now.tv_nsec;
}

int lock_wait(unsigned limit_seconds)
{
	int64_t now = now_ns();

	if (patience.since_ns == 0)
		patience.since_ns = now;
	if (!patience.has_no_end && now - patience.since_ns >= limit_seconds * SECOND_NS)
		return -ETIMEDOUT;
	return !patience.insists && now >= patience.deaf_until_ns && is_handler_due() ? -EINTR : 0;
}

void lock_yield(sigset_t *signals)
{
	struct patience before = patience;

	lock_release(signals);
	lock_take(signals);
	patience = before;
	patience.insists = false;
	patience.deaf_ns = before.deaf_ns ? 2 * before.deaf_ns : FIRST_DEAF_NS;
	patience.deaf_until_ns = now_ns() + patience.deaf_ns;
}

void lock_insist(void)
{
	patience.insists = true;
}

void lock_be_patient(bool on)
{
	patience.has_no_end = on;
}
