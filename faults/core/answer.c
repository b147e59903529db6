/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Missing and minor faults.
 *
 * The order is: hold the extent, grant it, map it, release it. The hold keeps an eviction out, so the frames are there
 * while they are mapped and a grant is never made on an extent that is being evicted. An extent that is not resident is
 * requested from the store, and a loader answers in the fault thread's place.
 */
#include "faults/core/answer.h"

#include "accounting/core/open_regions.h"
#include "accounting/core/settle.h"
#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "cache/core/store.h"
#include "faults/core/guest.h"
#include "faults/core/preload.h"
#include "faults/core/uffd.h"
#include "faults/core/write.h"

#include <stdlib.h>

#define RETRY_AFTER_NS 1000000u
#define AHEAD_STEP_PAGES 512
#define SKIPS_HERE 16           /* mapped pages passed over in the faulting extent */
#define FOLLOW_BYTES (1u << 20) /* resident extents mapped along when a load is answered */

struct miss {
	struct load_waiter waiter;
	struct guest *guest;
	uint64_t page;
	uint64_t read_ns;
	bool minor;
};

void answer_failed(struct guest *guest, int err)
{
	struct ledger_header *header = guest->account->header;

	if (err >= 0 || err == -EEXIST || err == -ENOENT || err == -EDQUOT || err == -EBUSY)
		return;
	if (err == -EAGAIN) {
		count_add(COUNTER(header, retries), 1);
		guest->retry_at_ns = clock_now_ns() + RETRY_AFTER_NS;
		return;
	}
	atomic_store(&header->broken, err);
	store_raise_at(POINT_WAKE_SERVICE, guest->image->store->notice_fd);
}

/* The kernel refuses a range across a split mapping (ENOENT): then map at least the faulting page. */
static int map_span(struct guest *guest, const struct account_span *span, uint64_t fault_page, uint32_t max_skips)
{
	struct ledger_header *header = guest->account->header;
	uint64_t mapped;
	int err = uffd_continue(guest->uffd, span->address, span->nr_pages << PAGE_SHIFT, max_skips, &mapped);

	count_add(COUNTER(header, mapped_pages), mapped >> PAGE_SHIFT);
	if (err == -ENOENT && span->nr_pages > 1 && fault_page - span->page < span->nr_pages) {
		uint64_t address = span->address + ((fault_page - span->page) << PAGE_SHIFT);

		err = uffd_continue(guest->uffd, address, PAGE_BYTES, 0, &mapped);
		count_add(COUNTER(header, mapped_pages), mapped >> PAGE_SHIFT);
	}
	return err;
}

/* Skips preloaded pages, which are never mapped from the image: cuts the span off before the first one, or moves it
 * behind them; false if no page is left to map. */
static bool pass_preloaded(const struct account *account, struct account_span *span)
{
	uint64_t end = span->page + span->nr_pages;
	uint64_t first = bits_next_clear(account->preloaded, span->page, end);

	span->address += (first - span->page) << PAGE_SHIFT;
	span->page = first;
	span->nr_pages = bits_next(account->preloaded, first, end) - first;
	return first < end;
}

/* Likewise skips open regions, where the kernel maps pages by itself. */
static bool pass_open(const struct account *account, struct account_span *span)
{
	uint64_t end = span->page + span->nr_pages, first = span->page;

	while (first < end && account_is_open(account, first))
		first = (first / OPEN_PAGES + 1) * OPEN_PAGES;
	first = first < end ? first : end;
	uint64_t closed_end = first;
	while (closed_end < end && !account_is_open(account, closed_end))
		closed_end = (closed_end / OPEN_PAGES + 1) * OPEN_PAGES;
	span->address += (first - span->page) << PAGE_SHIFT;
	span->page = first;
	span->nr_pages = (closed_end < end ? closed_end : end) - first;
	return first < end;
}

static bool has_open(const struct account *account, const struct account_span *span)
{
	uint64_t end = span->page + span->nr_pages;

	for (uint64_t page = span->page; page < end; page = (page / OPEN_PAGES + 1) * OPEN_PAGES)
		if (account_is_open(account, page))
			return true;
	return false;
}

/* Maps a run of pages, whose extents the caller holds, in the regions that have them. Returns the error of the part
 * with fault_page, else the first error. */
