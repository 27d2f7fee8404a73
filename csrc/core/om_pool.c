/*
 * om_pool: see om_pool.h. Owns the segments on its three lists (one reference each).
 *
 * Thread rule: passive, the caller serialises everything but om_segment_ref/unref. Failures leave
 * the pool as it was, but for cached segments that may have been given back to the system.
 */
#include "core/om_pool.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>

#include "base/om_base.h"
#include "base/om_error.h"
#include "core/om_guard.h"
#include "plat/om_dev.h"

static struct om_segment *segment_of(struct om_list *link)
{
	return om_container_of(link, struct om_segment, link);
}

static uint64_t populated_of(const struct om_segment *s)
{
	return __atomic_load_n(&s->populated, __ATOMIC_RELAXED);
}

static void segment_filled(struct om_segment *s)
{
	if (!s->fresh_bytes)
		return;
	om_guard_count(-(int64_t)s->fresh_bytes, (int64_t)s->fresh_bytes);
	s->fresh_bytes = 0;
}

void om_pool_filled(struct om_extent *e)
{
	if (e->segment)
		segment_filled(e->segment);
}

void om_segment_ref(struct om_segment *s)
{
	__atomic_add_fetch(&s->refs, 1, __ATOMIC_RELAXED);
}

void om_segment_unref(struct om_segment *s)
{
	if (__atomic_sub_fetch(&s->refs, 1, __ATOMIC_ACQ_REL))
		return;
	om_host_unmap(s->base, s->bytes);
	om_guard_count(-(int64_t)s->fresh_bytes, -(int64_t)(s->bytes - s->fresh_bytes));
	om_arena_destroy(s->arena);
	om_free(s);
}

void om_pool_init(struct om_pool *p, uint64_t limit_bytes)
{
	*p = (struct om_pool){ .limit_bytes = limit_bytes };
	om_list_init(&p->shared);
	om_list_init(&p->dedicated);
	om_list_init(&p->cached);
}

/* Take s off its list and out of the sums, and drop the pool's reference. */
static void segment_drop(struct om_pool *p, struct om_segment *s)
{
	om_list_del(&s->link);
	p->mapped_bytes -= s->bytes;
	om_segment_unref(s);
}

static void cache_put(struct om_pool *p, struct om_segment *s)
{
	om_list_del(&s->link);
	s->freed_ns = om_now();
	segment_filled(s); /* some of it at least */
	p->cached_bytes += s->bytes;
	om_list_push_tail(&p->cached, &s->link);
}

static struct om_segment *cache_take(struct om_pool *p, struct om_segment *s)
{
	om_list_del(&s->link);
	p->cached_bytes -= s->bytes;
	return s;
}

/* Unmap one cached segment; returns its bytes. */
static uint64_t cache_drop(struct om_pool *p, struct om_segment *s)
{
	uint64_t bytes = s->bytes;

	p->cached_bytes -= bytes;
	segment_drop(p, s);
	return bytes;
}

uint64_t om_pool_trim(struct om_pool *p, uint64_t reserve_bytes, uint64_t freed_before_ns)
{
	uint64_t bytes = 0;

	while (p->cached_bytes > reserve_bytes && om_pool_oldest(p) < freed_before_ns)
		bytes += cache_drop(p, segment_of(p->cached.next));
	return bytes;
}

uint64_t om_pool_oldest(const struct om_pool *p)
{
	return om_list_empty(&p->cached) ? UINT64_MAX : segment_of(p->cached.next)->freed_ns;
}

void om_pool_set_limit(struct om_pool *p, uint64_t limit_bytes)
{
	p->limit_bytes = limit_bytes;
	while (p->mapped_bytes > limit_bytes && !om_list_empty(&p->cached))
		cache_drop(p, segment_of(p->cached.next));
}

void om_pool_fini(struct om_pool *p)
{
	om_pool_trim(p, 0, UINT64_MAX);
	OM_LIST_FOREACH_SAFE(link, &p->shared)
		segment_drop(p, segment_of(link));
	OM_LIST_FOREACH_SAFE(link, &p->dedicated)
		segment_drop(p, segment_of(link));
}

