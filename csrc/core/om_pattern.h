/*
 * om_pattern: what comes next, by replay of what came before.
 *
 * A ring of past ids, the last position of each id, one cursor. While accesses match the history the
 * cursor walks along it; on a mismatch it jumps behind the id's last occurrence. Nothing is thrown
 * away by a mismatch. A stream's ids are its units, a cache's the slots of its group, which are added
 * over time and stand for another block when one is removed.
 *
 * Only a jump at an id that comes once in a round finds the length of that round, so a cycle without
 * such an id may never be learnt, and one that is longer than the ring cannot be. Then, as when
 * accesses are random, matches stay few and nothing is trusted.
 *
 * Positions are kept modulo 2^32. They stay right for ever since one counts only if the ring, which is
 * shorter, still has the id there. 8 bytes an id and 4 an entry of the ring, which has 16 entries an
 * id up to 2^18, then one an id: 12 bytes an id from 2^18 ids on.
 *
 * Owns its arrays; allocates in init and grow only. Passive: the caller serialises.
 */
#ifndef OM_PATTERN_H
#define OM_PATTERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define OM_PATTERN_TRUST   4    /* matches in a row after which the cursor is trusted */
#define OM_PATTERN_WINDOW  1024 /* accesses over which locality is measured; a power of two */
#define OM_PATTERN_UNKNOWN UINT64_MAX

/*
 * The last accesses, OM_PATTERN_WINDOW at most. Temporal locality is reused / accesses, spatial
 * locality foretold / (accesses - repeated).
 */
struct om_locality {
	uint32_t accesses;
	uint32_t repeated; /* of these: went on with the id just accessed (om_pattern_access) */
	uint32_t reused;   /* of these: repeated, or the id came at most a window before */
	/* Of these: the cursor stood at the id, trusted or not: how regular accesses are does not
	 * depend on how much of it is bet on. */
	uint32_t foretold;
};

struct om_pattern_mark {
	uint32_t last; /* position of the id's last occurrence, if the ring has it there */
	uint32_t born; /* occurrences before this position were another block's */
};

/* What lies `age` accesses back has that age: 1 is the last access. */
struct om_pattern {
	uint32_t *past;                /* ring */
	struct om_pattern_mark *marks; /* by id */
	uint32_t ids, capacity;
	uint32_t kept;    /* entries that the ring has */
	uint32_t at;      /* its entry that is written next */
	uint32_t head;    /* the next access's position, modulo 2^32 */
	uint32_t lag;     /* age of what is expected next; 0: nothing is known */
	uint64_t matches; /* in a row: since the last mismatch */
	uint64_t mismatches;
	struct om_locality locality;
	uint8_t recent[OM_PATTERN_WINDOW]; /* what `locality` counts, by access */
	uint32_t recent_at;
};

/* Ids below `ids`, 2^30 at most; the declared order, each id at most once, is the first history. */
int om_pattern_init(struct om_pattern *p, size_t ids, const uint32_t *order, size_t count);
void om_pattern_fini(struct om_pattern *p);
/* Room for ids below `ids` at least (amortised: grows by half). All stays as it was on failure. */
int om_pattern_grow(struct om_pattern *p, uint32_t ids);
/* The id will stand for another block: what the old one did foretells nothing of the new one. */
void om_pattern_forget(struct om_pattern *p, uint32_t id);
/* An access. Returns whether it was foretold. */
bool om_pattern_record(struct om_pattern *p, uint32_t id);
/*
 * The same where what was accessed stays at hand: an id that comes again at once goes on with the
 * same access. It says nothing about what follows and changes nothing but the locality, so that
 * a a a b b is the cycle a b. True then too.
 */
bool om_pattern_access(struct om_pattern *p, uint32_t id);
/* The id expected `ahead` accesses from now (0: the next). False when unknown, which those behind it
 * need not be: a forgotten id leaves a gap. */
bool om_pattern_next(const struct om_pattern *p, size_t ahead, uint32_t *ret_id);
/* Accesses since the id's last one, that included; 0: none is remembered. */
uint32_t om_pattern_age(const struct om_pattern *p, uint32_t id);
/* Did the last OM_PATTERN_TRUST accesses match? Then what is foretold is worth a bet. */
bool om_pattern_trusted(const struct om_pattern *p);
/*
 * In how many accesses the id is expected (0: the next), if it is among the next `most`; else, and
 * when the cursor is not trusted, OM_PATTERN_UNKNOWN. Looks at no more than `most` entries, at none
 * for an id that does not lie ahead.
 */
uint64_t om_pattern_distance(const struct om_pattern *p, uint32_t id, uint64_t most);

#endif
