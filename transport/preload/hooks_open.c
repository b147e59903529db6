/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hooks for opening the image's source.  The kernel serves reads.  Nobody may write: an open for reading and writing
 * (as QEMU's for share=off, which writes nothing) returns a read-only descriptor, so that a write is EBADF; an open for
 * writing alone is refused.  A user who may not open the source gets a descriptor from the backend, with a file
 * position of its own for each open.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "transport/preload/lent.h"
#include "transport/preload/real.h"
#include "transport/preload/config.h"

/* Whether open takes a mode, as fcntl.h decides it. */
#define HAS_MODE(flags) (((flags) & O_CREAT) != 0 || ((flags) & O_TMPFILE) == O_TMPFILE)

/* These are what fcntl.h turns open into when programs are built with _FORTIFY_SOURCE. */
int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int folder, const char *path, int flags);
int __openat64_2(int folder, const char *path, int flags);

/* Returns the flags to open with, or -1 with errno if the open is refused. */
static int readable_flags(int flags)
{
	if ((flags & O_ACCMODE) == O_WRONLY || (flags & O_TRUNC)) {
		report("writing over the image's source is refused: others read it");
		errno = EROFS;
		return -1;
	}
	if ((flags & O_CREAT) && !(flags & O_EXCL))
		flags &= ~O_CREAT;
	return (flags & ~O_ACCMODE) | O_RDONLY;
}

/* Opens a lent source by its name. */
static int open_lent(int folder, const char *path, int flags)
{
	int fd = -1;

	if (flags & O_DIRECTORY) {
		errno = ENOTDIR;
		return -1;
	}
	if (!(flags & O_PATH))
		return lent_open(flags);
	/* The kernel grants O_PATH to anybody; of the link itself, it would reveal the true path. */
	if (lent_leads(folder, path))
		fd = real_openat(folder, path, flags & ~O_NOFOLLOW, 0);
	return fd < 0 ? lent_open(flags) : fd;
}

static int open_any(int folder, const char *path, int flags, mode_t mode)
{
	bool is_for_writing = !(flags & O_PATH) && ((flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC));
	struct stat status;
	bool is_name;
	int fd;

	if (!config.active || lock_is_inside())
		return real_openat(folder, path, flags, mode);
	is_name = lent_is_name(folder, path);
	if (is_for_writing && (is_name || (real_fstatat(folder, path, &status, 0) == 0 && config_is_image(&status))))
		flags = readable_flags(flags);
	if (flags < 0)
		return -1;
	if (is_name)
		return open_lent(folder, path, flags);
	fd = real_openat(folder, path, flags, mode);
	/* Another name of the source, such as a link. */
	if (fd < 0 && errno == EACCES && lent_leads(folder, path))
		return lent_open(flags);
	return fd;
}

#define TAKE_MODE(mode, flags)                            \
	do {                                              \
		if (HAS_MODE(flags)) {                    \
			va_list arguments;                \
                                                          \
			va_start(arguments, flags);       \
			mode = va_arg(arguments, mode_t); \
			va_end(arguments);                \
		}                                         \
	} while (0)

EXPORTED int open64(const char *path, int flags, ...)
{
	mode_t mode = 0;

	TAKE_MODE(mode, flags);
	return open_any(AT_FDCWD, path, flags, mode);
}

EXPORTED int open(const char *path, int flags, ...) __attribute__((alias("open64")));
EXPORTED int __open(const char *path, int flags, ...) __attribute__((alias("open64"), nonnull(1)));
EXPORTED int __open64(const char *path, int flags, ...) __attribute__((alias("open64"), nonnull(1)));

EXPORTED int openat64(int folder, const char *path, int flags, ...)
{
	mode_t mode = 0;

	TAKE_MODE(mode, flags);
	return open_any(folder, path, flags, mode);
}

EXPORTED int openat(int folder, const char *path, int flags, ...) __attribute__((alias("openat64")));

EXPORTED int __open64_2(const char *path, int flags)
{
	return open_any(AT_FDCWD, path, flags, 0);
}

