/*
 * pool_bench: the C half of benchmarks/pool.py, which builds it with the core and reads what it prints, one JSON
 * object a line.
 *
 *   pool_bench utilisation SEED COUNT   full pools of 2 GiB: who fits how much
 *   pool_bench speed SEED COUNT         alloc + free, at a fixed population
 *   pool_bench placement SEED COUNT     do chunks of one lifetime belong together?
 *
 * An allocator under test is four functions over one state. `tree` is a best fit of our own: all holes in a
 * treap ordered by size and offset, neighbours in a ring by address; it exists here alone, as a peer and to try
 * placements out. Other mallocs come by LD_PRELOAD.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/om_arena.h"
#include "omnimem.h"

#define POOL      (UINT64_C(2) << 30)
#define GRANULE   UINT64_C(256)
#define MAX_ITEMS (1u << 20)

static uint64_t seed;

static uint64_t next_random(void)
{
	seed ^= seed >> 12;
	seed ^= seed << 25;
	seed ^= seed >> 27;
	return seed * UINT64_C(2685821657736338717);
}

static void fail(const char *what)
{
	fprintf(stderr, "pool_bench: %s (%s)\n", what, om_err_last()->text);
	exit(1);
}

/* ---- a best fit of our own ---- */

struct node {
	uint64_t at, n; /* granules */
	uint32_t left, right, priority;
	uint32_t below, above; /* ring by address through node 0 */
	bool used;
};

struct tree {
	struct node *nodes;
	uint32_t root, fresh, unused;
	uint64_t size, used, holes;
};

static bool is_before(const struct tree *t, uint32_t a, uint32_t b)
{
	const struct node *x = &t->nodes[a], *y = &t->nodes[b];

	return x->n != y->n ? x->n < y->n : x->at < y->at;
}

static uint32_t treap_merge(struct tree *t, uint32_t a, uint32_t b)
{
	if (!a || !b)
		return a ? a : b;
	if (t->nodes[a].priority > t->nodes[b].priority) {
		t->nodes[a].right = treap_merge(t, t->nodes[a].right, b);
		return a;
	}
	t->nodes[b].left = treap_merge(t, a, t->nodes[b].left);
	return b;
}

static void treap_split(struct tree *t, uint32_t root, uint32_t key, uint32_t *low, uint32_t *high)
{
	if (!root) {
		*low = *high = 0;
	} else if (is_before(t, root, key)) {
		treap_split(t, t->nodes[root].right, key, &t->nodes[root].right, high);
		*low = root;
	} else {
		treap_split(t, t->nodes[root].left, key, low, &t->nodes[root].left);
		*high = root;
	}
}

static void hole_put(struct tree *t, uint32_t i)
{
	uint32_t low, high;

	t->nodes[i].used = false;
	t->nodes[i].left = t->nodes[i].right = 0;
	treap_split(t, t->root, i, &low, &high);
	t->root = treap_merge(t, treap_merge(t, low, i), high);
}

static void hole_take(struct tree *t, uint32_t i)
{
	uint32_t *link = &t->root;

	while (*link != i)
		link = is_before(t, i, *link) ? &t->nodes[*link].left : &t->nodes[*link].right;
	*link = treap_merge(t, t->nodes[i].left, t->nodes[i].right);
}

static uint32_t node_new(struct tree *t, uint64_t at, uint64_t n, uint32_t above)
{
	uint32_t i = t->unused ? t->unused : t->fresh++;

	if (t->unused)
		t->unused = t->nodes[i].left;
	t->nodes[i] = (struct node){ .at = at,
		                     .n = n,
		                     .priority = (uint32_t)next_random(),
		                     .above = above,
		                     .below = t->nodes[above].below };
	t->nodes[t->nodes[i].below].above = i;
	t->nodes[above].below = i;
	return i;
}

static void node_drop(struct tree *t, uint32_t i)
{
	t->nodes[t->nodes[i].below].above = t->nodes[i].above;
	t->nodes[t->nodes[i].above].below = t->nodes[i].below;
	t->nodes[i].left = t->unused;
	t->unused = i;
}

static struct tree *tree_new(uint64_t bytes)
{
	struct tree *t = calloc(1, sizeof(*t));

	t->nodes = calloc(2 * MAX_ITEMS, sizeof(*t->nodes));
	t->fresh = 1;
	t->size = bytes / GRANULE;
	hole_put(t, node_new(t, 0, t->size, 0));
	return t;
}

