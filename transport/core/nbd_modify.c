/* SPDX-License-Identifier: Apache-2.0 */
/*
 * WRITE, TRIM, WRITE_ZEROES and FLUSH.
 *
 * A write takes its quota when its header is read, then its payload goes to the overlay as it comes, whole pages at a
 * time: a write of 32 MiB needs no buffer. The parts of pages at its two ends need what the image has there, and
 * wait for it as pieces if it is not resident.
 *
 * A trim gives the whole pages inside its range back to the image, or, by a connection's negotiated, is zeroes. Zeroes
 * are private pages that hold nothing; with NO_HOLE they are stored.  FAST_ZERO is refused where it could be as slow as
 * a write: if zeros have to be stored, or a page of the image has to be read first.
 */
#include "transport/core/nbd_state.h"

#include <errno.h>
#include <stdlib.h>

static bool is_last_short(const struct nbd_export *export, uint64_t offset, uint64_t length)
{
	return offset + length == export->size_bytes;
}

static uint64_t page_after(uint64_t offset)
{
	return (offset >> 12) + (offset % 4096 != 0);
}

/* A change came back with err.  true: it is to wait for the overlay's thaw; the connection is read from no further, so
 * that what comes after it waits too.  false, and err is -EBUSY: the thaw has been. */
static bool is_held(struct nbd_connection *connection, int err)
{
	if (err != -EBUSY || !overlay_hold(connection->export->overlay, &connection->hold))
		return false;
	connection->held = true;
	return true;
}

/* Has a patch wait for what the image has there, or hold it. */
static void want_frame(struct nbd_piece *piece)
{
	uint64_t extent = piece->offset / piece->connection->export->extent_bytes;

	if (piece_want(piece, piece->offset, piece->length))
		piece->waits[piece->nr_waits++] = (struct nbd_wait){.waiter = {.extent = extent}, .held = true};
}

/* Writes a part of one page, at once or when the image's page is there; false if it is to be asked again. */
static bool patch(struct nbd_turn *turn, struct nbd_op *op, uint64_t offset, uint32_t length, const uint8_t *bytes)
{
	struct nbd_connection *connection = turn->connection;
	struct nbd_export *export = connection->export;
	extent_word *state = &export->image->states[offset / export->extent_bytes];
	const uint8_t *frame = NULL;

	if (extent_hold(state))
		frame = export->frames->base + (offset & ~(uint64_t)4095);
	int err = overlay_patch(export->overlay, offset, length, bytes, frame, &op->reserved);
	if (frame)
		extent_release(state);
	if (err == -EBUSY)
		return !is_held(connection, err) && patch(turn, op, offset, length, bytes);
	if (err != -EAGAIN && err != -EINPROGRESS) {
		op->err = op->err ? op->err : err;
		return true;
	}
	struct nbd_piece *piece = piece_new(turn, op, PIECE_PATCH, offset, length, 1);
	if (piece && bytes && !(piece->bytes = malloc(length)))
		atomic_store(&piece->status, -ENOMEM);
	if (!piece) {
		op->err = -ENOMEM;
		return true;
	}
	if (piece->bytes) {
		memcpy(piece->bytes, bytes, length);
		connection->buffered_bytes += length;
	}
	turn->counts.misses++;
	op->missed = true;
	if (err == -EINPROGRESS)
		piece_want_missing(piece);
	else
		want_frame(piece);
	piece_wanted_all(piece);
	return true;
}

/* Its extent stays held, and it is ready again with the thaw. */
static void patch_hold_back(struct nbd_piece *piece)
{
	struct nbd_connection *connection = piece->connection;

	pthread_mutex_lock(&connection->lock);
	piece->next = connection->ready;
	connection->ready = piece;
	if (!piece->next)
		connection->ready_tail = &piece->next;
	pthread_mutex_unlock(&connection->lock);
}

