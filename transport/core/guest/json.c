/* SPDX-License-Identifier: Apache-2.0 */
#include "transport/core/guest/json.h"

#include <string.h>

#define MAX_DEPTH 16

/* Each takes the start of an item, and returns its end, or NULL if the text is not JSON. `end` is one past the text. */
static const char *skip_value(const char *at, const char *end, unsigned depth);

static const char *skip_blanks(const char *at, const char *end)
{
	while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r'))
		at++;
	return at;
}

static const char *skip_string(const char *at, const char *end)
{
	if (at >= end || *at != '"')
		return NULL;
	for (at++; at < end; at++) {
		if (*at == '"')
			return at + 1;
		if ((unsigned char)*at < 0x20)
			return NULL;
		if (*at == '\\')
			at++;
	}
	return NULL;
}

/* Does not check the shape of numbers and words: accepts any run of the characters they are made of. */
static const char *skip_word(const char *at, const char *end)
{
	const char *start = at;

	while (at < end && *at && strchr("+-.0123456789abcdefghijklmnopqrstuvwxyzE", *at))
		at++;
	return at == start ? NULL : at;
}

static const char *skip_member(const char *at, const char *end, unsigned depth)
{
	at = skip_string(at, end);
	if (!at)
		return NULL;
	at = skip_blanks(at, end);
	if (at >= end || *at != ':')
		return NULL;
	return skip_value(skip_blanks(at + 1, end), end, depth);
}

static const char *skip_nested(const char *at, const char *end, unsigned depth)
{
	bool is_object = *at == '{';
	char closing = is_object ? '}' : ']';

	if (depth >= MAX_DEPTH)
		return NULL;
	at = skip_blanks(at + 1, end);
	if (at < end && *at == closing)
		return at + 1;
	for (;;) {
		at = is_object ? skip_member(at, end, depth + 1) : skip_value(at, end, depth + 1);
		if (!at)
			return NULL;
		at = skip_blanks(at, end);
		if (at >= end)
			return NULL;
		if (*at == closing)
			return at + 1;
		if (*at != ',')
			return NULL;
		at = skip_blanks(at + 1, end);
	}
}

static const char *skip_value(const char *at, const char *end, unsigned depth)
{
	if (at >= end)
		return NULL;
	switch (*at) {
	case '"':
		return skip_string(at, end);
	case '{':
	case '[':
		return skip_nested(at, end, depth);
	default:
		return skip_word(at, end);
	}
}

bool json_is_object(struct json json)
{
	const char *end = json.text + json.length;
	const char *at = skip_blanks(json.text, end);

	if (at >= end || *at != '{')
		return false;
	at = skip_nested(at, end, 0);
	return at && skip_blanks(at, end) == end;
}

/* Where a field's value starts, and its end; NULL if there is none. Names with escapes are not found. */
static const char *find(struct json json, const char *field, const char **value_end_out)
{
	const char *end = json.text + json.length;
	const char *at;
	size_t field_length = strlen(field);

	if (!json_is_object(json))
		return NULL;
	at = skip_blanks(skip_blanks(json.text, end) + 1, end);
	while (*at == '"') {
		const char *name = at + 1;
		const char *name_end = skip_string(at, end) - 1;
		const char *value = skip_blanks(skip_blanks(name_end + 1, end) + 1, end);
		const char *value_end = skip_value(value, end, 1);

		if ((size_t)(name_end - name) == field_length && memcmp(name, field, field_length) == 0) {
			*value_end_out = value_end;
			return value;
		}
		at = skip_blanks(value_end, end);
		if (*at != ',')
			return NULL;
		at = skip_blanks(at + 1, end);
	}
	return NULL;
}

bool json_is_true(struct json json, const char *field)
{
	const char *end;
	const char *value = find(json, field, &end);

	return value && end - value == 4 && memcmp(value, "true", 4) == 0;
}

bool json_object(struct json json, const char *field, struct json *object_out)
{
	const char *end;
	const char *value = find(json, field, &end);

	if (!value || *value != '{')
		return false;
	*object_out = (struct json){value, (size_t)(end - value)};
	return true;
}

bool json_raw(struct json json, const char *field, struct json *raw_out)
{
	const char *end;
	const char *value = find(json, field, &end);

	if (!value)
		return false;
	*raw_out = (struct json){value, (size_t)(end - value)};
	return true;
}

bool json_number(struct json json, const char *field, uint64_t *number_out)
{
	const char *end;
	const char *value = find(json, field, &end);
	uint64_t number = 0;

	if (!value)
		return false;
	for (; value < end; value++) {
		if (*value < '0' || *value > '9')
			return false;
		if (number > (uint64_t)(INT64_MAX - (*value - '0')) / 10)
			return false;
		number = number * 10 + (uint64_t)(*value - '0');
	}
	*number_out = number;
	return true;
}

/* Decodes the escape after a backslash; leaves *at on its last character. */
static char unescaped(const char **at, const char *end)
{
	switch (**at) {
	case '"':
	case '\\':
	case '/':
		return **at;
	case 'n':
	case 't':
		return ' ';
	case 'u':
		if (end - *at > 4)
			*at += 4;
		return '?';
	default:
		return '?';
	}
}

bool json_text(struct json json, const char *field, char *text_out, size_t capacity_bytes)
{
	const char *end;
	const char *at = find(json, field, &end);
	size_t length = 0;

	text_out[0] = '\0';
	if (!at || *at != '"')
		return false;
	for (at++; at < end - 1 && length < capacity_bytes - 1; at++) {
		char mark = *at;

		if (mark == '\\') {
			at++;
			mark = unescaped(&at, end - 1);
		}
		text_out[length++] = mark >= ' ' && mark <= '~' ? mark : '?';
	}
	text_out[length] = '\0';
	return true;
}
