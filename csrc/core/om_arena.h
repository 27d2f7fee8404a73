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
 * -ENOMEM when a record cannot be had (the arena is unchanged). */
int om_arena_alloc(struct om_arena *a, uint64_t size, uint64_t align, uint64_t *ret_offset);
/* Reserve the largest hole, at most `size`: for users that can scatter. */
int om_arena_alloc_some(struct om_arena *a, uint64_t size, uint64_t *ret_offset, uint64_t *ret_size);
/* Give back an allocation by its offset. OM_EVALUE when nothing is allocated there. Never needs
 * memory. */
int om_arena_free(struct om_arena *a, uint64_t offset);
/* Add room at the end: the new size. */
int om_arena_grow(struct om_arena *a, uint64_t size);
/* Drop free room at the end; returns the new size (the end of the last allocation). */
uint64_t om_arena_shrink(struct om_arena *a);
uint64_t om_arena_size(const struct om_arena *a);
uint64_t om_arena_used(const struct om_arena *a);
uint64_t om_arena_largest_free(const struct om_arena *a);
uint64_t om_arena_count(const struct om_arena *a);
/* Walks everything: holes and allocations tile [0, size), free lists agree. OM_ECORRUPT if not. */
int om_arena_check(const struct om_arena *a);

#endif
