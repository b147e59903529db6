/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An overlay in two files: its pages (sparse, each at its own offset), and the map of those that are private.
 *
 * The map is a header block, and for each 32,512 pages two slots of one block, each with a generation and a checksum. A
 * slot is written with the next generation over the older of the two, so that a write that is cut short leaves the one
 * before it. A flush does this, in this order:
 *
 *   the bits of the blocks that changed are copied        (a bit is set only after its page was written)
 *   the pages are made durable                            so what a bit promises is there
 *   the copies go to the older slots, and become durable  from here on a crash finds the new bits
 *   pages that were trimmed before the copy are punched   not sooner: the old bits still promised them
 *
 * Missing pages (missing.h) have a bit in blocks of their own, which come after the others and exist once a page was
 * missing; in the blocks of private pages they have none. When such a page arrives, its private bit becomes durable
 * before its missing bit is cleared: if both are set, its bytes are here. So missing blocks are copied before the
 * blocks of private pages, which are always copied with them, and written after those.
 *
 * Blocks need not change together: pages are independent, and a change that was not flushed may be there or not. Bytes
 * that an open finds in pages that are not private (a crash before the punch) are punched then.
 *
 * A failed fdatasync may have lost earlier writes, and the kernel reports it only once: every later flush fails.
 */
#define _GNU_SOURCE
#include "accounting/core/overlay/files.h"

#include "accounting/core/overlay/missing.h"
#include "cache/core/abi.h"
#include "cache/core/points.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAP_MAGIC 0x31504d5644574f43ull /* "COWDVMP1" */
#define MAP_VERSION 1u
#define BLOCK_BYTES 4096u
#define SLOT_WORDS 508u
#define SLOT_PAGES (SLOT_WORDS * 64u)
#define DROPPED_MAX 16384 /* pages: after as many, a flush starts by itself and punches them */

struct map_header {
	uint64_t magic;
	uint32_t version, page_bytes;
	uint64_t size_bytes;
	uint8_t identity[OVERLAY_IDENTITY_BYTES];
	uint32_t checksum; /* of all before it */
	uint32_t zero;
};
_Static_assert(sizeof(struct map_header) == 64, "the header is on disk");

struct map_slot {
	uint64_t generation; /* its lowest bit is the slot's number */
	uint64_t block_no;
	uint64_t words[SLOT_WORDS];
	uint64_t zero;
	uint32_t also_zero;
	uint32_t checksum; /* of all before it */
};
_Static_assert(sizeof(struct map_slot) == BLOCK_BYTES, "a slot is a block");

struct overlay_disk {
	struct overlay *overlay;
	int map_fd;
	uint64_t nr_blocks;     /* of private pages; as many of missing ones follow, if has_missing */
	bool has_missing;       /* set before any page is missing */
	uint64_t *generations;  /* by block, of the newer slot; the flusher's */
	_Atomic uint8_t *dirty; /* by block: bits changed since they were copied */
	bits_word *dropped;     /* by page: trimmed, bytes still there */
	_Atomic uint64_t nr_dropped;

	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t work;
	struct overlay_sync *waiting, **waiting_tail;
	bool nudged, stop;
	int failed; /* -errno of the fdatasync that failed; the flusher's */
};

/* CRC-32C, bit by bit from a table of nibbles: a block takes some 10 us, a flush some milliseconds. */
static uint32_t checksum(const void *from, size_t nr_bytes)
{
	static const uint32_t table[16] = {
		0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
		0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
	};
	const uint8_t *at = from;
	uint32_t sum = ~0u;

	while (nr_bytes--) {
		sum ^= *at++;
		sum = sum >> 4 ^ table[sum & 15];
		sum = sum >> 4 ^ table[sum & 15];
	}
	return ~sum;
}

static off_t slot_offset(uint64_t block, uint64_t generation)
{
	return (off_t)((1 + 2 * block + (generation & 1)) * BLOCK_BYTES);
}

static int write_all(int fd, const void *from, size_t nr_bytes, off_t offset)
{
	ssize_t put = pwrite(fd, from, nr_bytes, offset);

	return put == (ssize_t)nr_bytes ? 0 : put < 0 ? -errno : -EIO;
}

/* ---- flushing ---- */

