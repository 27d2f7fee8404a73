/*
 * om_relief: what a monitor does about pressure: has stores, banks and the C library give memory back, and records
 * what it did and why.
 *
 * Runs with `turn` on the thread that took the sample; never with `lock`, but to record. Every step ends at a
 * deadline. A store or bank that is closed has nothing to give.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/om_guard.h"
#include "core/om_monitor_int.h"

#define STEP_NS    OM_NSEC /* a step may take so long: what is being written then goes on */
#define STEP_SHARE 20u     /* of all goes in one step at most, but under CRITICAL */
#define QUANTUM    128u    /* so much of all goes besides what is needed */
#define HEAP_NS    (10 * OM_NSEC)
#define FALLING    0.85 /* of the bytes of the last sample: what falls so fast needs no help */

static void record(struct om_monitor *m, enum om_action_kind kind, uint64_t wanted, uint64_t freed,
                   const char *what)
{
	const struct om_report *r = &m->next;
	struct om_action *a;

	m->vain = kind == OM_ACT_NONE;
	om_mutex_lock(&m->lock);
	a = &m->actions[m->action_count % OM_ACTIONS];
	*a = (struct om_action){ .number = ++m->action_count,
		                 .at_ns = r->sample.at_ns,
		                 .wall_ns = r->wall_ns,
		                 .kind = kind,
		                 .level = r->ram_level,
		                 .wanted_bytes = wanted,
		                 .freed_bytes = freed };
	snprintf(a->cause, sizeof(a->cause), "%s%s%s", m->assessor.ram_cause,
	         r->ram_level ? "; " : "", what);
	om_mutex_unlock(&m->lock);
}

static void add(struct om_pressed *sum, const struct om_pressed *p)
{
	sum->trimmed_bytes += p->trimmed_bytes;
	sum->dropped_bytes += p->dropped_bytes;
	sum->dropped_blocks += p->dropped_blocks;
	sum->written_bytes += p->written_bytes;
	sum->written_blocks += p->written_blocks;
	sum->left_bytes += p->left_bytes;
}

/* Where stores give up idle blocks rather than grow: as always, or, while memory is very short, where they would take
 * again what they just gave. Time alone, as while a model is loaded, has nobody give. */
static double ceiling(const struct om_monitor *m)
{
	const struct om_pressure_rules *rules = &m->assessor.ram.rules;

	return m->lowered ? rules->thresholds[OM_HIGH - 1] - rules->margin : 0;
}

/* From when memory is very short by what is in use, or by stalls, until it is not. */
static void lower(struct om_monitor *m)
{
	const struct om_report *r = &m->next;
	const struct om_pressure_state *s = &m->assessor.ram;
	bool time_alone = s->cause == OM_CAUSE_TIME && r->usage < s->rules.thresholds[OM_HIGH - 1];

	m->lowered = r->ram_level >= OM_HIGH && (m->lowered || (s->cause && !time_alone));
}

/* What nobody uses goes; ret->left_bytes, and of each store left[i]: what could go. */
static void trim(struct om_monitor *m, uint64_t deadline_ns, uint64_t *left, struct om_pressed *ret)
{
	for (size_t i = 0; i < m->watched_count; i++) {
		struct om_watched *w = &m->watched[i];
		struct om_pressed p = { 0 };
		uint64_t bytes = 0;

		if (w->bank && !om_bank_trim(w->bank, &bytes))
			p.trimmed_bytes = bytes;
		else if (w->store)
			om_store_press(w->store, m->next.ram_level, ceiling(m), 0, deadline_ns, &p);
		left[i] = p.left_bytes;
		add(ret, &p);
	}
}

/* Idle bytes go, of each store in proportion to what it has of them. */
static void evict(struct om_monitor *m, uint64_t deadline_ns, uint64_t want, const uint64_t *left,
                  uint64_t all, struct om_pressed *ret)
{
	double part = want < all ? (double)want / (double)all : 1;

	for (size_t i = 0; i < m->watched_count; i++) {
		struct om_pressed p = { 0 };

		if (!left[i])
			continue;
		om_store_press(m->watched[i].store, m->next.ram_level, ceiling(m),
		               (uint64_t)((double)left[i] * part), deadline_ns, &p);
		add(ret, &p);
	}
}

/* Bytes in use above what stores leave to others by themselves; a little above is nothing. */
static uint64_t intruded(const struct om_place *p)
{
	uint64_t most = om_guard_most(p->limit_bytes);

	return p->used_bytes > most + p->limit_bytes / QUANTUM ? p->used_bytes - most : 0;
}

/* Bytes that idle blocks are to give: down to where the level is left, and a little more. Where it is not the share
 * in use that is too high, only the little; where it is time alone, nothing: it may take long yet. */
