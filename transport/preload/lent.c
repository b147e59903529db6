/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/preload/lent.h"

#include <errno.h>
#include <string.h>

#include "transport/preload/real.h"
#include "transport/preload/config.h"
#include "transport/preload/wire.h"

static bool looks_so(int folder, const char *path, int flags, struct stat *status_out)
{
	int saved = errno;
	bool is_there = real_fstatat(folder, path, status_out, flags) == 0;

	errno = saved;
	return is_there;
}

/* /proc/PID/fd/N of a process that has ended: a script's helper, such as `readlink -f`, resolved {image} to that. */
static bool is_of_the_dead(const char *path)
{
	const char *number = strrchr(config.image_path, '/');
	size_t nr_digits = strncmp(path, "/proc/", 6) == 0 ? strspn(path + 6, "0123456789") : 0;
	char process[32];
	struct stat status;

	if (nr_digits == 0 || nr_digits > 10 || strncmp(path + 6 + nr_digits, "/fd", 3) != 0 ||
	    strcmp(path + 6 + nr_digits + 3, number) != 0)
		return false;
	memcpy(process, path, 6 + nr_digits);
	process[6 + nr_digits] = '\0';
	return !looks_so(AT_FDCWD, process, 0, &status);
}

bool lent_is_image(const char *path)
{
	return config.is_lent && path && (strcmp(path, config.image_path) == 0 || is_of_the_dead(path));
}

bool lent_leads(int folder, const char *path)
{
	struct stat status;

	return config.is_lent &&
	       (lent_is_image(path) || (looks_so(folder, path, 0, &status) && config_is_image(&status)));
}

bool lent_is_magic(int folder, const char *path)
{
	struct stat link, proc;

	if (lent_is_image(path))
		return true;
	return lent_leads(folder, path) && looks_so(folder, path, AT_SYMLINK_NOFOLLOW, &link) &&
	       S_ISLNK(link.st_mode) && looks_so(AT_FDCWD, "/proc/self", 0, &proc) && link.st_dev == proc.st_dev;
}

bool lent_is_name(int folder, const char *path)
{
	const char *last;

	if (!config.is_lent || !path)
		return false;
	last = strrchr(path, '/');
	/* Before any system call: few paths end in the descriptor's number. */
	return strcmp(last ? last + 1 : path, strrchr(config.image_path, '/') + 1) == 0 && lent_is_magic(folder, path);
}

int lent_open(int flags)
{
	sigset_t signals;
	int fd;

	lock_take(&signals);
	fd = wire_open_source(&signals);
	lock_release(&signals);
	if (fd < 0) {
		errno = EIO;
		return -1;
	}
	if (!(flags & O_CLOEXEC))
		fcntl(fd, F_SETFD, 0);
	return fd;
}
