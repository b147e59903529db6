/* SPDX-License-Identifier: Apache-2.0 */
/* NBD on the wire: magics, commands, flags, errors, and how a request's header is read.  Everything is big-endian. */
#ifndef COWSHED_NBD_WIRE_H
#define COWSHED_NBD_WIRE_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_EXTENDED_REQUEST_MAGIC 0x21e41c71u
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698u
#define NBD_STRUCTURED_REPLY_MAGIC 0x668e33efu
#define NBD_EXTENDED_REPLY_MAGIC 0x6e8a278cu

#define NBD_REQUEST_BYTES 28
#define NBD_EXTENDED_REQUEST_BYTES 32
#define NBD_SIMPLE_REPLY_BYTES 16
#define NBD_CHUNK_BYTES 20
#define NBD_EXTENDED_CHUNK_BYTES 32

enum nbd_command {
	NBD_CMD_READ,
	NBD_CMD_WRITE,
	NBD_CMD_DISC,
	NBD_CMD_FLUSH,
	NBD_CMD_TRIM,
	NBD_CMD_CACHE,
	NBD_CMD_WRITE_ZEROES,
	NBD_CMD_BLOCK_STATUS,
};

#define NBD_CMD_FLAG_FUA (1u << 0)
#define NBD_CMD_FLAG_NO_HOLE (1u << 1)
#define NBD_CMD_FLAG_DF (1u << 2)
#define NBD_CMD_FLAG_REQ_ONE (1u << 3)
#define NBD_CMD_FLAG_FAST_ZERO (1u << 4)
#define NBD_CMD_FLAG_PAYLOAD_LEN (1u << 5)

#define NBD_REPLY_FLAG_DONE (1u << 0)
#define NBD_REPLY_TYPE_NONE 0
#define NBD_REPLY_TYPE_OFFSET_DATA 1
#define NBD_REPLY_TYPE_BLOCK_STATUS 5
#define NBD_REPLY_TYPE_BLOCK_STATUS_EXT 6
#define NBD_REPLY_TYPE_ERROR ((1u << 15) + 1)

#define NBD_STATE_HOLE 1u
#define NBD_STATE_ZERO 2u

/* The protocol's numbers; they happen to be Linux's. */
#define NBD_EPERM 1u
#define NBD_EIO 5u
#define NBD_ENOMEM 12u
#define NBD_EINVAL 22u
#define NBD_ENOSPC 28u
#define NBD_EOVERFLOW 75u
#define NBD_ENOTSUP 95u
#define NBD_ESHUTDOWN 108u

/* A payload up to this size is read to its end, however wrong the request; a longer one ends the connection. */
#define NBD_PAYLOAD_MAX (1u << 25)

struct nbd_request {
	uint16_t flags, type;
	uint64_t cookie; /* as it came: opaque */
	uint64_t offset, length;
};

static inline uint16_t wire_get16(const uint8_t *from)
{
	uint16_t value;

	memcpy(&value, from, sizeof value);
	return be16toh(value);
}

static inline uint32_t wire_get32(const uint8_t *from)
{
	uint32_t value;

	memcpy(&value, from, sizeof value);
	return be32toh(value);
}

static inline uint64_t wire_get64(const uint8_t *from)
{
	uint64_t value;

	memcpy(&value, from, sizeof value);
	return be64toh(value);
}

static inline uint8_t *wire_put16(uint8_t *to, uint16_t value)
{
	value = htobe16(value);
	return (uint8_t *)memcpy(to, &value, sizeof value) + sizeof value;
}

static inline uint8_t *wire_put32(uint8_t *to, uint32_t value)
{
	value = htobe32(value);
	return (uint8_t *)memcpy(to, &value, sizeof value) + sizeof value;
}

static inline uint8_t *wire_put64(uint8_t *to, uint64_t value)
{
	value = htobe64(value);
	return (uint8_t *)memcpy(to, &value, sizeof value) + sizeof value;
}

static inline uint8_t *wire_put_raw64(uint8_t *to, uint64_t value)
{
	return (uint8_t *)memcpy(to, &value, sizeof value) + sizeof value;
}

/* Reads a header of the kind negotiated; 0 if its magic is another. */
static inline int wire_get_request(const uint8_t *from, int extended, struct nbd_request *request_out)
{
	if (wire_get32(from) != (extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC))
		return 0;
	request_out->flags = wire_get16(from + 4);
	request_out->type = wire_get16(from + 6);
	memcpy(&request_out->cookie, from + 8, sizeof request_out->cookie);
	request_out->offset = wire_get64(from + 16);
	request_out->length = extended ? wire_get64(from + 24) : wire_get32(from + 24);
	return 1;
}

/* The protocol's error for -errno. */
static inline uint32_t wire_error(int err)
{
	switch (-err) {
	case NBD_EPERM:
	case NBD_EINVAL:
	case NBD_ENOMEM:
	case NBD_ENOSPC:
	case NBD_EOVERFLOW:
	case NBD_ENOTSUP:
	case NBD_ESHUTDOWN:
		return (uint32_t)-err;
	case 122: /* EDQUOT */
	case 27:  /* EFBIG */
		return NBD_ENOSPC;
	default:
		return NBD_EIO;
	}
}

#endif