bool patch_complete(struct nbd_piece *piece)
{
	struct nbd_export *export = piece->connection->export;
	int err = atomic_load(&piece->status);

	if (piece->connection->broken)
		err = -ESHUTDOWN;
	if (!err) {
		const uint8_t *frame = export->frames->base + (piece->offset & ~(uint64_t)4095);

		do
			err = overlay_patch(export->overlay, piece->offset, piece->length, piece->bytes,
			                    piece->nr_waits ? frame : NULL, &piece->op->reserved);
		while (err == -EBUSY && !is_held(piece->connection, err));
		if (err == -EBUSY) {
			patch_hold_back(piece);
			return false;
		}
		if (err == -EAGAIN) { /* it was missing, and given back to the image meanwhile */
			atomic_store(&piece->nr_missing, 1);
			want_frame(piece);
			piece_wanted_all(piece);
			return false;
		}
	}
	atomic_store(&piece->status, err);
	return true;
}

void write_begin(struct nbd_turn *turn, const struct nbd_request *request, int err)
{
	struct nbd_connection *connection = turn->connection;
	struct nbd_op *op = nbd_op_new(turn, request);

	if (!op)
		return;
	op->err = err;
	if (!err) {
		uint64_t first = request->offset >> 12;

		op->err = overlay_take(connection->export->overlay, first,
		                       page_after(request->offset + request->length) - first, &op->reserved);
	}
	connection->payload = op;
	connection->payload_left = request->length;
	if (!request->length)
		write_take(turn, NULL, 0);
}

/* Takes one run of payload: whole pages, or what of one page the request has; 0 if it has not all come. */
static size_t write_run(struct nbd_turn *turn, struct nbd_op *op, const uint8_t *bytes, size_t nr_bytes)
{
	struct nbd_export *export = turn->connection->export;
	uint64_t left = turn->connection->payload_left;
	uint32_t in_page = op->at % 4096;
	size_t nr = nr_bytes < left ? nr_bytes : (size_t)left;

	if (op->err)
		return nr;
	if (!in_page && !(nr == left && is_last_short(export, op->at, nr)))
		nr = nr >= 4096 ? nr & ~(size_t)4095 : nr;
	if (!in_page && (nr >= 4096 || is_last_short(export, op->at, nr))) {
		do
			op->err = overlay_write(export->overlay, op->at, nr, bytes, &op->reserved);
		while (op->err == -EBUSY && !is_held(turn->connection, op->err));
		if (op->err != -EBUSY)
			return nr;
		op->err = 0;
		return 0;
	}
	size_t part = 4096 - in_page < left ? 4096 - in_page : (size_t)left;
	if (nr_bytes < part)
		return 0;
	return patch(turn, op, op->at, (uint32_t)part, bytes) ? part : 0;
}

static void payload_end(struct nbd_turn *turn)
{
	struct nbd_op *op = turn->connection->payload;

	turn->connection->payload = NULL;
	op->begun = true;
	if (!op->nr_pieces)
		nbd_op_end(turn, op);
}

size_t write_take(struct nbd_turn *turn, const uint8_t *bytes, size_t nr_bytes)
{
	struct nbd_connection *connection = turn->connection;
	size_t nr_taken = 0;

	while (connection->payload_left) {
		size_t nr = nr_bytes ? write_run(turn, connection->payload, bytes, nr_bytes) : 0;

		if (!nr)
			return nr_taken;
		connection->payload->at += nr;
		connection->payload_left -= nr;
		bytes += nr;
		nr_bytes -= nr;
		nr_taken += nr;
	}
	payload_end(turn);
	return nr_taken;
}

void write_cancel(struct nbd_turn *turn)
{
	turn->connection->payload->err = -ESHUTDOWN;
	payload_end(turn);
}

/* The whole pages of what is left of an op; none: *nr_out is 0. */
static void whole_pages(const struct nbd_export *export, const struct nbd_op *op, uint64_t *first_out, uint64_t *nr_out)
{
	uint64_t end = op->end == export->size_bytes ? page_after(op->end) : op->end >> 12;

	*first_out = page_after(op->at);
	*nr_out = end > *first_out ? end - *first_out : 0;
}

