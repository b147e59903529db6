/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/ledger.h"

#include "accounting/core/open_regions.h"
#include "accounting/core/preload.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static _Atomic uint64_t nr_accounts_ever;

/* What releases without open regions have; the bitmaps of these follow. */
static size_t ledger_bytes_before(const struct image_shape *shape)
{
	return sizeof(struct ledger_header) + bits_bytes(shape->nr_extents) + 6 * bits_bytes(shape->nr_pages);
}

static size_t ledger_bytes(const struct image *image)
{
	return ledger_bytes_before(&image->shape) + bits_bytes(image->shape.nr_pages) +
	       2 * bits_bytes(image_nr_regions(image)) + sizeof(bits_word);
}

static int ledger_map(struct account *account, int ledger_fd)
{
	const struct image_shape *shape = &account->image->shape;
	size_t by_extent = bits_bytes(shape->nr_extents);
	size_t by_page = bits_bytes(shape->nr_pages);

	account->ledger_bytes = ledger_bytes(account->image);
	void *at = mmap(NULL, account->ledger_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ledger_fd, 0);
	if (at == MAP_FAILED)
		return -errno;
	account->header = at;
	char *bits = (char *)(account->header + 1);
	account->granted = (bits_word *)bits;
	account->private = (bits_word *)(bits + by_extent);
	account->unsettled = (bits_word *)(bits + by_extent + by_page);
	account->discarded = (bits_word *)(bits + by_extent + 2 * by_page);
	account->unmapped = (bits_word *)(bits + by_extent + 3 * by_page);
	account->poisoned = (bits_word *)(bits + by_extent + 4 * by_page);
	account->preloaded = (bits_word *)(bits + by_extent + 5 * by_page);
	account->reserved = (bits_word *)(bits + by_extent + 6 * by_page);
	account->opened = (bits_word *)(bits + by_extent + 7 * by_page);
	size_t by_region = bits_bytes(image_nr_regions(account->image));
	account->lost = (bits_word *)(bits + by_extent + 7 * by_page + by_region);
	account->flags = (bits_word *)(bits + by_extent + 7 * by_page + 2 * by_region);
	return 0;
}

static int ledger_create(struct account *account)
{
	const struct image_shape *shape = &account->image->shape;

	account->ledger_fd = memfd_create("cowshed-ledger", MFD_CLOEXEC);
	if (account->ledger_fd < 0 || ftruncate(account->ledger_fd, (off_t)ledger_bytes(account->image)) < 0)
		return -errno;
	int err = ledger_map(account, account->ledger_fd);
	if (err)
		return err;
	account->header->magic = LEDGER_MAGIC;
	account->header->layout = LEDGER_LAYOUT;
	account->header->nr_pages = shape->nr_pages;
	account->header->nr_extents = shape->nr_extents;
	return 0;
}

static void account_free(struct account *account)
{
	account_drop_preloaded(account);
	free(account->dirty);
	free(account->faults);
	free(account->wanted);
	if (account->header)
		munmap(account->header, account->ledger_bytes);
	if (account->ledger_fd >= 0)
		close(account->ledger_fd);
	pthread_mutex_destroy(&account->write_lock);
	quota_leave(account->quota);
	free(account);
}

static struct account *account_new(struct image *image, struct quota *quota)
{
	struct account *account = calloc(1, sizeof *account);

	if (!account)
		return NULL;
	account->image = image;
	account->quota = quota;
	account->faults = calloc(image_nr_regions(image), sizeof *account->faults);
	account->wanted = calloc(1, bits_bytes(image_nr_regions(image)));
	if (!account->faults || !account->wanted) {
		free(account->faults);
		free(account->wanted);
		free(account);
		return NULL;
	}
	quota_join(quota);
	account->ledger_fd = account->uffd = account->pagemap_fd = account->preload_fd = -1;
	pthread_mutex_init(&account->write_lock, NULL);
	return account;
}

/* Adds it to the image's accounts. */
static void account_add(struct account *account)
{
	struct image *image = account->image;

	account->account_no = atomic_fetch_add(&nr_accounts_ever, 1);
	pthread_rwlock_wrlock(&image->accounts_lock);
	account->next = image->accounts;
	image->accounts = account;
	pthread_rwlock_unlock(&image->accounts_lock);
}

int account_open(struct image *image, struct quota *quota, struct account **account_out)
{
	struct account *account = account_new(image, quota);

	if (!account)
		return -ENOMEM;
	int err = ledger_create(account);
	if (err) {
		account_free(account);
		return err;
	}
	account_add(account);
	*account_out = account;
	return 0;
}

/*
 * Nothing else uses the account yet, and its guest waits for this. Most words of a large image's bitmaps are zero: they
 * are read with relaxed loads and not written, since a write would allocate memory for them.
 */
