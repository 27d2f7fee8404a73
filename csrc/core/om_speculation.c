/* om_speculation: see om_speculation.h. */
#include "core/om_speculation.h"

void om_speculation_init(struct om_speculation *s)
{
	*s = (struct om_speculation){ .depth = OM_SPECULATION_FIRST };
}

uint32_t om_speculation_room(const struct om_speculation *s)
{
	if (!s->depth)
		return !s->open && s->right >= OM_SPECULATION_PROBE;
	return s->depth > s->open ? s->depth - s->open : 0;
}

void om_speculation_issue(struct om_speculation *s)
{
	s->open++;
	s->issued_count++;
	s->quiet = 0;
	s->right = 0;
}

static void judge(struct om_speculation *s)
{
	s->ended = 0;
	if (s->used < s->wasted) {
		s->depth /= 2;
	} else if (3 * s->wasted <= s->used && s->depth < OM_SPECULATION_MOST) {
		s->depth++;
	}
	/* A probe is judged by itself. */
	if (!s->depth)
		s->used = s->wasted = 0;
}

void om_speculation_end(struct om_speculation *s, bool used)
{
	s->open -= s->open > 0; /* it may have been given up as wasted */
	s->quiet = 0;
	if (s->used + s->wasted >= OM_SPECULATION_HORIZON) {
		s->used /= 2;
		s->wasted /= 2;
	}
	s->used += used;
	s->wasted += !used;
	s->used_count += used;
	s->wasted_count += !used;
	if (++s->ended >= s->depth)
		judge(s);
}

void om_speculation_access(struct om_speculation *s, bool foretold)
{
	s->right += foretold;
	if (++s->quiet < OM_SPECULATION_PATIENCE)
		return;
	s->quiet = 0;
	while (s->open)
		om_speculation_end(s, false);
}
