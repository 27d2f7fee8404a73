/* om_table: name -> block, a chained hash table that doubles. Passive, under the store lock. */
#ifndef OM_TABLE_H
#define OM_TABLE_H

#include "core/om_block.h"

struct om_table {
	struct om_block **slots;
	size_t size, count; /* size is a power of two */
};

int om_table_init(struct om_table *t);
void om_table_fini(struct om_table *t);
struct om_block *om_table_find(const struct om_table *t, const char *name);
/* -ENOMEM leaves the table as it was. The caller has made sure that the name is free. */
int om_table_insert(struct om_table *t, struct om_block *b);
void om_table_remove(struct om_table *t, struct om_block *b);

#endif
