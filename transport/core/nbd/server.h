/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The server: its workers, its connections, and the list of those that are ready for a slice.
 *
 * Lock order: server->lock, blk_queue.lock, connection->lock, server->ready_lock; none is held while a store or an
 * overlay is called.
 */
#ifndef COWSHED_NBD_SERVER_H
#define COWSHED_NBD_SERVER_H

#include "transport/core/nbd/slice.h"

struct nbd_server {
	pthread_mutex_t lock;
	pthread_cond_t idle; /* the last connection ended */
	struct nbd_connection **slots;
	uint32_t nr_slots, next_generation;
	_Atomic uint32_t nr_connections; /* changed under lock */
	struct blk_frames *frames;
	uint32_t nr_exports;
	struct nbd_ended *ended; /* in order; room for every connection there is */
	uint64_t nr_ended, ended_room;
	int epoll_fd, ready_fd, event_fd;
	_Atomic bool stop;

	pthread_mutex_t ready_lock;
	struct nbd_connection *ready, **ready_tail;

	struct nbd_slice *slices; /* one a worker */
	uint32_t nr_workers;
	_Atomic uint32_t nr_serving; /* workers that serve a connection, or linger with it */
};

/* ready.c */
/* Puts a connection on the ready list. The caller must hold its lock. */
void nbd_ready_push(struct nbd_connection *connection);
/* Takes the next one out; returns its number, 0 if there is none. */
uint64_t nbd_ready_pop(struct nbd_server *server);
/* Takes out one that is ending. No thread may find it any more, and put it there again. */
void nbd_ready_forget(struct nbd_connection *connection);

/* connections.c */
/* The connection of a number, under server->lock; NULL: it has ended. */
struct nbd_connection *nbd_server_find(struct nbd_server *server, uint64_t connection_no);

#endif
