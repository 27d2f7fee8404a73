/* om_block: see om_block.h. */
#include "core/om_block.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "core/om_guard.h"

int om_block_create(const char *name, uint64_t nbytes, struct om_group *group,
                    struct om_block **ret)
{
	size_t size = strlen(name) + 1;
	struct om_block *b = om_alloc(1, sizeof(*b) + size);

	if (!b)
		return -ENOMEM;
	memcpy(b->name, name, size);
	b->refs = 1;
	b->nbytes = nbytes;
	b->slot = OM_NIL;
	b->group = group;
	b->blank = true;
	b->created_ns = b->accessed_ns = om_now();
	b->accesses = 1;
	om_list_init(&b->all);
	*ret = b;
	return 0;
}

int om_block_wake(struct om_block *b, const struct om_desc *desc)
{
	struct om_body *body = b->body;

	if (om_likely(body))
		return 0;
	body = om_alloc(1, sizeof(*body));
	if (!body)
		return -ENOMEM;
	if (om_group_join(b->group, b)) {
		om_free(body);
		return -ENOMEM;
	}
	body->block = b;
	body->align = OM_BLOCK_ALIGN;
	if (desc)
		body->desc = *desc;
	else
		body->desc.ndim = -1;
	om_list_init(&body->ahead);
	om_list_init(&body->holders);
	b->body = body;
	return 0;
}

void om_block_retire(struct om_block *b)
{
	om_list_del(&b->all);
	if (b->slot != OM_NIL)
		om_group_leave(b->group, b);
	om_block_unref(b);
}

void om_block_set_named(struct om_block *b, bool named)
{
	b->group->blocks += (uint64_t)named - (uint64_t)b->named;
	if (named) {
		b->named = true;
		b->group->missing_bytes += om_block_missing_bytes(b);
	} else {
		om_block_lose_name(b);
	}
}

void om_block_ref(struct om_block *b)
{
	__atomic_add_fetch(&b->refs, 1, __ATOMIC_RELAXED);
}

void om_block_unref(struct om_block *b)
{
	struct om_body *body;

	if (!b || __atomic_sub_fetch(&b->refs, 1, __ATOMIC_ACQ_REL))
		return;
	body = b->body;
	for (size_t i = 0; body && i < body->range_count; i++)
		om_file_unref(body->ranges[i].file);
	if (body) {
		om_free(body->ranges);
		om_free(body->disk_copy.runs);
	}
	om_free(body);
	om_free(b);
}

uint64_t om_block_host_bytes(const struct om_block *b)
{
	uint64_t bytes = 0;

	for (size_t i = 0; b->body && i < b->body->range_count; i++) {
		uint64_t first = om_down(b->body->ranges[i].offset, OM_PAGE);

		bytes += om_up(b->body->ranges[i].offset + b->body->ranges[i].nbytes, OM_PAGE) -
		         first;
	}
	if (!b->body || !b->body->ranges) /* an origin that is encoded takes room of its own */
		bytes = om_up(b->nbytes + (b->body ? b->body->disk_copy.head : 0), OM_PAGE);
	return OM_MAX(bytes, OM_PAGE);
}

static void count_host(struct om_block *b, int64_t bytes)
{
	struct om_group *g = b->group;

	if (b->gone) {
		g->gone_bytes += (uint64_t)bytes;
		return;
	}
	g->used_bytes += (uint64_t)bytes;
	if (b->inner) {
		struct om_packed_count *all = g->packed;

		g->packed_bytes += (uint64_t)bytes;
		if (all) {
			all->used_bytes += (uint64_t)bytes;
			all->peak_bytes = OM_MAX(all->peak_bytes, all->used_bytes);
		}
	}
	g->peak_bytes = OM_MAX(g->peak_bytes, g->used_bytes);
	if (!g->limit_bytes && g->used_bytes > g->policy->capacity)
		g->policy->capacity = g->used_bytes;
}