/* `top`: at the end of the hole. 0: no hole fits. */
static uint32_t tree_alloc(struct tree *t, uint64_t bytes, bool top)
{
	uint64_t n = (bytes + GRANULE - 1) / GRANULE, rest;
	uint32_t best = 0;

	for (uint32_t i = t->root; i;) {
		if (t->nodes[i].n >= n)
			best = i;
		i = t->nodes[i].n >= n ? t->nodes[i].left : t->nodes[i].right;
	}
	if (!best)
		return 0;
	hole_take(t, best);
	rest = t->nodes[best].n - n;
	if (rest && top) {
		uint32_t i = node_new(t, t->nodes[best].at + rest, n, t->nodes[best].above);

		t->nodes[best].n = rest;
		hole_put(t, best);
		best = i;
	} else if (rest) {
		t->nodes[best].n = n;
		hole_put(t, node_new(t, t->nodes[best].at + n, rest, t->nodes[best].above));
	}
	t->nodes[best].used = true;
	t->used += n;
	return best;
}

static void tree_free(struct tree *t, uint32_t i)
{
	uint32_t above = t->nodes[i].above, below = t->nodes[i].below;

	t->used -= t->nodes[i].n;
	if (above && !t->nodes[above].used) {
		hole_take(t, above);
		t->nodes[i].n += t->nodes[above].n;
		node_drop(t, above);
	}
	if (below && !t->nodes[below].used) {
		hole_take(t, below);
		t->nodes[below].n += t->nodes[i].n;
		node_drop(t, i);
		i = below;
	}
	hole_put(t, i);
}

static uint64_t tree_largest(const struct tree *t)
{
	uint32_t i = t->root;

	while (i && t->nodes[i].right)
		i = t->nodes[i].right;
	return i ? t->nodes[i].n * GRANULE : 0;
}

/* ---- what is compared ---- */

static struct om_bank *bank;
static struct om_arena *arena;
static struct tree *tree;

static void *bank_alloc(uint64_t bytes)
{
	struct om_chunk *c;

	return om_bank_try(bank, bytes, 1, NULL, &c) ? NULL : c;
}

static void bank_free(void *p)
{
	if (om_bank_free(bank, p))
		fail("om_bank_free");
}

static void *arena_alloc(uint64_t bytes)
{
	uint64_t offset;
	uint32_t handle;

	return om_arena_take(arena, bytes, 0, 1, &handle, &offset) ? NULL
	                                                           : (void *)(uintptr_t)handle;
}

static void arena_free(void *p)
{
	om_arena_give(arena, (uint32_t)(uintptr_t)p);
}

static void *tree_alloc_one(uint64_t bytes)
{
	return (void *)(uintptr_t)tree_alloc(tree, bytes, false);
}

static void tree_free_one(void *p)
{
	tree_free(tree, (uint32_t)(uintptr_t)p);
}

static void *malloc_alloc(uint64_t bytes)
{
	return malloc(bytes);
}

static void malloc_free(void *p)
{
	free(p);
}

struct allocator {
	const char *name;
	void *(*alloc)(uint64_t bytes);
	void (*free)(void *p);
};
static const struct allocator allocators[] = {
	{ "omnimem", bank_alloc, bank_free },
	{ "arena alone", arena_alloc, arena_free },
	{ "best fit tree", tree_alloc_one, tree_free_one },
	{ "malloc", malloc_alloc, malloc_free },
};

static void open_all(uint64_t bytes)
{
	struct om_bank_config c = { .name = "bench",
		                    .limit_bytes = bytes,
		                    .decay_ns = 3600 * OM_NSEC,
		                    .most_fragmented = 1 };

	tree = tree_new(bytes);
	if (!tree || om_bank_create(&c, &bank) || om_arena_create_by_handle(bytes, GRANULE, &arena))
		fail("no allocators");
}

/* ---- utilisation ---- */

struct item {
	void *p;
	uint64_t bytes;
};
static struct item items[MAX_ITEMS];
static size_t item_count;
static uint64_t item_bytes;

static void evict_random(const struct allocator *a)
{
	size_t k = next_random() % item_count;

	a->free(items[k].p);
	item_bytes -= items[k].bytes;
	items[k] = items[--item_count];
}

/* The chunks that the bank names; the items are found by their pointer. */
static double ages;
static uint64_t age_count, victim_ns, victim_calls;

