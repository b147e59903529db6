/* SPDX-License-Identifier: Apache-2.0 */
/* Checks requests by the protocol's rules, and submits them to the engine. */
#include "transport/core/nbd/slice.h"

#include <errno.h>
#include <stdlib.h>

static bool is_write(const struct nbd_request *request)
{
	return request->type == NBD_CMD_WRITE || request->type == NBD_CMD_TRIM || request->type == NBD_CMD_WRITE_ZEROES;
}

/* The error that the protocol demands for a request; 0: none. */
static int request_check(const struct nbd_connection *connection, const struct nbd_request *request)
{
	const struct nbd_negotiated *negotiated = &connection->negotiated;
	uint64_t size_bytes = connection->export->device.size_bytes;
	uint32_t flags = NBD_CMD_FLAG_FUA;

	switch (request->type) {
	case NBD_CMD_READ:
		flags |= negotiated->structured || negotiated->extended ? NBD_CMD_FLAG_DF : 0;
		break;
	case NBD_CMD_WRITE:
		flags |= negotiated->extended ? NBD_CMD_FLAG_PAYLOAD_LEN : 0;
		if (negotiated->extended && !(request->flags & NBD_CMD_FLAG_PAYLOAD_LEN))
			return -EINVAL;
		break;
	case NBD_CMD_WRITE_ZEROES:
		flags |= NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
		break;
	case NBD_CMD_BLOCK_STATUS:
		flags |= NBD_CMD_FLAG_REQ_ONE;
		if (!(negotiated->context_ids[0] | negotiated->context_ids[1] | negotiated->context_ids[2]))
			return -EINVAL;
		break;
	case NBD_CMD_FLUSH:
		return request->flags & ~flags || request->offset || request->length ? -EINVAL : 0;
	case NBD_CMD_TRIM:
	case NBD_CMD_CACHE:
		break;
	default:
		return -EINVAL;
	}
	if (request->flags & ~flags)
		return -EINVAL;
	if (is_write(request) && negotiated->read_only)
		return -EPERM;
	if (request->offset > size_bytes || request->length > size_bytes - request->offset)
		return is_write(request) && request->type != NBD_CMD_TRIM ? -ENOSPC : -EINVAL;
	if (request->length > negotiated->max_payload_bytes) {
		if (request->type == NBD_CMD_READ)
			return negotiated->structured || negotiated->extended ? -EOVERFLOW : -EINVAL;
		if (request->type == NBD_CMD_WRITE)
			return -EINVAL;
	}
	return 0;
}

static bool has_payload(const struct nbd_connection *connection, const struct nbd_request *request)
{
	if (connection->negotiated.extended)
		return request->flags & NBD_CMD_FLAG_PAYLOAD_LEN;
	return request->type == NBD_CMD_WRITE;
}

/* Translates a client's request for the engine. */
static struct blk_request block_request(const struct nbd_connection *connection, const struct nbd_request *request)
{
	const struct nbd_negotiated *negotiated = &connection->negotiated;
	struct blk_request block = {.offset = request->offset, .length = request->length};

	if (is_write(request) && request->flags & NBD_CMD_FLAG_FUA)
		block.flags |= BLK_FUA;
	switch (request->type) {
	case NBD_CMD_READ:
		block.op = BLK_READ;
		block.flags |= negotiated->structured || negotiated->extended ? BLK_SPLIT : 0;
		break;
	case NBD_CMD_FLUSH:
		block.op = BLK_FLUSH;
		break;
	case NBD_CMD_CACHE:
		block.op = BLK_PREFETCH;
		break;
	case NBD_CMD_TRIM:
		block.op = negotiated->trim_zeroes ? BLK_ZERO : BLK_DISCARD;
		break;
	case NBD_CMD_WRITE_ZEROES:
		block.op = BLK_ZERO;
		block.flags |= request->flags & NBD_CMD_FLAG_NO_HOLE ? BLK_ALLOCATE : 0;
		block.flags |= request->flags & NBD_CMD_FLAG_FAST_ZERO ? BLK_FAST : 0;
		break;
	default: /* any request with a payload */
		block.op = BLK_WRITE;
	}
	return block;
}

static void submit(struct nbd_slice *slice, const struct nbd_request *request, int err)
{
	struct nbd_connection *connection = slice->connection;
	struct nbd_submitted *submitted = slice->spare ? slice->spare : malloc(sizeof *submitted);

	if (!submitted) {
		nbd_slice_break(slice, NBD_END_MEMORY, 0);
		return;
	}
	slice->spare = NULL;
	submitted->request = *request;
	submitted->start_ns = slice->now_ns;
	submitted->block = block_request(connection, request);
	if (has_payload(connection, request)) {
		submitted->block.op = BLK_WRITE;
		submitted->block.err = err;
		connection->payload = request->length ? submitted : NULL;
		connection->payload_left = request->length;
	}
	blk_submit(&connection->queue, &submitted->block);
}

static void dispatch(struct nbd_slice *slice, const struct nbd_request *request)
{
	struct nbd_connection *connection = slice->connection;

	if (request->type == NBD_CMD_DISC) {
		connection->closing = true;
		connection->reason = NBD_END_DISC;
		return;
	}
	if (has_payload(connection, request) && request->length > NBD_PAYLOAD_MAX) {
		nbd_slice_break(slice, NBD_END_PROTOCOL, 0);
		return;
	}
	int err = request_check(connection, request);
	if (!err && request->type == NBD_CMD_READ && request->length > BLK_RUN_BYTES &&
	    request->flags & NBD_CMD_FLAG_DF) {
		slice->counts.reads++;
		err = -EOVERFLOW;
	}
	if (has_payload(connection, request))
		submit(slice, request, err);
	else if (err || !(request->length || request->type == NBD_CMD_FLUSH)) /* zero-length requests succeed */
		reply_status(slice, request, err);
	else if (request->type == NBD_CMD_BLOCK_STATUS)
		nbd_status(slice, request);
	else
		submit(slice, request, 0);
}

/* Passes payload to the engine, as much as it takes; returns how much. */
static size_t take_payload(struct nbd_slice *slice)
{
	struct nbd_connection *connection = slice->connection;
	struct blk_request *block = &connection->payload->block;
	size_t nr = slice->in_end - slice->in_at;

	nr = nr < connection->payload_left ? nr : (size_t)connection->payload_left;
	nr = (size_t)blk_write(&connection->queue, block, slice->in + slice->in_at, nr);
	slice->in_at += nr;
	connection->payload_left -= nr;
	if (!connection->payload_left)
		connection->payload = NULL;
	return nr;
}

bool nbd_parse(struct nbd_slice *slice)
{
	struct nbd_connection *connection = slice->connection;
	bool extended = connection->negotiated.extended != 0;
	size_t header_bytes = extended ? NBD_EXTENDED_REQUEST_BYTES : NBD_REQUEST_BYTES;
	struct nbd_request request;

	while (!connection->closing && blk_queue_accepts(&connection->queue) &&
	       connection->queue.sink->is_ready(&connection->queue)) {
		if (connection->payload) {
			if (!take_payload(slice))
				return !connection->queue.frozen;
			continue;
		}
		if (slice->in_end - slice->in_at < header_bytes)
			return true;
		if (!wire_get_request(slice->in + slice->in_at, extended, &request)) {
			nbd_slice_break(slice, NBD_END_PROTOCOL, 0);
			return false;
		}
		slice->in_at += header_bytes;
		dispatch(slice, &request);
	}
	return false;
}
