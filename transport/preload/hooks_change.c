/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hooks for the calls that change a file by its path, or its metadata by a descriptor.  The program sees the image's
 * source as a file of a read-only file system: each call is EROFS.  No descriptor can change its bytes, since
 * hooks_open.c returns none that can be written to.
 *
 * Calls that cannot change a file that exists have no hook: mknod, symlink and mkstemp of its name are EEXIST.  Calls
 * inside the C library cannot be hooked, but its functions that open a named file for writing are (setmntent, utmpname,
 * updwtmp, posix_spawn's file actions).  Nor can bare system calls; the launcher's read-only mount stops those, where
 * the system lets it make one (service/commands/shield.py).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/fs.h>
#include <mntent.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/swap.h>
#include <sys/time.h>
#include <sys/xattr.h>
#include <unistd.h>
#include <utime.h>
#include <utmp.h>
#include <utmpx.h>

#include "transport/preload/hooks_change.h"
#include "transport/preload/real.h"
#include "transport/preload/config.h"

#ifndef FS_IOC_ENABLE_VERITY
#define FS_IOC_ENABLE_VERITY _IOW('f', 133, char[128])
#endif

/* Whether the call would change the image. If so, reports it and sets errno to EROFS; otherwise keeps errno. */
static bool is_refused(const char *call, int folder, const char *path, int flags)
{
	struct stat status;
	int saved = errno;
	bool is_image;

	if (!config.active || lock_is_inside() || !path)
		return false;
	is_image = real_fstatat(folder, path, &status, flags & (AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH)) == 0 &&
	           config_is_image(&status);
	errno = saved;
	if (is_image) {
		report("%s of the image's source is refused: others read it", call);
		errno = EROFS;
	}
	return is_image;
}

/* How a call names the file: by a path, by a path whose last link it does not follow, by a descriptor. */
#define BY_PATH(path) is_refused(__func__, AT_FDCWD, path, 0)
#define BY_LINK(path) is_refused(__func__, AT_FDCWD, path, AT_SYMLINK_NOFOLLOW)
#define BY_FD(fd) is_refused(__func__, fd, "", AT_EMPTY_PATH)
#define BY_FOLDER(folder, path, flags) is_refused(__func__, folder, path, flags)

/* linkat(2) follows links only with AT_SYMLINK_FOLLOW. */
#define LINK_FLAGS(flags) ((flags & AT_EMPTY_PATH) | (flags & AT_SYMLINK_FOLLOW ? 0 : AT_SYMLINK_NOFOLLOW))

#define CHANGES(X)                                                                                                    \
	X(truncate, (const char *path, off_t length), (path, length), BY_PATH(path))                                  \
	X(chmod, (const char *path, mode_t mode), (path, mode), BY_PATH(path))                                        \
	X(lchmod, (const char *path, mode_t mode), (path, mode), BY_LINK(path))                                       \
	X(fchmod, (int fd, mode_t mode), (fd, mode), BY_FD(fd))                                                       \
	X(fchmodat, (int folder, const char *path, mode_t mode, int flags), (folder, path, mode, flags),              \
	  BY_FOLDER(folder, path, flags))                                                                             \
	X(chown, (const char *path, uid_t uid, gid_t gid), (path, uid, gid), BY_PATH(path))                           \
	X(lchown, (const char *path, uid_t uid, gid_t gid), (path, uid, gid), BY_LINK(path))                          \
	X(fchown, (int fd, uid_t uid, gid_t gid), (fd, uid, gid), BY_FD(fd))                                          \
	X(fchownat, (int folder, const char *path, uid_t uid, gid_t gid, int flags), (folder, path, uid, gid, flags), \
	  BY_FOLDER(folder, path, flags))                                                                             \
	X(utime, (const char *path, const struct utimbuf *times), (path, times), BY_PATH(path))                       \
	X(utimes, (const char *path, const struct timeval times[2]), (path, times), BY_PATH(path))                    \
	X(lutimes, (const char *path, const struct timeval times[2]), (path, times), BY_LINK(path))                   \
	X(futimes, (int fd, const struct timeval times[2]), (fd, times), BY_FD(fd))                                   \
	X(futimens, (int fd, const struct timespec times[2]), (fd, times), BY_FD(fd))                                 \
	X(futimesat, (int folder, const char *path, const struct timeval times[2]), (folder, path, times),            \
	  path ? BY_FOLDER(folder, path, 0) : BY_FD(folder))                                                          \
	X(utimensat, (int folder, const char *path, const struct timespec times[2], int flags),                       \
	  (folder, path, times, flags), BY_FOLDER(folder, path, flags))                                               \
	X(setxattr, (const char *path, const char *name, const void *value, size_t length, int flags),                \
	  (path, name, value, length, flags), BY_PATH(path))                                                          \
	X(lsetxattr, (const char *path, const char *name, const void *value, size_t length, int flags),               \
	  (path, name, value, length, flags), BY_LINK(path))                                                          \
	X(fsetxattr, (int fd, const char *name, const void *value, size_t length, int flags),                         \
	  (fd, name, value, length, flags), BY_FD(fd))                                                                \
	X(removexattr, (const char *path, const char *name), (path, name), BY_PATH(path))                             \
	X(lremovexattr, (const char *path, const char *name), (path, name), BY_LINK(path))                            \
	X(fremovexattr, (int fd, const char *name), (fd, name), BY_FD(fd))                                            \
	X(unlink, (const char *path), (path), BY_LINK(path))                                                          \
	X(unlinkat, (int folder, const char *path, int flags), (folder, path, flags),                                 \
	  BY_FOLDER(folder, path, AT_SYMLINK_NOFOLLOW))                                                               \
	X(remove, (const char *path), (path), BY_LINK(path))                                                          \
	X(rename, (const char *path, const char *new_path), (path, new_path), BY_LINK(path) || BY_LINK(new_path))     \
	X(renameat, (int folder, const char *path, int new_folder, const char *new_path),                             \
	  (folder, path, new_folder, new_path),                                                                       \
	  BY_FOLDER(folder, path, AT_SYMLINK_NOFOLLOW) || BY_FOLDER(new_folder, new_path, AT_SYMLINK_NOFOLLOW))       \
	X(renameat2, (int folder, const char *path, int new_folder, const char *new_path, unsigned flags),            \
	  (folder, path, new_folder, new_path, flags),                                                                \
	  BY_FOLDER(folder, path, AT_SYMLINK_NOFOLLOW) || BY_FOLDER(new_folder, new_path, AT_SYMLINK_NOFOLLOW))       \
	X(link, (const char *path, const char *new_path), (path, new_path), BY_LINK(path))                            \
	X(linkat, (int folder, const char *path, int new_folder, const char *new_path, int flags),                    \
	  (folder, path, new_folder, new_path, flags), BY_FOLDER(folder, path, LINK_FLAGS(flags)))                    \
	X(acct, (const char *path), (path), BY_PATH(path))                                                            \
	X(swapon, (const char *path, int flags), (path, flags), BY_PATH(path))                                        \
	X(utmpname, (const char *path), (path), BY_PATH(path))

#define NEXT(name) __typeof__(name) *next = (__typeof__(name) *)real_next(&found_##name, #name)

#define HOOK(name, parameters, arguments, refused)      \
	static void *found_##name;                      \
	EXPORTED int name parameters                    \
	{                                               \
		NEXT(name);                             \
                                                        \
		return (refused) ? -1 : next arguments; \
	}
CHANGES(HOOK)

EXPORTED int truncate64(const char *path, off_t length) __attribute__((alias("truncate")));

static void *found_updwtmp, *found_updwtmpx, *found_setmntent, *found_posix_spawn_file_actions_addopen, *found_ioctl;

EXPORTED void updwtmp(const char *path, const struct utmp *record)
{
	NEXT(updwtmp);

	if (!BY_PATH(path))
		next(path, record);
}

EXPORTED void updwtmpx(const char *path, const struct utmpx *record)
{
	NEXT(updwtmpx);

	if (!BY_PATH(path))
		next(path, record);
}

EXPORTED FILE *setmntent(const char *path, const char *mode)
{
	NEXT(setmntent);

	return strpbrk(mode, "wa+") && BY_PATH(path) ? NULL : next(path, mode);
}

FILE *__setmntent(const char *path, const char *mode) __THROW;
EXPORTED FILE *__setmntent(const char *path, const char *mode) __attribute__((alias("setmntent")));

/* The child opens the file inside the C library. Returns the error number itself. */
EXPORTED int posix_spawn_file_actions_addopen(posix_spawn_file_actions_t *actions, int fd, const char *path, int flags,
                                              mode_t mode)
{
	NEXT(posix_spawn_file_actions_addopen);

	if (((flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC)) && BY_PATH(path))
		return EROFS;
	return next(actions, fd, path, flags, mode);
}

/* Refuses the changes for which a descriptor for reading suffices. */
EXPORTED int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;
	NEXT(ioctl);

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	switch (request) {
	case FS_IOC_SETFLAGS:
	case FS_IOC_FSSETXATTR:
	case FS_IOC_SETVERSION:
	case FS_IOC_ENABLE_VERITY:
	case BLKROSET:
		if (BY_FD(fd))
			return -1;
	}
	return next(fd, request, argument);
}

void change_find(void)
{
#define FIND(name, parameters, arguments, refused) real_next(&found_##name, #name);
	CHANGES(FIND)
	real_next(&found_updwtmp, "updwtmp");
	real_next(&found_updwtmpx, "updwtmpx");
	real_next(&found_setmntent, "setmntent");
	real_next(&found_posix_spawn_file_actions_addopen, "posix_spawn_file_actions_addopen");
	real_next(&found_ioctl, "ioctl");
}
