/* SPDX-License-Identifier: Apache-2.0 */
/* BLOCK_STATUS: what is allocated, what is resident, what is the client's own. */
#include "transport/core/nbd_state.h"

#include <errno.h>

#define DESCRIPTORS_MAX 512          /* of one context, in one reply: clients ask for the rest */
#define SCAN_MAX ((uint64_t)1 << 20) /* pages or extents looked at for one descriptor */

/* The run at offset of one context, no longer than length: its status, and its length in the place given. */
static uint32_t status_run(const struct nbd_export *export, enum nbd_context context, uint64_t offset, uint64_t length,
                           uint64_t *run_out)
{
	const struct image *image = export->image;
	uint64_t end = offset + length;

	if (context == NBD_CONTEXT_RESIDENT) {
		uint64_t extent = offset / export->extent_bytes, nr = 0;
		bool resident = extent_state(&image->states[extent]) == EXTENT_RESIDENT;

		do
			extent++;
		while (extent * export->extent_bytes < end && ++nr < SCAN_MAX &&
		       (extent_state(&image->states[extent]) == EXTENT_RESIDENT) == resident);
		*run_out = (extent * export->extent_bytes < end ? extent * export->extent_bytes : end) - offset;
		return resident;
	}
	*run_out = length;
	if (!export->overlay)
		return 0;
	bool private, zero;
	*run_out =
		overlay_status_run(export->overlay, offset, length, context == NBD_CONTEXT_ALLOCATION, &private, &zero);
	if (context == NBD_CONTEXT_PRIVATE)
		return private;
	return zero ? NBD_STATE_ZERO : 0;
}

static void status_chunk(struct nbd_turn *turn, const struct nbd_request *request, enum nbd_context context, bool done)
{
	const struct nbd_connection *connection = turn->connection;
	bool extended = connection->negotiated.extended;
	uint32_t nr = 0, nr_max = request->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : DESCRIPTORS_MAX;
	uint64_t lengths[DESCRIPTORS_MAX];
	uint32_t statuses[DESCRIPTORS_MAX];
	uint64_t at = request->offset, end = request->offset + request->length;

	while (at < end && nr < nr_max) {
		uint64_t run;
		uint32_t status = status_run(connection->export, context, at, end - at, &run);

		at += run;
		if (nr && statuses[nr - 1] == status && (extended || lengths[nr - 1] + run <= UINT32_MAX)) {
			lengths[nr - 1] += run;
			continue;
		}
		lengths[nr] = run;
		statuses[nr++] = status;
	}
	reply_chunk(turn, request, extended ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS,
	            extended ? 8 + 16 * (uint64_t)nr : 4 + 8 * (uint64_t)nr, done);
	uint8_t *to = out_reserve(turn, extended ? 8 + 16 * nr : 4 + 8 * nr);
	to = wire_put32(to, connection->negotiated.context_ids[context]);
	if (extended)
		to = wire_put32(to, nr);
	for (uint32_t i = 0; i < nr; i++) {
		to = extended ? wire_put64(to, lengths[i]) : wire_put32(to, (uint32_t)lengths[i]);
		to = extended ? wire_put64(to, statuses[i]) : wire_put32(to, statuses[i]);
	}
}

void status_begin(struct nbd_turn *turn, const struct nbd_request *request)
{
	const struct nbd_negotiated *negotiated = &turn->connection->negotiated;
	uint32_t nr_left = 0;

	turn->counts.block_statuses++;
	for (int context = 0; context < NBD_CONTEXTS; context++)
		nr_left += negotiated->context_ids[context] != 0;
	for (int context = 0; context < NBD_CONTEXTS; context++)
		if (negotiated->context_ids[context])
			status_chunk(turn, request, context, --nr_left == 0);
}
