/* om_disk: see om_disk.h. */
#include "core/om_disk.h"

#include <errno.h>
#include <string.h>

#include "base/om_base.h"
#include "base/om_error.h"

#define GROW_STEP (UINT64_C(64) * OM_MIB) /* extending by small steps punts writes to workers */

int om_disk_init(struct om_disk *d, const char *directory, uint64_t limit_bytes)
{
	memset(d, 0, sizeof(*d));
	d->limit_bytes = om_down(limit_bytes, OM_PAGE);
	if (directory && !(d->directory = om_strdup(directory)))
		return -ENOMEM;
	return om_arena_create(0, OM_PAGE, &d->arena);
}

void om_disk_fini(struct om_disk *d)
{
	om_file_unref(d->file);
	om_arena_destroy(d->arena);
	om_free(d->directory);
	memset(d, 0, sizeof(*d));
}

static int add_run(struct om_disk_copy *copy, uint64_t offset, uint64_t bytes)
{
	struct om_run *runs = om_realloc(copy->runs, copy->count + 1, sizeof(*runs));

	if (!runs)
		return -ENOMEM;
	copy->runs = runs;
	runs[copy->count++] = (struct om_run){ offset, bytes };
	return 0;
}

int om_disk_alloc(struct om_disk *d, uint64_t bytes, struct om_disk_copy *ret)
{
	struct om_disk_copy copy = { 0 };
	uint64_t left = bytes;
	int code = 0;

	if (om_arena_size(d->arena) - om_arena_used(d->arena) < bytes)
		return -ENOSPC;
	while (left && !code) {
		uint64_t offset, got;

		code = om_arena_alloc_some(d->arena, left, &offset, &got);
		if (code)
			break;
		d->used_bytes += got;
		left -= got;
		code = add_run(&copy, offset, got);
		if (code) {
			om_arena_free(d->arena, offset);
			d->used_bytes -= got;
		}
	}
	if (code) {
		om_disk_free(d, &copy);
		return code;
	}
	d->peak_bytes = OM_MAX(d->peak_bytes, d->used_bytes);
	*ret = copy;
	return 0;
}

void om_disk_free(struct om_disk *d, struct om_disk_copy *copy)
{
	for (size_t i = 0; i < copy->count; i++) {
		om_arena_free(d->arena, copy->runs[i].offset);
		d->used_bytes -= copy->runs[i].bytes;
	}
	om_free(copy->runs);
	memset(copy, 0, sizeof(*copy));
}

uint64_t om_disk_copy_bytes(const struct om_disk_copy *copy)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < copy->count; i++)
		bytes += copy->runs[i].bytes;
	return bytes;
}

uint64_t om_disk_target(const struct om_disk *d, uint64_t bytes)
{
	uint64_t size = om_arena_size(d->arena), least = d->used_bytes + bytes;

	if (least > d->limit_bytes)
		return 0;
	return OM_MIN(d->limit_bytes, OM_MAX(om_up(least, OM_PAGE), size + GROW_STEP));
}

int om_disk_grown(struct om_disk *d, uint64_t bytes)
{
	return bytes > om_arena_size(d->arena) ? om_arena_grow(d->arena, bytes) : 0;
}

bool om_disk_wasteful(const struct om_disk *d)
{
	uint64_t backed = om_arena_size(d->arena) - d->used_bytes - d->holes;

	return d->file && !d->no_holes && !d->growing && !d->taken &&
	       backed > (d->used_bytes ? OM_MAX(GROW_STEP, d->used_bytes / 4) : 0);
}

int om_disk_take_free(struct om_disk *d, struct om_disk_copy *ret)
{
	uint64_t peak = d->peak_bytes, used = d->used_bytes;
	int code = om_disk_alloc(d, om_arena_size(d->arena) - om_arena_used(d->arena), ret);

	if (code)
		return code;
	d->taken = d->used_bytes - used;
	d->used_bytes = used; /* nobody uses them */
	d->peak_bytes = peak;
	return 0;
}

void om_disk_give_back(struct om_disk *d, struct om_disk_copy *runs, bool holes)
{
	if (holes)
		d->holes = d->taken;
	d->no_holes = !holes;
	d->used_bytes += d->taken;
	d->taken = 0;
	om_disk_free(d, runs);
}

uint64_t om_disk_capacity(struct om_disk *d)
{
	uint64_t free_bytes, size = om_arena_size(d->arena) - d->holes;

	if (!d->file || om_file_free_bytes(d->file, &free_bytes))
		return d->limit_bytes; /* proven when the file is made and grown, before any byte is at risk */
	return OM_MIN(d->limit_bytes, size + free_bytes);
}

int om_disk_check(const struct om_disk *d)
{
	if (om_arena_used(d->arena) != d->used_bytes + d->taken)
		return om_err(OM_ECORRUPT, "disk: the arena holds %llu bytes, the tier counts %llu",
		              (unsigned long long)om_arena_used(d->arena),
		              (unsigned long long)d->used_bytes);
	return om_arena_check(d->arena);
}
