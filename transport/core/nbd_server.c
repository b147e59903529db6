/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Threads, connections, exports.
 *
 * All threads wait on one epoll descriptor. A connection is in it with EPOLLONESHOT, and found by its number, never
 * by a pointer: an event may be read after the connection has ended.  A piece that is done, and a turn that has more to
 * do than is fair, put their connection in the ready queue, whose eventfd is in the same epoll.
 */
#define _GNU_SOURCE
#include "transport/core/nbd_state.h"
#include "cache/core/points.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define SLOTS_MAX 65536u
#define READY_EVENT UINT64_MAX
#define STOP_EVENT (UINT64_MAX - 1)
#define WORKER_STACK_BYTES (256u << 10)
#define LINGER_US 2000 /* a thread waits with its connection (nbd_turn.c) */
#define LOOK_MS 1000   /* a wake-up that was lost costs that much, and no more */
#define EVENTS_MAX 1   /* what a thread has taken, no other can serve */

static struct nbd_connection *server_find(struct nbd_server *server, uint64_t connection_no)
{
	uint32_t slot = (uint32_t)connection_no;

	if (slot >= server->nr_slots || !server->slots[slot] || server->slots[slot]->connection_no != connection_no)
		return NULL;
	return server->slots[slot];
}

void nbd_enqueue(struct nbd_connection *connection)
{
	struct nbd_server *server = connection->server;

	pthread_mutex_lock(&server->ready_lock);
	bool fresh = !connection->queued;
	if (fresh) {
		connection->queued = true;
		connection->next_ready = NULL;
		*server->ready_tail = connection;
		server->ready_tail = &connection->next_ready;
	}
	pthread_mutex_unlock(&server->ready_lock);
	if (fresh)
		store_raise_at(POINT_WAKE_NBD, server->ready_fd);
}

/* Takes it out of the line: it is ending. Nobody can find it any more to put it there again. */
static void ready_forget(struct nbd_connection *connection)
{
	struct nbd_server *server = connection->server;

	pthread_mutex_lock(&server->ready_lock);
	if (connection->queued) {
		struct nbd_connection **at = &server->ready;
		while (*at != connection)
			at = &(*at)->next_ready;
		*at = connection->next_ready;
		if (!*at)
			server->ready_tail = at;
	}
	pthread_mutex_unlock(&server->ready_lock);
}

void nbd_piece_ready(struct nbd_piece *piece)
{
	struct nbd_connection *connection = piece->connection;

	pthread_mutex_lock(&connection->lock);
	piece->next = NULL;
	*connection->ready_tail = piece;
	connection->ready_tail = &piece->next;
	if (connection->running)
		connection->again = true;
	else
		nbd_enqueue(connection);
	pthread_mutex_unlock(&connection->lock);
}

/* Its overlay was thawed. */
static void connection_go(struct overlay_hold *hold)
{
	struct nbd_connection *connection =
		(struct nbd_connection *)((char *)hold - offsetof(struct nbd_connection, hold));

	pthread_mutex_lock(&connection->lock);
	if (connection->running)
		connection->again = true;
	else
		nbd_enqueue(connection);
	pthread_mutex_unlock(&connection->lock);
}

/* The number of the connection that is next in line; 0 if there is none. */
static uint64_t ready_pop(struct nbd_server *server)
{
	uint64_t connection_no = 0;

	pthread_mutex_lock(&server->ready_lock);
	struct nbd_connection *connection = server->ready;
	if (connection) {
		connection_no = connection->connection_no;
		connection->queued = false;
		server->ready = connection->next_ready;
		if (!server->ready)
			server->ready_tail = &server->ready;
	}
	pthread_mutex_unlock(&server->ready_lock);
	return connection_no;
}

/* Another thread may have taken it; and nothing but time tells of one whose wake-up was lost (nr 0). */
static uint64_t next_in_line(struct nbd_server *server, int nr)
{
	uint64_t raised;

	return nr && read(server->ready_fd, &raised, sizeof raised) < 0 ? 0 : ready_pop(server);
}

static void segments_free(struct nbd_connection *connection)
{
	for (struct nbd_segment *segment; (segment = connection->backlog);) {
		connection->backlog = segment->next;
		if (segment->owner)
			piece_free(segment->owner);
		free(segment);
	}
}

static void connection_free(struct nbd_connection *connection)
{
	segments_free(connection);
	free(connection->carry);
	pthread_mutex_destroy(&connection->lock);
	free(connection);
}

