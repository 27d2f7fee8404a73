/* om_latency: how long requests took, as counts by duration: four steps to a doubling, so that a quantile
 * is right to 19 %. Passive, under the store lock. */
#ifndef OM_LATENCY_H
#define OM_LATENCY_H

#include <stdint.h>

#include "omnimem.h"

#define OM_LATENCY_STEPS 128 /* from 1 us to an hour */

struct om_latency {
	uint64_t total, sum_ns, counts[OM_LATENCY_STEPS];
};

void om_latency_add(struct om_latency *l, uint64_t ns);
/* The duration that `share` (0..1) of the requests did not exceed, in ns; 0 without requests. */
uint64_t om_latency_quantile(const struct om_latency *l, double share);
/* The same with wider steps. */
void om_latency_histogram(const struct om_latency *l, struct om_histogram *ret);

#endif