static void mend_pages(struct account *account)
{
	struct ledger_header *header = account->header;
	uint64_t nr_private = 0, nr_preloaded = 0, nr_reserved = 0, nr_poisoned = 0;

	for (uint64_t i = 0; i < bits_bytes(header->nr_pages) / sizeof(bits_word); i++) {
		uint64_t private = atomic_load_explicit(&account->private[i], memory_order_relaxed);
		uint64_t preloaded = atomic_load_explicit(&account->preloaded[i], memory_order_relaxed);
		uint64_t unsettled = atomic_load_explicit(&account->unsettled[i], memory_order_relaxed);
		uint64_t poisoned = atomic_load_explicit(&account->poisoned[i], memory_order_relaxed);
		uint64_t reserved = atomic_load_explicit(&account->reserved[i], memory_order_relaxed);

		if (!(private | preloaded | unsettled | poisoned | reserved))
			continue;
		/* A region that was being opened or closed: settling gives charges for nothing back. */
		uint64_t kept = bits_test(account->opened, i * 64 / OPEN_PAGES) ? reserved & private : 0;
		if (reserved != kept)
			atomic_store(&account->reserved[i], kept);
		if (preloaded & ~private)
			atomic_store(&account->preloaded[i], preloaded & private);
		preloaded &= private;
		if (unsettled != (private & ~preloaded))
			atomic_store(&account->unsettled[i], private & ~preloaded);
		if (private & ~preloaded && !atomic_load(&header->populated))
			atomic_fetch_or(&account->discarded[i], private & ~preloaded & ~kept);
		nr_private += (uint64_t)__builtin_popcountll(private);
		nr_preloaded += (uint64_t)__builtin_popcountll(preloaded);
		nr_reserved += (uint64_t)__builtin_popcountll(kept);
		nr_poisoned += (uint64_t)__builtin_popcountll(poisoned);
	}
	atomic_store(&header->private_pages, nr_private);
	atomic_store(&header->preloaded_pages, nr_preloaded);
	atomic_store(&account->nr_reserved, nr_reserved);
	atomic_fetch_add(&account->image->nr_poisoned, nr_poisoned);
	quota_take_anyway(account->quota, nr_private);
}

static void mend_grants(struct account *account)
{
	struct image *image = account->image;
	uint64_t nr_granted = 0, nr_extents = account->header->nr_extents;

	for (uint64_t e = 0; (e = bits_next(account->granted, e, nr_extents)) < nr_extents; e++) {
		if (extent_state(&image->states[e]) != EXTENT_RESIDENT) {
			bits_clear(account->granted, e);
			continue;
		}
		atomic_fetch_add_explicit(&image->refs[e], 1, memory_order_relaxed);
		nr_granted++;
	}
	atomic_store(&account->header->granted_extents, nr_granted);
}

static void account_mend(struct account *account)
{
	mend_grants(account);
	account_lend_again(account);
	mend_pages(account);
	/* A guest that is still at its quota stops again. */
	if (atomic_load(&account->header->stopped_since_ns) == STOP_ENDING)
		atomic_store(&account->header->stopped_since_ns, 0);
	account_end_stop(account);
}

int account_adopt(struct image *image, struct quota *quota, int ledger_fd, struct account **account_out)
{
	struct stat status;

	if (fstat(ledger_fd, &status) < 0)
		return -errno;
	if ((uint64_t)status.st_size == ledger_bytes_before(&image->shape)) {
		if (ftruncate(ledger_fd, (off_t)ledger_bytes(image)) < 0)
			return -errno;
	} else if ((uint64_t)status.st_size != ledger_bytes(image)) {
		return -EBADMSG;
	}
	struct account *account = account_new(image, quota);
	if (!account)
		return -ENOMEM;
	int err = ledger_map(account, ledger_fd);
	const struct ledger_header *header = account->header;
	if (!err && (header->magic != LEDGER_MAGIC || header->layout != LEDGER_LAYOUT ||
	             header->nr_pages != image->shape.nr_pages || header->nr_extents != image->shape.nr_extents))
		err = -EBADMSG;
	if (err) {
		account_free(account);
		return err;
	}
	account->ledger_fd = ledger_fd;
	account->populated = atomic_load(&account->header->populated);
	account_mend(account);
	account_add(account);
	*account_out = account;
	return 0;
}

int account_fd(const struct account *account)
{
	return account->ledger_fd;
}

uint64_t account_number(const struct account *account)
{
	return account->account_no;
}

