/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/purse.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void purse_free(struct purse *purse)
{
	if (purse->header)
		munmap(purse->header, sizeof *purse->header);
	if (purse->fd >= 0)
		close(purse->fd);
	free(purse);
}

static int purse_map(struct purse *purse, int fd)
{
	void *at = mmap(NULL, sizeof *purse->header, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (at == MAP_FAILED)
		return -errno;
	purse->header = at;
	return 0;
}

static int purse_create(struct purse *purse)
{
	purse->fd = memfd_create("cowshed-purse", MFD_CLOEXEC);
	if (purse->fd < 0 || ftruncate(purse->fd, sizeof *purse->header) < 0)
		return -errno;
	int err = purse_map(purse, purse->fd);
	if (err)
		return err;
	purse->header->magic = PURSE_MAGIC;
	purse->header->layout = PURSE_LAYOUT;
	return 0;
}

static struct purse *purse_new(void)
{
	struct purse *purse = calloc(1, sizeof *purse);

	if (purse) {
		purse->fd = -1;
		atomic_store(&purse->nr_users, 1);
	}
	return purse;
}

int purse_open(uint64_t quota_pages, int policy, struct purse **purse_out)
{
	struct purse *purse = purse_new();

	if (!purse)
		return -ENOMEM;
	int err = purse_create(purse);
	if (!err)
		err = purse_set_quota(purse, quota_pages, policy);
	if (err) {
		purse_free(purse);
		return err;
	}
	*purse_out = purse;
	return 0;
}

int purse_adopt(int fd, struct purse **purse_out)
{
	struct stat status;

	if (fstat(fd, &status) < 0)
		return -errno;
	if (status.st_size != sizeof(struct purse_header))
		return -EBADMSG;
	struct purse *purse = purse_new();
	if (!purse)
		return -ENOMEM;
	int err = purse_map(purse, fd);
	if (!err && (purse->header->magic != PURSE_MAGIC || purse->header->layout != PURSE_LAYOUT))
		err = -EBADMSG;
	if (err) {
		purse_free(purse);
		return err;
	}
	purse->fd = fd;
	atomic_store(&purse->header->used_pages, 0); /* what was taken and not charged went with who took it */
	*purse_out = purse;
	return 0;
}

void purse_close(struct purse *purse)
{
	uint32_t before = atomic_fetch_sub(&purse->nr_users, 1);

	assert(before > 0);
	if (before == 1)
		purse_free(purse);
}

void purse_join(struct purse *purse)
{
	atomic_fetch_add(&purse->nr_users, 1);
	atomic_fetch_add(&purse->nr_accounts, 1);
}

void purse_leave(struct purse *purse)
{
	atomic_fetch_sub(&purse->nr_accounts, 1);
	purse_close(purse);
}

int purse_set_quota(struct purse *purse, uint64_t quota_pages, int policy)
{
	if (policy < QUOTA_STOP || policy > QUOTA_ALLOW)
		return -EINVAL;
	atomic_store(&purse->header->quota_pages, quota_pages);
	atomic_store(&purse->header->policy, (uint32_t)policy);
	return 0;
}

void purse_read(const struct purse *purse, struct purse_status *status_out)
{
	*status_out = (struct purse_status){
		.quota_pages = atomic_load(&purse->header->quota_pages),
		.used_pages = atomic_load(&purse->header->used_pages),
		.policy = purse_policy(purse),
		.nr_accounts = atomic_load(&purse->nr_accounts),
	};
}

int purse_fd(const struct purse *purse)
{
	return purse->fd;
}
