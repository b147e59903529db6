/* SPDX-License-Identifier: Apache-2.0 */
/* Decides whether a program that is about to be run can load this library. */
#ifndef COWSHED_PRELOAD_PROGRAMS_H
#define COWSHED_PRELOAD_PROGRAMS_H

#include <stdbool.h>

/* Reads this process's own ELF properties, to compare others with. */
void programs_learn(void);

/* False if the library would end the program, or make the dynamic linker complain: a program of another C library or
   machine, or one that must load the address sanitizer first. For a script, its interpreter decides. True if unknown,
   and for static programs, whose children may load it. flags are execveat's. Safe after vfork. */
bool program_takes_us(int folder, const char *path, int flags);

#endif
