/* om_table: see om_table.h. */
#include "core/om_table.h"

#include <errno.h>
#include <string.h>
#include <xxhash.h>

int om_table_init(struct om_table *t)
{
	t->size = 64;
	t->count = 0;
	t->slots = om_alloc(t->size, sizeof(*t->slots));
	return t->slots ? 0 : -ENOMEM;
}

void om_table_fini(struct om_table *t)
{
	om_free(t->slots);
	t->slots = NULL;
}

static uint64_t hash_name(const char *name)
{
	return XXH3_64bits(name, strlen(name));
}

struct om_block *om_table_find(const struct om_table *t, const char *name)
{
	uint64_t hash = hash_name(name);
	struct om_block *b = t->slots[hash & (t->size - 1)];

	while (b && (b->name_hash != hash || strcmp(b->name, name)))
		b = b->chain;
	return b;
}

static int grow(struct om_table *t)
{
	size_t size = t->size * 2;
	struct om_block **slots = om_alloc(size, sizeof(*slots));

	if (!slots)
		return -ENOMEM;
	for (size_t i = 0; i < t->size; i++) {
		for (struct om_block *b = t->slots[i], *next; b; b = next) {
			next = b->chain;
			b->chain = slots[b->name_hash & (size - 1)];
			slots[b->name_hash & (size - 1)] = b;
		}
	}
	om_free(t->slots);
	t->slots = slots;
	t->size = size;
	return 0;
}

int om_table_insert(struct om_table *t, struct om_block *b)
{
	struct om_block **slot;

	if (t->count >= t->size && grow(t))
		return -ENOMEM;
	b->name_hash = hash_name(b->name);
	slot = &t->slots[b->name_hash & (t->size - 1)];
	b->chain = *slot;
	*slot = b;
	om_block_set_named(b, true);
	t->count++;
	return 0;
}

void om_table_remove(struct om_table *t, struct om_block *b)
{
	struct om_block **slot = &t->slots[b->name_hash & (t->size - 1)];

	while (*slot != b)
		slot = &(*slot)->chain;
	*slot = b->chain;
	om_block_set_named(b, false);
	t->count--;
}
