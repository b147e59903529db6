/* SPDX-License-Identifier: Apache-2.0 */
/*
 * READ and CACHE.
 *
 * A read of what is resident refers to the frames and holds their extents until the send; private pages are copied
 * from the overlay.  If one extent is missing, the whole piece waits in a buffer of its own: the bytes that are there
 * are copied, the others come as they are loaded.  A long read goes piece by piece where replies may be split, so that
 * it needs no more memory than a few pieces; with simple replies it needs its length.
 */
#include "transport/core/nbd_state.h"

#include <errno.h>

#define AHEAD_MAX ((uint64_t)4 << 20)

/* Where a send's list stood, to go back to. */
struct out_mark {
	uint32_t nr_iov, nr_holds;
	size_t bytes, arena_used, last_bytes;
};

static struct out_mark out_mark(const struct nbd_out *out)
{
	return (struct out_mark){
		out->nr_iov,
		out->nr_holds,
		out->bytes,
		out->arena_used,
		out->nr_iov ? out->iov[out->nr_iov - 1].iov_len : 0,
	};
}

static void out_go_back(struct nbd_out *out, const struct out_mark *mark)
{
	while (out->nr_holds > mark->nr_holds)
		extent_release(out->holds[--out->nr_holds]);
	out->nr_iov = mark->nr_iov;
	out->bytes = mark->bytes;
	out->arena_used = mark->arena_used;
	if (mark->nr_iov)
		out->iov[mark->nr_iov - 1].iov_len = mark->last_bytes;
}

static void extent_was_read(struct image *image, uint64_t extent)
{
	image_touch(image, extent);
	image_note_first_touch(image, extent);
}

/* Refers to shared bytes, all resident; false, with some of them held, if one is not. */
static bool refer_shared(struct nbd_turn *turn, uint64_t offset, uint64_t length)
{
	struct nbd_export *export = turn->connection->export;
	struct nbd_out *out = &turn->out;

	while (length) {
		uint64_t extent = offset / export->extent_bytes;
		uint64_t here = (extent + 1) * export->extent_bytes - offset;

		here = here < length ? here : length;
		if (!extent_hold(&export->image->states[extent]))
			return false;
		out->holds[out->nr_holds++] = &export->image->states[extent];
		extent_was_read(export->image, extent);
		turn->counts.hits++;
		out_refer(turn, export->frames->base + offset, here, NULL);
		offset += here;
		length -= here;
	}
	return true;
}

/* Answers a read of at most PIECE_BYTES if that needs no load; 0, -EAGAIN, or what the overlay failed with. */
static int read_resident(struct nbd_turn *turn, const struct nbd_request *request, uint64_t offset, uint64_t length,
                         bool done)
{
	struct nbd_out *out = &turn->out;
	struct overlay *overlay = turn->connection->export->overlay;
	struct out_mark mark = out_mark(out);
	uint64_t nr_hits = turn->counts.hits;
	int err = 0;

	reply_data(turn, request, offset, (uint32_t)length, done);
	while (length && !err) {
		bool private = false;
		int64_t run = (int64_t)length;

		if (overlay)
			run = overlay_read_run(overlay, offset, length, out->arena + out->arena_used, &private);
		if (run < 0)
			err = (int)run;
		else if (private)
			out_reserve(turn, (size_t)run);
		else if (!refer_shared(turn, offset, (uint64_t)run))
			err = -EAGAIN;
		offset += (uint64_t)run;
		length -= (uint64_t)run;
	}
	if (err) {
		out_go_back(out, &mark);
		turn->counts.hits = nr_hits;
	}
	return err;
}

/* Reads ahead of a client that reads one thing after the other and has missed: twice what it read so far. */
static void read_ahead(struct nbd_turn *turn, bool missed)
{
	struct nbd_connection *connection = turn->connection;
	struct nbd_export *export = connection->export;
	uint64_t window = 2 * connection->stream_bytes;

	window = window < AHEAD_MAX ? window : AHEAD_MAX;
	if (missed && connection->ahead_offset < connection->stream_offset)
		connection->ahead_offset = connection->stream_offset;
	if (!connection->ahead_offset || window < export->extent_bytes ||
	    connection->stream_offset + window / 2 < connection->ahead_offset)
		return;
	uint64_t first = (connection->ahead_offset + export->extent_bytes - 1) / export->extent_bytes;
	uint64_t nr = window / export->extent_bytes;
	uint64_t nr_extents = export->image->shape.nr_extents;
	if (first >= nr_extents)
		return;
	nr = nr < nr_extents - first ? nr : nr_extents - first;
	store_prefetch(export->image, first, nr);
	connection->ahead_offset = (first + nr) * export->extent_bytes;
}

static void note_stream(struct nbd_connection *connection, uint64_t offset, uint64_t length)
{
	if (offset != connection->stream_offset) {
		connection->stream_bytes = 0;
		connection->ahead_offset = 0;
	}
	connection->stream_bytes += length;
	connection->stream_offset = offset + length;
}

/* Copies or waits for shared bytes of a piece. */
static void fill_shared(struct nbd_turn *turn, struct nbd_piece *piece, uint64_t offset, uint64_t length)
{
	struct nbd_export *export = turn->connection->export;

	while (length) {
		uint64_t extent = offset / export->extent_bytes;
		uint64_t here = (extent + 1) * export->extent_bytes - offset;

		here = here < length ? here : length;
		if (piece_want(piece, offset, (uint32_t)here)) {
			if (piece->bytes)
				memcpy(piece->bytes + (offset - piece->offset), export->frames->base + offset, here);
			extent_release(&export->image->states[extent]);
			turn->counts.hits++;
		} else {
			turn->counts.misses++;
			piece->op->missed = true;
		}
		extent_was_read(export->image, extent);
		offset += here;
		length -= here;
	}
}

