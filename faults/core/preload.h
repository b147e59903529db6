/* SPDX-License-Identifier: Apache-2.0 */
/* Pages that a guest arrives with and has not touched yet (preload.c). */
#ifndef COWSHED_FAULTS_PRELOAD_H
#define COWSHED_FAULTS_PRELOAD_H

#include "faults/core/guest.h"

/* Answers a fault on a preloaded page; false if the page is not preloaded. */
bool answer_preloaded(struct guest *guest, uint64_t page, uint64_t read_ns);
/* Copies some preloaded pages ahead of faults; returns whether there were any. */
bool preload_push(struct guest *guest);

#endif