int account_close(struct account *account)
{
	struct image *image = account->image;
	uint64_t nr_extents = image->shape.nr_extents;

	pthread_rwlock_wrlock(&image->accounts_lock);
	struct account **at = &image->accounts;
	while (*at != account)
		at = &(*at)->next;
	*at = account->next;
	for (uint64_t e = 0; (e = bits_next(account->granted, e, nr_extents)) < nr_extents; e++)
		account_revoke(account, e);
	account_end_loans(account);
	account_add_past(account);
	account->header->magic = 0; /* if we die now, its counters must not be added again */
	quota_give(account->quota, account->header->private_pages);
	uint64_t nr_poisoned = bits_count(account->poisoned, 0, image->shape.nr_pages);
	atomic_fetch_sub(&image->nr_poisoned, nr_poisoned);
	pthread_rwlock_unlock(&image->accounts_lock);
	account_free(account);
	return 0;
}

int account_place(struct account *account, int uffd, int pagemap_fd, const struct account_region *regions,
                  uint64_t nr_regions)
{
	struct region_table table;
	int err = regions_make(regions, nr_regions, account->image->shape.nr_pages, &table);

	if (err)
		return err;
	pthread_mutex_lock(&account->write_lock);
	account->uffd = uffd;
	account->pagemap_fd = pagemap_fd;
	account_set_regions(account, &table);
	pthread_mutex_unlock(&account->write_lock);
	return 0;
}

void account_set_regions(struct account *account, const struct region_table *table)
{
	regions_write(&account->header->regions, table, account->image->shape.nr_pages);
}

void account_regions(const struct account *account, struct region_table *table_out)
{
	regions_read(&account->header->regions, table_out);
}

void account_grant(struct account *account, uint64_t extent)
{
	if (bits_test(account->granted, extent) || !bits_set(account->granted, extent))
		return;
	atomic_fetch_add(&account->image->refs[extent], 1);
	count_add(&account->header->granted_extents, 1);
	image_note_first_touch(account->image, extent);
}

void account_revoke(struct account *account, uint64_t extent)
{
	if (!bits_clear(account->granted, extent))
		return;
	uint32_t before = atomic_fetch_sub(&account->image->refs[extent], 1);
	assert(before > 0);
	(void)before;
	atomic_fetch_sub(&account->header->granted_extents, 1);
}

void account_charge(struct account *account, uint64_t page)
{
	bool fresh = bits_set(account->private, page);

	assert(fresh);
	(void)fresh;
	bits_set(account->unsettled, page);
	account_mark_dirty(account, page, 1);
	count_add(&account->header->private_pages, 1);
	count_add(COUNTER(account->header, charged_pages), 1);
}

void account_uncharge(struct account *account, uint64_t page)
{
	bool was = bits_clear(account->private, page);

	assert(was);
	(void)was;
	bits_clear(account->unsettled, page);
	if (bits_clear(account->reserved, page))
		atomic_fetch_sub(&account->nr_reserved, 1);
	if (bits_clear(account->preloaded, page))
		atomic_fetch_sub(&account->header->preloaded_pages, 1);
	account_mark_dirty(account, page, 1);
	atomic_fetch_sub(&account->header->private_pages, 1);
	quota_give(account->quota, 1);
}

/* With every write_lock held, no page is taken and not charged. No other code holds two of them. */
uint64_t account_quota_pages(struct account *asked, uint64_t *used_out)
{
	struct image *image = asked->image;
	struct quota *quota = asked->quota;
	struct quota_status status;
	uint64_t nr = 0;

	pthread_rwlock_rdlock(&image->accounts_lock);
	for (struct account *account = image->accounts; account; account = account->next)
		if (account->quota == quota) {
			pthread_mutex_lock(&account->write_lock);
			nr += bits_count(account->private, 0, image->shape.nr_pages);
		}
	quota_read(quota, &status);
	for (struct account *account = image->accounts; account; account = account->next)
		if (account->quota == quota)
			pthread_mutex_unlock(&account->write_lock);
	pthread_rwlock_unlock(&image->accounts_lock);
	*used_out = status.used_pages;
	return nr;
}

int account_add_grants(const struct account *account, uint64_t first, uint64_t nr, uint32_t *refs_out)
{
	uint64_t nr_extents = account->image->shape.nr_extents;

	if (first > nr_extents || nr > nr_extents - first)
		return -ERANGE;
	for (uint64_t e = first; (e = bits_next(account->granted, e, first + nr)) < first + nr; e++)
		refs_out[e - first]++;
	return 0;
}

int account_bitmap(const struct account *account, int unsettled, uint64_t *words_out, uint64_t nr_words)
{
	const bits_word *bits = unsettled ? account->unsettled : account->private;

	if (nr_words != bits_bytes(account->image->shape.nr_pages) / 8)
		return -ERANGE;
	for (uint64_t i = 0; i < nr_words; i++)
		words_out[i] = bits[i];
	return 0;
}