/* The smallest cached segment of at least `least` and at most `most` bytes; NULL: none. */
static struct om_segment *cache_find(const struct om_pool *p, uint64_t least, uint64_t most)
{
	struct om_segment *best = NULL;

	OM_LIST_FOREACH(link, &p->cached) {
		struct om_segment *s = segment_of(link);

		if (s->bytes >= least && s->bytes <= most && (!best || s->bytes < best->bytes))
			best = s;
	}
	return best;
}

/* The end of a segment that nobody uses is not its own any more. */
static void segment_shrink(struct om_pool *p, struct om_segment *s, uint64_t bytes)
{
	p->mapped_bytes -= s->bytes - bytes;
	s->bytes = bytes;
	if (populated_of(s) > bytes)
		__atomic_store_n(&s->populated, bytes, __ATOMIC_RELAXED);
	om_arena_destroy(s->arena); /* of the old size, and empty */
	s->arena = NULL;
}

/* Unmap the end of a segment. What is fresh of it is taken to be there. */
static void segment_cut(struct om_pool *p, struct om_segment *s, uint64_t bytes)
{
	uint64_t fresh = s->fresh_bytes - OM_MIN(s->fresh_bytes, bytes);

	om_host_unmap((char *)s->base + bytes, s->bytes - bytes);
	om_guard_count(-(int64_t)fresh, -(int64_t)(s->bytes - bytes - fresh));
	s->fresh_bytes -= fresh;
	segment_shrink(p, s, bytes);
}

static void cache_cut(struct om_pool *p, struct om_segment *s, uint64_t bytes)
{
	p->cached_bytes -= s->bytes - bytes;
	segment_cut(p, s, bytes);
}

/* Unmap cached bytes, first those at the ends, of which no segment can be built. */
static void cache_shave(struct om_pool *p, uint64_t bytes)
{
	for (int whole = 0; whole < 2; whole++) {
		OM_LIST_FOREACH_SAFE(link, &p->cached) {
			struct om_segment *s = segment_of(link);
			uint64_t part = OM_MIN(bytes, whole ? s->bytes : s->bytes % OM_HUGE);

			if (!bytes)
				return;
			bytes -= part;
			if (part == s->bytes)
				cache_drop(p, s);
			else if (part)
				cache_cut(p, s, s->bytes - part);
		}
	}
}

/* ---- segments built of cached ones ----
 *
 * Pages move from one address to another with what they hold: nobody has to clear them again. The kernel moves
 * what lies in one mapping, so every whole OM_HUGE of a segment, counted from its base, and what is left at its end
 * are in one mapping each, and only such pieces move. */

static uint64_t last_piece(const struct om_segment *s)
{
	return s->bytes % OM_HUGE ? s->bytes % OM_HUGE : OM_HUGE;
}

/* The cached segment with the smallest last piece of at least `bytes`; NULL: none. */
static struct om_segment *cache_find_end(const struct om_pool *p, uint64_t bytes)
{
	struct om_segment *best = NULL;

	OM_LIST_FOREACH(link, &p->cached) {
		struct om_segment *s = segment_of(link);

		if (last_piece(s) >= bytes && (!best || last_piece(s) < last_piece(best)))
			best = s;
	}
	return best;
}

/* Move a piece of a cached segment, from its front or from its end, to offset `at` of another. */
static int piece_move(struct om_pool *p, struct om_segment *from, bool front, uint64_t bytes,
                      struct om_segment *to, uint64_t at)
{
	char *source = (char *)from->base + (front ? 0 : from->bytes - bytes);
	uint64_t there = populated_of(from);
	int code = om_host_move((char *)to->base + at, source, bytes);

	if (code)
		return code;
	if (to->populated == at && (uint64_t)(source - (char *)from->base) + bytes <= there)
		to->populated += bytes;
	to->fresh_bytes -= bytes;
	p->cached_bytes -= bytes;
	if (front) {
		from->base = source + bytes;
		from->populated = there > bytes ? there - bytes : 0;
	}
	segment_shrink(p, from, from->bytes - bytes);
	if (!from->bytes) {
		om_list_del(&from->link);
		om_free(from);
	}
	return 0;
}

