/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest's side of a shared image: a private, copy-on-write mapping guarded by a userfaultfd that
 * the backend answers.  See region.c for the order of the steps and why.
 *
 * Functions return >= 0 or -errno.  A struct region belongs to one process; it starts no thread, except during
 * region_replace, region_revoke and region_swap.
 */
#ifndef COWSHED_REGION_H
#define COWSHED_REGION_H

#include <stdint.h>

/* cdef-begin */
/* The step of region_init that failed, so that the caller can name the cure. */
enum region_stage {
	REGION_STAGE_NONE = 0,
	REGION_STAGE_COPY = 1,     /* process_vm_readv on ourselves */
	REGION_STAGE_MAP = 2,      /* mmap of the image, MADV_DONTFORK */
	REGION_STAGE_UFFD = 3,     /* a userfaultfd that also handles faults inside system calls */
	REGION_STAGE_API = 4,      /* its features */
	REGION_STAGE_REGISTER = 5, /* the range under it */
	REGION_STAGE_PROC = 6,     /* /proc/self/pagemap, /proc/self/mem */
};

struct region {
	void *address; /* NULL when there is no mapping */
	uint64_t map_bytes;
	int uffd; /* the three are -1 when closed */
	int pagemap_fd;
	int mem_fd;
	uint32_t read_only; /* given to region_init: 1 if the guest must not write */
	uint32_t epoch;     /* odd while another mapping takes this one's place (follow.c) */
};

/* Maps and guards map_bytes of memfd. uffd_device is an open /dev/userfaultfd to try first, or -1;
   both descriptors stay the caller's. Of *r it reads read_only alone. On failure nothing is left behind and *r is
   untouched. */
int region_init(struct region *r, int memfd, uint64_t map_bytes, int uffd_device, uint64_t features, int *stage_out);

/* Unmaps, then closes. Never waits for the backend. Harmless when repeated. */
int region_deinit(struct region *r);

/* In a forked child: closes the inherited descriptors and forgets the mapping, which is not there. */
void region_forget(struct region *r);

/* Returns the bytes copied: fewer than length if a page in between could not be loaded; -EIO if that was the
   first one; -EINVAL if the range is outside the region. Waits while the backend does not answer. */
int64_t region_read(const struct region *r, uint64_t offset, void *to, uint64_t length);
int64_t region_write(struct region *r, uint64_t offset, const void *from, uint64_t length);

/* Gives private pages back: the range is what the image holds. -EINVAL unless page-aligned and inside. */
int region_discard(struct region *r, uint64_t offset, uint64_t length);

/* Puts `with`, of the same length, in the place of r, at r's address, in one step: a reader sees the one or the other.
   No backend may answer r's userfaultfd any more, nor `with`'s yet: threads that wait for either fault anew, in `with`.
   r has its descriptors then, and `with` none. On failure both keep theirs; r may be PROT_NONE. */
int region_replace(struct region *r, struct region *with);

/* Likewise makes r inaccessible: -EIO for region_read, SIGBUS for a direct access. */
int region_revoke(struct region *r);
/* cdef-end */

/* Does what both share: puts `with`, or an inaccessible mapping if NULL, in the place of r.  Uses only address,
   map_bytes and uffd of both; all descriptors stay the caller's. */
int region_swap(const struct region *r, const struct region *with);

#endif
