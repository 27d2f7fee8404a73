/* om_list: an intrusive doubly linked list. A node is on at most one list; an unlinked node points
 * at itself, so that om_list_del of it is harmless. */
#ifndef OM_LIST_H
#define OM_LIST_H

#include <stdbool.h>

#include "base/om_base.h"

struct om_list {
	struct om_list *prev, *next;
};

static inline void om_list_init(struct om_list *l)
{
	l->prev = l->next = l;
}
static inline bool om_list_empty(const struct om_list *l)
{
	return l->next == l;
}
static inline void om_list_del(struct om_list *n)
{
	n->prev->next = n->next;
	n->next->prev = n->prev;
	om_list_init(n);
}
/* Insert n before `at`; before the head means at the tail. */
static inline void om_list_insert(struct om_list *at, struct om_list *n)
{
	n->prev = at->prev;
	n->next = at;
	at->prev->next = n;
	at->prev = n;
}
static inline void om_list_push_tail(struct om_list *head, struct om_list *n)
{
	om_list_insert(head, n);
}
static inline void om_list_push_head(struct om_list *head, struct om_list *n)
{
	om_list_insert(head->next, n);
}

#define OM_LIST_FOREACH(pos, head) \
	for (struct om_list *pos = (head)->next; pos != (head); pos = pos->next)
/* The loop body may unlink `pos`. */
#define OM_LIST_FOREACH_SAFE(pos, head)                                                  \
	for (struct om_list *pos = (head)->next, *pos##_next = pos->next; pos != (head); \
	     pos = pos##_next, pos##_next = pos->next)

#endif
