/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads single fields of an untrusted JSON object, in place and without allocation.
 * Only fields of the top level are found; nested values are skipped, to a bounded depth.
 */
#ifndef COWSHED_JSON_H
#define COWSHED_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* One text, length bytes of it; not terminated. */
struct json {
	const char *text;
	size_t length;
};

/* Whether the text is one whole object and nothing else. */
bool json_is_object(struct json json);

/* Whether the field is there and true. */
bool json_is_true(struct json json, const char *field);

/* An object in the field, as a text of its own; false, leaving *object_out alone, for anything else. */
bool json_object(struct json json, const char *field, struct json *object_out);

/* The field's value as it is written; false, leaving *raw_out alone, if it is not there. */
bool json_raw(struct json json, const char *field, struct json *raw_out);

/* A whole number from 0 to 2^63-1; false, leaving *number_out alone, for anything else. */
bool json_number(struct json json, const char *field, uint64_t *number_out);

/* A string, made printable ASCII ('?' for the rest), cut to what fits and terminated; false, leaving an
   empty one, for anything else. capacity_bytes is at least 1. */
bool json_text(struct json json, const char *field, char *text_out, size_t capacity_bytes);

#endif
