/* SPDX-License-Identifier: Apache-2.0 */
/* A populated guest's fault thread: missing faults, loads that ended, discards, and copies ahead of the guest. */
#define _GNU_SOURCE
#include "accounting/core/settle.h"
#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "cache/core/store.h"
#include "faults/core/answer.h"
#include "faults/core/guest.h"
#include "faults/core/populate/populate.h"
#include "faults/core/uffd.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define COPY_PAGES 64
#define ZERO_PAGES 16
#define ORDER_LOADS 16         /* extents of the recorded order prefetched at once */
#define ORDER_LOOK_NS 2000000u /* between two looks at whether they are resident: a prefetch notifies no thread */
#define ORDER_LOOKS 200
#define AHEAD_MAX_PAGES 512 /* beyond what a stream gets at once: copies fill the guest's own memory */

static uint64_t least(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static const struct populate_region *region_at(const struct populate *populate, uint64_t address)
{
	for (uint32_t i = 0; i < populate->nr_regions; i++)
		if (address - populate->regions[i].address < populate->regions[i].nr_pages << PAGE_SHIFT)
			return &populate->regions[i];
	return NULL;
}

static const struct populate_region *region_of(const struct populate *populate, uint64_t page)
{
	for (uint32_t i = 0; i < populate->nr_regions; i++)
		if (page - populate->regions[i].first_page < populate->regions[i].nr_pages)
			return &populate->regions[i];
	return NULL;
}

/* Populates those of [page, end) that are empty, from frames that the caller holds; 0, or -errno of what stopped it. */
static int copy_empty(struct guest *guest, const struct populate_region *region, uint64_t page, uint64_t end)
{
	struct populate *populate = guest->populate;
	const struct account *account = guest->account;

	while (page < end) {
		uint64_t nr = least(bits_next(account->private, page, end) - page, COPY_PAGES);

		if (populate->zero_discarded)
			nr = least(nr, bits_next(account->discarded, page, end) - page);
		if (nr == 0) {
			page++;
			continue;
		}
		int err = frames_read(guest->image, page, nr, populate->buffer);
		int64_t nr_done = err ? err : populate_install(guest, region, page, nr, populate->buffer);

		if (nr_done < 0)
			return (int)nr_done;
		if ((uint64_t)nr_done < nr)
			return -EDQUOT; /* or the kernel stopped it: the faults there are woken and tried again */
		page += nr;
	}
	return 0;
}

/* Populates page first and then the rest of [first, end), all of one extent that the caller holds. */
static int copy_held(struct guest *guest, const struct populate_region *region, uint64_t page, uint64_t first,
                     uint64_t end)
{
	struct account *account = guest->account;
	int err = 0;

	if (bits_test(account->private, page)) {
		err = frames_read(guest->image, page, 1, guest->populate->buffer);
		if (!err)
			err = populate_again(guest, region, page, guest->populate->buffer);
	}
	if (!err)
		err = copy_empty(guest, region, page, end);
	if (err == -EDQUOT && !bits_test(account->private, page))
		populate_refuse(guest, region, page);
	else if (!err)
		err = copy_empty(guest, region, first, page);
	bits_set(guest->populate->populated, page / guest->image->shape.extent_pages);
	return err;
}

/* The part of an extent that lies in a region and in the image; false: none. */
static bool extent_in(const struct guest *guest, const struct populate_region *region, uint64_t extent,
                      uint64_t *first_out, uint64_t *end_out)
{
	uint64_t first = extent * guest->image->shape.extent_pages;
	uint64_t end = least(first + image_extent_pages(guest->image, extent), region->first_page + region->nr_pages);

	*first_out = first > region->first_page ? first : region->first_page;
	*end_out = end;
	return *first_out < end;
}

/* Whether at least half of the quota is left: copies ahead of faults must not stop the guest at its quota. */
static bool may_copy_ahead(const struct guest *guest)
{
	return quota_has_room(guest->account->quota, atomic_load(&guest->account->quota->header->used_pages));
}

/* Populates an extent ahead of a fault; returns whether it is resident. */
static bool copy_ahead(struct guest *guest, const struct populate_region *region, uint64_t extent)
{
	uint64_t first, end;

	if (!extent_hold(&guest->image->states[extent]))
		return false;
	if (region->page_bytes == PAGE_BYTES && extent_in(guest, region, extent, &first, &end) &&
	    may_copy_ahead(guest)) {
		answer_failed(guest, copy_empty(guest, region, first, end));
		bits_set(guest->populate->populated, extent);
	}
	extent_release(&guest->image->states[extent]);
	return true;
}

/* In a loader thread: hands the extent to the guest's own thread, held. */
static void answer_populated(struct load_waiter *waiter, int status)
{
	struct populate_miss *miss = (struct populate_miss *)waiter;
	struct guest *guest = miss->guest;

	pthread_mutex_lock(&guest->answer_lock);
	bool stopped = guest->stopped;
	if (!stopped) {
		bool held = status || extent_hold(&guest->image->states[waiter->extent]);

		assert(held);
		(void)held;
		miss->status = status;
		miss->next = guest->populate->done;
		guest->populate->done = miss;
		store_raise_at(POINT_WAKE_GUEST, guest->kick_fd);
	}
	pthread_mutex_unlock(&guest->answer_lock);
	if (stopped) {
		free(miss);
		guest_put(guest);
	}
}

int populate_want(struct guest *guest, uint64_t extent, uint64_t page, uint64_t read_ns)
{
	struct ledger_header *header = guest->account->header;
	int resident = -ENOMEM;

	if (!bits_set(guest->waiting, extent))
		return 0;
	struct populate_miss *miss = malloc(sizeof *miss);
	if (miss) {
		*miss = (struct populate_miss){
			.waiter = {.answer = answer_populated},
			.guest = guest,
			.page = page,
			.read_ns = read_ns,
		};
		atomic_fetch_add(&guest->nr_users, 1);
		resident = store_want(guest->image, extent, &miss->waiter);
		if (resident == 0) {
			count_add(COUNTER(header, misses), 1);
			return 0;
		}
		atomic_fetch_sub(&guest->nr_users, 1);
		free(miss);
	}
	bits_clear(guest->waiting, extent);
	if (resident < 0)
		answer_failed(guest, -EAGAIN);
	return resident == 1;
}

/* Answers a wait for an extent: it is resident and held, or its load failed. */
static void answer_done(struct guest *guest, struct populate_miss *miss)
{
	struct account *account = guest->account;
	uint64_t extent = miss->waiter.extent;
	uint64_t first, end;

	bits_clear(guest->waiting, extent);
	for (uint32_t i = 0; i < guest->populate->nr_regions; i++) {
		const struct populate_region *region = &guest->populate->regions[i];
		bool here = miss->page - region->first_page < region->nr_pages;

		if (!extent_in(guest, region, extent, &first, &end))
			continue;
		if (zerocopy_loaded(guest, extent))
			continue;
		if (region->page_bytes > PAGE_BYTES) {
			huge_loaded(guest, region, extent, miss->status);
			continue;
		}
		if (miss->status == 0) {
			answer_failed(guest, copy_held(guest, region, here ? miss->page : first, first, end));
		} else if (here) {
			pthread_mutex_lock(&account->write_lock);
			populate_poison(guest, region, miss->page);
			pthread_mutex_unlock(&account->write_lock);
		}
		/* Wake faults on other pages of the extent, and those that met an error above. */
		uffd_wake(guest->uffd, populate_address(region, first), (end - first) << PAGE_SHIFT);
	}
	if (miss->status == 0)
		extent_release(&guest->image->states[extent]);
	count_access(account->header, false, waited_outcome(miss->status, miss->waiter.restored));
	account_note_latency(account, miss->waiter.restored ? LATENCY_HIT : LATENCY_MISS,
	                     clock_now_ns() - miss->read_ns);
}

static struct populate_miss *take_done(struct guest *guest)
{
	pthread_mutex_lock(&guest->answer_lock);
	struct populate_miss *done = guest->populate->done;
	guest->populate->done = NULL;
	pthread_mutex_unlock(&guest->answer_lock);
	return done;
}

static bool answer_all_done(struct guest *guest)
{
	struct populate_miss *next, *miss = take_done(guest);
	bool any = miss != NULL;

	for (; miss; miss = next) {
		next = miss->next;
		answer_done(guest, miss);
		free(miss);
		guest_put(guest);
	}
	return any;
}

/* Installs a page that reads as zeros, and those behind it that do. */
static int zero_run(struct guest *guest, const struct populate_region *region, uint64_t page)
{
	const struct account *account = guest->account;
	uint64_t end = least(page + ZERO_PAGES, region->first_page + region->nr_pages);

	if (bits_test(account->private, page))
		return populate_again(guest, region, page, NULL);
	end = least(end, guest->image->shape.nr_pages);
	end = least(bits_next_clear(account->discarded, page, end), bits_next(account->private, page, end));
	int64_t nr = populate_install(guest, region, page, end - page, NULL);

	if (nr == -EDQUOT)
		populate_refuse(guest, region, page);
	return nr < 0 ? (int)nr : 0;
}

/* Copies the resident part of a fault's window, page and what is behind it first. */
static int copy_window(struct guest *guest, const struct populate_region *region, uint64_t page,
                       const struct window_plan *plan)
{
	uint64_t extent = page / guest->image->shape.extent_pages;
	uint64_t plan_end = plan->first_page + plan->nr_pages;
	uint64_t first, end;

	extent_in(guest, region, extent, &first, &end);
	int err = copy_held(guest, region, page, first > plan->first_page ? first : plan->first_page,
	                    least(end, plan_end));
	extent_release(&guest->image->states[extent]);
	while (!err && ++extent * guest->image->shape.extent_pages < plan_end)
		if (!copy_ahead(guest, region, extent))
			break;
	return err;
}

static void fault_small(struct guest *guest, const struct populate_region *region, uint64_t page, uint64_t read_ns)
{
	struct populate *populate = guest->populate;
	struct image *image = guest->image;
	struct account *account = guest->account;
	uint64_t extent = page / image->shape.extent_pages;
	struct window_shape shape = {
		.nr_pages = image->shape.nr_pages,
		.nr_extents = image->shape.nr_extents,
		.extent_pages = image->shape.extent_pages,
		.fixed_pages = atomic_load_explicit(&guest->window_pages, memory_order_relaxed),
	};
	struct window_plan plan;

	window_plan_fault(&guest->windows, &shape, (const uint64_t *)populate->populated, page, &plan);
	image_touch(image, extent);
	image_note_first_touch(image, extent);
	bool held = extent_hold(&image->states[extent]);
	while (!held && populate_want(guest, extent, page, read_ns))
		held = extent_hold(&image->states[extent]);
	if (held) {
		point_reach(POINT_FAULT_HELD);
		int err = copy_window(guest, region, page, &plan);
		answer_failed(guest, err);
		if (!err) {
			count_access(account->header, false, FAULT_HIT);
			account_note_latency(account, LATENCY_HIT, clock_now_ns() - read_ns);
		}
	}
	if (plan.nr_prefetch)
		store_prefetch(image, plan.prefetch_extent,
		               least(plan.nr_prefetch, AHEAD_MAX_PAGES / image->shape.extent_pages));
	if (plan.nr_ahead) {
		guest->ahead_extent = plan.ahead_extent;
		guest->nr_ahead = least(plan.nr_ahead, AHEAD_MAX_PAGES / image->shape.extent_pages + 1);
	}
}

static void populate_fault(struct guest *guest, uint64_t address, uint64_t flags, uint64_t read_ns)
{
	const struct populate_region *region = region_at(guest->populate, address);
	uint64_t done_bytes;

	answer_all_done(guest);
	if (!region || flags & (UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_MINOR))
		return; /* outside the regions, or registered for other faults too: the guest blocks only itself */
	uint64_t page = region->first_page + ((address - region->address) >> PAGE_SHIFT);

	count_add(COUNTER(guest->account->header, faults_missing), 1);
	if (page < guest->image->shape.nr_pages && bits_test(guest->account->unmapped, page))
		bits_clear(guest->account->unmapped, page); /* it mapped and registered memory there again */
	if (page < guest->image->shape.nr_pages && zerocopy_fault(guest, region, page, read_ns))
		return;
	if (region->page_bytes > PAGE_BYTES)
		huge_fault(guest, region, page, read_ns);
	else if (page >= guest->image->shape.nr_pages) /* less than 2 MiB a region: not charged */
		answer_failed(guest, uffd_install(guest->uffd, populate_address(region, page), NULL, PAGE_BYTES,
		                                  PAGE_BYTES, &done_bytes));
	else if (populate_is_zero(guest, page))
		answer_failed(guest, zero_run(guest, region, page));
	else
		fault_small(guest, region, page, read_ns);
}

static void populate_discard(struct guest *guest, uint64_t start, uint64_t end, bool unmapped)
{
	for (uint32_t i = 0; i < guest->populate->nr_regions; i++) {
		const struct populate_region *region = &guest->populate->regions[i];
		uint64_t limit = region->address + (region->nr_pages << PAGE_SHIFT);
		uint64_t low = start > region->address ? start : region->address;
		uint64_t high = least(end, limit);

		if (low >= high)
			continue;
		uint64_t first = region->first_page + ((low - region->address) >> PAGE_SHIFT);
		uint64_t last = region->first_page + ((high - region->address + PAGE_BYTES - 1) >> PAGE_SHIFT);

		last = least(last, guest->image->shape.nr_pages);
		if (first >= last)
			continue;
		answer_discard(guest, first, last - first, unmapped);
		huge_discard(guest, first, last - first);
	}
}

/* Copies the recorded working set, one extent a call; returns whether there was anything to do now. */
static bool order_ahead(struct guest *guest)
{
	struct populate *populate = guest->populate;
	struct image *image = guest->image;

	while (populate->order_at < populate->nr_order) {
		uint64_t extent = populate->order[populate->order_at];
		const struct populate_region *region = region_of(populate, extent * image->shape.extent_pages);

		if (!may_copy_ahead(guest)) {
			populate->order_at = populate->nr_order;
			return false;
		}
		if (!region || region->page_bytes > PAGE_BYTES || bits_test(populate->populated, extent)) {
			populate->order_at++;
			populate->nr_order_looks = 0;
			continue;
		}
		if (copy_ahead(guest, region, extent) || ++populate->nr_order_looks > ORDER_LOOKS) {
			populate->order_at++;
			populate->nr_order_looks = 0;
			return true;
		}
		for (uint64_t i = populate->order_at; i < populate->nr_order && i < populate->order_at + ORDER_LOADS;
		     i++)
			store_prefetch(image, populate->order[i], 1);
		guest->idle_at_ns = clock_now_ns() + ORDER_LOOK_NS;
		return false;
	}
	return false;
}

static bool populate_idle(struct guest *guest)
{
	if (answer_all_done(guest))
		return true;
	if (guest->nr_ahead) {
		uint64_t extent = guest->ahead_extent++;
		const struct populate_region *region =
			region_of(guest->populate, extent * guest->image->shape.extent_pages);

		guest->nr_ahead--;
		if (region && !guest->populate->allowance)
			copy_ahead(guest, region, extent);
		return true;
	}
	return zerocopy_ahead(guest) || order_ahead(guest);
}

static void populate_end(struct guest *guest)
{
	struct populate *populate = guest->populate;

	for (struct populate_miss *next, *miss = take_done(guest); miss; miss = next) {
		next = miss->next;
		if (miss->status == 0)
			extent_release(&guest->image->states[miss->waiter.extent]);
		free(miss);
		guest_put(guest);
	}
	zerocopy_end(guest);
	free(populate->assembly.buffer);
	free(populate->buffer);
	free(populate->populated);
	free(populate->lent);
	free(populate->to_announce);
	free(populate->order);
	if (populate->zerocopy_fd >= 0)
		close(populate->zerocopy_fd);
	free(populate);
	guest->populate = NULL;
}

static void populate_wake(struct guest *guest)
{
	for (uint32_t i = 0; i < guest->populate->nr_regions; i++)
		uffd_wake(guest->uffd, guest->populate->regions[i].address,
		          guest->populate->regions[i].nr_pages << PAGE_SHIFT);
}

/* A machine's memory must not move: moved memory can no longer be populated. */
static void populate_move(struct guest *guest, uint64_t from, uint64_t to, uint64_t length)
{
	(void)from, (void)to, (void)length;
	answer_failed(guest, -EXDEV);
}

static const struct guest_kind populated = {
	.fault = populate_fault,
	.discard = populate_discard,
	.move = populate_move,
	.idle = populate_idle,
	.wake = populate_wake,
	.end = populate_end,
};

static int terms_take(struct populate *populate, const struct image *image, const struct populate_options *terms)
{
	if (!terms->nr_regions || terms->nr_regions > POPULATE_REGIONS_MAX)
		return -EINVAL;
	for (uint32_t i = 0; i < terms->nr_regions; i++) {
		const struct populate_region *region = &terms->regions[i];
		uint64_t step = region->page_bytes / PAGE_BYTES;

		if (region->page_bytes != PAGE_BYTES && region->page_bytes != HUGE_BYTES)
			return -EINVAL;
		if (region->address % region->page_bytes || region->first_page % step || region->nr_pages % step)
			return -EINVAL;
		if (!region->nr_pages || region->first_page >= image->shape.nr_pages)
			return -ERANGE;
		populate->regions[i] = *region;
	}
	for (uint64_t i = 0; i < terms->nr_order; i++)
		if (terms->order[i] >= image->shape.nr_extents)
			return -ERANGE;
	populate->nr_regions = terms->nr_regions;
	populate->zero_discarded = terms->zero_discarded;
	populate->allowance = terms->allowance;
	populate->max_pinned_extents = terms->max_pinned_extents;
	populate->zerocopy_at = terms->allowance && terms->zerocopy_resident ? 0 : image->shape.nr_extents;
	return 0;
}

/* Marks the extents that our predecessor copied. */
static void note_populated(struct guest *guest)
{
	const struct image_shape *shape = &guest->image->shape;
	uint64_t extent;

	for (uint64_t page = 0; (page = bits_next(guest->account->private, page, shape->nr_pages)) < shape->nr_pages;) {
		extent = page / shape->extent_pages;
		bits_set(guest->populate->populated, extent);
		page = (extent + 1) * shape->extent_pages;
	}
}

int populate_start(struct account *account, int uffd, int pidfd, const struct fault_options *options,
                   const struct populate_options *terms, struct guest **guest_out)
{
	const struct image *image = account->image;
	struct populate *populate = calloc(1, sizeof *populate);

	if (!populate)
		return -ENOMEM;
	populate->zerocopy_fd = -1;
	int err = terms_take(populate, image, terms);
	populate->populated = calloc(1, bits_bytes(image->shape.nr_extents));
	populate->lent = calloc(1, bits_bytes(image->shape.nr_extents));
	populate->to_announce = calloc(1, bits_bytes(image->shape.nr_extents));
	populate->order = malloc((terms->nr_order + 1) * sizeof *populate->order);
	if (!err && (!populate->populated || !populate->lent || !populate->to_announce || !populate->order))
		err = -ENOMEM;
	if (!err && posix_memalign((void **)&populate->buffer, PAGE_BYTES, COPY_PAGES * PAGE_BYTES))
		err = -ENOMEM;
	if (!err && terms->allowance && (populate->zerocopy_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0)
		err = -errno;
	struct guest none = {.account = account, .image = account->image, .populate = populate};

	if (!err) {
		note_populated(&none);
		err = zerocopy_adopt(&none);
	}
	if (!err) {
		memcpy(populate->order, terms->order, terms->nr_order * sizeof *populate->order);
		populate->nr_order = terms->nr_order;
		account->populated = true;
		atomic_store(&account->header->populated, 1);
		err = guest_start_kind(account, uffd, pidfd, options, &populated, populate, guest_out);
	}
	if (err) { /* no thread runs */
		pthread_mutex_init(&none.answer_lock, NULL);
		populate_end(&none);
		pthread_mutex_destroy(&none.answer_lock);
	}
	return err;
}