static int map_run(struct guest *guest, uint64_t first, uint64_t nr, uint64_t fault_page, uint32_t max_skips)
{
	struct account_span span;
	uint64_t end = first + nr;
	int err = 0;

	for (; account_span(guest->account, first, end, &span); first = span.page + span.nr_pages) {
		if (atomic_load(&guest->account->header->preloaded_pages) && !pass_preloaded(guest->account, &span))
			continue;
		if (atomic_load_explicit(&guest->account->nr_open, memory_order_relaxed) &&
		    !pass_open(guest->account, &span))
			continue;
		int span_err = map_span(guest, &span, fault_page, max_skips);

		/* A region was opened meanwhile: its pages cannot be mapped protected, and need not be. */
		if (span_err == -EINVAL && has_open(guest->account, &span)) {
			answer_wake(guest, span.page, span.nr_pages);
			span_err = 0;
		}

		if (span_err && (!err || fault_page - span.page < span.nr_pages))
			err = span_err;
	}
	return err;
}

void answer_in_open(struct guest *guest, uint64_t page, uint64_t flags)
{
	bool missing = !(flags & (UFFD_PAGEFAULT_FLAG_MINOR | UFFD_PAGEFAULT_FLAG_WP));
	int err = account_fault_in_open(guest->account, page, missing);

	answer_wake(guest, page, 1);
	answer_failed(guest, err);
}

void answer_wake(struct guest *guest, uint64_t first, uint64_t nr)
{
	struct account_span span;
	uint64_t end = first + nr;

	for (; account_span(guest->account, first, end, &span); first = span.page + span.nr_pages)
		uffd_wake(guest->uffd, span.address, span.nr_pages << PAGE_SHIFT);
}

/* Holds, grants and maps the resident, ungranted extents of [first, first + nr), in runs. */
static int map_extents(struct guest *guest, uint64_t first, uint64_t nr)
{
	struct image *image = guest->image;
	uint64_t end = first + nr;
	int err = 0;

	for (uint64_t extent = first; extent < end && !err;) {
		uint64_t run = 0;

		while (extent + run < end && !bits_test(guest->account->granted, extent + run) &&
		       extent_hold(&image->states[extent + run])) {
			account_grant(guest->account, extent + run);
			run++;
		}
		if (run) {
			uint64_t page = extent * image->shape.extent_pages;
			uint64_t last = extent + run - 1;
			uint64_t nr_pages = last * image->shape.extent_pages + image_extent_pages(image, last) - page;

			/* A page that is mapped already ends the run: pages behind it fault if they are touched. */
			err = map_run(guest, page, nr_pages, page, 1);
			if (err == -EEXIST)
				err = 0;
		}
		for (uint64_t i = 0; i < run; i++)
			extent_release(&image->states[extent + i]);
		extent += run ? run : 1;
	}
	return err;
}

bool answer_ahead(struct guest *guest)
{
	uint64_t step = AHEAD_STEP_PAGES / guest->image->shape.extent_pages;

	if (!guest->nr_ahead)
		return false;
	step = step ? step : 1;
	step = step < guest->nr_ahead ? step : guest->nr_ahead;
	answer_failed(guest, map_extents(guest, guest->ahead_extent, step));
	guest->ahead_extent += step;
	guest->nr_ahead -= step;
	return true;
}

/*
 * Maps, in one call, from page to the end of its extent and of the resident, ungranted extents that follow it, up to
 * last_extent: a guest that walks faster than we map sleeps once, not once an extent. The caller holds page's extent.
 * *next_out is the first extent that was not reached.
 */
static int map_forward(struct guest *guest, uint64_t page, uint64_t last_extent, uint64_t end_page, uint64_t *next_out)
{
	struct image *image = guest->image;
	uint64_t extent = page / image->shape.extent_pages;
	uint64_t next = extent + 1;

	while (next <= last_extent && !bits_test(guest->account->granted, next) && extent_hold(&image->states[next]))
		account_grant(guest->account, next++);
	uint64_t end = (next - 1) * image->shape.extent_pages + image_extent_pages(image, next - 1);
	int err = map_run(guest, page, (end < end_page ? end : end_page) - page, page, SKIPS_HERE);
	*next_out = next;
	while (--next > extent)
		extent_release(&image->states[next]);
	return err == -EEXIST ? 0 : err;
}

/* Maps the faulting page first, and opens it at once for a write, so that the guest goes on while the rest is
 * mapped. */
