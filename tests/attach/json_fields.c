/* SPDX-License-Identifier: Apache-2.0 */
/* json_fields: for each text on stdin, after a line with its length, what the library's reader makes of its
 * fields "n", "s", "t" and "o", as one line: object true, number or -, string's length or -, nested n or -. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "transport/core/guest/json.h"

static void show_number(struct json json)
{
	uint64_t number;

	if (json_number(json, "n", &number))
		printf(" %" PRIu64, number);
	else
		printf(" -");
}

int main(void)
{
	size_t length;

	while (scanf("%zu", &length) == 1 && getchar() == '\n') {
		/* Of exactly its size, so that the sanitizer sees a read past its end. */
		char *text = malloc(length ? length : 1), string[8];
		struct json json = {text, length}, nested;
		bool has_string;

		if (fread(text, 1, length, stdin) != length)
			return 1;
		has_string = json_text(json, "s", string, sizeof(string));
		printf("%d %d", json_is_object(json), json_is_true(json, "t"));
		show_number(json);
		if (has_string)
			printf(" '%s'", string);
		else
			printf(" -");
		if (json_object(json, "o", &nested))
			show_number(nested);
		else
			printf(" -");
		printf("\n");
		free(text);
	}
	return 0;
}