/* Copies the bits of a block, which the caller has marked clean before. */
static void slot_copy(struct overlay_disk *disk, uint64_t block, struct map_slot *slot)
{
	const struct account *account = disk->overlay->account;
	uint64_t nr_words = bits_bytes(disk->overlay->image->shape.nr_pages) / 8;
	uint64_t base = block % disk->nr_blocks * SLOT_WORDS;

	*slot = (struct map_slot){.generation = disk->generations[block] + 1, .block_no = block};
	for (uint64_t i = 0; i < SLOT_WORDS && base + i < nr_words; i++) {
		uint64_t missing = atomic_load_explicit(&account->preloaded[base + i], memory_order_acquire);
		uint64_t private = atomic_load_explicit(&account->private[base + i], memory_order_acquire);

		slot->words[i] = block < disk->nr_blocks ? private & ~missing : private & missing;
	}
	slot->checksum = checksum(slot, offsetof(struct map_slot, checksum));
}

/* Drops the bytes of trimmed pages that the durable map no longer promises. */
static void slot_punch(struct overlay_disk *disk, const struct map_slot *slot)
{
	struct overlay *overlay = disk->overlay;
	uint64_t base = slot->block_no * SLOT_PAGES, nr_pages = overlay->image->shape.nr_pages;
	uint64_t end = base + SLOT_PAGES < nr_pages ? base + SLOT_PAGES : nr_pages;

	for (uint64_t page = base; (page = bits_next(disk->dropped, page, end)) < end; page++) {
		if (slot->words[(page - base) / 64] >> page % 64 & 1)
			continue;
		pthread_rwlock_t *stripe = overlay_stripe(overlay, page);
		pthread_rwlock_wrlock(stripe);
		if (bits_clear(disk->dropped, page)) {
			atomic_fetch_sub(&disk->nr_dropped, 1);
			if (!bits_test(overlay->account->private, page))
				overlay_punch(overlay, page, 1);
		}
		pthread_rwlock_unlock(stripe);
	}
}

static int slots_write(struct overlay_disk *disk, const struct map_slot *slots, uint64_t nr)
{
	int err = 0;

	for (uint64_t i = 0; i < nr && !err; i++)
		err = write_all(disk->map_fd, &slots[i], sizeof slots[i],
		                slot_offset(slots[i].block_no, slots[i].generation));
	return err;
}

/* Makes pages, then slots durable, in the order above; the first nr_missing slots are of missing pages. */
static int flush_slots(struct overlay_disk *disk, struct map_slot *slots, uint64_t nr_missing, uint64_t nr)
{
	int err = point_reach(POINT_OVERLAY_FLUSH);

	if (err)
		return err;
	if (fdatasync(disk->overlay->data_fd) < 0)
		return disk->failed = -errno;
	err = point_reach(POINT_OVERLAY_SYNCED);
	if (!err)
		err = slots_write(disk, slots + nr_missing, nr - nr_missing);
	if (!err && nr_missing && fdatasync(disk->map_fd) < 0)
		return disk->failed = -errno;
	if (!err)
		err = slots_write(disk, slots, nr_missing);
	if (!err)
		err = point_reach(POINT_OVERLAY_MAPPED);
	if (err || !nr)
		return err;
	if (fdatasync(disk->map_fd) < 0)
		return disk->failed = -errno;
	for (uint64_t i = 0; i < nr; i++) {
		disk->generations[slots[i].block_no] = slots[i].generation;
		if (i >= nr_missing)
			slot_punch(disk, &slots[i]);
	}
	return 0;
}

static int flush_all(struct overlay_disk *disk)
{
	uint64_t nr_dirty = 0, nr_missing = 0, nr = 0;

	if (disk->failed)
		return disk->failed;
	for (uint64_t block = 0; block < disk->nr_blocks; block++) {
		nr_missing += atomic_load(&disk->dirty[disk->nr_blocks + block]) != 0;
		nr_dirty += atomic_load(&disk->dirty[block]) != 0;
	}
	uint64_t room = 2 * nr_missing + nr_dirty;
	struct map_slot *slots = malloc((room + 1) * sizeof *slots);
	if (!slots)
		return -ENOMEM;
	for (uint64_t block = 0; block < disk->nr_blocks && nr < nr_missing; block++)
		if (atomic_exchange(&disk->dirty[disk->nr_blocks + block], 0))
			slot_copy(disk, disk->nr_blocks + block, &slots[nr++]);
	nr_missing = nr;
	for (uint64_t i = 0; i < nr_missing; i++) {
		uint64_t block = slots[i].block_no - disk->nr_blocks;

		atomic_store(&disk->dirty[block], 0);
		slot_copy(disk, block, &slots[nr++]);
	}
	for (uint64_t block = 0; block < disk->nr_blocks && nr < room; block++)
		if (atomic_exchange(&disk->dirty[block], 0))
			slot_copy(disk, block, &slots[nr++]);
	int err = flush_slots(disk, slots, nr_missing, nr);
	for (uint64_t i = 0; i < nr && err; i++)
		atomic_store(&disk->dirty[slots[i].block_no], 1);
	free(slots);
	return err;
}

