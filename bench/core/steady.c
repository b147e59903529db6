/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "bench/core/steady.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#define PAGE_BYTES 4096u

static sigjmp_buf broken;

static uint64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void on_bus_error(int number)
{
	(void)number;
	siglongjmp(broken, 1);
}

uint64_t steady_note(const struct steady_order *order, struct steady_guest *guest, uint32_t *span, uint64_t before_ns,
                     uint64_t pace_ns, uint32_t failed)
{
	uint32_t now_span = __atomic_load_n(&order->span, __ATOMIC_ACQUIRE);
	uint64_t now_ns = clock_ns();
	uint64_t stall_ns = now_ns - before_ns > pace_ns ? now_ns - before_ns - pace_ns : 0;

	for (uint32_t at = *span; at <= now_span && at < STEADY_SPANS; at++)
		if (stall_ns > guest->longest_ns[at])
			__atomic_store_n(&guest->longest_ns[at], stall_ns, __ATOMIC_RELAXED);
	*span = now_span;
	if (now_span < STEADY_SPANS)
		__atomic_fetch_add(&guest->nr_in[now_span], 1, __ATOMIC_RELAXED);
	__atomic_fetch_add(&guest->nr_failed, failed, __ATOMIC_RELAXED);
	__atomic_fetch_add(&guest->nr_made, 1, __ATOMIC_RELEASE);
	return now_ns;
}

/* Returns whether the page had the bytes that this guest last wrote there, or else the image's. */
static bool touch(volatile uint64_t *word, uint64_t page, bool write, bool may_be_written)
{
	if (write)
		*word = ~page;
	uint64_t seen = *word;
	return seen == (write ? ~page : page) || (may_be_written && seen == ~page);
}

/* A separate function, so that no local variable changes between the two returns of sigsetjmp. */
static bool access_page(char *base, uint64_t page, bool write, bool may_be_written)
{
	if (sigsetjmp(broken, 1))
		return false;
	return touch((volatile uint64_t *)(base + page * PAGE_BYTES), page, write, may_be_written);
}

static void pause_until(uint64_t until_ns)
{
	struct timespec until = {(time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u)};

	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

int steady_run(char *base, const uint32_t *pages, uint64_t nr, uint64_t pace_ns, uint32_t write_every,
               uint32_t hot_pages, uint32_t kept_pages, uint64_t map_bytes, const struct steady_order *order,
               struct steady_guest *guest)
{
	struct sigaction action = {.sa_handler = on_bus_error, .sa_flags = SA_NODEFER};
	uint64_t at = kept_pages, nr_done = 0;
	uint32_t span = __atomic_load_n(&order->span, __ATOMIC_ACQUIRE);
	uint64_t before_ns = clock_ns();

	if (sigaction(SIGBUS, &action, NULL) < 0)
		return -errno;
	prctl(PR_SET_TIMERSLACK, 1ul);
	while (!__atomic_load_n(&order->stop, __ATOMIC_ACQUIRE)) {
		bool write = write_every && nr_done % write_every == 0;
		bool hot = write && hot_pages;
		uint64_t page = pages[hot ? nr_done / write_every % hot_pages : at];
		bool good = access_page(base, page, write, hot);

		before_ns = steady_note(order, guest, &span, before_ns, pace_ns, !good);
		nr_done++;
		at += !hot;
		if (at >= nr) {
			at = kept_pages;
			if (!hot_pages && madvise(base, map_bytes, MADV_DONTNEED) < 0)
				return -errno;
		}
		pause_until(before_ns + pace_ns);
	}
	return 0;
}

void steady_ready(struct steady_order *order)
{
	__atomic_fetch_add(&order->nr_ready, 1, __ATOMIC_RELEASE);
}

int steady_die_with_parent(void)
{
	return prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 ? -errno : 0;
}