/* Fill a segment that is mapped and not counted with cached pieces, longest idle first. An error leaves
 * it with a hole at *at. */
static int segment_gather(struct om_pool *p, struct om_segment *s, uint64_t *at)
{
	struct om_segment *end;
	int code = 0;

	OM_LIST_FOREACH_SAFE(link, &p->cached) {
		uint64_t pieces = OM_MIN(segment_of(link)->bytes, s->bytes - *at) / OM_HUGE;

		for (; !code && pieces; pieces--) {
			code = piece_move(p, segment_of(link), true, OM_HUGE, s, *at);
			*at += code ? 0 : OM_HUGE;
		}
		if (code)
			return code;
	}
	if (*at == s->bytes || s->bytes - *at >= OM_HUGE)
		return 0;
	end = cache_find_end(p, s->bytes - *at);
	return end ? piece_move(p, end, false, s->bytes - *at, s, *at) : 0;
}

/* A new segment on no list, counted as mapped: of cached pieces, as far as there are any; cached bytes that
 * are none make way for the rest. The segment is within the limit, with nothing else cached. */
static int segment_build(struct om_pool *p, uint64_t bytes, struct om_segment **ret)
{
	struct om_segment *s = om_alloc(1, sizeof(*s));
	uint64_t at = 0;
	int code;

	if (!s)
		return -ENOMEM;
	code = om_host_map(bytes, &s->base);
	if (code) {
		om_free(s);
		return code;
	}
	om_list_init(&s->link);
	s->bytes = s->fresh_bytes = bytes;
	s->refs = 1;
	code = segment_gather(p, s, &at);
	if (code) { /* what is in the hole is not ours */
		om_host_unmap(s->base, at);
		om_host_unmap((char *)s->base + at + OM_MIN(OM_HUGE, bytes - at),
		              bytes - at - OM_MIN(OM_HUGE, bytes - at));
		om_guard_count(0, -(int64_t)(bytes - s->fresh_bytes));
		om_free(s);
		return code;
	}
	om_guard_count((int64_t)s->fresh_bytes, 0);
	p->mapped_bytes += bytes;
	cache_shave(p, s->fresh_bytes);
	*ret = s;
	return 0;
}

uint64_t om_pool_room(const struct om_pool *p)
{
	uint64_t live = p->mapped_bytes - p->cached_bytes;

	return live < p->limit_bytes ? p->limit_bytes - live : 0;
}

static bool limit_fits(const struct om_pool *p, uint64_t bytes)
{
	return bytes <= om_pool_room(p);
}

/* A segment of `bytes` to `most` bytes on no list. limit_fits holds. */
static int segment_get(struct om_pool *p, uint64_t bytes, uint64_t most, struct om_segment **ret)
{
	struct om_segment *s = cache_find(p, bytes, most);
	int code;

	if (s) {
		*ret = cache_take(p, s);
		return 0;
	}
	code = segment_build(p, bytes, ret);
	while (code && !om_list_empty(&p->cached)) { /* the system refuses: give back, or cut */
		s = cache_find(p, bytes, UINT64_MAX);
		if (s) {
			*ret = cache_take(p, s);
			segment_cut(p, s, bytes);
			return 0;
		}
		cache_drop(p, segment_of(p->cached.next));
		code = segment_build(p, bytes, ret);
	}
	return code;
}

static int shared_new(struct om_pool *p, struct om_segment **ret)
{
	struct om_segment *s;
	int code = segment_get(p, OM_POOL_SHARED, OM_POOL_SHARED, &s);

	if (code)
		return code;
	if (!s->arena)
		code = om_arena_create(OM_POOL_SHARED, OM_PAGE, &s->arena);
	if (code) {
		cache_put(p, s);
		return code;
	}
	om_list_push_head(&p->shared, &s->link);
	*ret = s;
	return 0;
}

static void extent_set(struct om_pool *p, struct om_segment *s, uint64_t offset, uint64_t bytes,
                       struct om_extent *ret)
{
	s->used += bytes;
	p->used_bytes += bytes;
	*ret = (struct om_extent){ .segment = s, .ptr = (char *)s->base + offset, .bytes = bytes };
}

static bool is_full(const struct om_segment *s)
{
	return s->used == s->bytes;
}

