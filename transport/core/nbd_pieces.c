/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pieces: what an op waits for.
 *
 * A loader answers with the extent held. It copies a read's bytes there and then: a piece that kept its extents until
 * the last of them came could need more than the store has room for.  A patch has one extent, takes a hold of its own
 * and is made in the next turn of its connection (completed), whether or not the client reads. So no hold lasts longer
 * than a turn takes to come, however slow a client is.
 */
#include "transport/core/nbd_state.h"

#include <stddef.h>
#include <stdlib.h>

struct nbd_piece *piece_new(struct nbd_turn *turn, struct nbd_op *op, enum piece_kind kind, uint64_t offset,
                            uint32_t length, uint32_t nr_waits)
{
	struct nbd_piece *piece = malloc(sizeof *piece + nr_waits * sizeof *piece->waits);

	if (!piece)
		return NULL;
	*piece = (struct nbd_piece){
		.connection = turn->connection,
		.op = op,
		.kind = kind,
		.offset = offset,
		.length = length,
		.nr_missing = 1,
	};
	if (kind == PIECE_READ && !(piece->bytes = malloc(length))) {
		free(piece);
		return NULL;
	}
	turn->connection->buffered_bytes += piece->bytes ? length : 0;
	turn->connection->nr_pieces++;
	if (op->nr_pieces++ == 0)
		nbd_export_park(turn->connection->export);
	return piece;
}

void piece_free(struct nbd_piece *piece)
{
	free(piece->bytes);
	free(piece);
}

static void piece_answer(struct load_waiter *waiter, int status)
{
	struct nbd_wait *wait = (struct nbd_wait *)((char *)waiter - offsetof(struct nbd_wait, waiter));
	struct nbd_piece *piece = wait->piece;
	struct image *image = piece->connection->export->image;

	if (status) {
		atomic_store(&piece->status, status);
	} else if (piece->kind == PIECE_READ) {
		memcpy(piece->bytes + (wait->offset - piece->offset),
		       piece->connection->export->frames->base + wait->offset, wait->length);
	} else if (piece->kind == PIECE_PATCH) {
		wait->held = extent_hold(&image->states[waiter->extent]);
		assert(wait->held); /* the loader holds it while this runs */
	}
	if (atomic_fetch_sub(&piece->nr_missing, 1) == 1)
		nbd_piece_ready(piece);
}

bool piece_want(struct nbd_piece *piece, uint64_t offset, uint32_t length)
{
	struct nbd_export *export = piece->connection->export;
	struct image *image = export->image;
	uint64_t extent = offset / export->extent_bytes;
	struct nbd_wait *wait = &piece->waits[piece->nr_waits];

	for (;;) {
		if (extent_hold(&image->states[extent]))
			return true;
		*wait = (struct nbd_wait){
			.waiter = {.answer = piece_answer},
			.piece = piece,
			.offset = offset,
			.length = length,
		};
		piece->nr_waits++;
		atomic_fetch_add(&piece->nr_missing, 1);
		int state = store_want(image, extent, &wait->waiter);
		if (state == 0)
			return false;
		/* It became resident meanwhile; or there was no memory to ask for it. */
		piece->nr_waits--;
		atomic_fetch_sub(&piece->nr_missing, 1);
		if (state < 0) {
			atomic_store(&piece->status, state);
			return false;
		}
	}
}

void piece_wanted_all(struct nbd_piece *piece)
{
	if (atomic_fetch_sub(&piece->nr_missing, 1) == 1)
		nbd_piece_ready(piece);
}

void pieces_complete(struct nbd_turn *turn)
{
	struct nbd_connection *connection = turn->connection;
	struct image *image = connection->export->image;

	pthread_mutex_lock(&connection->lock);
	struct nbd_piece *ready = connection->ready;
	connection->ready = NULL;
	connection->ready_tail = &connection->ready;
	pthread_mutex_unlock(&connection->lock);
	for (struct nbd_piece *piece; (piece = ready);) {
		ready = piece->next;
		if (piece->kind == PIECE_PATCH) {
			if (!patch_complete(piece))
				continue;
			if (piece->nr_waits && piece->waits[0].held)
				extent_release(&image->states[piece->waits[0].waiter.extent]);
		}
		piece->next = NULL;
		*connection->completed_tail = piece;
		connection->completed_tail = &piece->next;
	}
}

void piece_end(struct nbd_turn *turn, struct nbd_piece *piece)
{
	struct nbd_op *op = piece->op;
	int status = atomic_load(&piece->status);

	if (status && !op->err)
		op->err = status;
	if (piece->kind == PIECE_LATE)
		op->missing = false;
	if (--op->nr_pieces == 0) {
		nbd_export_unpark(turn->connection->export);
		if (op->begun)
			nbd_op_end(turn, op);
	}
}

void pieces_finish(struct nbd_turn *turn)
{
	struct nbd_connection *connection = turn->connection;

	for (struct nbd_piece *piece; !connection->backlog && (piece = connection->completed);) {
		if (!out_has_room(turn, 0, 1)) {
			out_send(turn);
			continue;
		}
		connection->completed = piece->next;
		if (!piece->next)
			connection->completed_tail = &connection->completed;
		if (piece->kind == PIECE_READ)
			read_finish(turn, piece);
		piece_end(turn, piece);
		piece->next = turn->out.spent;
		turn->out.spent = piece;
	}
}
