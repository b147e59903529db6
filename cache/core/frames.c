/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cache/core/frames.h"

#include "cache/core/abi.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

/* As the kernel names a memfd: successors and audits know the descriptor by its name. */
#define FRAMES_NAME "memfd:cowshed-image"

static int tmpfs_configure(int fs_fd)
{
	/* Without size=0 the limit is half of the memory; the store has one of its own. */
	return fsconfig(fs_fd, FSCONFIG_SET_STRING, "huge", "within_size", 0) < 0 ||
	                       fsconfig(fs_fd, FSCONFIG_SET_STRING, "size", "0", 0) < 0 ||
	                       fsconfig(fs_fd, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0
		       ? -errno
		       : 0;
}

/* Mounts a tmpfs where nobody sees it; returns its root directory, or -errno. */
static int tmpfs_mount(void)
{
	int fs_fd = fsopen("tmpfs", FSOPEN_CLOEXEC);
	int mount_fd;

	if (fs_fd < 0)
		return -errno;
	mount_fd = tmpfs_configure(fs_fd);
	if (mount_fd == 0) {
		mount_fd = fsmount(fs_fd, FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
		if (mount_fd < 0)
			mount_fd = -errno;
	}
	close(fs_fd);
	return mount_fd;
}

int frames_probe_huge(void)
{
	int mount_fd = tmpfs_mount();

	if (mount_fd < 0)
		return mount_fd;
	close(mount_fd);
	return 0;
}

/* A file without a name on a tmpfs of its own; returns its descriptor, or -errno. */
static int huge_create(void)
{
	int mount_fd = tmpfs_mount();
	int fd;

	if (mount_fd < 0)
		return mount_fd;
	fd = openat(mount_fd, FRAMES_NAME, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
	if (fd < 0) {
		fd = -errno;
	} else if (unlinkat(mount_fd, FRAMES_NAME, 0) < 0) {
		int err = -errno;

		close(fd);
		fd = err;
	}
	close(mount_fd);
	return fd;
}

static int frames_create(uint32_t extent_pages)
{
	if (extent_pages == HUGE_EXTENT_PAGES)
		return huge_create();
	int fd = memfd_create("cowshed-image", MFD_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

/*
 * The file gets mode 0, so that guests cannot reopen it for writing; they get an O_RDONLY description that was opened
 * before. Seals would do, too, but F_SEAL_WRITE and F_SEAL_FUTURE_WRITE forbid punching.
 */
int frames_open(uint64_t map_bytes, uint32_t extent_pages, int *frames_fd_out, int *guest_fd_out)
{
	char path[32];
	int frames_fd = frames_create(extent_pages);
	int guest_fd = -1;

	if (frames_fd < 0)
		return frames_fd;
	snprintf(path, sizeof path, "/proc/self/fd/%d", frames_fd);
	if (ftruncate(frames_fd, (off_t)map_bytes) == 0)
		guest_fd = open(path, O_RDONLY | O_CLOEXEC);
	if (guest_fd < 0 || fchmod(frames_fd, 0) < 0) {
		int err = -errno;

		if (guest_fd >= 0)
			close(guest_fd);
		close(frames_fd);
		return err;
	}
	*frames_fd_out = frames_fd;
	*guest_fd_out = guest_fd;
	return 0;
}
