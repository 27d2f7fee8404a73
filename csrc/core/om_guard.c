/* om_guard: see om_guard.h. Owns the last reading of the process, and what happened since. */
#include "core/om_guard.h"

#include "core/om_store_int.h"
#include "plat/om_sys.h"

#define FRESH_NS (UINT64_C(50) * 1000 * 1000) /* a reading is good for so long */
#define LEAST_NS (UINT64_C(5) * 1000 * 1000)  /* between two, however much is mapped */
#define STUCK_NS OM_NSEC
#define PEAK_NS  (5 * OM_NSEC) /* a peak of others counts for so long, and up to twice as long */
#define UNIT     (UINT64_C(64) * OM_KIB)

/* The process's. Both halves of a reading in one word, so that nobody sees one of another: bytes in use
 * and in all, in units. */
static struct {
	uint64_t word; /* 0: there is none */
	uint64_t at_ns;
	int64_t fresh;  /* bytes mapped and not filled */
	int64_t since;  /* bytes filled less bytes unmapped, since the reading */
	int64_t mapped; /* bytes mapped since */
	int64_t held;   /* bytes that stores have mapped and filled */
	uint64_t others,
		others_before; /* the most that others used in this span of PEAK_NS, and in the last one */
	uint64_t span, total;
	uint64_t reader; /* fork generation + 1 of a thread that reads now; 0: none */
	uint64_t count;
	const char *root;
	bool once;
} now;

void om_guard_count(int64_t fresh_bytes, int64_t filled_bytes)
{
	__atomic_add_fetch(&now.fresh, fresh_bytes, __ATOMIC_RELAXED);
	__atomic_add_fetch(&now.since, filled_bytes, __ATOMIC_RELAXED);
	__atomic_add_fetch(&now.held, filled_bytes, __ATOMIC_RELAXED);
	if (fresh_bytes > 0)
		__atomic_add_fetch(&now.mapped, fresh_bytes, __ATOMIC_RELAXED);
}

void om_guard_count_foreign(int64_t bytes)
{
	__atomic_add_fetch(bytes > 0 ? &now.mapped : &now.since, bytes, __ATOMIC_RELAXED);
}

void om_guard_fake(const char *root, bool once)
{
	now.root = root;
	now.once = once;
	__atomic_store_n(&now.at_ns, 0, __ATOMIC_RELAXED);
	now.span = 0;
}

uint64_t om_guard_readings(void)
{
	return __atomic_load_n(&now.count, __ATOMIC_RELAXED);
}

int64_t om_guard_held(void)
{
	return __atomic_load_n(&now.held, __ATOMIC_RELAXED) +
	       __atomic_load_n(&now.fresh, __ATOMIC_RELAXED);
}

struct state {
	uint64_t used, total; /* total 0: nobody knows */
	uint64_t age_ns;
	int64_t mapped;
};

static struct state look(void)
{
	uint64_t word = __atomic_load_n(&now.word, __ATOMIC_ACQUIRE);
	uint64_t at_ns = __atomic_load_n(&now.at_ns, __ATOMIC_RELAXED), clock = om_now();
	int64_t used = (int64_t)((word >> 32) * UNIT) +
	               __atomic_load_n(&now.fresh, __ATOMIC_RELAXED) +
	               __atomic_load_n(&now.since, __ATOMIC_RELAXED);
	int64_t peak = om_guard_held() +
	               (int64_t)OM_MAX(__atomic_load_n(&now.others, __ATOMIC_RELAXED),
	                               __atomic_load_n(&now.others_before, __ATOMIC_RELAXED));

	used = OM_MAX(used, peak);
	return (struct state){ .used = (uint64_t)OM_MAX(used, 0),
		               .total = (word & UINT32_MAX) * UNIT,
		               .age_ns = at_ns && now.once ? 0 : clock - OM_MIN(at_ns, clock),
		               .mapped = __atomic_load_n(&now.mapped, __ATOMIC_RELAXED) };
}

