/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/core/shared_count.h"

void shared_count_add(uint64_t *words, uint64_t no, uint64_t nr)
{
	__atomic_fetch_add(&words[no], nr, __ATOMIC_RELAXED);
}
