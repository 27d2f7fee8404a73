/* Numbers for those who watch: marks, why copies left, totals that outlive their store, histograms. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "om_test.h"
#include "core/om_latency.h"
#include "omnimem.h"

#define SOON om_deadline(30 * OM_NSEC)

static char dir[] = "/var/tmp/omnimem-test-XXXXXX";
static uint8_t bytes[4 << 20];

static struct om_store *open_store(void)
{
	struct om_store_config c = { .host_limit_bytes = 16 * OM_MIB,
		                     .disk_limit_bytes = 64 * OM_MIB,
		                     .directory = dir };
	struct om_store *s;

	CHECK_EQ(om_store_create(&c, &s), 0);
	return s;
}

static void add(struct om_store *s, const char *name, uint64_t nbytes)
{
	CHECK_EQ(om_store_add(s, name, NULL, bytes, nbytes, NULL, SOON), 0);
}

static struct om_totals totals_of(struct om_store *s)
{
	struct om_totals t;
	struct om_gauges g;

	CHECK_EQ(om_store_totals(s, &t, &g), 0);
	return t;
}

/* Marks nest, overlap, and leave the peak of the store as it was. */
static void marks(void)
{
	struct om_store *s = open_store();
	struct om_mark *outer, *inner, *late;
	struct om_peaks p;
	struct om_stats stats;

	add(s, "a", 4 * OM_MIB);
	add(s, "b", 4 * OM_MIB);
	CHECK_EQ(om_store_remove(s, "b"), 0);
	CHECK_EQ(om_mark_begin(s, &outer), 0);
	add(s, "c", 2 * OM_MIB);
	CHECK_EQ(om_mark_begin(s, &inner), 0);
	CHECK_EQ(om_store_remove(s, "c"), 0);
	om_mark_end(inner, &p);
	CHECK_EQ(p.host_bytes, 6 * OM_MIB); /* what there was when it began */
	CHECK_EQ(om_mark_begin(s, &inner), 0);
	CHECK_EQ(om_mark_begin(s, &late), 0);
	add(s, "d", OM_MIB);
	om_mark_end(inner, &p);
	CHECK_EQ(p.host_bytes, 5 * OM_MIB);
	CHECK_EQ(p.disk_bytes, 0);
	CHECK_EQ(om_store_evict(s, "d", SOON), 1);
	om_mark_end(outer, &p);
	CHECK_EQ(p.host_bytes, 6 * OM_MIB);
	CHECK_EQ(p.disk_bytes, OM_MIB);
	CHECK_EQ(om_store_stats(s, &stats), 0);
	CHECK_EQ(stats.host.peak_bytes, 8 * OM_MIB);
	CHECK_EQ(stats.disk.peak_bytes, OM_MIB);
	om_store_close(s); /* a mark may end later */
	om_mark_end(late, &p);
	CHECK_EQ(p.host_bytes, 5 * OM_MIB);
	CHECK_EQ(om_mark_begin(s, &late), OM_ECLOSED);
	om_store_unref(s);
}

static void packed(void)
{
	struct om_store *s = open_store();
	struct om_mark *m;
	struct om_peaks p;
	uint64_t form;

	memset(bytes, 0, sizeof(bytes));
	add(s, "a", 4 * OM_MIB);
	CHECK_EQ(om_mark_begin(s, &m), 0);
	CHECK_EQ(om_store_encode(s, "a", OM_CODING_FAST, SOON, &form), 0);
	CHECK(form > 0);
	CHECK_EQ(om_store_remove(s, "a"), 0);
	om_mark_end(m, &p);
	CHECK(p.packed_bytes >= form && p.packed_bytes < 4 * OM_MIB);
	CHECK_EQ(om_mark_begin(s, &m), 0);
	om_mark_end(m, &p);
	CHECK_EQ(p.packed_bytes, 0);
	om_store_unref(s);
}

/* Copies leave for a reason, and each counter outlives its store. */
static void totals(void)
{
	struct om_totals before, after, t;
	struct om_store *s = open_store();
	uint64_t stores = om_totals_closed(&before);
	struct om_gauges g;
	char name[16];

	for (int i = 0; i < 6; i++) {
		snprintf(name, sizeof(name), "%d", i);
		add(s, name, 4 * OM_MIB);
	}
	t = totals_of(s);
	CHECK(t.gone[OM_REASON_CAPACITY] >= 2);
	CHECK_EQ(t.gone_bytes[OM_REASON_CAPACITY], t.gone[OM_REASON_CAPACITY] * 4 * OM_MIB);
	CHECK_EQ(t.gone[OM_REASON_EXPLICIT], 0);
	CHECK_EQ(om_store_evict(s, "5", SOON), 1);
	CHECK_EQ(om_store_remove(s, "4"), 0);
	after = totals_of(s);
	CHECK_EQ(after.gone[OM_REASON_EXPLICIT], 1);
	CHECK_EQ(after.gone[OM_REASON_CAPACITY], t.gone[OM_REASON_CAPACITY]);
	CHECK_EQ(after.life.count, 1);
	CHECK_EQ(after.idle.count, after.gone[OM_REASON_EXPLICIT] + after.gone[OM_REASON_CAPACITY]);
	CHECK_EQ(after.out.count, after.idle.count);
	CHECK(after.write.count > 0 && after.write.sum_ns > 0 && after.written_bytes > 0);
	CHECK_EQ(after.out_begun_bytes, after.out_ended_bytes);
	CHECK_EQ(om_store_close(s), 0);
	CHECK_EQ(om_store_totals(s, &t, &g), 1);
	CHECK_EQ(t.written_bytes, after.written_bytes);
	CHECK_EQ(t.block_misses + t.block_hits, after.block_misses + after.block_hits);
	CHECK_EQ(om_totals_closed(&t), stores + 1);
	CHECK_EQ(t.written_bytes - before.written_bytes, after.written_bytes);
	CHECK_EQ(t.life.count - before.life.count, after.life.count);
	CHECK_EQ(t.gone[OM_REASON_EXPLICIT] - before.gone[OM_REASON_EXPLICIT], 1);
	om_store_unref(s);
	CHECK_EQ(om_totals_closed(&after), stores + 1);
}

static void histograms(void)
{
	struct om_latency l = { 0 };
	struct om_histogram h;
	unsigned long long state = 7;
	uint64_t sum = 0;

	for (int i = 0; i < 10000; i++) {
		uint64_t ns = om_test_random(&state) >> (om_test_random(&state) % 50 + 14);
		unsigned step = 0;
		struct om_latency one = { 0 };

		om_latency_add(&l, ns);
		sum += ns;
		om_latency_add(&one, ns);
		om_latency_histogram(&one, &h);
		while (ns >= om_histogram_bound_ns(step))
			step++;
		CHECK_EQ(h.counts[step], 1);
	}
	om_latency_histogram(&l, &h);
	CHECK_EQ(h.count, 10000);
	CHECK_EQ(h.sum_ns, sum);
	for (unsigned i = 0; i < OM_HISTOGRAM_STEPS; i++)
		h.count -= h.counts[i];
	CHECK_EQ(h.count, 0);
}

int main(void)
{
	CHECK(mkdtemp(dir));
	marks();
	packed();
	totals();
	histograms();
	rmdir(dir);
	return 0;
}
