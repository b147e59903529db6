/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hooks for calls that inspect a path before it is opened.  Every program sees the image's source as a file that can
 * only be read; where the source is lent, also as readable, and as no symbolic link (lent.h).
 */
#define _GNU_SOURCE
#include "transport/preload/hooks_look.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "transport/preload/lent.h"
#include "transport/preload/real.h"
#include "transport/preload/config.h"

/* Entry points of programs built before glibc 2.33, or with _FORTIFY_SOURCE. */
int __xstat64(int version, const char *path, struct stat *status);
int __lxstat64(int version, const char *path, struct stat *status);
int __fxstatat64(int version, int folder, const char *path, struct stat *status, int flags);
ssize_t __readlink_chk(const char *path, char *target, size_t length, size_t room);
ssize_t __readlinkat_chk(int folder, const char *path, char *target, size_t length, size_t room);
char *__realpath_chk(const char *path, char *resolved, size_t room);

#define LOOKS(X)        \
	X(faccessat)    \
	X(stat)         \
	X(lstat)        \
	X(fstatat)      \
	X(__xstat64)    \
	X(__lxstat64)   \
	X(__fxstatat64) \
	X(statx)        \
	X(readlinkat)   \
	X(realpath)
#define FOUND(name) static void *found_##name;
LOOKS(FOUND)
#define NEXT(name) ((__typeof__(name) *)real_next(&found_##name, #name))

static bool is_lent(void)
{
	return config.is_lent && !lock_is_inside();
}

/* Keeps errno. */
static bool leads_to_image(int folder, const char *path, int flags)
{
	struct stat status;
	int saved = errno;
	bool is_image;

	is_image = real_fstatat(folder, path, &status, flags & (AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH)) == 0 &&
	           config_is_image(&status);
	errno = saved;
	return is_image;
}

EXPORTED int faccessat(int folder, const char *path, int mode, int flags)
{
	bool is_image = false;

	if (is_lent())
		is_image = lent_leads(folder, path);
	else if (config.active && !lock_is_inside() && (mode & W_OK))
		is_image = leads_to_image(folder, path, flags);
	if (!is_image || (!config.is_lent && !(mode & W_OK)))
		return NEXT(faccessat)(folder, path, mode, flags);
	if (!(mode & (W_OK | X_OK)))
		return 0;
	errno = mode & W_OK ? EROFS : EACCES;
	return -1;
}

EXPORTED int access(const char *path, int mode)
{
	return faccessat(AT_FDCWD, path, mode, 0);
}

EXPORTED int euidaccess(const char *path, int mode)
{
	return faccessat(AT_FDCWD, path, mode, AT_EACCESS);
}

EXPORTED int eaccess(const char *path, int mode) __attribute__((alias("euidaccess"), nonnull(1)));

/* fstatat(2) where the source is lent. */
static int look(int folder, const char *path, struct stat *status_out, int flags)
{
	int result, fd;

	if (lent_is_name(folder, path))
		flags &= ~AT_SYMLINK_NOFOLLOW;
	result = real_fstatat(folder, path, status_out, flags);
	if (!lent_is_image(path) || (result == 0 && config_is_image(status_out)))
		return result;
	/* The program closed the lent descriptor, or reused its number. */
	fd = lent_open(O_CLOEXEC);
	if (fd < 0)
		return -1;
	result = real_fstatat(fd, "", status_out, AT_EMPTY_PATH);
	real_close(fd);
	return result;
}

EXPORTED int stat(const char *path, struct stat *status)
{
	return is_lent() ? look(AT_FDCWD, path, status, 0) : NEXT(stat)(path, status);
}

EXPORTED int lstat(const char *path, struct stat *status)
{
	return is_lent() ? look(AT_FDCWD, path, status, AT_SYMLINK_NOFOLLOW) : NEXT(lstat)(path, status);
}

EXPORTED int fstatat(int folder, const char *path, struct stat *status, int flags)
{
	return is_lent() ? look(folder, path, status, flags) : NEXT(fstatat)(folder, path, status, flags);
}

