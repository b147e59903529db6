/* SPDX-License-Identifier: Apache-2.0 */
/* The userfaultfd ioctls, with the kernel's partial progress, EEXIST and EAGAIN handled or reported. */
#ifndef COWSHED_UFFD_H
#define COWSHED_UFFD_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Maps [address, address + length) from the frames, write-protected, and wakes threads that wait there. Pages that are
 * mapped already are woken and skipped, max_skips of them at most: then it ends with -EEXIST. *mapped_out is the number
 * of bytes newly mapped, on failure too. -EAGAIN: the memory is changing, read the events and retry; -EFAULT: a page
 * has no frame; -ENOENT: the range is not in one registered mapping; -ESRCH: the process is gone.
 */
int uffd_continue(int uffd, uint64_t address, uint64_t length, uint32_t max_skips, uint64_t *mapped_out);
/* Installs private copies of [from, from + length), write-protected if protect, and wakes threads that wait there;
 * pages that are there already are woken and skipped. *done_out is how far it got, on failure too. */
int uffd_copy(int uffd, uint64_t address, const void *from, uint64_t length, bool protect, uint64_t *done_out);
/* Installs a private, writable copy of one page; -EEXIST (woken) if one is mapped. */
int uffd_copy_page(int uffd, uint64_t address, const void *from);
/*
 * Installs private copies of [from, from + length) at address, and wakes threads that wait there; from NULL: zero pages
 * instead of copies, which huge pages do not support. Pages (of page_bytes) that are there already are woken and
 * skipped. *done_out is how far it got, on failure too; errors are those of uffd_continue.
 */
int uffd_install(int uffd, uint64_t address, const void *from, uint64_t length, uint64_t page_bytes,
                 uint64_t *done_out);
/* Poisons [address, address + length), where nothing is mapped, and wakes it. */
int uffd_poison_range(int uffd, uint64_t address, uint64_t length);

/* Removes the write protection of the range, and wakes it. */
int uffd_open(int uffd, uint64_t address, uint64_t length);
/* Poisons the page, and wakes it; -EEXIST if one is mapped. marked: the marker that a write-protected page leaves when
 * it is punched may be there; it is removed first. */
int uffd_poison_page(int uffd, uint64_t address, bool marked);
int uffd_wake(int uffd, uint64_t address, uint64_t length);

#endif
