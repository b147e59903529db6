/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guard of a mapping of shared frames: a userfaultfd with the features that the backend asks for,
 * and a range registered under it.  Used by the library (region.c) and by the preload library.
 *
 * Functions return >= 0 or -errno.
 */
#ifndef COWSHED_GUARD_H
#define COWSHED_GUARD_H

#include <stdint.h>

/* Returns a userfaultfd that also handles faults inside system calls: from the lent device (-1: none), from
   /dev/userfaultfd by our own right, or by the system call; -errno of the last. */
int guard_open(int uffd_device);

/* Agrees on features. -EOPNOTSUPP if the kernel lacks one. Once per userfaultfd. */
int guard_agree(int uffd, uint64_t features);

/* Registers a range for missing pages, minor faults and writes. Until then nothing may touch it. */
int guard_range(int uffd, void *address, uint64_t nr_bytes);

/* Takes the guard off. The caller must have made the range PROT_NONE. */
int guard_lift(int uffd, void *address, uint64_t nr_bytes);

#endif
