/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Kernel interfaces newer than Debian 12's headers, defined here with their layout asserted, and the
 * one list of userfaultfd features that cowshed needs.
 *
 * Sources: linux/include/uapi/linux/{userfaultfd.h,fs.h} (6.18), ioctl_userfaultfd(2).
 */
#ifndef COWSHED_ABI_H
#define COWSHED_ABI_H

#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define PAGE_BYTES 4096u
#define PAGE_SHIFT 12

/* 6.4: the page is installed write-protected, so that the first write is an event. */
#ifndef UFFDIO_CONTINUE_MODE_WP
#define UFFDIO_CONTINUE_MODE_WP ((uint64_t)1 << 1)
#endif

/* 6.6: touching the page raises SIGBUS. */
#ifndef UFFDIO_POISON
#define UFFD_FEATURE_POISON ((uint64_t)1 << 14)
struct uffdio_poison {
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif
_Static_assert(sizeof(struct uffdio_poison) == 32, "uffdio_poison is the kernel's");

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

_Static_assert(sizeof(struct uffdio_continue) == 32, "uffdio_continue is the kernel's");
_Static_assert(sizeof(struct uffdio_copy) == 40, "uffdio_copy is the kernel's");
_Static_assert(sizeof(struct uffdio_writeprotect) == 24, "uffdio_writeprotect is the kernel's");
_Static_assert(sizeof(struct uffd_msg) == 32, "uffd_msg is the kernel's");

/* Features that a guest's userfaultfd must have; the handshake sends them to the guest. */
#define COWSHED_UFFD_FEATURES                                                                     \
	(UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_PAGEFAULT_FLAG_WP | \
	 UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP | \
	 UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_POISON)

/* 6.7: PAGEMAP_SCAN. */
#ifndef PAGEMAP_SCAN
struct page_region {
	uint64_t start;
	uint64_t end;
	uint64_t categories;
};
struct pm_scan_arg {
	uint64_t size;
	uint64_t flags;
	uint64_t start;
	uint64_t end;
	uint64_t walk_end;
	uint64_t vec;
	uint64_t vec_len;
	uint64_t max_pages;
	uint64_t category_inverted;
	uint64_t category_mask;
	uint64_t category_anyof_mask;
	uint64_t return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_WPALLOWED (1 << 0)
#define PAGE_IS_WRITTEN (1 << 1)
#define PAGE_IS_FILE (1 << 2)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
#define PAGE_IS_PFNZERO (1 << 5)
#endif
_Static_assert(sizeof(struct page_region) == 24, "page_region is the kernel's");
_Static_assert(sizeof(struct pm_scan_arg) == 96, "pm_scan_arg is the kernel's");

#endif
