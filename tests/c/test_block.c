/* The block's record: each transition, what lists and sums it keeps, whole pages, foreign memory. */
#include <stdlib.h>

#include "core/om_block.h"
#include "om_test.h"

static struct om_group *group;
static struct om_pool pool;

static struct om_block *make(uint64_t nbytes)
{
	struct om_block *b;

	CHECK_EQ(om_block_create("a block", nbytes, group, &b), 0);
	CHECK(!b->body && b->blank);
	CHECK_EQ(om_block_wake(b, NULL), 0);
	CHECK_EQ(b->body->desc.ndim, -1);
	return b;
}

static bool on(const struct om_block *b, const struct om_list *list)
{
	OM_LIST_FOREACH(link, list)
		if (link == &b->body->ahead)
			return true;
	return false;
}

static void begin(struct om_block *b)
{
	struct om_extent mem;

	CHECK_EQ(om_pool_alloc(&pool, om_block_host_bytes(b), 0, &mem), 0);
	om_block_fill_begin(b, mem);
}

static bool any(void *arg, const struct om_block *b)
{
	(void)arg;
	CHECK(b->host == OM_COPY_VALID && !b->leases);
	return true;
}

static void life(void)
{
	struct om_block *b = make(5000), *other = make(10);

	CHECK(b->host == OM_COPY_NONE && b->disk == OM_COPY_NONE && !om_block_clean(b));
	CHECK_EQ(om_block_host_bytes(b), 2 * OM_PAGE);
	begin(b);
	CHECK(b->host == OM_COPY_FILLING && on(b, &group->ahead) && !group->idle);
	CHECK_EQ(group->used_bytes, b->body->mem.bytes);
	om_block_fill_fail(b, &pool);
	CHECK(b->host == OM_COPY_NONE && !on(b, &group->ahead) && !group->used_bytes &&
	      !pool.used_bytes);
	begin(b);
	om_block_lease(b);
	CHECK(!on(b, &group->ahead));
	om_block_fill_end(b);
	CHECK(b->host == OM_COPY_VALID && !group->idle); /* leased: no victim */
	om_block_lease(b);
	om_block_unlease(b);
	CHECK(!group->idle && !om_group_victim(group, any, NULL));
	om_block_unlease(b);
	CHECK(group->idle == 1 && om_group_victim(group, any, NULL) == b);
	begin(other);
	om_block_fill_end(other);
	CHECK(group->idle == 2 && om_group_victim(group, any, NULL) == b);
	om_block_access(b);
	CHECK(om_group_victim(group, any, NULL) == other); /* least recently used first */
	om_block_lease(other);
	CHECK(om_group_victim(group, any, NULL) == b); /* leased ones are passed by, and stay */
	om_block_unlease(other);
	CHECK(om_group_victim(group, any, NULL) == other);
	om_block_leave_begin(b);
	CHECK(b->host == OM_COPY_LEAVING && group->idle == 1);
	CHECK_EQ(group->leaving_bytes, b->body->mem.bytes);
	om_block_leave_rescue(b);
	CHECK(b->host == OM_COPY_VALID && group->idle == 2 && !group->leaving_bytes);
	om_block_leave_begin(b);
	om_block_host_drop(b, &pool);
	CHECK(b->host == OM_COPY_NONE && !group->leaving_bytes);
	om_block_host_drop(other, &pool);
	CHECK(!group->used_bytes && group->peak_bytes && !group->idle);
	CHECK(group->seats[b->slot] == b && group->seats[other->slot] == other);
	om_block_unref(b);
	om_block_unref(other);
}

static void disk_copies(void)
{
	struct om_block *b = make(5000);
	struct om_disk d;

	CHECK_EQ(om_disk_init(&d, NULL, OM_MIB), 0);
	CHECK_EQ(om_disk_grown(&d, OM_MIB), 0);
	CHECK_EQ(om_disk_alloc(&d, 2 * OM_PAGE, &b->body->disk_copy), 0);
	om_block_disk_begin(b);
	CHECK(!om_block_clean(b)); /* not before it is whole */
	om_block_disk_end(b);
	CHECK(om_block_clean(b));
	b->body->disk_copy.head = 4000; /* the bytes begin late in the first page */
	CHECK_EQ(om_block_host_bytes(b), 3 * OM_PAGE);
	om_block_disk_drop(b, &d);
	om_block_disk_drop(b, &d);
	CHECK(!om_block_clean(b) && !d.used_bytes);
	om_block_unref(b);
	om_disk_fini(&d);
}

static void origins(void)
{
	struct om_block *b = make(30);

	b->body->ranges = om_alloc(2, sizeof(*b->body->ranges));
	b->body->range_count = 2;
	b->body->ranges[0] = (struct om_range){ NULL, 4090, 20 }; /* over a page's edge */
	b->body->ranges[1] = (struct om_range){ NULL, 4096, 10 };
	CHECK(om_block_clean(b));
	CHECK_EQ(om_block_host_bytes(b), 3 * OM_PAGE);
	b->body->hash_known = true;
	om_block_forget_origin(b);
	CHECK(!om_block_clean(b) && !b->body->hash_known && !b->body->ranges);
	CHECK_EQ(om_block_host_bytes(b), OM_PAGE);
	b->nbytes = 0;
	CHECK_EQ(om_block_host_bytes(b), OM_PAGE); /* nothing still has an address */
	om_block_unref(b);
}

static int released;

static void release(void *context)
{
	released += *(int *)context;
}

static void foreign_memory(void)
{
	static uint8_t mine[9000];
	int one = 1;
	struct om_block *b = make(sizeof(mine));
	struct om_foreign *f = om_alloc(1, sizeof(*f));

	CHECK(f);
	*f = (struct om_foreign){ .refs = 1, .data = mine, .release = release, .context = &one };
	om_block_adopt(b, &pool, f);
	CHECK(b->body->data == mine && b->host == OM_COPY_VALID && group->idle == 1);
	CHECK_EQ(group->used_bytes, 3 * OM_PAGE);
	CHECK_EQ(pool.limit_bytes, 8 * OM_MIB - 3 * OM_PAGE); /* it counts */
	__atomic_add_fetch(&f->refs, 1, __ATOMIC_RELAXED);    /* a lease */
	om_block_host_drop(b, &pool);
	CHECK_EQ(pool.limit_bytes, 8 * OM_MIB);
	om_foreign_collect();
	CHECK_EQ(released, 0);
	om_foreign_unref(f);
	CHECK_EQ(released, 0); /* only a thread that collects runs it */
	om_foreign_collect();
	om_foreign_collect();
	CHECK_EQ(released, 1);
	om_block_unref(b);
}

static void without_memory(void)
{
	struct om_block *b;

	om_fault_arm(OM_FAULT_ALLOC, 1, false);
	CHECK(om_block_create("x", 1, group, &b) < 0);
	CHECK_EQ(om_block_create("x", 1, group, &b), 0);
	om_fault_arm(OM_FAULT_ALLOC, 1, false);
	CHECK(om_block_wake(b, NULL) < 0 && !b->body && b->slot == OM_NIL);
	CHECK_EQ(om_block_wake(b, NULL), 0);
	om_fault_reset();
	om_block_retire(b);
	CHECK_EQ(om_pool_check(&pool), 0);
}

int main(void)
{
	om_pool_init(&pool, 8 * OM_MIB);
	CHECK_EQ(om_group_create("group", 8 * OM_MIB, &group), 0);
	life();
	disk_copies();
	origins();
	foreign_memory();
	without_memory();
	om_group_destroy(group);
	om_pool_fini(&pool);
	return 0;
}
