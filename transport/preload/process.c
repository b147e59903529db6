/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finds the table's owner.  A page that the kernel wipes in copies of this memory (MADV_WIPEONFORK) holds the owner's
 * process id.  A process that finds another id there is in another's memory; one that finds 0 is in a copy that our
 * fork handlers did not see.
 */
#define _GNU_SOURCE
#include "transport/preload/process.h"

#include <linux/kcmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cache/core/abi.h"
#include "transport/preload/lock.h"
#include "transport/preload/orphans.h"
#include "transport/preload/real.h"
#include "transport/preload/table.h"

static pid_t *wiped_owner; /* NULL if there is no such page: then every process is PROCESS_OWN */
static pid_t owner;        /* as it was when this memory was copied */

void process_begin(void)
{
	void *page = wiped_owner;

	owner = getpid();
	orphans_begin();
	if (!page) {
		page = real_mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (page == MAP_FAILED)
			return;
		if (real_madvise(page, PAGE_BYTES, MADV_WIPEONFORK) < 0) {
			real_munmap(page, PAGE_BYTES);
			return;
		}
	}
	wiped_owner = page;
	*wiped_owner = owner;
}

static bool shares_fds_with(pid_t other)
{
	return syscall(SYS_kcmp, getpid(), other, KCMP_FILES, 0, 0) == 0;
}

enum process_kind process_kind(void)
{
	if (!wiped_owner || *wiped_owner == getpid())
		return PROCESS_OWN;
	/* A process that shares both is as good as a thread. */
	if (*wiped_owner != 0)
		return shares_fds_with(*wiped_owner) ? PROCESS_OWN : PROCESS_IN_MEMORY_OF_ANOTHER;
	orphans_forget();
	table_forget_ranges();
	if (shares_fds_with(owner))
		return PROCESS_WITH_FDS_OF_ANOTHER;
	/* A thread that held the lock when the copy was made is not here to release it. */
	lock_renew();
	table_drop_links();
	process_begin();
	return PROCESS_OWN;
}