static void move_to(struct om_list *head, struct om_segment *s, bool tail)
{
	om_list_del(&s->link);
	if (tail)
		om_list_push_tail(head, &s->link);
	else
		om_list_push_head(head, &s->link);
}

/* A hole in a shared segment. -ENOSPC (no message) when there is none. Full ones are at the end of the
 * list, where nobody has to look at them. */
static int shared_alloc(struct om_pool *p, uint64_t bytes, struct om_extent *ret)
{
	OM_LIST_FOREACH(link, &p->shared) {
		struct om_segment *s = segment_of(link);
		uint64_t offset;
		int code;

		if (is_full(s))
			break;
		code = bytes <= s->bytes - s->used ? om_arena_alloc(s->arena, bytes, 0, &offset)
		                                   : -ENOSPC;

		if (!code) {
			extent_set(p, s, offset, bytes, ret);
			if (is_full(s))
				move_to(&p->shared, s, true);
		}
		if (code != -ENOSPC)
			return code;
	}
	return -ENOSPC;
}

static int limit_error(const struct om_pool *p, uint64_t bytes)
{
	uint64_t live = p->mapped_bytes - p->cached_bytes;

	om_err(OM_ELIMIT,
	       "host memory: need %" PRIu64 " bytes, %" PRIu64 " of at most %" PRIu64 " are in use",
	       bytes, live, p->limit_bytes);
	om_err_limit("host", bytes, live, p->limit_bytes);
	return OM_ELIMIT;
}

static int dedicated_alloc(struct om_pool *p, uint64_t bytes, uint64_t most, struct om_extent *ret)
{
	struct om_segment *s;
	int code;

	if (!limit_fits(p, bytes))
		return limit_error(p, bytes);
	code = segment_get(p, bytes, OM_MAX(bytes, most), &s);
	if (code)
		return code;
	om_arena_destroy(s->arena);
	s->arena = NULL;
	om_list_push_tail(&p->dedicated, &s->link);
	extent_set(p, s, 0, s->bytes, ret);
	return 0;
}

int om_pool_alloc(struct om_pool *p, uint64_t bytes, uint64_t most, struct om_extent *ret)
{
	uint64_t size = om_up(bytes, OM_PAGE);
	struct om_segment *s;
	int code;

	*ret = (struct om_extent){ 0 };
	if (!bytes)
		return om_err(OM_EVALUE, "host memory: a request of 0 bytes");
	if (size < bytes) /* within a page of 2^64 */
		return limit_error(p, bytes);
	if (most)
		return dedicated_alloc(p, size, om_down(most, OM_PAGE), ret);
	if (size > OM_POOL_SMALL)
		return dedicated_alloc(p, size, size + size / 4, ret);
	code = shared_alloc(p, size, ret);
	if (code != -ENOSPC)
		return code;
	if (!limit_fits(p, OM_POOL_SHARED))
		return dedicated_alloc(p, size, size, ret);
	code = shared_new(p, &s);
	if (code)
		return code;
	code = shared_alloc(p, size, ret);
	if (!s->used)
		cache_put(p, s);
	return code;
}

void om_pool_free(struct om_pool *p, struct om_extent *e)
{
	struct om_segment *s = e->segment;

	if (!s)
		return;
	if (s->arena) {
		int code = om_arena_free(s->arena, (uint64_t)((char *)e->ptr - (char *)s->base));

		assert(!code && "an extent is freed twice");
		(void)code;
	}
	if (s->arena && is_full(s))
		move_to(&p->shared, s, false);
	s->used -= e->bytes;
	p->used_bytes -= e->bytes;
	*e = (struct om_extent){ 0 };
	if (s->used)
		return;
	if (__atomic_load_n(&s->refs, __ATOMIC_ACQUIRE) > 1 || p->mapped_bytes > p->limit_bytes)
		segment_drop(p, s);
	else
		cache_put(p, s);
}

void om_pool_cut(struct om_pool *p, struct om_extent *e, uint64_t bytes)
{
	struct om_segment *s = e->segment;
	uint64_t size = om_up(OM_MAX(bytes, 1), OM_PAGE);

	assert(!s->arena && s->used == e->bytes && size <= e->bytes);
	if (size == s->bytes)
		return;
	p->used_bytes -= e->bytes - size;
	segment_cut(p, s, size);
	s->used = e->bytes = size;
}

