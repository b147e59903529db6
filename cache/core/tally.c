/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/core/tally.h"

void tally_add(uint64_t *words, uint64_t no, uint64_t nr)
{
	__atomic_fetch_add(&words[no], nr, __ATOMIC_RELAXED);
}