/* Has an op wait for the bytes of a piece; -ENOMEM. */
static int read_park(struct nbd_turn *turn, struct nbd_op *op, uint64_t offset, uint64_t length)
{
	struct nbd_export *export = turn->connection->export;
	uint64_t step = export->overlay ? 4096 : export->extent_bytes;
	struct nbd_piece *piece =
		piece_new(turn, op, PIECE_READ, offset, (uint32_t)length, (uint32_t)(length / step) + 2);

	if (!piece)
		return -ENOMEM;
	while (length) {
		bool private = false;
		int64_t run = (int64_t)length;

		if (export->overlay)
			run = overlay_read_run(export->overlay, offset, length, piece->bytes + (offset - piece->offset),
			                       &private);
		if (run < 0) {
			atomic_store(&piece->status, (int)run);
			break;
		}
		if (!private)
			fill_shared(turn, piece, offset, (uint64_t)run);
		offset += (uint64_t)run;
		length -= (uint64_t)run;
	}
	piece_wanted_all(piece);
	return 0;
}

void read_begin(struct nbd_turn *turn, const struct nbd_request *request)
{
	struct nbd_connection *connection = turn->connection;
	bool split = connection->negotiated.structured || connection->negotiated.extended;
	int err = -EAGAIN;

	if (request->length > PIECE_BYTES && request->flags & NBD_CMD_FLAG_DF) {
		turn->counts.reads++;
		reply_status(turn, request, -EOVERFLOW);
		return;
	}
	note_stream(connection, request->offset, request->length);
	int missing = missing_look(connection, request->offset, request->length);
	if (missing == -EIO)
		err = missing;
	else if (!missing && request->length <= PIECE_BYTES)
		err = read_resident(turn, request, request->offset, request->length, true);
	read_ahead(turn, err == -EAGAIN);
	if (err != -EAGAIN) {
		turn->counts.reads++;
		turn->counts.read_bytes += err ? 0 : request->length;
		turn->nr_hits[0]++;
		if (err)
			reply_status(turn, request, err);
		return;
	}
	struct nbd_op *op = nbd_op_new(turn, request);
	if (!op)
		return;
	op->chunked = split && request->length > PIECE_BYTES;
	if (op->chunked || missing) {
		if (missing)
			missing_park(turn, op, op->at, op->end - op->at);
		nbd_op_queue(turn, op);
		return;
	}
	op->begun = true;
	op->err = read_park(turn, op, request->offset, request->length);
	if (op->err)
		nbd_op_end(turn, op);
}

enum nbd_step read_step(struct nbd_turn *turn, struct nbd_op *op)
{
	uint64_t length = PIECE_BYTES - op->at % PIECE_BYTES;

	if (op->missing)
		return STEP_WAIT;
	if (op->err)
		return STEP_DONE;
	if (!op->chunked) { /* its pages were missing */
		op->err = read_park(turn, op, op->at, op->end - op->at);
		op->at = op->end;
		return STEP_DONE;
	}
	length = length < op->end - op->at ? length : op->end - op->at;
	int err = read_resident(turn, &op->request, op->at, length, false);
	if (err == -EAGAIN && op->nr_pieces >= CACHING_MAX)
		return STEP_WAIT;
	if (err == -EAGAIN)
		err = read_park(turn, op, op->at, length);
	if (err)
		op->err = err;
	op->at += length;
	return err || op->at == op->end ? STEP_DONE : STEP_MORE;
}

void read_finish(struct nbd_turn *turn, struct nbd_piece *piece)
{
	struct nbd_op *op = piece->op;

	if (atomic_load(&piece->status) || turn->connection->broken)
		return;
	reply_data(turn, &op->request, piece->offset, piece->length, !op->chunked);
	out_refer(turn, piece->bytes, piece->length, piece);
	op->replied = !op->chunked;
}

void cache_begin(struct nbd_turn *turn, const struct nbd_request *request)
{
	struct nbd_op *op = nbd_op_new(turn, request);

	if (op)
		nbd_op_queue(turn, op);
}

enum nbd_step cache_step(struct nbd_turn *turn, struct nbd_op *op)
{
	struct nbd_export *export = turn->connection->export;
	uint64_t nr_max = 4096;

	while (op->at < op->end) {
		uint64_t extent = op->at / export->extent_bytes;
		uint64_t end = (extent + PIECE_BYTES / export->extent_bytes + 1) * export->extent_bytes;

		if (extent_state(&export->image->states[extent]) == EXTENT_RESIDENT) {
			op->at = (extent + 1) * export->extent_bytes;
			if (--nr_max == 0)
				return STEP_MORE;
			continue;
		}
		if (op->nr_pieces >= CACHING_MAX)
			return STEP_WAIT;
		end = end < op->end ? end : op->end;
		struct nbd_piece *piece = piece_new(turn, op, PIECE_CACHE, op->at, (uint32_t)(end - op->at),
		                                    PIECE_BYTES / (uint32_t)export->extent_bytes + 2);
		if (!piece) {
			op->err = -ENOMEM;
			break;
		}
		fill_shared(turn, piece, op->at, end - op->at);
		piece_wanted_all(piece);
		op->at = end;
	}
	return STEP_DONE;
}