/* Bytes that the HOST copy takes from the limits. */
static uint64_t taken(const struct om_block *b)
{
	return b->body->foreign ? om_up(OM_MAX(b->nbytes, 1), OM_PAGE) : b->body->mem.bytes;
}

/* What a change of state, leases or pin may change in the group's counts. */
struct counts {
	bool idle, swapped, doubled;
	uint64_t idle_bytes, spare_bytes, missing_bytes;
};

static struct counts counts_of(const struct om_block *b)
{
	bool idle = b->host == OM_COPY_VALID && !b->leases && !b->pinned;

	return (struct counts){ idle,
		                om_block_swapped(b),
		                idle && b->body->packed,
		                idle ? taken(b) : 0,
		                idle && om_block_has_origin(b) ? taken(b) : 0,
		                om_block_missing_bytes(b) };
}

/* Keep the group's counts, and its list of what is fetched ahead. */
static void recount(struct om_block *b, struct counts was)
{
	struct counts now = counts_of(b);
	struct om_group *g = b->group;

	om_list_del(&b->body->ahead);
	if (b->host == OM_COPY_FILLING && !b->leases)
		om_list_push_tail(&g->ahead, &b->body->ahead);
	g->idle += (uint64_t)now.idle - (uint64_t)was.idle;
	g->idle_bytes += now.idle_bytes - was.idle_bytes;
	g->spare_bytes += now.spare_bytes - was.spare_bytes;
	g->missing_bytes += now.missing_bytes - was.missing_bytes;
	g->swapped += (uint64_t)now.swapped - (uint64_t)was.swapped;
	g->doubled += (uint64_t)now.doubled - (uint64_t)was.doubled;
}

/* Pinned copies are no members: nothing has to pass them by. Nor are those that go when they are let go. */
static bool is_member(const struct om_block *b)
{
	return !b->pinned && !b->gone;
}

void om_block_access(struct om_block *b)
{
	struct om_policy *p = b->group->policy;

	b->body->used_no = ++b->group->uses;
	if (is_member(b))
		p->ops->access(p, b->slot, om_block_host_bytes(b), b->host != OM_COPY_NONE);
	if (b->group->foresight && !b->inner)
		om_foresight_access(b->group->foresight, b);
}

static void become_member(struct om_block *b)
{
	struct om_policy *p = b->group->policy;

	if (is_member(b))
		p->ops->add(p, b->slot, om_block_host_bytes(b));
}

static void end_membership(struct om_block *b, bool evicted)
{
	struct om_policy *p = b->group->policy;

	if (is_member(b))
		p->ops->drop(p, b->slot, evicted);
}

void om_block_fill_begin(struct om_block *b, struct om_extent mem)
{
	struct counts was = counts_of(b);

	assert(b->host == OM_COPY_NONE && !b->leases);
	b->host = OM_COPY_FILLING;
	b->body->mem = mem;
	b->body->data = mem.ptr;
	count_host(b, (int64_t)mem.bytes);
	become_member(b);
	recount(b, was);
}

void om_block_fill_end(struct om_block *b)
{
	struct counts was = counts_of(b);

	assert(b->host == OM_COPY_FILLING);
	b->host = OM_COPY_VALID;
	b->blank = false;
	om_pool_filled(&b->body->mem);
	recount(b, was);
}

void om_block_lose_name(struct om_block *b)
{
	om_block_pin(b, false);
	b->group->missing_bytes -= om_block_missing_bytes(b);
	b->named = false;
	if (b->host == OM_COPY_NONE) {
		b->gone = true;
		return;
	}
	end_membership(b, false);
	count_host(b, -(int64_t)taken(b));
	b->gone = true;
	count_host(b, (int64_t)taken(b));
}

