/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The file that an image's frames are in: a memfd or, for extents of 2 MiB, a file on a private tmpfs of huge pages.
 *
 * A memfd gets huge pages only if the host's shmem_enabled says so, which is not ours to change. A tmpfs has an option
 * of its own, so one is mounted for each such image, in no mount namespace: no path leads to it, and it ends with the
 * last descriptor or mapping of its file. Its option is huge=within_size: the last, shorter extent takes no more than
 * its own pages. Where the kernel finds no huge page, small ones are taken and nothing else changes.
 *
 * Such a file must be written and punched by whole extents. A write of a part makes a whole page of 2 MiB, and what
 * was not written is there and zero; a punch of a part empties pages and keeps them.
 */
#ifndef COWSHED_FRAMES_H
#define COWSHED_FRAMES_H

#include <stdint.h>

/* cdef-begin */
/* Extents of so many pages have frames of huge pages. */
#define HUGE_EXTENT_PAGES 512
/* 0 if this process may mount a tmpfs with huge pages, else -errno: -EPERM without CAP_SYS_ADMIN, -EINVAL or -ENOSYS
 * if the kernel knows no such thing. */
int frames_probe_huge(void);
/* cdef-end */

/* Makes the file, empty, of map_bytes. frames_fd_out: for us; guest_fd_out: for guests, read-only. Neither a guest that
 * has the one nor a process that finds the other can open the file for writing, unless it runs as our user. */
int frames_open(uint64_t map_bytes, uint32_t extent_pages, int *frames_fd_out, int *guest_fd_out);

#endif
