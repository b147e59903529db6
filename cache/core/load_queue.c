/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/core/load_queue.h"

#include "cache/core/image.h"

#include <stddef.h>

void load_queue_init(struct load_queue *queue)
{
	*queue = (struct load_queue){.tail = &queue->head};
}

void load_queue_push(struct load_queue *queue, struct load *load)
{
	load->next = NULL;
	*queue->tail = load;
	queue->tail = &load->next;
	queue->nr++;
}

void load_queue_push_front(struct load_queue *queue, struct load *load)
{
	load->next = queue->head;
	if (!queue->head)
		queue->tail = &load->next;
	queue->head = load;
	queue->nr++;
}

static struct load *load_queue_unlink(struct load_queue *queue, struct load **at)
{
	struct load *load = *at;

	*at = load->next;
	if (!load->next)
		queue->tail = at;
	queue->nr--;
	return load;
}

bool load_is_restore(const struct load *load)
{
	return load->image->standby[load->first] != 0;
}

struct load *load_queue_pop(struct load_queue *queue, uint32_t nr_max, uint64_t *room)
{
	for (struct load **at = &queue->head; *at; at = &(*at)->next) {
		const struct load *load = *at;

		if (load_is_restore(load))
			return load_queue_unlink(queue, at);
		if (load->image->nr_loaders >= nr_max)
			continue;
		if (image_room(load->image, load->first, 1) <= *room)
			return load_queue_unlink(queue, at);
		*room = 0;
	}
	return NULL;
}

struct load *load_queue_take(struct load_queue *queue, const struct image *image, uint64_t extent)
{
	for (struct load **at = &queue->head; *at; at = &(*at)->next)
		if ((*at)->image == image && extent - (*at)->first < (*at)->nr)
			return load_queue_unlink(queue, at);
	return NULL;
}