/* The last turn of a connection: nothing of it is anywhere else any more but in the table. */
static void connection_end(struct nbd_connection *connection)
{
	struct nbd_server *server = connection->server;
	struct nbd_ended ended = {
		.connection_no = connection->connection_no,
		.err = connection->err,
		.reason = connection->reason,
	};

	if (connection->export->overlay)
		overlay_unhold(connection->export->overlay, &connection->hold);
	assert(!connection->nr_ops && !connection->nr_pieces && !connection->ready);
	epoll_ctl(server->epoll_fd, EPOLL_CTL_DEL, connection->fd, NULL);
	pthread_mutex_lock(&server->lock);
	close(connection->fd); /* under the lock: nbd_detach shuts down what is open */
	server->slots[(uint32_t)connection->connection_no] = NULL;
	connection->export->nr_connections--;
	server->ended[server->nr_ended++] = ended;
	if (--server->nr_connections == 0)
		pthread_cond_broadcast(&server->idle);
	pthread_mutex_unlock(&server->lock);
	pthread_mutex_lock(&connection->lock); /* who found it in the table lets go first */
	pthread_mutex_unlock(&connection->lock);
	ready_forget(connection);
	connection_free(connection);
	store_raise_at(POINT_WAKE_NBD_ENDED, server->event_fd);
}

/* Takes the connection for a turn, unless another thread has it, which will then look again. */
static bool connection_take(struct nbd_connection *connection)
{
	bool mine = !connection->running;

	if (mine)
		connection->running = true;
	else
		connection->again = true;
	return mine;
}

static void connection_serve(struct nbd_turn *turn, struct nbd_connection *connection)
{
	struct nbd_server *server = turn->server;

	for (;;) {
		turn->connection = connection;
		uint32_t wanted = nbd_turn_run(turn);
		turn->connection = NULL;
		if (wanted == TURN_ENDED) {
			connection_end(connection);
			return;
		}
		pthread_mutex_lock(&connection->lock);
		if (connection->again) {
			connection->again = false;
			pthread_mutex_unlock(&connection->lock);
			continue;
		}
		connection->running = false;
		if (wanted == TURN_AGAIN) {
			nbd_enqueue(connection);
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

void *nbd_worker_main(void *arg)
{
	struct nbd_turn *turn = arg;
	struct nbd_server *server = turn->server;

	prctl(PR_SET_NAME, "cow-nbd");
	while (!atomic_load(&server->stop)) {
		struct epoll_event event;
		int nr = epoll_wait(server->epoll_fd, &event, EVENTS_MAX, LOOK_MS);

		if (nr < 0 || (nr && event.data.u64 == STOP_EVENT))
			continue;
		uint64_t connection_no =
			nr && event.data.u64 != READY_EVENT ? event.data.u64 : next_in_line(server, nr);
		pthread_mutex_lock(&server->lock);
		struct nbd_connection *connection = server_find(server, connection_no);
		if (connection)
			pthread_mutex_lock(&connection->lock);
		pthread_mutex_unlock(&server->lock);
		if (!connection)
			continue;
		bool mine = connection_take(connection);
		pthread_mutex_unlock(&connection->lock);
		if (mine)
			connection_serve(turn, connection);
	}
	return NULL;
}

static void turn_deinit(struct nbd_turn *turn)
{
	free(turn->in);
	free(turn->out.arena);
	free(turn->scratch);
}

static int turn_init(struct nbd_turn *turn, struct nbd_server *server)
{
	turn->server = server;
	turn->in = malloc(IN_BYTES);
	turn->out.arena = malloc(ARENA_BYTES);
	turn->scratch = malloc(4096);
	if (turn->in && turn->out.arena && turn->scratch)
		return 0;
	turn_deinit(turn);
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
	free(server->turns);
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
		store_raise(server->ready_fd); /* without a descriptor of its own, this wakes them too */
		pthread_join(server->turns[i].thread, NULL);
		turn_deinit(&server->turns[i]);
	}
	if (stop_fd >= 0)
		close(stop_fd);
}

static int server_start_worker(struct nbd_server *server)
{
	struct nbd_turn *turn = &server->turns[server->nr_workers];
	pthread_attr_t attr;
	int err = turn_init(turn, server);

	if (err)
		return err;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, WORKER_STACK_BYTES);
	err = -pthread_create(&turn->thread, &attr, nbd_worker_main, turn);
	pthread_attr_destroy(&attr);
	if (err)
		turn_deinit(turn);
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
	server->turns = calloc(nr_workers, sizeof *server->turns);
	if (server->epoll_fd < 0 || server->ready_fd < 0 || server->event_fd < 0)
		err = -EMFILE;
	else if (!server->turns)
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

static void connection_detach(struct nbd_connection *connection)
{
	pthread_mutex_lock(&connection->lock);
	connection->detached = true;
	shutdown(connection->fd, SHUT_RDWR); /* whoever waits on it is woken; the turn that sees it ends it */
	if (connection->running)
		connection->again = true;
	else
		nbd_enqueue(connection);
	pthread_mutex_unlock(&connection->lock);
}

void nbd_server_drain(struct nbd_server *server)
{
	pthread_mutex_lock(&server->lock);
	for (uint32_t i = 0; i < server->nr_slots; i++)
		if (server->slots[i])
			connection_detach(server->slots[i]);
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

/* Room for one connection more, and for the report of its end; under lock. */
static int slot_take(struct nbd_server *server, uint32_t *slot_out)
{
	uint32_t slot = 0;

	while (slot < server->nr_slots && server->slots[slot])
		slot++;
	if (slot == server->nr_slots) {
		uint32_t nr = server->nr_slots ? 2 * server->nr_slots : 64;
		if (server->nr_slots >= SLOTS_MAX)
			return -EMFILE;
		struct nbd_connection **slots = realloc(server->slots, nr * sizeof *slots);
		if (!slots)
			return -ENOMEM;
		memset(slots + server->nr_slots, 0, (nr - server->nr_slots) * sizeof *slots);
		server->slots = slots;
		server->nr_slots = nr;
	}
	uint64_t room = server->nr_ended + server->nr_connections + 1;
	if (room > server->ended_room) {
		struct nbd_ended *ended = realloc(server->ended, 2 * room * sizeof *ended);
		if (!ended)
			return -ENOMEM;
		server->ended = ended;
		server->ended_room = 2 * room;
	}
	*slot_out = slot;
	return 0;
}

static void socket_prepare(int fd)
{
	struct timeval linger = {.tv_usec = LINGER_US};
	int one = 1, room = 4 << 20;

	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK); /* to linger; all else asks for MSG_DONTWAIT */
	/* Each only makes things faster, and fails on sockets of another kind. */
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &linger, sizeof linger);
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room) < 0)
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
}