static int map_window(struct guest *guest, uint64_t page, const struct window_plan *plan, bool write)
{
	uint64_t extent_pages = guest->image->shape.extent_pages;
	uint64_t extent = page / extent_pages;
	uint64_t end = plan->first_page + plan->nr_pages;
	uint64_t here = extent * extent_pages;
	uint64_t first = plan->first_page > here ? plan->first_page : here;
	uint64_t last_extent = (end - 1) / extent_pages;
	uint64_t next;
	int err = map_forward(guest, page, last_extent, end, &next);

	if (!err && write)
		answer_open(guest, page);
	if (!err && first < page)
		err = map_run(guest, first, page - first, page, SKIPS_HERE);
	if ((!err || err == -EEXIST) && next <= last_extent)
		err = map_extents(guest, next, last_extent + 1 - next);
	if ((!err || err == -EEXIST) && plan->first_page < here)
		err = map_extents(guest, plan->first_page / extent_pages, extent - plan->first_page / extent_pages);
	return err;
}

int answer_poison(struct guest *guest, uint64_t page)
{
	struct account *account = guest->account;
	uint64_t address = account_address(account, page);
	uint8_t look = PAGE_LOOK_PRIVATE;

	if (!address)
		return -ENOENT;
	if (account_is_open(account, page)) /* it was loaded since, and is there */
		return 0;
	if (account->pagemap_fd >= 0)
		account_look(account, page, 1, &look);
	/* Mark it before poisoning it: a good load that ends between the two would not look for it. */
	bool fresh = bits_set(account->poisoned, page);
	if (fresh)
		atomic_fetch_add(&guest->image->nr_poisoned, 1);
	int err = uffd_poison_page(guest->uffd, address, look == PAGE_LOOK_ABSENT);
	if (!err && fresh)
		count_add(COUNTER(account->header, poisoned_pages), 1);
	if (err && fresh && bits_clear(account->poisoned, page))
		atomic_fetch_sub(&guest->image->nr_poisoned, 1);
	return err;
}

/* In a loader thread: the extent is held (status 0) or its source failed. */
static void answer_loaded(struct load_waiter *waiter, int status)
{
	struct miss *miss = (struct miss *)waiter;
	struct guest *guest = miss->guest;
	struct image *image = guest->image;
	uint64_t extent = waiter->extent;
	uint64_t first = extent * image->shape.extent_pages;
	uint64_t nr_pages = image_extent_pages(image, extent);
	uint64_t fixed = atomic_load(&guest->window_pages);

	pthread_mutex_lock(&guest->answer_lock);
	if (!guest->stopped) {
		struct ledger_header *header = guest->account->header;

		/* From here on a new fault on the extent waits by itself; those read before are answered below. */
		bits_clear(guest->waiting, extent);
		if (status == 0) {
			account_grant(guest->account, extent);
			int err = map_run(guest, first, nr_pages, miss->page, (uint32_t)nr_pages);

			if (!err && !fixed) {
				uint64_t nr_follow = FOLLOW_BYTES / PAGE_BYTES / image->shape.extent_pages;
				uint64_t nr_left = image->shape.nr_extents - extent - 1;

				map_extents(guest, extent + 1, nr_follow < nr_left ? nr_follow : nr_left);
			}
		} else {
			pthread_mutex_lock(&guest->account->write_lock);
			answer_poison(guest, miss->page);
			pthread_mutex_unlock(&guest->account->write_lock);
		}
		/* Wake faults on other pages of the extent, and those that met an error above. */
		answer_wake(guest, first, nr_pages);
		count_access(header, miss->minor, waited_outcome(status, waiter->restored));
		account_note_latency(guest->account, waiter->restored ? LATENCY_HIT : LATENCY_MISS,
		                     clock_now_ns() - miss->read_ns);
	}
	pthread_mutex_unlock(&guest->answer_lock);
	free(miss);
	guest_put(guest);
}

/* Queues the guest as a waiter for the extent; true if it turned out to be resident meanwhile. */
static bool want_extent(struct guest *guest, uint64_t extent, uint64_t page, bool minor, uint64_t read_ns)
{
	struct ledger_header *header = guest->account->header;
	struct miss *miss;
	int resident;

	if (!bits_set(guest->waiting, extent)) {
		/* The guest waits already, and the answer covers the whole extent. If the load fails, this page faults
		 * again, and that fault counts as failed. */
		count_add(COUNTER(header, misses), 1);
		count_access(header, minor, FAULT_LOADED);
		return false;
	}
	miss = malloc(sizeof *miss);
	if (miss) {
		*miss = (struct miss){
			.waiter = {.answer = answer_loaded},
			.guest = guest,
			.page = page,
			.read_ns = read_ns,
			.minor = minor,
		};
		atomic_fetch_add(&guest->nr_users, 1);
		resident = store_want(guest->image, extent, &miss->waiter);
		if (resident == 0) {
			count_add(COUNTER(header, misses), 1);
			return false;
		}
		atomic_fetch_sub(&guest->nr_users, 1);
		free(miss);
	} else {
		resident = -ENOMEM;
	}
	bits_clear(guest->waiting, extent);
	if (resident < 0)
		answer_failed(guest, -EAGAIN);
	return resident == 1;
}

