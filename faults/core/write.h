/* SPDX-License-Identifier: Apache-2.0 */
/* Answers to writes, and the quota that they are charged to (write.c). */
#ifndef COWSHED_WRITE_H
#define COWSHED_WRITE_H

#include "faults/core/guest.h"

/* A write fault on a page. */
void answer_write(struct guest *guest, uint64_t page, uint64_t read_ns);
/* Charges and opens the write window of a page that is mapped: 0, or an error that was handled. */
int answer_open(struct guest *guest, uint64_t page);
/* Answers a first write to a page that is not mapped; the extent is held. 0: answered; -ENOTSUP: the caller must map
 * and open the page; -EDQUOT: the guest is at its quota; -EAGAIN: whether it is cannot be known now. */
int write_first(struct guest *guest, uint64_t page);
/* Under write_lock: takes up to nr_wanted pages from the quota; if none are left, has the account give some back and
 * tries again. Returns how many, -EDQUOT, or -EAGAIN: an event is unread, and the account may have some to give. */
int64_t account_take_pages(struct account *account, uint64_t nr_wanted);
/* With no lock held, after -EDQUOT: has the quota's other accounts give charges back. 0: try again; -EDQUOT: they have
 * none; -EAGAIN: ask again later, since not all could be looked at. */
int quota_settle_others(struct account *account);
/* At the quota: stops the guest, and sends its process SIGBUS if the policy is kill. */
void quota_refuse(struct guest *guest);

#endif