static bool has_hole(const struct om_pool *p, uint64_t size)
{
	OM_LIST_FOREACH(link, &p->shared) {
		if (is_full(segment_of(link)))
			break;
		if (om_arena_largest_free(segment_of(link)->arena) >= size)
			return true;
	}
	return false;
}

bool om_pool_fits(const struct om_pool *p, uint64_t bytes)
{
	uint64_t size = om_up(bytes, OM_PAGE);

	if (size < bytes)
		return false;
	return (size <= OM_POOL_SMALL && has_hole(p, size)) || limit_fits(p, size);
}

uint64_t om_pool_growth(const struct om_pool *p, uint64_t bytes)
{
	uint64_t size = om_up(bytes, OM_PAGE);

	if (!size || (size <= OM_POOL_SMALL && has_hole(p, size)))
		return 0;
	if (size <= OM_POOL_SMALL && limit_fits(p, OM_POOL_SHARED))
		size = OM_POOL_SHARED;
	return size - OM_MIN(size, p->cached_bytes);
}

/* ---- check ---- */

static int broken(const char *what, uint64_t is, uint64_t should_be)
{
	return om_err(OM_ECORRUPT, "pool: %s is %" PRIu64 ", not %" PRIu64, what, is, should_be);
}

static int check_segment(const struct om_pool *p, const struct om_list *list,
                         const struct om_segment *s)
{
	if (!__atomic_load_n(&s->refs, __ATOMIC_RELAXED) || !s->base || populated_of(s) > s->bytes)
		return broken("populated", populated_of(s), s->bytes);
	if (s->fresh_bytes > s->bytes || (s->bytes >= OM_HUGE && (uintptr_t)s->base % OM_HUGE))
		return broken("a segment's place", (uintptr_t)s->base, 0);
	if (list == &p->cached)
		return s->used ? broken("use of a cached segment", s->used, 0) : 0;
	if (list == &p->dedicated) {
		if (s->arena || !s->used || s->used > s->bytes)
			return broken("use of a dedicated segment", s->used, s->bytes);
		return 0;
	}
	if (!s->arena || s->bytes != OM_POOL_SHARED || om_arena_size(s->arena) != s->bytes)
		return broken("a shared segment's size", s->bytes, OM_POOL_SHARED);
	if (!s->used || om_arena_used(s->arena) != s->used)
		return broken("use of a shared segment", s->used, om_arena_used(s->arena));
	return om_arena_check(s->arena);
}

int om_pool_check(const struct om_pool *p)
{
	const struct om_list *lists[] = { &p->shared, &p->dedicated, &p->cached };
	uint64_t used = 0, mapped = 0, cached = 0, freed_ns = 0;
	int code;

	for (int i = 0; i < 3; i++) {
		OM_LIST_FOREACH(link, lists[i]) {
			const struct om_segment *s = segment_of(link);

			if (link->next->prev != link)
				return om_err(OM_ECORRUPT, "pool: a list is broken");
			if (lists[i] == &p->shared && link->next != &p->shared && is_full(s) &&
			    !is_full(segment_of(link->next)))
				return om_err(OM_ECORRUPT, "pool: a full segment is in the way");
			code = check_segment(p, lists[i], s);
			if (code)
				return code;
			used += s->used;
			mapped += s->bytes;
			if (lists[i] != &p->cached)
				continue;
			cached += s->bytes;
			if (s->freed_ns < freed_ns)
				return broken("order of idle time", s->freed_ns, freed_ns);
			freed_ns = s->freed_ns;
		}
	}
	if (used != p->used_bytes)
		return broken("used", p->used_bytes, used);
	if (mapped != p->mapped_bytes)
		return broken("mapped", p->mapped_bytes, mapped);
	if (cached != p->cached_bytes)
		return broken("cached", p->cached_bytes, cached);
	if (cached && mapped > p->limit_bytes)
		return broken("mapped, with something cached,", mapped, p->limit_bytes);
	return 0;
}
