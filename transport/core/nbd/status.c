/* SPDX-License-Identifier: Apache-2.0 */
/* BLOCK_STATUS: what is allocated, what is resident, what is the client's own. */
#include "transport/core/nbd/slice.h"

#define DESCRIPTORS_MAX 512 /* of one context, in one reply: clients ask for the rest */

static const enum blk_status CONTEXT_STATUS[NBD_CONTEXTS] = {
	[NBD_CONTEXT_ALLOCATION] = BLK_ZEROES,
	[NBD_CONTEXT_RESIDENT] = BLK_RESIDENT,
	[NBD_CONTEXT_PRIVATE] = BLK_PRIVATE,
};

static void status_chunk(struct nbd_slice *slice, const struct nbd_request *request, enum nbd_context context,
                         bool done)
{
	const struct nbd_connection *connection = slice->connection;
	bool extended = connection->negotiated.extended;
	uint32_t nr = 0, nr_max = request->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : DESCRIPTORS_MAX;
	uint64_t lengths[DESCRIPTORS_MAX];
	uint32_t statuses[DESCRIPTORS_MAX];
	uint64_t at = request->offset, end = request->offset + request->length;

	while (at < end && nr < nr_max) {
		uint64_t run;
		bool is = blk_status_run(connection->queue.device, CONTEXT_STATUS[context], at, end - at, &run);
		uint32_t status = !is ? 0 : context == NBD_CONTEXT_ALLOCATION ? NBD_STATE_ZERO : 1;

		at += run;
		if (nr && statuses[nr - 1] == status && (extended || lengths[nr - 1] + run <= UINT32_MAX)) {
			lengths[nr - 1] += run;
			continue;
		}
		lengths[nr] = run;
		statuses[nr++] = status;
	}
	reply_chunk(slice, request, extended ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS,
	            extended ? 8 + 16 * (uint64_t)nr : 4 + 8 * (uint64_t)nr, done);
	uint8_t *to = out_reserve(slice, extended ? 8 + 16 * nr : 4 + 8 * nr);
	to = wire_put32(to, connection->negotiated.context_ids[context]);
	if (extended)
		to = wire_put32(to, nr);
	for (uint32_t i = 0; i < nr; i++) {
		to = extended ? wire_put64(to, lengths[i]) : wire_put32(to, (uint32_t)lengths[i]);
		to = extended ? wire_put64(to, statuses[i]) : wire_put32(to, statuses[i]);
	}
}

void nbd_status(struct nbd_slice *slice, const struct nbd_request *request)
{
	const struct nbd_negotiated *negotiated = &slice->connection->negotiated;
	uint32_t nr_left = 0;

	slice->counts.block_statuses++;
	for (int context = 0; context < NBD_CONTEXTS; context++)
		nr_left += negotiated->context_ids[context] != 0;
	for (int context = 0; context < NBD_CONTEXTS; context++)
		if (negotiated->context_ids[context])
			status_chunk(slice, request, context, --nr_left == 0);
}