static uint64_t wanted(const struct om_monitor *m)
{
	const struct om_report *r = &m->next;
	const struct om_place *p = &r->sample.places[r->tightest];
	const struct om_pressure_state *s = &m->assessor.ram;
	uint64_t quantum = p->limit_bytes / QUANTUM, want = intruded(p), edge;

	if (!m->lowered)
		return want;
	edge = (uint64_t)((s->rules.thresholds[r->ram_level - 1] - s->rules.margin) *
	                  (double)p->limit_bytes);
	if (p->used_bytes >= edge)
		want = OM_MAX(want, p->used_bytes - edge + quantum);
	else if (s->cause == OM_CAUSE_FULL || s->cause == OM_CAUSE_MET)
		want = OM_MAX(want, quantum);
	if (r->ram_level < OM_CRITICAL)
		want = OM_MAX(OM_MIN(want, p->limit_bytes / STEP_SHARE), intruded(p));
	return want;
}

/* Use falls by itself. */
static bool falling(struct om_monitor *m)
{
	const struct om_report *r = &m->next;
	uint64_t used = r->sample.places[r->tightest].used_bytes;
	bool yes = m->acted_number + 1 == r->number &&
	           (double)used < FALLING * (double)m->acted_bytes;

	m->acted_number = r->number;
	m->acted_bytes = used;
	return yes;
}

static void trim_heap(struct om_monitor *m)
{
	uint64_t now = m->next.sample.at_ns, bytes;

	if (m->next.ram_level < OM_HIGH || (m->heap_ns && now - m->heap_ns < HEAP_NS))
		return;
	m->heap_ns = now;
	bytes = om_sys_heap_trim();
	if (bytes)
		record(m, OM_ACT_HEAP, 0, bytes, "the C library gave back what it held");
}

static void record_eviction(struct om_monitor *m, uint64_t want, const struct om_pressed *p)
{
	uint64_t got = p->dropped_bytes + p->written_bytes;
	const struct om_place *place = &m->next.sample.places[m->next.tightest];
	char wanted_text[24], got_text[24], written[24], left[24], what[160];

	om_size_text(place->available_bytes, left);
	om_size_text(want, wanted_text);
	om_size_text(got, got_text);
	om_size_text(p->written_bytes, written);
	if (got)
		snprintf(what, sizeof(what),
		         "%s left, wanted %s, got %s in %" PRIu64
		         " blocks (%s of them written out)",
		         left, wanted_text, got_text, p->dropped_blocks + p->written_blocks,
		         written);
	else
		snprintf(what, sizeof(what),
		         "%s left, wanted %s, and nothing idle was left to give", left,
		         wanted_text);
	if (got || !m->vain)
		record(m, got ? OM_ACT_EVICT : OM_ACT_NONE, want, got, what);
}

static void press(struct om_monitor *m)
{
	uint64_t deadline = om_deadline(STEP_NS), want = falling(m) ? 0 : wanted(m);
	uint64_t now = m->next.sample.at_ns, *left;
	struct om_pressed trimmed = { 0 }, evicted = { 0 };

	if (want)
		om_guard_look();
	if (!want && m->pressed && now - m->press_ns < m->config.interval_ns)
		return; /* what is free for a moment is taken again: no need to look so often */
	left = om_alloc(m->watched_count, sizeof(*left));
	if (!left)
		return; /* with the next sample, then */
	m->pressed = m->next.ram_level >= OM_MEDIUM;
	m->press_ns = now;
	trim(m, deadline, left, &trimmed);
	if (trimmed.trimmed_bytes)
		record(m, OM_ACT_TRIM, 0, trimmed.trimmed_bytes,
		       "memory that nobody used went back");
	trim_heap(m);
	want -= OM_MIN(want, trimmed.trimmed_bytes);
	if (want) {
		evict(m, deadline, want, left, trimmed.left_bytes, &evicted);
		record_eviction(m, want, &evicted);
	}
	om_free(left);
}

static void relax(const struct om_watched *w)
{
	struct om_pressed p;

	if (w->store)
		om_store_press(w->store, OM_LOW, 0, 0, om_now(), &p);
}

void om_relief_end(struct om_monitor *m, struct om_watched *one)
{
	if (!m->pressed)
		return;
	for (size_t i = 0; i < m->watched_count; i++)
		if (!one || one == &m->watched[i])
			relax(&m->watched[i]);
	m->pressed = one != NULL;
}

void om_relief_act(struct om_monitor *m)
{
	if (!m->config.act)
		return;
	lower(m);
	if (m->next.ram_level < OM_MEDIUM && m->pressed) {
		record(m, OM_ACT_RELAX, 0, 0, "memory is not short any more");
		om_relief_end(m, NULL);
	}
	if (m->next.ram_level >= OM_MEDIUM || wanted(m))
		press(m);
}
