/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls the next library's functions: another preloaded one may stand between us and the C library, hence RTLD_NEXT.
 * Calls made before our constructor has run go to the kernel.
 */
#define _GNU_SOURCE
#include "transport/preload/real.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct {
	void *(*mmap)(void *, size_t, int, int, int, off_t);
	int (*munmap)(void *, size_t);
	void *(*mremap)(void *, size_t, size_t, int, ...);
	int (*mprotect)(void *, size_t, int);
	int (*madvise)(void *, size_t, int);
	int (*openat)(int, const char *, int, ...);
	FILE *(*fopen)(const char *, const char *);
	FILE *(*freopen)(const char *, const char *, FILE *);
	int (*fstatat)(int, const char *, struct stat *, int);
	int (*close)(int);
	int (*dup2)(int, int);
	int (*dup3)(int, int, int);
	int (*close_range)(unsigned, unsigned, int);
} next;

static void find(void *pointer_out, const char *name)
{
	void *found = dlsym(RTLD_NEXT, name);

	memcpy(pointer_out, &found, sizeof(found));
}

void *real_next(void **found, const char *name)
{
	if (!*found)
		*found = dlsym(RTLD_NEXT, name);
	return *found;
}

void real_find(void)
{
	find(&next.mmap, "mmap64");
	find(&next.munmap, "munmap");
	find(&next.mremap, "mremap");
	find(&next.mprotect, "mprotect");
	find(&next.madvise, "madvise");
	find(&next.openat, "openat64");
	find(&next.fopen, "fopen64");
	find(&next.freopen, "freopen64");
	find(&next.fstatat, "fstatat64");
	find(&next.close, "close");
	find(&next.dup2, "dup2");
	find(&next.dup3, "dup3");
	find(&next.close_range, "close_range");
}

void *real_mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
	if (next.mmap)
		return next.mmap(address, length, prot, flags, fd, offset);
	return (void *)syscall(SYS_mmap, address, length, prot, flags, fd, offset);
}

int real_munmap(void *address, size_t length)
{
	if (next.munmap)
		return next.munmap(address, length);
	return (int)syscall(SYS_munmap, address, length);
}

void *real_mremap(void *address, size_t old_length, size_t new_length, int flags, void *new_address)
{
	if (next.mremap)
		return next.mremap(address, old_length, new_length, flags, new_address);
	return (void *)syscall(SYS_mremap, address, old_length, new_length, flags, new_address);
}

int real_mprotect(void *address, size_t length, int prot)
{
	if (next.mprotect)
		return next.mprotect(address, length, prot);
	return (int)syscall(SYS_mprotect, address, length, prot);
}

int real_madvise(void *address, size_t length, int advice)
{
	if (next.madvise)
		return next.madvise(address, length, advice);
	return (int)syscall(SYS_madvise, address, length, advice);
}

int real_openat(int folder, const char *path, int flags, mode_t mode)
{
	if (next.openat)
		return next.openat(folder, path, flags, mode);
	return (int)syscall(SYS_openat, folder, path, flags, mode);
}

FILE *real_fopen(const char *path, const char *mode)
{
	if (next.fopen)
		return next.fopen(path, mode);
	errno = ENOSYS;
	return NULL;
}

FILE *real_freopen(const char *path, const char *mode, FILE *stream)
{
	if (next.freopen)
		return next.freopen(path, mode, stream);
	errno = ENOSYS;
	return NULL;
}

int real_open_by_handle_at(int mount_fd, struct file_handle *handle, int flags)
{
	return (int)syscall(SYS_open_by_handle_at, mount_fd, handle, flags);
}

int real_fstatat(int folder, const char *path, struct stat *status_out, int flags)
{
	if (next.fstatat)
		return next.fstatat(folder, path, status_out, flags);
	return (int)syscall(SYS_newfstatat, folder, path, status_out, flags);
}

int real_close(int fd)
{
	if (next.close)
		return next.close(fd);
	return (int)syscall(SYS_close, fd);
}

int real_dup3(int fd, int wanted, int flags, bool is_dup2)
{
	if (is_dup2)
		return next.dup2 ? next.dup2(fd, wanted) : (int)syscall(SYS_dup2, fd, wanted);
	return next.dup3 ? next.dup3(fd, wanted, flags) : (int)syscall(SYS_dup3, fd, wanted, flags);
}

int real_close_range(unsigned first, unsigned last, int flags)
{
	if (next.close_range)
		return next.close_range(first, last, flags);
	return (int)syscall(SYS_close_range, first, last, flags);
}
