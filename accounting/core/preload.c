/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/preload.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int open_source(struct account *account, int source_fd)
{
	size_t map_bytes = account->image->shape.map_bytes;
	struct stat status;

	if (fstat(source_fd, &status) < 0)
		return -errno;
	if ((uint64_t)status.st_size < map_bytes)
		return -EINVAL;
	int fd = fcntl(source_fd, F_DUPFD_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	/* Only the kernel reads it, for UFFDIO_COPY: a page that cannot be read is an error there, no SIGBUS. */
	void *at = mmap(NULL, map_bytes, PROT_READ, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED) {
		int err = -errno;

		close(fd);
		return err;
	}
	account->preloaded_bytes = at;
	account->preload_fd = fd;
	return 0;
}

void account_drop_preloaded(struct account *account)
{
	if (!account->preloaded_bytes)
		return;
	munmap((void *)(uintptr_t)account->preloaded_bytes, account->image->shape.map_bytes);
	close(account->preload_fd);
	account->preloaded_bytes = NULL;
	account->preload_fd = -1;
}

static uint64_t preload_word(struct account *account, uint64_t word_no, uint64_t word)
{
	uint64_t nr = 0;

	for (; word; word &= word - 1) {
		uint64_t page = word_no * 64 + (uint64_t)__builtin_ctzll(word);

		if (page >= account->image->shape.nr_pages || bits_test(account->private, page) ||
		    !account_address(account, page))
			continue;
		quota_take_anyway(account->quota, 1);
		account_charge(account, page);
		/* Set before unsettled is cleared: a process killed in between must not leave a charge for nothing. */
		bits_set(account->preloaded, page);
		bits_clear(account->unsettled, page);
		nr++;
	}
	return nr;
}

int64_t account_preload(struct account *account, int source_fd, const uint64_t *words, uint64_t nr_words)
{
	uint64_t nr = 0;

	if (nr_words != bits_bytes(account->image->shape.nr_pages) / sizeof(bits_word))
		return -ERANGE;
	if (account->preloaded_bytes)
		return -EBUSY;
	int err = open_source(account, source_fd);
	if (err)
		return err;
	pthread_mutex_lock(&account->write_lock);
	for (uint64_t i = 0; i < nr_words; i++)
		nr += preload_word(account, i, words[i]);
	atomic_store(&account->header->preloaded_pages, nr);
	if (!nr)
		account_drop_preloaded(account);
	pthread_mutex_unlock(&account->write_lock);
	return (int64_t)nr;
}

int account_adopt_preloaded(struct account *account, int source_fd)
{
	if (account->preloaded_bytes)
		return -EBUSY;
	return atomic_load(&account->header->preloaded_pages) ? open_source(account, source_fd) : 0;
}

int account_copy_preload_fd(struct account *account)
{
	int fd = -ENOENT;

	pthread_mutex_lock(&account->write_lock);
	if (account->preload_fd >= 0) {
		fd = fcntl(account->preload_fd, F_DUPFD_CLOEXEC, 0);
		if (fd < 0)
			fd = -errno;
	}
	pthread_mutex_unlock(&account->write_lock);
	return fd;
}

void account_preload_installed(struct account *account, uint64_t first, uint64_t nr)
{
	uint64_t nr_gone = 0;

	for (uint64_t page = first; page < first + nr; page++)
		nr_gone += bits_clear(account->preloaded, page);
	if (nr_gone && atomic_fetch_sub(&account->header->preloaded_pages, nr_gone) == nr_gone)
		account_drop_preloaded(account);
}
