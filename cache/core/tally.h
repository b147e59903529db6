/* SPDX-License-Identifier: Apache-2.0 */
/* Counters that Python keeps in memory it shares with who comes after, or with who still is. */
#ifndef COWSHED_TALLY_H
#define COWSHED_TALLY_H

#include <stdint.h>

/* cdef-begin */
/* Adds to words[no], in one piece whoever else adds to it: another thread, or another process that has it mapped. */
void tally_add(uint64_t *words, uint64_t no, uint64_t nr);
/* cdef-end */

#endif
