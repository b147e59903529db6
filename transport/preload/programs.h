/* SPDX-License-Identifier: Apache-2.0 */
/* Whether a program that is about to be run takes this library, or is better off without. */
#ifndef COWSHED_PRELOAD_PROGRAMS_H
#define COWSHED_PRELOAD_PROGRAMS_H

#include <stdbool.h>

/* Learns what this process is, to compare others with. */
void programs_learn(void);

/* False if the library would end the program, or have the dynamic linker complain: another C library's or another
   machine's, or one that has to load the address sanitizer first. Of a script its interpreter counts. True in all
   doubt, and for static programs, whose children may take it. flags are execveat's. Safe after vfork. */
bool program_takes_us(int folder, const char *path, int flags);

#endif
