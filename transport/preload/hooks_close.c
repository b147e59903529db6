/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hooks for close and dup.  Programs close descriptors that they did not open: daemons all of them, shells those above
 * a number.  A mapping without its connection would lose its guard, so our descriptors look closed to the program.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <unistd.h>

#include "transport/preload/process.h"
#include "transport/preload/real.h"
#include "transport/preload/table.h"
#include "transport/preload/config.h"

static bool is_none_of_ours(unsigned first, unsigned last)
{
	return !config.active || lock_is_inside() || !table_may_own(first, last);
}

/* A process must not take the lock of another's table: its death would leave the table locked. */
static bool may_lock(void)
{
	return process_kind() == PROCESS_OWN;
}

static bool is_ours(int fd)
{
	sigset_t signals;
	bool found;

	if (!may_lock())
		return table_find_fd(fd) != NULL;
	lock_take(&signals);
	found = table_find_fd(fd) != NULL;
	lock_release(&signals);
	return found;
}

EXPORTED int close(int fd)
{
	if (is_none_of_ours((unsigned)fd, (unsigned)fd) || !is_ours(fd))
		return real_close(fd);
	errno = EBADF;
	return -1;
}

static int close_others(unsigned first, unsigned last, int flags)
{
	int result = 0;

	for (unsigned long fd = first; result == 0 && fd <= last;) {
		unsigned long ours = fd;

		/* No descriptor is above INT_MAX; the tables are short. */
		while (ours <= last && ours <= INT_MAX && !table_find_fd((int)ours) &&
		       table_may_own((unsigned)ours, last))
			ours++;
		if (ours > last || !table_may_own((unsigned)ours, last))
			ours = (unsigned long)last + 1;
		if (ours > fd)
			result = real_close_range((unsigned)fd, (unsigned)(ours - 1), flags);
		fd = ours + 1;
	}
	return result;
}

EXPORTED int close_range(unsigned first, unsigned last, int flags)
{
	sigset_t signals;
	int result;

	if (is_none_of_ours(first, last) || first > last)
		return real_close_range(first, last, flags);
	if (!may_lock())
		return close_others(first, last, flags);
	lock_take(&signals);
	result = close_others(first, last, flags);
	lock_release(&signals);
	return result;
}

EXPORTED void closefrom(int lowest)
{
	close_range(lowest < 0 ? 0 : (unsigned)lowest, UINT_MAX, 0);
}

/* Gives the program the number that it wants: a descriptor of ours moves out of the way. */
static int duplicate(int fd, int wanted, int flags, bool is_dup2)
{
	sigset_t signals;
	int *ours, result;

	if (is_none_of_ours((unsigned)wanted, (unsigned)wanted))
		return real_dup3(fd, wanted, flags, is_dup2);
	switch (process_kind()) {
	case PROCESS_OWN:
		break;
	case PROCESS_IN_MEMORY_OF_ANOTHER: /* these are its own copies */
		return real_dup3(fd, wanted, flags, is_dup2);
	case PROCESS_WITH_FDS_OF_ANOTHER: /* the other would not learn of a new number */
		if (!table_find_fd(wanted))
			return real_dup3(fd, wanted, flags, is_dup2);
		errno = EBUSY;
		return -1;
	}
	lock_take(&signals);
	ours = table_find_fd(wanted);
	if (ours) {
		table_hide_fd(ours);
		table_update_bounds();
	}
	result = -1;
	errno = EMFILE;
	if (!ours || *ours != wanted)
		result = real_dup3(fd, wanted, flags, is_dup2);
	lock_release(&signals);
	return result;
}

EXPORTED int dup2(int fd, int wanted)
{
	return duplicate(fd, wanted, 0, true);
}

EXPORTED int dup3(int fd, int wanted, int flags)
{
	return duplicate(fd, wanted, flags, false);
}
