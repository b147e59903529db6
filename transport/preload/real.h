/* SPDX-License-Identifier: Apache-2.0 */
/* The C library's own functions behind the hooks. */
#ifndef COWSHED_PRELOAD_REAL_H
#define COWSHED_PRELOAD_REAL_H

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "transport/preload/lock.h"

struct file_handle;

#define EXPORTED __attribute__((visibility("default")))

void *real_mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset);
int real_munmap(void *address, size_t length);
void *real_mremap(void *address, size_t old_length, size_t new_length, int flags, void *new_address);
int real_mprotect(void *address, size_t length, int prot);
int real_madvise(void *address, size_t length, int advice);
int real_openat(int folder, const char *path, int flags, mode_t mode);
FILE *real_fopen(const char *path, const char *mode);
FILE *real_freopen(const char *path, const char *mode, FILE *stream);
int real_open_by_handle_at(int mount_fd, struct file_handle *handle, int flags);
int real_fstatat(int folder, const char *path, struct stat *status_out, int flags);
int real_close(int fd);
int real_dup3(int fd, int wanted, int flags, bool is_dup2);
int real_close_range(unsigned first, unsigned last, int flags);

/* Looks them up; until then they are bare system calls. */
void real_find(void);

/* Returns the next library's function of that name, and caches it in *found, which must be NULL at first. */
void *real_next(void **found, const char *name);

#endif
