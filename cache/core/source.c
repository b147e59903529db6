/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cache/core/source.h"

#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "cache/core/store.h"

#include <errno.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#define LOAD_ATTEMPTS 3
#define RETRY_DELAY_NS 5000000l /* doubled each time */

/* Reads exactly length bytes, or fails: a short file is an error, never a page of zeros. */
static int source_read_all(int fd, char *to, uint64_t length, uint64_t offset, uint64_t asked)
{
	uint64_t done = 0;

	while (done < length) {
		uint64_t some = asked - done;

		if (some > PAGE_BYTES && point_reach(POINT_LOAD_SHORT) < 0)
			some = PAGE_BYTES; /* as after a signal or from a network file system */
		ssize_t got = pread(fd, to + done, some, (off_t)(offset + done));

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		if (got == 0)
			return -ENODATA; /* shorter than when it was opened */
		done += (uint64_t)got;
	}
	return 0;
}

/*
 * O_DIRECT keeps a second copy of the source out of the page cache. It needs lengths in whole blocks, so the tail is
 * read in full pages and the read ends short at the end of the file. A file system without O_DIRECT gets buffered
 * reads, and their page cache is dropped.
 */
static int source_read(struct image *image, char *to, uint64_t length, uint64_t offset)
{
	uint64_t whole = (length + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
	int err = point_reach(POINT_LOAD_READ);

	if (err)
		return err;
	err = -EINVAL;
	if (image->direct_fd >= 0)
		err = source_read_all(image->direct_fd, to, length, offset, whole);
	if (err == -EINVAL) {
		err = source_read_all(image->source_fd, to, length, offset, length);
		posix_fadvise(image->source_fd, (off_t)offset, (off_t)whole, POSIX_FADV_DONTNEED);
	}
	return err;
}

int source_read_retrying(struct loader *loader, char *to, uint64_t length, uint64_t offset)
{
	struct image *image = loader->image;
	struct timespec delay = {.tv_nsec = RETRY_DELAY_NS};
	int err = 0;

	for (int attempt = 0; attempt < LOAD_ATTEMPTS; attempt++) {
		atomic_store(&loader->reading_since_ns, loader_now_ns());
		err = source_read(image, to, length, offset);
		atomic_store(&loader->reading_since_ns, 0);
		if (!err || err == -ENODATA || atomic_load(&image->store->stop))
			break;
		if (attempt + 1 < LOAD_ATTEMPTS) {
			atomic_fetch_add(&image->totals->load_retries, 1);
			nanosleep(&delay, NULL);
			delay.tv_nsec *= 2;
		}
	}
	return err;
}
