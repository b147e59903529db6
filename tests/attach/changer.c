/* SPDX-License-Identifier: Apache-2.0 */
/*
 * changer TABLE IMAGE: tries each way in a table to change a file or its name, and prints those that did or that
 * did not say that it cannot be. TABLE is "calls", the C library's, or "bare", system calls that no library sees.
 * Beside IMAGE are IMAGE.hard, another name of it, IMAGE.soft, a link to it, and IMAGE.other, another file.
 */
#define _GNU_SOURCE
#include <aio.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/openat2.h>
#include <mntent.h>
#include <spawn.h>
#include <stdint.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>
#include <utime.h>
#include <utmp.h>
#include <utmpx.h>

int __open_2(const char *path, int flags);
int __openat64_2(int folder, const char *path, int flags);

static const char *image, *name; /* its path, and its name in its folder */
static char hard[4096], soft[4096], other[4096];
static int folder; /* open */

/* Of an open that gives a descriptor: that was a change of nothing yet, so write through it. */
static int used(int fd)
{
	return fd < 0 ? -1 : (int)write(fd, "changed", 7);
}

static int used_stream(FILE *file)
{
	return !file || fputs("changed", file) < 0 || fflush(file) < 0 ? -1 : 0;
}

/* As QEMU opens it, which is given a descriptor for reading. */
static int both(void)
{
	return open(image, O_RDWR);
}

static char *self_path(int fd)
{
	static char path[40];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	return path;
}

static int other_fd(void)
{
	return open(other, O_RDWR);
}

static int piped(void)
{
	int ends[2];

	if (pipe(ends) < 0 || write(ends[1], "changed", 7) < 0)
		abort();
	return ends[0];
}

static int written_by_aio(void)
{
	struct aiocb request = {.aio_fildes = both(), .aio_buf = "changed", .aio_nbytes = 7};
	const struct aiocb *requests[] = {&request};

	if (aio_write(&request) < 0 || aio_suspend(requests, 1, NULL) < 0)
		return -1;
	errno = aio_error(&request);
	return errno ? -1 : 0;
}

static int written_by_mapping(int type)
{
	char *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, type, both(), 0);

	if (at == MAP_FAILED)
		return -1;
	memcpy(at, "changed", 7);
	return 0;
}

static int ran(const char *script)
{
	char line[9000];
	int status;

	snprintf(line, sizeof(line), "i='%s'; exec 2>/dev/null; %s", image, script);
	status = system(line);
	errno = EROFS;
	return status == 0 ? 0 : -1;
}

static int spawned(void)
{
	char *words[] = {"sh", "-c", "echo changed", NULL};
	posix_spawn_file_actions_t actions;
	pid_t child;
	int status;

	posix_spawn_file_actions_init(&actions);
	errno = posix_spawn_file_actions_addopen(&actions, 1, image, O_WRONLY | O_TRUNC, 0);
	if (errno)
		return -1;
	errno = posix_spawn(&child, "/bin/sh", &actions, NULL, words, NULL);
	return errno || waitpid(child, &status, 0) < 0 ? -1 : 0;
}

static int attributes_set(unsigned long request)
{
	int attributes = 0x80; /* no atime */

	return ioctl(open(image, O_RDONLY), request, &attributes);
}

static int extended_set(void)
{
	struct fsxattr attributes = {.fsx_xflags = FS_XFLAG_NOATIME};

	return ioctl(open(image, O_RDONLY), FS_IOC_FSSETXATTR, &attributes);
}

static int opened_by_handle(void)
{
	static union {
		struct file_handle handle;
		char room[sizeof(struct file_handle) + MAX_HANDLE_SZ];
	} found = {.handle = {.handle_bytes = MAX_HANDLE_SZ}};
	int mount;

	if (name_to_handle_at(folder, name, &found.handle, &mount, 0) < 0)
		return -1;
	return used(open_by_handle_at(folder, &found.handle, O_WRONLY));
}

static int recorded(int is_extended)
{
	errno = 0;
	if (is_extended)
		updwtmpx(image, &(struct utmpx){.ut_type = USER_PROCESS});
	else
		updwtmp(image, &(struct utmp){.ut_type = USER_PROCESS});
	return errno ? -1 : 0;
}