/* The structure is the same here. */
_Static_assert(sizeof(struct stat) == sizeof(struct stat64), "one structure");
EXPORTED int stat64(const char *path, struct stat64 *status) __attribute__((alias("stat")));
EXPORTED int lstat64(const char *path, struct stat64 *status) __attribute__((alias("lstat")));
EXPORTED int fstatat64(int folder, const char *path, struct stat64 *status, int flags)
	__attribute__((alias("fstatat")));

EXPORTED int __xstat64(int version, const char *path, struct stat *status)
{
	return is_lent() ? look(AT_FDCWD, path, status, 0) : NEXT(__xstat64)(version, path, status);
}

EXPORTED int __lxstat64(int version, const char *path, struct stat *status)
{
	return is_lent() ? look(AT_FDCWD, path, status, AT_SYMLINK_NOFOLLOW) : NEXT(__lxstat64)(version, path, status);
}

EXPORTED int __fxstatat64(int version, int folder, const char *path, struct stat *status, int flags)
{
	return is_lent() ? look(folder, path, status, flags) : NEXT(__fxstatat64)(version, folder, path, status, flags);
}

EXPORTED int __xstat(int version, const char *path, struct stat *status) __attribute__((alias("__xstat64")));
EXPORTED int __lxstat(int version, const char *path, struct stat *status) __attribute__((alias("__lxstat64")));
EXPORTED int __fxstatat(int version, int folder, const char *path, struct stat *status, int flags)
	__attribute__((alias("__fxstatat64")));

EXPORTED int statx(int folder, const char *path, int flags, unsigned mask, struct statx *status)
{
	int result, fd;

	if (!is_lent() || !lent_is_name(folder, path))
		return NEXT(statx)(folder, path, flags, mask, status);
	flags &= ~AT_SYMLINK_NOFOLLOW;
	if (!lent_is_image(path) || leads_to_image(folder, path, 0))
		return NEXT(statx)(folder, path, flags, mask, status);
	fd = lent_open(O_CLOEXEC);
	if (fd < 0)
		return -1;
	result = NEXT(statx)(fd, "", flags | AT_EMPTY_PATH, mask, status);
	real_close(fd);
	return result;
}

EXPORTED ssize_t readlinkat(int folder, const char *path, char *target, size_t length)
{
	size_t name_bytes;

	if (!is_lent() || !lent_is_magic(folder, path))
		return NEXT(readlinkat)(folder, path, target, length);
	if (lent_is_name(folder, path)) {
		errno = EINVAL; /* not a link */
		return -1;
	}
	/* Another descriptor of the image: this user cannot reach its target. */
	name_bytes = strlen(config.image_path);
	if (length > name_bytes)
		length = name_bytes;
	memcpy(target, config.image_path, length);
	return (ssize_t)length;
}

EXPORTED ssize_t readlink(const char *path, char *target, size_t length)
{
	return readlinkat(AT_FDCWD, path, target, length);
}

EXPORTED ssize_t __readlinkat_chk(int folder, const char *path, char *target, size_t length, size_t room)
{
	if (length > room)
		abort(); /* as the C library does */
	return readlinkat(folder, path, target, length);
}

EXPORTED ssize_t __readlink_chk(const char *path, char *target, size_t length, size_t room)
{
	return __readlinkat_chk(AT_FDCWD, path, target, length, room);
}

EXPORTED char *realpath(const char *path, char *resolved)
{
	if (!is_lent() || !lent_leads(AT_FDCWD, path))
		return NEXT(realpath)(path, resolved);
	return resolved ? strcpy(resolved, config.image_path) : strdup(config.image_path);
}

EXPORTED char *__realpath_chk(const char *path, char *resolved, size_t room)
{
	if (room < PATH_MAX)
		abort(); /* as the C library does */
	return realpath(path, resolved);
}

EXPORTED char *canonicalize_file_name(const char *path)
{
	return realpath(path, NULL);
}

void look_find(void)
{
#define FIND(name) real_next(&found_##name, #name);
	LOOKS(FIND)
}
