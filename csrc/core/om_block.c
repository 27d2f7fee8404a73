/* om_block: see om_block.h. */
#include "core/om_block.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

int om_block_create(const char *name, uint64_t nbytes, struct om_group *group,
                    const struct om_desc *desc, struct om_block **ret)
{
	struct om_block *b = om_alloc(1, sizeof(*b));

	if (!b)
		return -ENOMEM;
	b->name = om_strdup(name);
	if (!b->name) {
		om_free(b);
		return -ENOMEM;
	}
	if (om_group_join(group, b)) {
		om_free(b->name);
		om_free(b);
		return -ENOMEM;
	}
	b->refs = 1;
	b->nbytes = nbytes;
	b->align = OM_BLOCK_ALIGN;
	if (desc)
		b->desc = *desc;
	else
		b->desc.ndim = -1;
	om_list_init(&b->all);
	om_list_init(&b->ahead);
	om_list_init(&b->holders);
	*ret = b;
	return 0;
}

void om_block_ref(struct om_block *b)
{
	__atomic_add_fetch(&b->refs, 1, __ATOMIC_RELAXED);
}

void om_block_unref(struct om_block *b)
{
	if (__atomic_sub_fetch(&b->refs, 1, __ATOMIC_ACQ_REL))
		return;
	for (size_t i = 0; i < b->range_count; i++)
		om_file_unref(b->ranges[i].file);
	om_free(b->ranges);
	om_free(b->disk_copy.runs);
	om_free(b->name);
	om_free(b);
}

uint64_t om_block_host_bytes(const struct om_block *b)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < b->range_count; i++) {
		uint64_t first = om_down(b->ranges[i].offset, OM_PAGE);

		bytes += om_up(b->ranges[i].offset + b->ranges[i].nbytes, OM_PAGE) - first;
	}
	if (!b->ranges)
		bytes = om_up(b->nbytes + b->disk_copy.head, OM_PAGE);
	return OM_MAX(bytes, OM_PAGE);
}

static void count_host(struct om_block *b, int64_t bytes)
{
	struct om_group *g = b->group;

	g->used_bytes += (uint64_t)bytes;
	g->peak_bytes = OM_MAX(g->peak_bytes, g->used_bytes);
}

static bool is_idle(const struct om_block *b)
{
	return b->host == OM_COPY_VALID && !b->leases;
}

/* State or leases were changed: keep the list of what is fetched ahead, and the number of idle ones. */
static void relist(struct om_block *b, bool was_idle)
{
	om_list_del(&b->ahead);
	if (b->host == OM_COPY_FILLING && !b->leases)
		om_list_push_tail(&b->group->ahead, &b->ahead);
	b->group->idle += (uint64_t)is_idle(b) - (uint64_t)was_idle;
}

void om_block_access(struct om_block *b)
{
	struct om_policy *p = b->group->policy;

	p->ops->access(p, b->slot, om_block_host_bytes(b), b->host != OM_COPY_NONE);
}

static void become_member(struct om_block *b)
{
	struct om_policy *p = b->group->policy;

	p->ops->add(p, b->slot, om_block_host_bytes(b));
}

void om_block_fill_begin(struct om_block *b, struct om_extent mem)
{
	assert(b->host == OM_COPY_NONE && !b->leases);
	b->host = OM_COPY_FILLING;
	b->mem = mem;
	b->data = mem.ptr;
	count_host(b, (int64_t)mem.bytes);
	become_member(b);
	relist(b, false);
}

void om_block_fill_end(struct om_block *b)
{
	assert(b->host == OM_COPY_FILLING);
	b->host = OM_COPY_VALID;
	relist(b, false);
}

/* Bytes that the HOST copy takes from the limits. */
static uint64_t taken(const struct om_block *b)
{
	return b->foreign ? om_up(OM_MAX(b->nbytes, 1), OM_PAGE) : b->mem.bytes;
}

static void free_host(struct om_block *b, struct om_pool *p, bool evicted)
{
	struct om_policy *policy = b->group->policy;
	uint64_t bytes = taken(b);
	bool was_idle = is_idle(b);

	count_host(b, -(int64_t)bytes);
	if (b->foreign) {
		p->limit_bytes += bytes;
		om_foreign_unref(b->foreign);
		b->foreign = NULL;
	} else {
		om_pool_free(p, &b->mem);
	}
	if (b->host == OM_COPY_LEAVING)
		b->group->leaving_bytes -= bytes;
	b->data = NULL;
	b->host = OM_COPY_NONE;
	b->unused = false;
	b->counted = 0;
	policy->ops->drop(policy, b->slot, evicted);
	relist(b, was_idle);
}

void om_block_fill_fail(struct om_block *b, struct om_pool *p)
{
	assert(b->host == OM_COPY_FILLING);
	free_host(b, p, false);
}

void om_block_leave_begin(struct om_block *b)
{
	assert(b->host == OM_COPY_VALID && !b->leases);
	b->host = OM_COPY_LEAVING;
	relist(b, true);
	b->group->leaving_bytes += taken(b);
}

void om_block_leave_rescue(struct om_block *b)
{
	assert(b->host == OM_COPY_LEAVING);
	b->host = OM_COPY_VALID;
	b->group->leaving_bytes -= taken(b);
	relist(b, false);
}

void om_block_host_drop(struct om_block *b, struct om_pool *p)
{
	assert((b->host == OM_COPY_VALID || b->host == OM_COPY_LEAVING) && !b->leases);
	free_host(b, p, true);
}

void om_block_adopt(struct om_block *b, struct om_pool *p, struct om_foreign *foreign)
{
	assert(b->host == OM_COPY_NONE);
	b->host = OM_COPY_VALID;
	b->foreign = foreign;
	b->data = foreign->data;
	p->limit_bytes -= taken(b);
	count_host(b, (int64_t)taken(b));
	become_member(b);
	relist(b, false);
}

void om_block_disk_begin(struct om_block *b)
{
	assert(b->disk == OM_COPY_NONE);
	b->disk = OM_COPY_FILLING;
}

void om_block_disk_end(struct om_block *b)
{
	assert(b->disk == OM_COPY_FILLING);
	b->disk = OM_COPY_VALID;
}

void om_block_disk_drop(struct om_block *b, struct om_disk *d)
{
	if (b->disk == OM_COPY_NONE)
		return;
	b->disk = OM_COPY_NONE;
	om_disk_free(d, &b->disk_copy);
}

void om_block_lease(struct om_block *b)
{
	assert(b->host == OM_COPY_VALID || b->host == OM_COPY_FILLING);
	b->leases++;
	relist(b, b->host == OM_COPY_VALID && b->leases == 1);
}

void om_block_unlease(struct om_block *b)
{
	assert(b->leases);
	b->leases--;
	relist(b, false);
}

void om_block_lose_leases(struct om_block *b)
{
	b->leases = 0;
}

void om_block_forget_origin(struct om_block *b)
{
	for (size_t i = 0; i < b->range_count; i++)
		om_file_unref(b->ranges[i].file);
	om_free(b->ranges);
	b->ranges = NULL;
	b->range_count = 0;
	b->hash_known = false;
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

	if (om_likely(!__atomic_load_n(&graveyard, __ATOMIC_RELAXED)))
		return;
	f = __atomic_exchange_n(&graveyard, NULL, __ATOMIC_ACQUIRE);
	while (f) {
		struct om_foreign *next = f->next;

		f->release(f->context);
		om_free(f);
		f = next;
	}
}