EXPORTED int __open_2(const char *path, int flags) __attribute__((alias("__open64_2")));

EXPORTED int __openat64_2(int folder, const char *path, int flags)
{
	return open_any(folder, path, flags, 0);
}

EXPORTED int __openat_2(int folder, const char *path, int flags) __attribute__((alias("__openat64_2")));

EXPORTED int creat64(const char *path, mode_t mode)
{
	return open_any(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode);
}

EXPORTED int creat(const char *path, mode_t mode) __attribute__((alias("creat64")));

/* Whether this library must serve an fopen(3) of the path. */
static bool is_ours_to_open(const char *path, const char *mode)
{
	struct stat status;

	if (!config.active || lock_is_inside())
		return false;
	return lent_leads(AT_FDCWD, path) ||
	       (strpbrk(mode, "wa+") && real_fstatat(AT_FDCWD, path, &status, 0) == 0 && config_is_image(&status));
}

/* Opens path as fopen(3) would; returns a descriptor for reading, or -1 with errno. */
static int open_for_stream(const char *path, const char *mode)
{
	int flags = mode[0] != 'r' ? O_WRONLY : strchr(mode, '+') ? O_RDWR : O_RDONLY;

	return open_any(AT_FDCWD, path, flags | (strchr(mode, 'e') ? O_CLOEXEC : 0), 0);
}

EXPORTED FILE *fopen64(const char *path, const char *mode)
{
	FILE *file;
	int fd;

	if (!is_ours_to_open(path, mode))
		return real_fopen(path, mode);
	fd = open_for_stream(path, mode);
	if (fd < 0)
		return NULL;
	file = fdopen(fd, strchr(mode, 'e') ? "re" : "r");
	if (!file)
		real_close(fd);
	return file;
}

EXPORTED FILE *fopen(const char *path, const char *mode) __attribute__((alias("fopen64")));
EXPORTED FILE *_IO_fopen(const char *path, const char *mode) __attribute__((alias("fopen64"), malloc));

/* As freopen(3), closes the stream's old file in any case, and on failure the stream. */
EXPORTED FILE *freopen64(const char *path, const char *mode, FILE *stream)
{
	char own_path[40];
	int fd, number;

	if (!path && fileno(stream) >= 0) {
		/* The same file again, in another mode. */
		snprintf(own_path, sizeof(own_path), "/proc/self/fd/%d", fileno(stream));
		if (is_ours_to_open(own_path, mode))
			path = own_path;
	}
	if (!path || !is_ours_to_open(path, mode))
		return real_freopen(path, mode, stream);
	fd = open_for_stream(path, mode);
	if (fd < 0) {
		int err = errno;

		fclose(stream);
		errno = err;
		return NULL;
	}
	/* First a stream for reading, then the image as its file. */
	stream = real_freopen("/dev/null", strchr(mode, 'e') ? "re" : "r", stream);
	number = stream ? real_dup3(fd, fileno(stream), strchr(mode, 'e') ? O_CLOEXEC : 0, false) : -1;
	real_close(fd);
	return number < 0 ? NULL : stream;
}

EXPORTED FILE *freopen(const char *path, const char *mode, FILE *stream) __attribute__((alias("freopen64")));

/* A handle shows its file only once it is open, so the hook opens it with O_PATH first. */
EXPORTED int open_by_handle_at(int mount_fd, struct file_handle *handle, int flags)
{
	bool is_for_writing = (flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC);
	struct stat status;
	int fd;

	if (config.active && !lock_is_inside() && is_for_writing && !(flags & O_PATH)) {
		fd = real_open_by_handle_at(mount_fd, handle, O_PATH | O_CLOEXEC);
		if (fd < 0)
			return -1;
		if (fstat(fd, &status) == 0 && config_is_image(&status))
			flags = readable_flags(flags);
		real_close(fd);
		if (flags < 0)
			return -1;
	}
	return real_open_by_handle_at(mount_fd, handle, flags);
}