static void evict_ours(uint64_t bytes)
{
	struct om_chunk **list;
	size_t count;
	uint64_t begin = om_now();

	if (om_bank_victims(bank, bytes, 1, &list, &count) || !count)
		fail("om_bank_victims");
	victim_ns += om_now() - begin;
	victim_calls++;
	for (size_t i = 0; i < count; i++) {
		struct om_chunk_state st, oldest, newest;
		size_t k = 0;

		om_chunk_state(list[i], &st);
		oldest = newest = st;
		for (size_t j = 0; j < item_count; j++) {
			struct om_chunk_state other;

			om_chunk_state(items[j].p, &other);
			if (other.serial < oldest.serial)
				oldest = other;
			if (other.serial > newest.serial)
				newest = other;
			k = items[j].p == list[i] ? j : k;
		}
		if (newest.serial > oldest.serial) {
			ages += (double)(st.serial - oldest.serial) /
			        (double)(newest.serial - oldest.serial);
			age_count++;
		}
		bank_free(items[k].p);
		item_bytes -= items[k].bytes;
		items[k] = items[--item_count];
	}
	om_free(list);
}

static void empty(const struct allocator *a)
{
	while (item_count)
		a->free(items[--item_count].p);
	item_bytes = 0;
}

/* Mean share of the pool that was asked for, over `count` allocations after three pools' worth; `fixed` bytes
 * each, or 0: 1 KiB to 64 MiB. */
static void fill(const struct allocator *a, bool ours, uint64_t fixed, uint64_t count)
{
	uint64_t done = 0, passed = 0, ops = 0, begin = 0, spent;
	double sum = 0;

	ages = 0;
	age_count = victim_ns = victim_calls = 0;
	while (done < count) {
		uint64_t bytes = fixed ? fixed : OM_KIB + next_random() % ((64 << 20) - OM_KIB + 1);
		void *p;

		while (!(p = a->alloc(bytes))) {
			if (ours)
				evict_ours(bytes);
			else
				evict_random(a);
			ops++;
		}
		ops++;
		items[item_count++] = (struct item){ p, bytes };
		item_bytes += bytes;
		passed += bytes;
		if (passed <= 3 * POOL)
			continue;
		if (!done++) {
			ops = 0;
			begin = om_now();
		}
		sum += (double)item_bytes / (double)POOL;
	}
	spent = om_now() - begin;
	printf("{\"allocator\": \"%s\", \"eviction\": \"%s\", \"size\": %llu, \"utilisation\": %.5f, "
	       "\"ns_op\": %.2f, \"victim_age\": %.4f, \"victim_ns\": %.1f}\n",
	       a->name, ours ? "ours" : "random", (unsigned long long)fixed, sum / (double)done,
	       (double)spent / (double)ops, age_count ? ages / (double)age_count : 0,
	       victim_calls ? (double)victim_ns / (double)victim_calls : 0);
	fflush(stdout);
	empty(a);
}

static void utilisation(uint64_t count)
{
	open_all(POOL);
	for (int i = 0; i < 3; i++)
		fill(&allocators[i], false, 0, count);
	fill(&allocators[0], true, 0, count);
	for (int k = 12; k <= 26; k += 2)
		for (int i = 0; i < 3; i += 2)
			fill(&allocators[i], false, (UINT64_C(1) << k) + 17,
			     OM_MIN(count, MAX_ITEMS / 4));
}

/* ---- speed ---- */

/* A free and an alloc of a random size in turn, at `live` chunks. */
static void pairs(const struct allocator *a, uint64_t live, uint64_t least, uint64_t most,
                  uint64_t count)
{
	uint64_t begin, empty_loop;

	for (uint64_t i = 0; i < live; i++)
		items[i].p = a->alloc(least + next_random() % (most - least + 1));
	begin = om_now();
	for (uint64_t i = 0; i < count; i++) { /* the harness alone */
		volatile uint64_t k = next_random() % live, bytes;

		bytes = least + next_random() % (most - least + 1);
		(void)bytes;
		(void)k;
	}
	empty_loop = om_now() - begin;
	begin = om_now();
	for (uint64_t i = 0; i < count; i++) {
		uint64_t k = next_random() % live;

		a->free(items[k].p);
		items[k].p = a->alloc(least + next_random() % (most - least + 1));
		if (!items[k].p)
			fail("an allocation was refused");
	}
	begin = om_now() - begin;
	printf("{\"allocator\": \"%s\", \"live\": %llu, \"least\": %llu, \"most\": %llu, "
	       "\"ns_pair\": %.2f}\n",
	       a->name, (unsigned long long)live, (unsigned long long)least,
	       (unsigned long long)most,
	       (double)(begin - OM_MIN(begin, empty_loop)) / (double)count);
	fflush(stdout);
	for (uint64_t i = 0; i < live; i++)
		a->free(items[i].p);
}

static void *nothing(void *arg)
{
	return arg;
}