/* The HOST copy is no more; its bytes are the caller's. */
static void end_host(struct om_block *b, bool evicted)
{
	struct counts was = counts_of(b);
	struct om_body *body = b->body;
	uint64_t bytes = taken(b);

	if (body->guessed)
		om_foresight_end(b->group->foresight, b, false);
	count_host(b, -(int64_t)bytes);
	if (b->host == OM_COPY_LEAVING)
		b->group->leaving_bytes -= bytes;
	body->data = NULL;
	b->host = OM_COPY_NONE;
	body->unused = body->touched = body->shown = false;
	b->counted = 0;
	end_membership(b, evicted);
	recount(b, was);
}

static void free_host(struct om_block *b, struct om_pool *p, bool evicted)
{
	struct om_foreign *foreign = b->body->foreign;
	uint64_t bytes = taken(b);

	end_host(b, evicted);
	if (foreign) {
		p->limit_bytes += bytes;
		b->group->foreign_bytes -= bytes;
		om_guard_count_foreign(-(int64_t)bytes);
		b->body->foreign = NULL;
		om_foreign_unref(foreign);
	} else {
		om_pool_free(p, &b->body->mem);
	}
}

struct om_extent om_block_host_cede(struct om_block *b)
{
	struct om_extent mem = b->body->mem;

	assert(b->host == OM_COPY_VALID && !b->leases && !b->body->foreign);
	end_host(b, false);
	b->body->mem.segment = NULL;
	return mem;
}

uint64_t om_block_counted_bytes(const struct om_block *b)
{
	return b->gone || b->host == OM_COPY_NONE ? 0 : taken(b);
}

uint64_t om_block_entry_bytes(const struct om_block *b)
{
	uint64_t bytes = 0;

	if (!b || !b->body)
		return 0;
	if (b->body->packed)
		bytes += om_block_counted_bytes(b->body->packed);
	if (b->body->origin)
		bytes += om_block_counted_bytes(b->body->origin);
	return bytes + om_block_counted_bytes(b);
}

void om_block_fill_fail(struct om_block *b, struct om_pool *p)
{
	assert(b->host == OM_COPY_FILLING);
	free_host(b, p, false);
}

void om_block_leave_begin(struct om_block *b)
{
	struct counts was = counts_of(b);

	assert(b->host == OM_COPY_VALID && !b->leases);
	b->host = OM_COPY_LEAVING;
	b->group->leaving_bytes += taken(b);
	recount(b, was);
}

void om_block_leave_rescue(struct om_block *b)
{
	struct counts was = counts_of(b);

	assert(b->host == OM_COPY_LEAVING);
	b->host = OM_COPY_VALID;
	b->group->leaving_bytes -= taken(b);
	recount(b, was);
}

void om_block_host_drop(struct om_block *b, struct om_pool *p)
{
	assert((b->host == OM_COPY_VALID || b->host == OM_COPY_LEAVING) && !b->leases);
	free_host(b, p, true);
}

void om_block_adopt(struct om_block *b, struct om_pool *p, struct om_foreign *foreign)
{
	struct counts was = counts_of(b);

	assert(b->host == OM_COPY_NONE);
	b->host = OM_COPY_VALID;
	b->blank = false;
	b->body->foreign = foreign;
	b->body->data = foreign->data;
	p->limit_bytes -= taken(b);
	b->group->foreign_bytes += taken(b);
	om_guard_count_foreign((int64_t)taken(b));
	count_host(b, (int64_t)taken(b));
	become_member(b);
	recount(b, was);
}

void om_block_disk_begin(struct om_block *b)
{
	assert(b->disk == OM_COPY_NONE);
	b->disk = OM_COPY_FILLING;
	b->group->disk_bytes += om_disk_copy_bytes(&b->body->disk_copy);
}

void om_block_disk_end(struct om_block *b)
{
	struct counts was = counts_of(b);

	assert(b->disk == OM_COPY_FILLING);
	b->disk = OM_COPY_VALID;
	recount(b, was);
}