/* The reader's: what others use goes up and down within a request, and what they used at their peak they will want
 * again. A peak is one of the memory that was tightest then. */
static void note_others(const struct om_memory *m, int64_t held_bytes)
{
	uint64_t used = m->total_bytes - m->available_bytes, span = om_now() / PEAK_NS;
	uint64_t others = used - OM_MIN(used, (uint64_t)OM_MAX(held_bytes, 0));
	bool same = m->total_bytes == now.total, again = same && span == now.span;

	if (!again)
		__atomic_store_n(&now.others_before, same && span == now.span + 1 ? now.others : 0,
		                 __ATOMIC_RELAXED);
	__atomic_store_n(&now.others, again ? OM_MAX(now.others, others) : others,
	                 __ATOMIC_RELAXED);
	now.span = span;
	now.total = m->total_bytes;
}

void om_guard_look(void)
{
	uint64_t mine = (uint64_t)om_fork_generation() + 1;
	uint64_t other = __atomic_load_n(&now.reader, __ATOMIC_RELAXED);
	int64_t since, mapped, held;
	struct om_memory m;

	/* One of the process that forked this one is not coming back. */
	if (other == mine || !__atomic_compare_exchange_n(&now.reader, &other, mine, false,
	                                                  __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
		return;
	since = __atomic_load_n(&now.since, __ATOMIC_RELAXED);
	mapped = __atomic_load_n(&now.mapped, __ATOMIC_RELAXED);
	held = om_guard_held();
	if (om_sys_memory(now.root, &m))
		m = (struct om_memory){ 0 };
	note_others(&m, held);
	__atomic_store_n(&now.word,
	                 ((m.total_bytes - m.available_bytes) / UNIT) << 32 |
	                         (m.total_bytes / UNIT & UINT32_MAX),
	                 __ATOMIC_RELEASE);
	__atomic_sub_fetch(&now.since, since, __ATOMIC_RELAXED);
	__atomic_sub_fetch(&now.mapped, mapped, __ATOMIC_RELAXED);
	__atomic_store_n(&now.at_ns, om_now(), __ATOMIC_RELAXED);
	__atomic_add_fetch(&now.count, 1, __ATOMIC_RELAXED);
	__atomic_store_n(&now.reader, 0, __ATOMIC_RELEASE);
}

static uint64_t ceiling_of(const struct om_store *s, uint64_t total)
{
	return s->guard.ceiling > 0 ? (uint64_t)(s->guard.ceiling * (double)total)
	                            : om_guard_most(total);
}

/* Bytes above the ceiling once `more` are mapped, by a reading that is new enough. */
static uint64_t over(const struct om_store *s, uint64_t more)
{
	struct state st = look();

	for (int again = 0; again < 2; again++) {
		uint64_t most = ceiling_of(s, st.total);
		uint64_t left = most - OM_MIN(most, st.used);
		bool old = st.age_ns > FRESH_NS,
		     gone = more > left || st.mapped > (int64_t)(left / 4);

		if (!old && !(gone && st.age_ns > LEAST_NS))
			break;
		om_guard_look();
		st = look();
	}
	if (!st.total || st.used + more <= ceiling_of(s, st.total))
		return 0;
	return st.used + more - ceiling_of(s, st.total);
}

uint64_t om_guard_short_locked(struct om_store *s, uint64_t bytes)
{
	uint64_t more = om_pool_growth(&s->pool, bytes);

	return more ? over(s, more) : 0;
}

bool om_guard_room_locked(struct om_store *s, uint64_t bytes)
{
	uint64_t more = om_pool_growth(&s->pool, bytes);

	return s->guard.level < OM_MEDIUM && (!more || !over(s, more));
}

void om_guard_stuck_locked(struct om_store *s)
{
	s->guard.stuck_until = om_now() + STUCK_NS;
}
