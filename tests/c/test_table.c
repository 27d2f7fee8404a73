/* The table: names come and go while it doubles; a failed insert leaves it as it was. */
#include <stdio.h>

#include "core/om_table.h"
#include "om_test.h"

#define COUNT 1000

static struct om_block *blocks[COUNT];

static void make_blocks(struct om_group *g)
{
	char name[32];

	for (int i = 0; i < COUNT; i++) {
		snprintf(name, sizeof(name), "model.layers.%d.weight", i);
		CHECK_EQ(om_block_create(name, 1, g, &blocks[i]), 0);
	}
}

int main(void)
{
	struct om_group *g;
	struct om_table t;

	CHECK_EQ(om_group_create("g", OM_GIB, &g), 0);
	make_blocks(g);
	CHECK_EQ(om_table_init(&t), 0);
	CHECK(om_table_find(&t, "model.layers.0.weight") == NULL);
	for (int i = 0; i < COUNT; i++) {
		om_fault_arm(OM_FAULT_ALLOC, 1, true);
		if (om_table_insert(&t, blocks[i])) { /* it had to grow */
			CHECK_EQ(t.count, i);
			CHECK(!blocks[i]->named && !om_table_find(&t, blocks[i]->name));
			om_fault_reset();
			CHECK_EQ(om_table_insert(&t, blocks[i]), 0);
		}
		om_fault_reset();
		CHECK(blocks[i]->named && om_table_find(&t, blocks[i]->name) == blocks[i]);
	}
	CHECK(t.size > 64);
	for (int i = 0; i < COUNT; i += 2)
		om_table_remove(&t, blocks[i]);
	CHECK_EQ(t.count, COUNT / 2);
	for (int i = 0; i < COUNT; i++) {
		CHECK(blocks[i]->named == i % 2);
		CHECK(om_table_find(&t, blocks[i]->name) == (i % 2 ? blocks[i] : NULL));
	}
	om_table_fini(&t);
	for (int i = 0; i < COUNT; i++)
		om_block_unref(blocks[i]);
	om_group_destroy(g);
	return 0;
}