static void *flusher_main(void *arg)
{
	struct overlay_disk *disk = arg;

	prctl(PR_SET_NAME, "cow-flusher");
	pthread_mutex_lock(&disk->lock);
	for (;;) {
		while (!disk->waiting && !disk->nudged && !disk->stop)
			pthread_cond_wait(&disk->work, &disk->lock);
		if (!disk->waiting && !disk->nudged)
			break;
		struct overlay_sync *syncs = disk->waiting;
		disk->waiting = NULL;
		disk->waiting_tail = &disk->waiting;
		disk->nudged = false;
		pthread_mutex_unlock(&disk->lock);
		int err = flush_all(disk);
		for (struct overlay_sync *next; syncs; syncs = next) {
			next = syncs->next;
			syncs->done(syncs, err);
		}
		pthread_mutex_lock(&disk->lock);
	}
	pthread_mutex_unlock(&disk->lock);
	return NULL;
}

void disk_flush(struct overlay_disk *disk, struct overlay_sync *sync)
{
	pthread_mutex_lock(&disk->lock);
	if (sync) {
		sync->next = NULL;
		*disk->waiting_tail = sync;
		disk->waiting_tail = &sync->next;
	} else {
		disk->nudged = true;
	}
	pthread_cond_signal(&disk->work);
	pthread_mutex_unlock(&disk->lock);
}

void disk_changed(struct overlay_disk *disk, uint64_t page)
{
	atomic_store(&disk->dirty[page / SLOT_PAGES], 1);
}

void disk_missing_changed(struct overlay_disk *disk, uint64_t page)
{
	disk_changed(disk, page);
	atomic_store(&disk->dirty[disk->nr_blocks + page / SLOT_PAGES], 1);
}

void disk_trimmed(struct overlay_disk *disk, uint64_t first, uint64_t nr)
{
	uint64_t nr_fresh = 0;

	for (uint64_t page = first; page < first + nr; page++)
		nr_fresh += bits_set(disk->dropped, page);
	uint64_t before = atomic_fetch_add(&disk->nr_dropped, nr_fresh);
	disk_changed(disk, first); /* all of one group, and so of one block */
	if (before / DROPPED_MAX != (before + nr_fresh) / DROPPED_MAX)
		disk_flush(disk, NULL);
}

bool disk_is_dropped(const struct overlay_disk *disk, uint64_t page)
{
	return bits_test(disk->dropped, page);
}

/* ---- opening ---- */

static void disk_free(struct overlay_disk *disk)
{
	free(disk->generations);
	free((void *)disk->dirty);
	free((void *)disk->dropped);
	free(disk);
}

static void header_fill(const struct image *image, const uint8_t *identity, struct map_header *header)
{
	*header = (struct map_header){
		.magic = MAP_MAGIC,
		.version = MAP_VERSION,
		.page_bytes = PAGE_BYTES,
		.size_bytes = image->shape.size_bytes,
	};
	memcpy(header->identity, identity, sizeof header->identity);
	header->checksum = checksum(header, offsetof(struct map_header, checksum));
}

/* Writes the empty slots of nr_blocks blocks. */
static int slots_create(struct overlay_disk *disk, uint64_t first_block)
{
	for (uint64_t i = 0; i < 2 * disk->nr_blocks; i++) {
		struct map_slot slot = {.generation = 2 + i % 2, .block_no = first_block + i / 2};

		slot.checksum = checksum(&slot, offsetof(struct map_slot, checksum));
		int err = write_all(disk->map_fd, &slot, sizeof slot, slot_offset(slot.block_no, slot.generation));
		if (err)
			return err;
		disk->generations[slot.block_no] = slot.generation;
	}
	return 0;
}

