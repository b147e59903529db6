/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/core/elf.h"

#include <elf.h>
#include <endian.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

/* Programs have about a dozen headers and some tens of dynamic entries. */
#define MAX_HEADERS 64
#define MAX_DYNAMIC 2048
#define CHUNK 64

#if __BYTE_ORDER == __LITTLE_ENDIAN
#define OUR_BYTE_ORDER ELFDATA2LSB
#else
#define OUR_BYTE_ORDER ELFDATA2MSB
#endif

/* The file, and its segments. */
struct file {
	int fd;
	unsigned nr_headers;
	Elf64_Phdr headers[MAX_HEADERS];
};

/* Returns how many of the bytes the file has; 0 on error. */
static size_t read_at(int fd, uint64_t offset_bytes, void *to, size_t nr_bytes)
{
	ssize_t got = offset_bytes > INT64_MAX ? -1 : pread(fd, to, nr_bytes, (off_t)offset_bytes);

	return got < 0 ? 0 : (size_t)got;
}

/* Reads a string, cut to 255 bytes. */
static void read_text(int fd, uint64_t offset_bytes, size_t length, char text[256])
{
	size_t got = read_at(fd, offset_bytes, text, length < 255 ? length : 255);

	text[got] = '\0';
}

static const Elf64_Phdr *find_header(const struct file *file, uint32_t type)
{
	for (unsigned i = 0; i < file->nr_headers; i++)
		if (file->headers[i].p_type == type)
			return &file->headers[i];
	return NULL;
}

/* The file offset of a virtual address of the program; 0 if none. */
static uint64_t offset_of(const struct file *file, uint64_t address)
{
	for (unsigned i = 0; i < file->nr_headers; i++) {
		const Elf64_Phdr *header = &file->headers[i];

		if (header->p_type == PT_LOAD && address >= header->p_vaddr &&
		    address - header->p_vaddr < header->p_filesz)
			return address - header->p_vaddr + header->p_offset;
	}
	return 0;
}

/* Finds the next entry of this tag in the dynamic section, from *entry_no on, and returns its value. */
static bool find_dynamic(const struct file *file, int64_t tag, unsigned *entry_no, uint64_t *value_out)
{
	const Elf64_Phdr *section = find_header(file, PT_DYNAMIC);
	Elf64_Dyn entries[CHUNK];

	while (section && *entry_no < section->p_filesz / sizeof(entries[0]) && *entry_no < MAX_DYNAMIC) {
		size_t got = read_at(file->fd, section->p_offset + *entry_no * sizeof(entries[0]), entries,
		                     sizeof(entries)) /
		             sizeof(entries[0]);

		for (size_t i = 0; i < got; i++) {
			(*entry_no)++;
			if (entries[i].d_tag == DT_NULL)
				return false;
			if (entries[i].d_tag == tag) {
				*value_out = entries[i].d_un.d_val;
				return true;
			}
		}
		if (got == 0)
			return false;
	}
	return false;
}

static uint64_t dynamic_value(const struct file *file, int64_t tag)
{
	unsigned entry_no = 0;
	uint64_t value;

	return find_dynamic(file, tag, &entry_no, &value) ? value : 0;
}

static void read_dynamic(const struct file *file, struct elf *elf)
{
	uint64_t texts = offset_of(file, dynamic_value(file, DT_STRTAB));
	uint64_t name = dynamic_value(file, DT_SONAME), needed;
	unsigned entry_no = 0;
	char text[256];

	if (texts == 0)
		return;
	if (name)
		read_text(file->fd, texts + name, 255, elf->soname);
	while (find_dynamic(file, DT_NEEDED, &entry_no, &needed)) {
		read_text(file->fd, texts + needed, 255, text);
		elf->needs_first |= strncmp(text, "libasan.so", 10) == 0 || strstr(text, "libclang_rt.asan");
	}
}

int elf_read(int fd, struct elf *elf_out)
{
	struct elf elf = {.bits = 0};
	struct file file = {.fd = fd};
	const Elf64_Phdr *linker;
	Elf64_Ehdr head;
	ssize_t got;

	got = pread(fd, &head, sizeof(head), 0);
	if (got < 0)
		return -errno;
	if (got < (ssize_t)sizeof(Elf32_Ehdr) || memcmp(head.e_ident, ELFMAG, SELFMAG) != 0 ||
	    (head.e_ident[EI_CLASS] != ELFCLASS32 && head.e_ident[EI_CLASS] != ELFCLASS64))
		return 0;
	elf.bits = head.e_ident[EI_CLASS] == ELFCLASS64 ? 64 : 32;
	elf.is_big_endian = head.e_ident[EI_DATA] == ELFDATA2MSB;
	elf.machine = head.e_ident[EI_DATA] == OUR_BYTE_ORDER ? head.e_machine : __builtin_bswap16(head.e_machine);
	if (elf.bits == 64 && head.e_ident[EI_DATA] == OUR_BYTE_ORDER && got == sizeof(head) &&
	    head.e_phentsize == sizeof(file.headers[0])) {
		size_t nr_bytes = (head.e_phnum < MAX_HEADERS ? head.e_phnum : MAX_HEADERS) * sizeof(file.headers[0]);

		file.nr_headers =
			(unsigned)(read_at(fd, head.e_phoff, file.headers, nr_bytes) / sizeof(file.headers[0]));
		linker = find_header(&file, PT_INTERP);
		if (linker)
			read_text(fd, linker->p_offset, linker->p_filesz, elf.linker);
		/* A static program at any address (-static-pie) has DF_1_PIE; a loader does not. */
		elf.is_loader = !linker && head.e_type == ET_DYN && !(dynamic_value(&file, DT_FLAGS_1) & DF_1_PIE);
		read_dynamic(&file, &elf);
	}
	*elf_out = elf;
	return 1;
}
