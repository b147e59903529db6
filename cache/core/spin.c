/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/core/spin.h"

#include <stdatomic.h>

#define CREDIT_MAX 16
#define EARNED 4
#define PROBE 256 /* without credit, one sleep in so many is preceded by a spin */

static _Atomic int nr_spinning;

void spin_init(struct spin *spin)
{
	*spin = (struct spin){.credit = CREDIT_MAX};
}

bool spin_begin(struct spin *spin)
{
	if (spin->credit <= 0 && ++spin->nr_skipped % PROBE)
		return false;
	if (atomic_fetch_add(&nr_spinning, 1) == 0)
		return true;
	atomic_fetch_sub(&nr_spinning, 1);
	return false;
}

void spin_end(struct spin *spin, bool found)
{
	atomic_fetch_sub(&nr_spinning, 1);
	spin->credit += found ? EARNED : -1;
	if (spin->credit > CREDIT_MAX)
		spin->credit = CREDIT_MAX;
}
