/* SPDX-License-Identifier: Apache-2.0 */
/* The properties of an ELF file that decide whether a library can be preloaded into it. */
#ifndef COWSHED_TRANSPORT_ELF_H
#define COWSHED_TRANSPORT_ELF_H

#include <stdbool.h>
#include <stdint.h>

/* cdef-begin */
struct elf {
	uint16_t bits; /* 32 or 64 */
	uint16_t machine;
	bool is_big_endian;
	/* These are known only of programs of 64 bits and this machine's byte order. */
	bool is_loader;   /* a dynamic linker, which runs programs by itself */
	bool needs_first; /* links the address sanitizer, which ends the program if its library is not the first */
	char linker[256]; /* the dynamic linker it names, "" if it is static or a loader */
	char soname[256]; /* the name by which others link it, "" if it has none */
};

/* Reads a file's headers: 1, or 0 if it is no ELF file, or -errno. Truncated or malformed parts count as absent.
   Keeps the file's position. Safe after vfork and in signal handlers. */
int elf_read(int fd, struct elf *elf_out);
/* cdef-end */

#endif
