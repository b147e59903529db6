/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/purse.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static void purse_free(struct purse *purse)
{
	if (purse->header)
		munmap(purse->header, sizeof *purse->header);
	if (purse->fd >= 0)
		close(purse->fd);
	free(purse);
}

static int purse_map(struct purse *purse)
{
	purse->fd = memfd_create("cowshed-purse", MFD_CLOEXEC);
	if (purse->fd < 0 || ftruncate(purse->fd, sizeof *purse->header) < 0)
		return -errno;
	void *at = mmap(NULL, sizeof *purse->header, PROT_READ | PROT_WRITE, MAP_SHARED, purse->fd, 0);
	if (at == MAP_FAILED)
		return -errno;
	purse->header = at;
	purse->header->magic = PURSE_MAGIC;
	purse->header->layout = PURSE_LAYOUT;
	return 0;
}

int purse_open(uint64_t quota_pages, int policy, struct purse **purse_out)
{
	struct purse *purse = calloc(1, sizeof *purse);

	if (!purse)
		return -ENOMEM;
	purse->fd = -1;
	atomic_store(&purse->nr_users, 1);
	int err = purse_map(purse);
	if (!err)
		err = purse_set_quota(purse, quota_pages, policy);
	if (err) {
		purse_free(purse);
		return err;
	}
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