static bool negotiated_ok(const struct nbd_negotiated *negotiated)
{
	const uint32_t *ids = negotiated->context_ids;

	return negotiated->max_payload_bytes >= 4096 && negotiated->max_payload_bytes <= NBD_PAYLOAD_MAX &&
	       (!(ids[0] | ids[1] | ids[2]) || negotiated->structured || negotiated->extended);
}

int nbd_attach(struct nbd_server *server, struct nbd_export *export, int fd, const struct nbd_negotiated *negotiated,
               const uint8_t *early, uint64_t nr_early, uint64_t *connection_no_out)
{
	struct epoll_event event = {.events = EPOLLONESHOT};
	uint32_t slot;

	if (!negotiated_ok(negotiated) || nr_early > IN_BYTES / 2)
		return -EINVAL;
	struct nbd_connection *connection = calloc(1, sizeof *connection);
	if (!connection)
		return -ENOMEM;
	pthread_mutex_init(&connection->lock, NULL);
	connection->server = server;
	connection->export = export;
	connection->negotiated = *negotiated;
	connection->negotiated.read_only |= !export->overlay;
	connection->fd = fd;
	connection->hold.go = connection_go;
	connection->ready_tail = &connection->ready;
	connection->longs_tail = &connection->longs;
	connection->completed_tail = &connection->completed;
	connection->backlog_tail = &connection->backlog;
	if (nr_early && !(connection->carry = malloc(nr_early))) {
		connection_free(connection);
		return -ENOMEM;
	}
	if (nr_early)
		memcpy(connection->carry, early, nr_early);
	connection->nr_carry = nr_early;
	socket_prepare(fd);

	pthread_mutex_lock(&server->lock);
	int err = slot_take(server, &slot);
	if (!err) {
		connection->connection_no = (uint64_t)++server->next_generation << 32 | slot;
		event.data.u64 = connection->connection_no;
		if (epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
			err = -errno;
	}
	if (err) {
		pthread_mutex_unlock(&server->lock);
		connection_free(connection);
		return err;
	}
	server->slots[slot] = connection;
	server->nr_connections++;
	export->nr_connections++;
	nbd_export_add(export, NBD_COUNT_NO(connections), 1);
	*connection_no_out = connection->connection_no;
	pthread_mutex_lock(&connection->lock);
	nbd_enqueue(connection);
	pthread_mutex_unlock(&connection->lock);
	pthread_mutex_unlock(&server->lock);
	return 0;
}

int nbd_detach(struct nbd_server *server, uint64_t connection_no)
{
	pthread_mutex_lock(&server->lock);
	struct nbd_connection *connection = server_find(server, connection_no);
	if (connection)
		connection_detach(connection);
	pthread_mutex_unlock(&server->lock);
	return connection ? 0 : -ENOENT;
}

int nbd_event_fd(const struct nbd_server *server)
{
	return server->event_fd;
}

int64_t nbd_take_ended(struct nbd_server *server, struct nbd_ended *ended_out, uint64_t nr_max)
{
	pthread_mutex_lock(&server->lock);
	uint64_t nr = server->nr_ended < nr_max ? server->nr_ended : nr_max;
	if (nr) {
		memcpy(ended_out, server->ended, nr * sizeof *ended_out);
		server->nr_ended -= nr;
		memmove(server->ended, server->ended + nr, server->nr_ended * sizeof *ended_out);
	}
	pthread_mutex_unlock(&server->lock);
	return (int64_t)nr;
}
