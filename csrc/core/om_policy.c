/* om_policy: see om_policy.h. */
#include "core/om_policy.h"

#include <errno.h>
#include <string.h>

#include "base/om_base.h"
#include "base/om_error.h"

static const struct om_policy_ops *const known[] = { &om_policy_lru, &om_policy_clock,
	                                             &om_policy_sieve, &om_policy_s3fifo,
	                                             &om_policy_adaptive };

const struct om_policy_ops *om_policy_find(const char *name)
{
	for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++)
		if (!strcmp(known[i]->name, name))
			return known[i];
	return NULL;
}

int om_policy_create(const struct om_policy_ops *ops, uint64_t capacity, struct om_policy **ret)
{
	struct om_policy *p = om_alloc(1, ops->bytes);
	int code;

	if (!p)
		return -ENOMEM;
	p->ops = ops;
	p->capacity = capacity;
	code = ops->init ? ops->init(p) : 0;
	if (code) {
		om_policy_destroy(p);
		return code;
	}
	*ret = p;
	return 0;
}

void om_policy_destroy(struct om_policy *p)
{
	if (!p)
		return;
	p->ops->fini(p);
	om_free(p);
}

int om_policy_grow(struct om_policy *p, uint32_t slots)
{
	uint64_t to = OM_MAX((uint64_t)slots, p->slots + p->slots / 2);
	int code;

	if (slots <= p->slots)
		return 0;
	to = OM_MIN(to, (uint64_t)OM_NIL);
	code = p->ops->grow(p, (uint32_t)to);
	if (!code)
		p->slots = (uint32_t)to;
	return code;
}

int om_policy_grow_array(void *array, uint32_t from, uint32_t to, size_t size)
{
	void **at = array, *grown = om_realloc(*at, to, size);

	if (!grown)
		return -ENOMEM;
	memset((char *)grown + from * size, 0, (to - from) * size);
	*at = grown;
	return 0;
}