void clear_begin(struct nbd_turn *turn, const struct nbd_request *request)
{
	struct nbd_export *export = turn->connection->export;
	struct nbd_op *op = nbd_op_new(turn, request);

	if (!op)
		return;
	op->zeroes = request->type == NBD_CMD_WRITE_ZEROES || turn->connection->negotiated.trim_zeroes;
	if (op->zeroes) {
		uint64_t first = op->at >> 12;
		bool parts = op->at % 4096 || (op->end % 4096 && op->end != export->size_bytes);

		if (request->flags & NBD_CMD_FLAG_FAST_ZERO && (parts || request->flags & NBD_CMD_FLAG_NO_HOLE))
			op->err = -ENOTSUP;
		else
			op->err = overlay_take(export->overlay, first, page_after(op->end) - first, &op->reserved);
	}
	if (op->err || clear_step(turn, op) == STEP_DONE) {
		op->begun = true;
		if (!op->nr_pieces)
			nbd_op_end(turn, op);
		return;
	}
	nbd_op_queue(turn, op);
}

static void zero_step(struct nbd_turn *turn, struct nbd_op *op)
{
	struct nbd_export *export = turn->connection->export;
	uint64_t first, nr;

	whole_pages(export, op, &first, &nr);
	if (nr && op->at % 4096 == 0) {
		uint64_t length = op->end - op->at;

		if (length != export->size_bytes - op->at)
			length = nr << 12;
		length = length < STEP_BYTES ? length : STEP_BYTES;
		op->err = overlay_zero(export->overlay, op->at, length, op->request.flags & NBD_CMD_FLAG_NO_HOLE,
		                       &op->reserved);
		if (op->err == -EBUSY) {
			is_held(turn->connection, op->err);
			op->err = 0;
			return;
		}
		op->at += length;
	} else {
		uint64_t page_end = ((op->at >> 12) + 1) << 12;
		uint64_t end = page_end < op->end ? page_end : op->end;

		if (patch(turn, op, op->at, (uint32_t)(end - op->at), NULL))
			op->at = end;
	}
}

enum nbd_step clear_step(struct nbd_turn *turn, struct nbd_op *op)
{
	struct nbd_export *export = turn->connection->export;

	if (op->zeroes) {
		uint64_t until = op->at + STEP_BYTES;

		while (op->at < op->end && op->at < until && !op->err && !turn->connection->held)
			zero_step(turn, op);
	} else {
		uint64_t first, nr, nr_max = STEP_BYTES >> 12;

		whole_pages(export, op, &first, &nr);
		op->err = overlay_trim(export->overlay, first, nr < nr_max ? nr : nr_max);
		if (op->err == -EBUSY) {
			op->err = 0;
			return is_held(turn->connection, -EBUSY) ? STEP_WAIT : STEP_MORE;
		}
		op->at = nr <= nr_max ? op->end : (first + nr_max) << 12;
	}
	if (turn->connection->held && !op->err && op->at < op->end)
		return STEP_WAIT;
	return op->err || op->at == op->end ? STEP_DONE : STEP_MORE;
}

static void sync_done(struct overlay_sync *sync, int status)
{
	struct nbd_piece *piece = (struct nbd_piece *)((char *)sync - offsetof(struct nbd_piece, sync));

	atomic_store(&piece->status, status);
	nbd_piece_ready(piece);
}

bool op_sync(struct nbd_turn *turn, struct nbd_op *op)
{
	struct overlay *overlay = turn->connection->export->overlay;

	op->synced = true;
	if (!overlay || !overlay->disk)
		return false;
	struct nbd_piece *piece = piece_new(turn, op, PIECE_SYNC, 0, 0, 0);
	if (!piece) {
		op->err = -ENOMEM;
		return false;
	}
	piece->sync.done = sync_done;
	op->begun = true;
	if (overlay_flush(overlay, &piece->sync) == 1)
		sync_done(&piece->sync, 0);
	return true;
}

void flush_begin(struct nbd_turn *turn, const struct nbd_request *request)
{
	struct nbd_op *op = nbd_op_new(turn, request);

	if (op && !op_sync(turn, op))
		nbd_op_end(turn, op);
}