void om_block_disk_drop(struct om_block *b, struct om_disk *d)
{
	struct counts was = counts_of(b);

	if (b->disk == OM_COPY_NONE)
		return;
	b->disk = OM_COPY_NONE;
	b->group->disk_bytes -= om_disk_copy_bytes(&b->body->disk_copy);
	om_disk_free(d, &b->body->disk_copy);
	recount(b, was);
}

struct om_block *om_block_set_packed(struct om_block *b, struct om_block *packed)
{
	struct counts was = counts_of(b);
	struct om_block *former = b->body->packed;

	b->body->packed = packed;
	recount(b, was);
	return former;
}

/* As recount, of a VALID copy that is leased from now on, or no longer: a hit does little else. */
static void recount_idle(struct om_block *b, bool idle)
{
	struct om_group *g = b->group;

	if (b->pinned)
		return;
	g->idle += idle ? 1 : UINT64_MAX;
	g->idle_bytes += idle ? taken(b) : -taken(b);
	if (om_block_has_origin(b))
		g->spare_bytes += idle ? taken(b) : -taken(b);
	if (b->body->packed)
		g->doubled += idle ? 1 : UINT64_MAX;
}

void om_block_lease(struct om_block *b)
{
	assert(b->host == OM_COPY_VALID || b->host == OM_COPY_FILLING);
	b->group->leases++;
	if (b->leases++)
		return;
	if (om_likely(b->host == OM_COPY_VALID))
		recount_idle(b, false);
	else
		om_list_del(&b->body->ahead);
}

void om_block_unlease(struct om_block *b)
{
	assert(b->leases);
	b->group->leases--;
	if (--b->leases)
		return;
	if (om_likely(b->host == OM_COPY_VALID))
		recount_idle(b, true);
	else if (b->host == OM_COPY_FILLING)
		om_list_push_tail(&b->group->ahead, &b->body->ahead);
}

void om_block_lose_leases(struct om_block *b)
{
	b->group->leases -= b->leases;
	b->leases = 0;
}

void om_block_pin(struct om_block *b, bool pinned)
{
	struct counts was = counts_of(b);

	if (pinned == b->pinned)
		return;
	if (pinned && b->host != OM_COPY_NONE)
		end_membership(b, false);
	b->group->pinned += (uint64_t)pinned - (uint64_t)b->pinned;
	b->pinned = pinned;
	if (!pinned && b->host != OM_COPY_NONE) {
		b->group->policy->ops->access(b->group->policy, b->slot, om_block_host_bytes(b),
		                              false);
		become_member(b);
	}
	if (b->body)
		recount(b, was);
}

void om_block_forget_origin(struct om_block *b)
{
	for (size_t i = 0; i < b->body->range_count; i++)
		om_file_unref(b->body->ranges[i].file);
	om_free(b->body->ranges);
	b->body->ranges = NULL;
	b->body->range_count = 0;
	b->body->origin = NULL;
	b->body->hash_known = false;
}

/* Foreign memory whose last user is gone waits here for a binding thread. */
static struct om_foreign *graveyard;

void om_foreign_unref(struct om_foreign *f)
{
	if (!f || __atomic_sub_fetch(&f->refs, 1, __ATOMIC_ACQ_REL))
		return;
	f->next = __atomic_load_n(&graveyard, __ATOMIC_RELAXED);
	while (!__atomic_compare_exchange_n(&graveyard, &f->next, f, true, __ATOMIC_RELEASE,
	                                    __ATOMIC_RELAXED))
		;
}

void om_foreign_collect(void)
{
	struct om_foreign *f;

	while (om_unlikely(__atomic_load_n(&graveyard, __ATOMIC_RELAXED))) {
		f = __atomic_exchange_n(&graveyard, NULL, __ATOMIC_ACQUIRE);
		while (f) {
			struct om_foreign *next = f->next;

			f->release(f->context); /* may bring others here */
			om_free(f);
			f = next;
		}
	}
}
