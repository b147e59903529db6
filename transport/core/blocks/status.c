/* SPDX-License-Identifier: Apache-2.0 */
/* Which bytes are resident, which are private, which are known to be zeros. */
#include "transport/core/blocks/blocks.h"

#define SCAN_MAX ((uint64_t)1 << 20) /* extents looked at for one run */

static bool resident_run(const struct blk_device *device, uint64_t offset, uint64_t length, uint64_t *run_out)
{
	const struct image *image = device->image;
	uint64_t end = offset + length, extent = offset / device->extent_bytes, nr = 0;
	bool resident = extent_state(&image->states[extent]) == EXTENT_RESIDENT;

	do
		extent++;
	while (extent * device->extent_bytes < end && ++nr < SCAN_MAX &&
	       (extent_state(&image->states[extent]) == EXTENT_RESIDENT) == resident);
	*run_out = (extent * device->extent_bytes < end ? extent * device->extent_bytes : end) - offset;
	return resident;
}

bool blk_status_run(const struct blk_device *device, enum blk_status what, uint64_t offset, uint64_t length,
                    uint64_t *run_out)
{
	bool private, zero;

	if (what == BLK_RESIDENT)
		return resident_run(device, offset, length, run_out);
	*run_out = length;
	if (!device->overlay)
		return false;
	*run_out = overlay_status_run(device->overlay, offset, length, what == BLK_ZEROES, &private, &zero);
	return what == BLK_PRIVATE ? private : zero;
}