/* A fault on a page that is private in the ledger: checks the page table. True if the fault is answered. */
static bool answer_private(struct guest *guest, uint64_t page)
{
	struct account *account = guest->account;

	if (!bits_test(account->private, page))
		return false;
	pthread_mutex_lock(&account->write_lock);
	bool private = account_page_is_private(account, page);
	pthread_mutex_unlock(&account->write_lock);
	/* The report is old: its fault was answered long ago. A frozen page stays in doubt, but the thaw wakes all
	 * faults. */
	if (private && !account_is_frozen(account))
		answer_wake(guest, page, 1);
	return private;
}

/* Answers from the resident extent, which is held; 0 or -errno. */
static int answer_held(struct guest *guest, uint64_t page, bool write, const struct window_plan *plan)
{
	int err = write ? write_first(guest, page) : -ENOTSUP;

	return err == -ENOTSUP ? map_window(guest, page, plan, write) : err;
}

void answer_access(struct guest *guest, uint64_t page, uint64_t flags, uint64_t read_ns)
{
	bool minor = flags & UFFD_PAGEFAULT_FLAG_MINOR;
	struct image *image = guest->image;
	struct account *account = guest->account;
	uint64_t extent = page / image->shape.extent_pages;
	struct window_shape shape = {
		.nr_pages = image->shape.nr_pages,
		.nr_extents = image->shape.nr_extents,
		.extent_pages = image->shape.extent_pages,
		.fixed_pages = atomic_load_explicit(&guest->window_pages, memory_order_relaxed),
	};
	struct account_region region;
	struct window_plan plan;

	if (answer_preloaded(guest, page, read_ns) || answer_private(guest, page))
		return;
	account_note_fault(account, page);
	window_plan_fault(&guest->windows, &shape, (const uint64_t *)account->granted, page, &plan);
	if (account_region_of(account, page, &region) && region.nr_pages != shape.nr_pages)
		window_clip(&plan, &shape, region.first_page, region.nr_pages);
	image_touch(image, extent);
	bool held = extent_hold(&image->states[extent]);
	while (!held) {
		if (!want_extent(guest, extent, page, minor, read_ns))
			break;
		held = extent_hold(&image->states[extent]);
	}
	if (held) {
		point_reach(POINT_FAULT_HELD);
		account_grant(account, extent);
		int err = answer_held(guest, page, flags & UFFD_PAGEFAULT_FLAG_WRITE, &plan);
		extent_release(&image->states[extent]);
		answer_failed(guest, err);
		if (!err || err == -EEXIST) {
			count_access(account->header, minor, FAULT_HIT);
			account_note_latency(account, LATENCY_HIT, clock_now_ns() - read_ns);
		}
	}
	if (plan.nr_prefetch)
		store_prefetch(image, plan.prefetch_extent, plan.nr_prefetch);
	if (plan.nr_ahead) {
		guest->ahead_extent = plan.ahead_extent;
		guest->nr_ahead = plan.nr_ahead;
	}
}

void answer_repair(struct image *image, uint64_t extent)
{
	uint64_t first = extent * image->shape.extent_pages;
	uint64_t end = first + image_extent_pages(image, extent);

	pthread_rwlock_rdlock(&image->accounts_lock);
	for (struct account *account = image->accounts; account; account = account->next)
		for (uint64_t page = first;
		     !account->populated && (page = bits_next(account->poisoned, page, end)) < end; page++) {
			uint64_t mapped, address = account_address(account, page);

			if (!address)
				continue;
			account_grant(account, extent);
			int err = uffd_continue(account->uffd, address, PAGE_BYTES, 1, &mapped);
			if (err && err != -EEXIST)
				continue; /* the next good load tries again */
			if (bits_clear(account->poisoned, page)) {
				atomic_fetch_sub(&image->nr_poisoned, 1);
				count_add(COUNTER(account->header, repaired_pages), 1);
			}
		}
	pthread_rwlock_unlock(&image->accounts_lock);
}
