/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/quota.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void quota_free(struct quota *quota)
{
	if (quota->header)
		munmap(quota->header, sizeof *quota->header);
	if (quota->fd >= 0)
		close(quota->fd);
	free(quota);
}

static int quota_map(struct quota *quota, int fd)
{
	void *at = mmap(NULL, sizeof *quota->header, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (at == MAP_FAILED)
		return -errno;
	quota->header = at;
	return 0;
}

static int quota_create(struct quota *quota)
{
	quota->fd = memfd_create("cowshed-purse", MFD_CLOEXEC);
	if (quota->fd < 0 || ftruncate(quota->fd, sizeof *quota->header) < 0)
		return -errno;
	int err = quota_map(quota, quota->fd);
	if (err)
		return err;
	quota->header->magic = QUOTA_MAGIC;
	quota->header->layout = QUOTA_LAYOUT;
	return 0;
}

static struct quota *quota_new(void)
{
	struct quota *quota = calloc(1, sizeof *quota);

	if (quota) {
		quota->fd = -1;
		atomic_store(&quota->nr_users, 1);
	}
	return quota;
}

int quota_open(uint64_t quota_pages, int policy, struct quota **quota_out)
{
	struct quota *quota = quota_new();

	if (!quota)
		return -ENOMEM;
	int err = quota_create(quota);
	if (!err)
		err = quota_set(quota, quota_pages, policy);
	if (err) {
		quota_free(quota);
		return err;
	}
	*quota_out = quota;
	return 0;
}

int quota_adopt(int fd, struct quota **quota_out)
{
	struct stat status;

	if (fstat(fd, &status) < 0)
		return -errno;
	if (status.st_size != sizeof(struct quota_header))
		return -EBADMSG;
	struct quota *quota = quota_new();
	if (!quota)
		return -ENOMEM;
	int err = quota_map(quota, fd);
	if (!err && (quota->header->magic != QUOTA_MAGIC || quota->header->layout != QUOTA_LAYOUT))
		err = -EBADMSG;
	if (err) {
		quota_free(quota);
		return err;
	}
	quota->fd = fd;
	atomic_store(&quota->header->used_pages, 0); /* pages taken and not charged died with the process */
	*quota_out = quota;
	return 0;
}

void quota_close(struct quota *quota)
{
	uint32_t before = atomic_fetch_sub(&quota->nr_users, 1);

	assert(before > 0);
	if (before == 1)
		quota_free(quota);
}

void quota_join(struct quota *quota)
{
	atomic_fetch_add(&quota->nr_users, 1);
	atomic_fetch_add(&quota->nr_accounts, 1);
}

void quota_leave(struct quota *quota)
{
	atomic_fetch_sub(&quota->nr_accounts, 1);
	quota_close(quota);
}

int quota_set(struct quota *quota, uint64_t quota_pages, int policy)
{
	if (policy < QUOTA_STOP || policy > QUOTA_ALLOW)
		return -EINVAL;
	atomic_store(&quota->header->quota_pages, quota_pages);
	atomic_store(&quota->header->policy, (uint32_t)policy);
	return 0;
}

void quota_read(const struct quota *quota, struct quota_status *status_out)
{
	*status_out = (struct quota_status){
		.quota_pages = atomic_load(&quota->header->quota_pages),
		.used_pages = atomic_load(&quota->header->used_pages),
		.policy = quota_policy_of(quota),
		.nr_accounts = atomic_load(&quota->nr_accounts),
	};
}

int quota_fd(const struct quota *quota)
{
	return quota->fd;
}