int disk_missing_begin(struct overlay_disk *disk)
{
	int err = disk->has_missing ? 0 : slots_create(disk, disk->nr_blocks);

	disk->has_missing |= !err;
	return err;
}

/* Writes an empty map; the header comes last, so that a map without one has nothing to lose. */
static int map_create(struct overlay_disk *disk, const uint8_t *identity)
{
	const struct image *image = disk->overlay->image;
	struct map_header header;
	uint8_t block[BLOCK_BYTES] = {0};

	if (ftruncate(disk->overlay->data_fd, 0) < 0 ||
	    ftruncate(disk->overlay->data_fd, (off_t)image->shape.map_bytes) < 0)
		return -errno;
	int err = slots_create(disk, 0);
	if (err)
		return err;
	if (fsync(disk->map_fd) < 0 || fsync(disk->overlay->data_fd) < 0)
		return -errno;
	header_fill(image, identity, &header);
	memcpy(block, &header, sizeof header);
	err = write_all(disk->map_fd, block, sizeof block, 0);
	return err ? err : fsync(disk->map_fd) < 0 ? -errno : 0;
}

static bool slot_read(struct overlay_disk *disk, uint64_t block, uint64_t generation, struct map_slot *slot)
{
	return pread(disk->map_fd, slot, sizeof *slot, slot_offset(block, generation)) == (ssize_t)sizeof *slot &&
	       slot->checksum == checksum(slot, offsetof(struct map_slot, checksum)) && slot->block_no == block &&
	       (slot->generation & 1) == generation;
}

/* Takes over the private and missing bits from the newer slot of each block; is_left: only its generation, since the
 * account has the bits. */
static int map_load(struct overlay_disk *disk, bool is_left)
{
	struct account *account = disk->overlay->account;
	uint64_t nr_pages = disk->overlay->image->shape.nr_pages, nr_private = 0, nr_missing = 0;
	uint64_t nr_blocks = disk->has_missing ? 2 * disk->nr_blocks : disk->nr_blocks;
	struct map_slot slots[2];

	for (uint64_t block = 0; block < nr_blocks; block++) {
		bool good[2] = {slot_read(disk, block, 0, &slots[0]), slot_read(disk, block, 1, &slots[1])};

		if (!good[0] && !good[1])
			return -EBADMSG;
		bool second = !good[0] || (good[1] && slots[1].generation > slots[0].generation);
		const struct map_slot *slot = &slots[second];
		disk->generations[block] = slot->generation;
		for (uint64_t i = 0; i < SLOT_PAGES && !is_left; i++) {
			uint64_t page = block % disk->nr_blocks * SLOT_PAGES + i;
			bool is_missing = block >= disk->nr_blocks;

			if (!(slot->words[i / 64] >> i % 64 & 1))
				continue;
			if (page >= nr_pages)
				return -EBADMSG;
			bool is_new = bits_set(account->private, page);
			nr_private += is_new;
			if (is_missing && is_new)
				nr_missing += bits_set(account->preloaded, page);
			else if (is_missing) /* it had just arrived */
				atomic_store(&disk->dirty[block], 1);
		}
	}
	quota_take_anyway(account->quota, nr_private);
	count_add(&account->header->private_pages, nr_private);
	count_add(COUNTER(account->header, charged_pages), nr_private);
	count_add(&account->header->preloaded_pages, nr_missing);
	return 0;
}

/* For an account that another process left: marks all blocks to be flushed by us. */
static int map_catch_up(struct overlay_disk *disk)
{
	struct overlay *overlay = disk->overlay;
	uint64_t nr_pages = overlay->image->shape.nr_pages;
	uint64_t *stored = malloc(bits_bytes(nr_pages));
	int err = stored ? overlay_stored(overlay, stored, bits_bytes(nr_pages) / 8) : -ENOMEM;

	/* Bytes of pages that are not private must not be punched while the durable map may still promise them. */
	for (uint64_t page = 0; page < nr_pages && !err; page++)
		if (stored[page / 64] >> page % 64 & 1 && !bits_test(overlay->account->private, page) &&
		    bits_set(disk->dropped, page))
			atomic_fetch_add(&disk->nr_dropped, 1);
	for (uint64_t block = 0; block < (disk->has_missing ? 2 : 1) * disk->nr_blocks; block++)
		atomic_store(&disk->dirty[block], 1);
	free(stored);
	return err;
}

