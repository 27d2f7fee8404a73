/*
 * om_arena: O(1) two-level segregated fit over offsets [0, size).
 *
 * Its records live outside the memory it manages, so that RAM segments, GPU segments and the swap
 * file use the same code. Passive: no locks, no threads; the caller serialises. Every offset and
 * size is a multiple of `granule` (a power of two).
 */
#ifndef OM_ARENA_H
#define OM_ARENA_H

#include <stdbool.h>
#include <stdint.h>

struct om_arena;

int om_arena_create(uint64_t size, uint64_t granule, struct om_arena **ret);
void om_arena_destroy(struct om_arena *a); /* NULL is fine */
/* Reserve `size` bytes (rounded up to granules) at an offset that is a multiple of `align` (a power
 * of two; 0 or <= granule: none beyond the granule). -ENOSPC (no message) when no hole fits,
 * -ENOMEM when a record cannot be had (the arena is unchanged). Bounded work: it looks at 8 holes
 * and then only where every hole fits, so that of 64 granules and more it may miss a hole less than
 * 1/32 larger than the request (any, up to align - 1 larger, with an alignment above the granule). */
int om_arena_alloc(struct om_arena *a, uint64_t size, uint64_t align, uint64_t *ret_offset);
/* Reserve `size` bytes, or else a hole within 1/32 of the largest one: for users that can scatter.
 * Fails as om_arena_alloc does; -ENOSPC only when everything is in use. */
int om_arena_alloc_some(struct om_arena *a, uint64_t size, uint64_t *ret_offset,
                        uint64_t *ret_size);
/* Give back an allocation by its offset. OM_EVALUE when nothing is allocated there. Never needs
 * memory. */
int om_arena_free(struct om_arena *a, uint64_t offset);
/* Add room at the end: the new size (OM_EVALUE when smaller, 2^63 or more, or not in granules). */
int om_arena_grow(struct om_arena *a, uint64_t size);
/* Drop free room at the end; returns the new size (the end of the last allocation). */
uint64_t om_arena_shrink(struct om_arena *a);
uint64_t om_arena_size(const struct om_arena *a);
uint64_t om_arena_used(const struct om_arena *a);
uint64_t om_arena_largest_free(const struct om_arena *a); /* exact; walks one size class */
uint64_t om_arena_count(const struct om_arena *a);
/* ---- allocations by handle ---- */

/* As om_arena_create, for users that keep the handle of each allocation: nothing is looked up by offset, and
 * each allocation knows its owner. Use only the functions below on it, and those above that take no
 * offset. */
int om_arena_create_by_handle(uint64_t size, uint64_t granule, struct om_arena **ret);
/* As om_arena_alloc; `owner` is the caller's number. Misses no hole: where the bounded search finds none, it
 * looks at all those that are less than 1/32 larger (or `align`). A handle is never 0. */
int om_arena_take(struct om_arena *a, uint64_t size, uint64_t align, uint32_t owner,
                  uint32_t *ret_handle, uint64_t *ret_offset);
/* Give back an allocation; returns the handle of the hole that it is part of now. */
uint32_t om_arena_give(struct om_arena *a, uint32_t handle);

/* A part of the space: a hole or an allocation. */
struct om_tile {
	uint64_t offset, bytes;
	uint32_t handle;
	uint32_t owner; /* of an allocation */
	bool used;
};
struct om_tile om_arena_tile(const struct om_arena *a, uint32_t handle);
/* The neighbour by address; its handle is 0 at the end. */
struct om_tile om_arena_beside(const struct om_arena *a, uint32_t handle, bool above);
/* Walks the holes from about `least` bytes up (all of those, and maybe smaller ones): handle 0 begins, 0
 * ends. The arena must not change meanwhile. */
uint32_t om_arena_next_hole(const struct om_arena *a, uint32_t handle, uint64_t least);

/* Walks everything: holes and allocations tile [0, size), free lists agree. OM_ECORRUPT if not. */
int om_arena_check(const struct om_arena *a);

#endif
