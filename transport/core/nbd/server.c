/* SPDX-License-Identifier: Apache-2.0 */
/* The workers: all wait on one epoll descriptor, for each connection (EPOLLONESHOT) and for the ready list. */
#define _GNU_SOURCE
#include "transport/core/nbd/server.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

#define READY_EVENT UINT64_MAX
#define STOP_EVENT (UINT64_MAX - 1)
#define WORKER_STACK_BYTES (256u << 10)
#define LOOK_MS 1000 /* a lost wake-up costs this much at most */
#define EVENTS_MAX 1 /* an event that a thread has taken, no other can serve */

/* 0 if another thread took the event first. After a timeout (nr 0), finds a connection whose wake-up was lost. */
static uint64_t next_in_line(struct nbd_server *server, int nr)
{
	uint64_t raised;

	return nr && read(server->ready_fd, &raised, sizeof raised) < 0 ? 0 : nbd_ready_pop(server);
}

/* Takes the connection for a slice, unless another thread has it, which then serves it once more. */
static bool connection_take(struct nbd_connection *connection)
{
	bool mine = !connection->running;

	if (mine)
		connection->running = true;
	else
		connection->again = true;
	return mine;
}

static void connection_serve(struct nbd_slice *slice, struct nbd_connection *connection)
{
	struct nbd_server *server = slice->server;

	for (;;) {
		slice->connection = connection;
		connection->slice = slice;
		uint32_t wanted = nbd_slice_run(slice);
		slice->connection = NULL;
		if (wanted == SLICE_ENDED) {
			nbd_connection_end(connection);
			return;
		}
		pthread_mutex_lock(&connection->lock);
		if (connection->again) {
			connection->again = false;
			pthread_mutex_unlock(&connection->lock);
			continue;
		}
		connection->running = false;
		if (wanted == SLICE_AGAIN) {
			nbd_ready_push(connection);
		} else if (wanted) {
			struct epoll_event event = {.events = wanted | EPOLLONESHOT,
			                            .data.u64 = connection->connection_no};

			int err = epoll_ctl(server->epoll_fd, EPOLL_CTL_MOD, connection->fd, &event);
			assert(!err);
			(void)err;
		}
		pthread_mutex_unlock(&connection->lock);
		return;
	}
}

static void *worker_main(void *arg)
{
	struct nbd_slice *slice = arg;
	struct nbd_server *server = slice->server;

	prctl(PR_SET_NAME, "cow-nbd");
	while (!atomic_load(&server->stop)) {
		struct epoll_event event;
		int nr = epoll_wait(server->epoll_fd, &event, EVENTS_MAX, LOOK_MS);

		if (nr < 0 || (nr && event.data.u64 == STOP_EVENT))
			continue;
		uint64_t connection_no =
			nr && event.data.u64 != READY_EVENT ? event.data.u64 : next_in_line(server, nr);
		pthread_mutex_lock(&server->lock);
		struct nbd_connection *connection = nbd_server_find(server, connection_no);
		if (connection)
			pthread_mutex_lock(&connection->lock);
		pthread_mutex_unlock(&server->lock);
		if (!connection)
			continue;
		bool mine = connection_take(connection);
		pthread_mutex_unlock(&connection->lock);
		if (mine) {
			atomic_fetch_add_explicit(&server->nr_serving, 1, memory_order_relaxed);
			connection_serve(slice, connection);
			atomic_fetch_sub_explicit(&server->nr_serving, 1, memory_order_relaxed);
		}
	}
	return NULL;
}

static void slice_deinit(struct nbd_slice *slice)
{
	free(slice->in);
	free(slice->out.arena);
	free(slice->spare);
}

static int slice_init(struct nbd_slice *slice, struct nbd_server *server)
{
	slice->server = server;
	slice->in = malloc(IN_BYTES);
	slice->out.arena = malloc(ARENA_BYTES);
	if (slice->in && slice->out.arena)
		return 0;
	slice_deinit(slice);
	return -ENOMEM;
}

static void server_free(struct nbd_server *server)
{
	if (server->epoll_fd >= 0)
		close(server->epoll_fd);
	if (server->ready_fd >= 0)
		close(server->ready_fd);
	if (server->event_fd >= 0)
		close(server->event_fd);
	pthread_mutex_destroy(&server->lock);
	pthread_mutex_destroy(&server->ready_lock);
	pthread_cond_destroy(&server->idle);
	free(server->slots);
	free(server->ended);
	free(server->slices);
	free(server);
}

static void server_stop_workers(struct nbd_server *server)
{
	int stop_fd = eventfd(1, EFD_CLOEXEC);
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = STOP_EVENT};

	atomic_store(&server->stop, true);
	if (stop_fd >= 0)
		epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, stop_fd, &event);
	for (uint32_t i = 0; i < server->nr_workers; i++) {
		store_raise(server->ready_fd); /* wakes them if there is no stop_fd */
		pthread_join(server->slices[i].thread, NULL);
		slice_deinit(&server->slices[i]);
	}
	if (stop_fd >= 0)
		close(stop_fd);
}

static int server_start_worker(struct nbd_server *server)
{
	struct nbd_slice *slice = &server->slices[server->nr_workers];
	pthread_attr_t attr;
	int err = slice_init(slice, server);

	if (err)
		return err;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, WORKER_STACK_BYTES);
	err = -pthread_create(&slice->thread, &attr, worker_main, slice);
	pthread_attr_destroy(&attr);
	if (err)
		slice_deinit(slice);
	else
		server->nr_workers++;
	return err;
}

int nbd_server_init(uint32_t nr_workers, struct nbd_server **server_out)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = READY_EVENT};
	int err = 0;

	if (nr_workers < 1 || nr_workers > 256)
		return -EINVAL;
	struct nbd_server *server = calloc(1, sizeof *server);
	if (!server)
		return -ENOMEM;
	pthread_mutex_init(&server->lock, NULL);
	pthread_mutex_init(&server->ready_lock, NULL);
	pthread_cond_init(&server->idle, NULL);
	server->ready_tail = &server->ready;
	server->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	server->ready_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE);
	server->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	server->slices = calloc(nr_workers, sizeof *server->slices);
	if (server->epoll_fd < 0 || server->ready_fd < 0 || server->event_fd < 0)
		err = -EMFILE;
	else if (!server->slices)
		err = -ENOMEM;
	else if (epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, server->ready_fd, &event) < 0)
		err = -errno;
	for (uint32_t i = 0; i < nr_workers && !err; i++)
		err = server_start_worker(server);
	if (err) {
		if (server->nr_workers)
			server_stop_workers(server);
		server_free(server);
		return err;
	}
	*server_out = server;
	return 0;
}

void nbd_server_drain(struct nbd_server *server)
{
	pthread_mutex_lock(&server->lock);
	for (uint32_t i = 0; i < server->nr_slots; i++)
		if (server->slots[i])
			nbd_connection_detach(server->slots[i]);
	while (server->nr_connections)
		pthread_cond_wait(&server->idle, &server->lock);
	pthread_mutex_unlock(&server->lock);
}

int nbd_server_deinit(struct nbd_server *server)
{
	pthread_mutex_lock(&server->lock);
	bool busy = server->nr_exports != 0;
	pthread_mutex_unlock(&server->lock);
	if (busy)
		return -EBUSY;
	server_stop_workers(server);
	server_free(server);
	return 0;
}