static int map_open(struct overlay_disk *disk, const uint8_t *identity, bool is_left)
{
	static const struct map_header none;
	struct map_header found = {0}, wanted;
	struct stat about;

	header_fill(disk->overlay->image, identity, &wanted);
	if (pread(disk->map_fd, &found, sizeof found, 0) < 0)
		return -errno;
	if (memcmp(&found, &none, sizeof found) == 0)
		return map_create(disk, identity);
	if (found.magic != MAP_MAGIC || found.checksum != checksum(&found, offsetof(struct map_header, checksum)))
		return -EBADMSG;
	if (memcmp(&found, &wanted, sizeof found) != 0)
		return -ESTALE;
	if (fstat(disk->overlay->data_fd, &about) < 0)
		return -errno;
	if ((uint64_t)about.st_size != disk->overlay->image->shape.map_bytes)
		return -EBADMSG;
	if (fstat(disk->map_fd, &about) < 0)
		return -errno;
	disk->has_missing = about.st_size > slot_offset(disk->nr_blocks, 0);
	int err = map_load(disk, is_left);
	if (err)
		return err;
	err = is_left ? map_catch_up(disk) : overlay_drop_leftovers(disk->overlay);
	if (!err)
		err = overlay_missing_init(disk->overlay);
	/* A page that is here and still has its missing bit would be fetched again after the next crash: flush now. */
	return err || is_left ? err : flush_all(disk);
}

static int disk_open(struct overlay *overlay, int map_fd, const uint8_t *identity, bool is_left)
{
	uint64_t nr_pages = overlay->image->shape.nr_pages;
	struct overlay_disk *disk = calloc(1, sizeof *disk);

	if (!disk)
		return -ENOMEM;
	disk->overlay = overlay;
	disk->map_fd = map_fd;
	disk->nr_blocks = (nr_pages + SLOT_PAGES - 1) / SLOT_PAGES;
	disk->generations = calloc(2 * disk->nr_blocks, sizeof *disk->generations);
	disk->dirty = calloc(2 * disk->nr_blocks, sizeof *disk->dirty);
	disk->dropped = calloc(1, bits_bytes(nr_pages));
	disk->waiting_tail = &disk->waiting;
	int err = disk->generations && disk->dirty && disk->dropped ? 0 : -ENOMEM;
	if (!err)
		err = map_open(disk, identity, is_left);
	if (err) {
		disk_free(disk);
		return err;
	}
	pthread_mutex_init(&disk->lock, NULL);
	pthread_cond_init(&disk->work, NULL);
	err = -pthread_create(&disk->thread, NULL, flusher_main, disk);
	if (err) {
		pthread_mutex_destroy(&disk->lock);
		pthread_cond_destroy(&disk->work);
		disk_free(disk);
		return err;
	}
	overlay->disk = disk;
	return 0;
}

int overlay_place_files(struct account *account, int data_fd, int map_fd, const uint8_t *identity, bool is_left,
                        struct overlay **overlay_out)
{
	struct overlay *overlay;

	if (flock(map_fd, LOCK_EX | LOCK_NB) < 0)
		return errno == EWOULDBLOCK ? -EBUSY : -errno;
	int err = overlay_init(account, data_fd, &overlay);
	if (!err) {
		err = point_reach(POINT_OVERLAY_OPEN);
		if (!err)
			err = disk_open(overlay, map_fd, identity, is_left);
		if (err)
			overlay_deinit(overlay);
		else
			*overlay_out = overlay;
	}
	if (err)
		flock(map_fd, LOCK_UN);
	return err;
}

int disk_close(struct overlay *overlay)
{
	struct overlay_disk *disk = overlay->disk;

	pthread_mutex_lock(&disk->lock);
	disk->stop = true;
	pthread_cond_signal(&disk->work);
	pthread_mutex_unlock(&disk->lock);
	pthread_join(disk->thread, NULL);
	int err = flush_all(disk);
	close(disk->map_fd);
	pthread_mutex_destroy(&disk->lock);
	pthread_cond_destroy(&disk->work);
	disk_free(disk);
	return err;
}