static void speed(uint64_t count, bool malloc_only)
{
	pthread_t t;

	open_all(POOL);
	/* A process with threads: mutexes cost what they cost there. */
	if (pthread_create(&t, NULL, nothing, NULL) || pthread_join(t, NULL))
		fail("no thread");
	for (int i = malloc_only ? 3 : 0; i < 4; i++) {
		pairs(&allocators[i], 1, 4096, 4096, count);
		pairs(&allocators[i], 64, OM_KIB, 16 * OM_MIB, i == 3 ? count / 10 : count);
		pairs(&allocators[i], 1000, OM_KIB, 64 * OM_KIB, count);
		pairs(&allocators[i], 10000, OM_KIB, 64 * OM_KIB, count);
	}
}

/* ---- placement ---- */

enum { WEIGHT, ACTIVATION, TEMPORARY, LIVES };
enum placement { OFF, BY_SIZE, BY_LIFE, SEPARATE, PLACEMENTS };
static const char *const placement_names[] = { "off", "small from the top",
	                                       "short-lived from the top", "a segment each" };

struct lived {
	uint32_t node;
	int life;
	uint64_t bytes;
	struct tree *of;
};
static struct lived lived[MAX_ITEMS];

static struct tree *trees[LIVES];

static void let_one_go(size_t k, size_t *n, uint64_t *bytes)
{
	tree_free(lived[k].of, lived[k].node);
	*bytes -= lived[k].bytes;
	lived[k] = lived[--*n];
}

/* The mix, each size of some lifetime: of ten evictions six take something temporary, three an activation and
 * one a weight (where there is one; else whatever comes). A segment each: a half for weights, a quarter each for
 * the rest, and whoever's is full takes room elsewhere. */
static void place(enum placement placement, uint64_t count)
{
	uint64_t done = 0, passed = 0, bytes_live = 0;
	double utilised = 0, largest = 0;
	size_t n = 0;

	for (int i = 0; i < LIVES; i++)
		trees[i] = placement != SEPARATE ? (i ? trees[0] : tree_new(POOL))
		                                 : tree_new(i ? POOL / 4 : POOL / 2);
	while (done < count) {
		uint64_t bytes = OM_KIB + next_random() % ((64 << 20) - OM_KIB + 1), dice;
		uint64_t free_bytes = 0, best = 0;
		int life = (int)(next_random() % LIVES);
		bool top = placement == BY_SIZE ? bytes < (16 << 20)
		                                : placement == BY_LIFE && life != WEIGHT;
		struct lived v = { .life = life, .bytes = bytes };

		for (;;) {
			for (int i = 0; i < LIVES && !v.node; i++) {
				v.of = trees[(life + i) % LIVES];
				v.node = tree_alloc(v.of, bytes, top);
			}
			if (v.node)
				break;
			dice = next_random() % 10;
			life = dice < 6 ? TEMPORARY : dice < 9 ? ACTIVATION : WEIGHT;
			size_t k = next_random() % n;

			for (size_t tries = 0; tries < n && lived[k].life != life; tries++)
				k = (k + 1) % n;
			let_one_go(k, &n, &bytes_live);
			life = v.life;
		}
		lived[n++] = v;
		bytes_live += bytes;
		passed += bytes;
		if (passed <= 3 * POOL)
			continue;
		done++;
		utilised += (double)bytes_live / (double)POOL;
		for (int i = 0; i < (placement == SEPARATE ? LIVES : 1); i++) {
			uint64_t here = tree_largest(trees[i]);

			best = OM_MAX(best, here);
			free_bytes += (trees[i]->size - trees[i]->used) * GRANULE;
		}
		largest += free_bytes ? (double)best / (double)free_bytes : 1;
	}
	printf("{\"placement\": \"%s\", \"utilisation\": %.5f, \"largest_free\": %.5f}\n",
	       placement_names[placement], utilised / (double)done, largest / (double)done);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	uint64_t count = argc > 3 ? strtoull(argv[3], NULL, 10) : 0;

	seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 0;
	if (argc != 4 || !seed || !count) {
		fprintf(stderr,
		        "usage: pool_bench utilisation|speed|malloc|placement SEED COUNT\n");
		return 2;
	}
	if (!strcmp(argv[1], "utilisation"))
		utilisation(count);
	else if (!strcmp(argv[1], "speed") || !strcmp(argv[1], "malloc"))
		speed(count, argv[1][0] == 'm');
	else if (!strcmp(argv[1], "placement"))
		for (int i = OFF; i < PLACEMENTS; i++)
			place((enum placement)i, count);
	return 0;
}
