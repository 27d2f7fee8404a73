/* om_heap: slots by key, the least first; a key may change. Passive, allocates in grow only. */
#ifndef OM_HEAP_H
#define OM_HEAP_H

#include <stdint.h>

struct om_heap {
	double *keys;           /* by slot */
	uint32_t *slots;        /* the heap */
	uint32_t *place, count; /* by slot: index in `slots` */
};

/* Room for slots below `to`; `from` is what there is room for. All stays as it was on failure. */
int om_heap_grow(struct om_heap *h, uint32_t from, uint32_t to);
void om_heap_fini(struct om_heap *h);
void om_heap_put(struct om_heap *h, uint32_t slot, double key);
void om_heap_set(struct om_heap *h, uint32_t slot, double key);
void om_heap_del(struct om_heap *h, uint32_t slot);
/* The keys were changed behind the heap's back: order it anew. */
void om_heap_order(struct om_heap *h);

#endif