static int logged_in(void)
{
	if (utmpname(image) < 0)
		return -1;
	setutent();
	return pututline(&(struct utmp){.ut_type = USER_PROCESS}) ? 0 : -1;
}

static int opened_anew(void)
{
	struct open_how how = {.flags = O_RDWR};

	return used((int)syscall(SYS_openat2, AT_FDCWD, image, &how, sizeof(how)));
}

static const struct timeval old[2];
static const struct timespec ancient[2];

/* Tried one after another: the expression, and the error with which it is to fail; 0 for those that differ. */
#define TRY(what, wanted)                          \
	do {                                       \
		errno = 0;                         \
		judge(#what, (int)(what), wanted); \
	} while (0)

struct state {
	struct stat status;
	uint64_t sum;
};

static struct state before;

static struct state look(void)
{
	int fd = (int)syscall(SYS_openat, AT_FDCWD, image, O_RDONLY);
	struct state now = {.sum = 14695981039346656037u};
	unsigned char bytes[65536];
	ssize_t nr_bytes;

	if (fd < 0 || fstat(fd, &now.status) < 0)
		return now;
	while ((nr_bytes = read(fd, bytes, sizeof(bytes))) > 0)
		for (ssize_t i = 0; i < nr_bytes; i++)
			now.sum = (now.sum ^ bytes[i]) * 1099511628211u;
	close(fd);
	return now;
}

static int differs(const struct state *one, const struct state *two)
{
	const struct stat *a = &one->status, *b = &two->status;

	return one->sum != two->sum || a->st_ino != b->st_ino || a->st_size != b->st_size || a->st_mode != b->st_mode ||
	       a->st_uid != b->st_uid || a->st_gid != b->st_gid || a->st_nlink != b->st_nlink ||
	       a->st_blocks != b->st_blocks || memcmp(&a->st_mtim, &b->st_mtim, sizeof(a->st_mtim)) != 0 ||
	       memcmp(&a->st_ctim, &b->st_ctim, sizeof(a->st_ctim)) != 0;
}

static void judge(const char *what, int result, int wanted)
{
	int err = errno;
	struct state now = look();

	if (differs(&before, &now))
		printf("%s: changed the image\n", what);
	else if (result >= 0)
		printf("%s: did not fail\n", what);
	else if (wanted && err != wanted)
		printf("%s: failed with %s\n", what, strerrorname_np(err));
	fflush(stdout);
	before = now;
}

static void try_calls(void)
{
	char *proc = self_path(open(image, O_RDONLY));

	TRY(used(open(image, O_WRONLY)), EROFS);
	TRY(used(open(image, O_WRONLY | O_APPEND)), EROFS);
	TRY(used(open(image, O_RDONLY | O_TRUNC)), EROFS);
	TRY(used(open64(image, O_RDWR | O_CREAT | O_TRUNC, 0600)), EROFS);
	TRY(used(open(name, O_WRONLY)), EROFS); /* the current folder is its */
	TRY(used(openat(folder, name, O_WRONLY | O_TRUNC)), EROFS);
	TRY(used(openat64(folder, name, O_WRONLY)), EROFS);
	TRY(used(__open_2(image, O_WRONLY)), EROFS);
	TRY(used(__openat64_2(folder, name, O_WRONLY)), EROFS);
	TRY(used(open(hard, O_WRONLY)), EROFS);
	TRY(used(open(soft, O_WRONLY | O_TRUNC)), EROFS);
	TRY(used(open(proc, O_WRONLY)), EROFS);
	TRY(used(creat(image, 0600)), EROFS);
	TRY(used(creat64(soft, 0600)), EROFS);
	TRY(used_stream(fopen(image, "w")), EROFS);
	TRY(used_stream(fopen64(image, "a+")), EROFS);
	TRY(used_stream(fopen(image, "r+")), EBADF);
	TRY(used_stream(freopen(image, "w", fopen("/dev/null", "r"))), EROFS);
	TRY(used_stream(freopen64(image, "r+", fopen("/dev/null", "w"))), EBADF);
	TRY(used_stream(freopen(NULL, "w", fopen(image, "r"))), EROFS);
	TRY(used_stream(setmntent(image, "r+")), EROFS);
	TRY(spawned(), EROFS);
	TRY(logged_in(), EROFS);
	TRY(recorded(0), EROFS);
	TRY(recorded(1), EROFS);

	TRY(write(both(), "changed", 7), EBADF);
	TRY(pwrite(both(), "changed", 7, 3), EBADF);
	TRY(pwrite64(both(), "changed", 7, 3), EBADF);
	TRY(writev(both(), &(struct iovec){"changed", 7}, 1), EBADF);
	TRY(pwritev2(both(), &(struct iovec){"changed", 7}, 1, 3, 0), EBADF);
	TRY(ftruncate(both(), 1), EINVAL);
	TRY(ftruncate64(both(), 1), EINVAL);
	TRY(fallocate(both(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), EBADF);
	TRY((errno = posix_fallocate(both(), 0, 1 << 24)) ? -1 : 0, EBADF);
	TRY(copy_file_range(other_fd(), NULL, both(), NULL, 7, 0), EBADF);
	TRY(sendfile(both(), other_fd(), NULL, 7), EBADF);
	TRY(splice(piped(), NULL, both(), NULL, 7, 0), EBADF);
	TRY(ioctl(both(), FICLONE, other_fd()), 0);
	TRY(written_by_aio(), EBADF);
	TRY(written_by_mapping(MAP_SHARED), EACCES);
	TRY(dprintf(both(), "changed"), EBADF);
	TRY(lockf(both(), F_LOCK, 0), EBADF);

	TRY(truncate(image, 1), EROFS);
	TRY(truncate64(soft, 1), EROFS);
	TRY(truncate(proc, 1), EROFS);
	TRY(truncate(hard, 1), EROFS);
	TRY(chmod(image, 0666), EROFS);
	TRY(fchmod(both(), 0666), EROFS);
	TRY(fchmodat(folder, name, 0666, 0), EROFS);
	TRY(lchmod(image, 0666), EROFS);
	TRY(chown(image, getuid(), getgid()), EROFS);
	TRY(lchown(image, getuid(), getgid()), EROFS);
	TRY(fchown(both(), getuid(), getgid()), EROFS);
	TRY(fchownat(folder, name, getuid(), getgid(), 0), EROFS);
	TRY(fchownat(both(), "", getuid(), getgid(), AT_EMPTY_PATH), EROFS);
	TRY(utime(image, &(struct utimbuf){1, 1}), EROFS);
	TRY(utimes(soft, old), EROFS);
	TRY(lutimes(image, old), EROFS);
	TRY(futimes(both(), old), EROFS);
	TRY(futimesat(folder, name, old), EROFS);
	TRY(futimens(both(), ancient), EROFS);
	TRY(utimensat(AT_FDCWD, image, NULL, 0), EROFS);
	TRY(setxattr(image, "user.a", "b", 1, 0), EROFS);
	TRY(lsetxattr(image, "user.a", "b", 1, 0), EROFS);
	TRY(fsetxattr(both(), "user.a", "b", 1, 0), EROFS);
	TRY(removexattr(image, "user.old"), EROFS);
	TRY(lremovexattr(image, "user.old"), EROFS);
	TRY(fremovexattr(both(), "user.old"), EROFS);
	TRY(attributes_set(FS_IOC_SETFLAGS), EROFS);
	TRY(extended_set(), EROFS);

	TRY(rename(image, "elsewhere"), EROFS);
	TRY(rename(other, image), EROFS);
	TRY(renameat(folder, name, folder, "elsewhere"), EROFS);
	TRY(renameat2(AT_FDCWD, other, folder, name, RENAME_EXCHANGE), EROFS);
	TRY(renameat2(folder, name, folder, "elsewhere", RENAME_NOREPLACE), EROFS);
	TRY(link(image, "elsewhere"), EROFS);
	TRY(linkat(folder, name, folder, "elsewhere", 0), EROFS);
	TRY(linkat(AT_FDCWD, proc, folder, "elsewhere", AT_SYMLINK_FOLLOW), EROFS);
	TRY(link(other, image), EEXIST);
	TRY(symlink(other, image), EEXIST);
	TRY(mknod(image, S_IFREG | 0600, 0), EEXIST);
	TRY(unlink(hard), EROFS);
	TRY(unlink(image), EROFS);
	TRY(unlinkat(folder, name, 0), EROFS);
	TRY(remove(image), EROFS);
	TRY(ran("echo changed > $i"), 0);
	TRY(ran("exec 3<>$i; echo changed >&3"), 0);
	TRY(ran("dd if=/dev/zero of=$i conv=notrunc count=1"), 0);
	TRY(ran("cp $i.other $i"), 0);
	TRY(ran("mv -f $i.other $i"), 0);
	TRY(ran("ln -f $i.other $i"), 0);
	TRY(ran("rm -f $i"), 0);
	TRY(ran("touch -c -d @1 $i"), 0);
	TRY(ran("chmod 666 $i"), 0);
	TRY(ran("sed -i s/a/b/ $i"), 0);
	TRY(access(image, W_OK), EROFS);
	if (geteuid() == 0) {
		TRY(opened_by_handle(), EROFS);
		TRY(acct(image), EROFS);
		TRY(swapon(image, 0), EROFS);
	}
}

static void try_bare(void)
{
	int fd = (int)syscall(SYS_openat, AT_FDCWD, image, O_RDONLY);
	char *proc = self_path(fd);

	TRY(used((int)syscall(SYS_openat, AT_FDCWD, image, O_WRONLY)), EROFS);
	TRY(used((int)syscall(SYS_openat, AT_FDCWD, image, O_RDWR | O_TRUNC)), EROFS);
	TRY(used((int)syscall(SYS_openat, folder, name, O_WRONLY)), EROFS);
	TRY(used((int)syscall(SYS_openat, AT_FDCWD, soft, O_RDWR)), EROFS);
	TRY(used((int)syscall(SYS_openat, AT_FDCWD, proc, O_RDWR)), EROFS);
	TRY(opened_anew(), EROFS);
	TRY(syscall(SYS_truncate, image, 1), EROFS);
	TRY(syscall(SYS_fchmod, fd, 0666), EROFS);
	TRY(syscall(SYS_fchmodat, AT_FDCWD, image, 0666), EROFS);
	TRY(syscall(SYS_fchownat, AT_FDCWD, image, 1, 1, 0), EROFS);
	TRY(syscall(SYS_utimensat, AT_FDCWD, image, NULL, 0), EROFS);
	TRY(syscall(SYS_utimensat, fd, NULL, NULL, 0), EROFS);
	TRY(syscall(SYS_setxattr, image, "user.a", "b", 1, 0), EROFS);
	TRY(syscall(SYS_fsetxattr, fd, "user.a", "b", 1, 0), EROFS);
	TRY(syscall(SYS_removexattr, image, "user.old"), EROFS);
	TRY(syscall(SYS_renameat2, folder, name, folder, "elsewhere", 0), EBUSY);
	TRY(syscall(SYS_renameat2, AT_FDCWD, other, folder, name, 0), EBUSY);
	TRY(syscall(SYS_linkat, folder, name, folder, "elsewhere", 0), EXDEV);
	TRY(syscall(SYS_linkat, fd, "", folder, "elsewhere", AT_EMPTY_PATH), EXDEV);
	TRY(syscall(SYS_unlinkat, folder, name, 0), EBUSY);
	TRY(syscall(SYS_faccessat, AT_FDCWD, image, W_OK), EROFS);
	TRY(syscall(SYS_acct, image), EROFS);
	TRY(syscall(SYS_swapon, image, 0), EROFS);
	TRY(ran("busybox truncate -s 1 $i"), 0); /* static */
	TRY(ran("env -i busybox sh -c \"echo changed > $i\""), 0);
	TRY(ran("busybox dd if=/dev/zero of=$i conv=notrunc count=1"), 0);
	TRY(ran("busybox rm -f $i"), 0);
}

int main(int nr_words, char **words)
{
	char *slash;

	if (nr_words != 3 || !(slash = strrchr(words[2], '/')))
		return 98;
	image = words[2];
	name = slash + 1;
	snprintf(hard, sizeof(hard), "%s.hard", image);
	snprintf(soft, sizeof(soft), "%s.soft", image);
	snprintf(other, sizeof(other), "%s.other", image);
	*slash = '\0';
	folder = open(words[2], O_RDONLY | O_DIRECTORY);
	if (folder < 0 || fchdir(folder) < 0)
		return 97;
	*slash = '/';
	before = look();
	strcmp(words[1], "bare") == 0 ? try_bare() : try_calls();
	return 0;
}
