/*
 * om_sys: what the system tells about memory: its own, that of every memory cgroup from ours up to the root
 * (versions 1 and 2, found by /proc/self/cgroup and /proc/self/mountinfo), stalls for want of memory, GPUs.
 *
 * om_sys_memory is stateless. A sampler remembers where the cgroups' files lie, and looks anew when our cgroup
 * is another or a file that was there cannot be read; limits are read each time, since they may change. It
 * is not thread safe: its user serialises. `root` goes before every path of the system ("" or NULL: none), for
 * tests. What cannot be read is passed over; only without the system's own numbers there is no sample.
 */
#ifndef OM_SYS_H
#define OM_SYS_H

#include <stdint.h>

#include "omnimem.h"

/* The tightest of them: the one with the largest share in use. Page cache that can be dropped at once
 * (a cgroup's inactive file pages, what MemAvailable counts) is not in use. A cgroup that cannot be read is passed
 * over; -errno when the system's own numbers cannot be. */
int om_sys_memory(const char *root, struct om_memory *ret);

struct om_sampler;
/* -ENOMEM. GPUs are those that the process may use: by NVML (libnvidia-ml.so.1, or what OMNIMEM_NVML names),
 * which is loaded here and needs no CUDA context; CUDA_VISIBLE_DEVICES is heeded as it is now. */
int om_sampler_create(const char *root, struct om_sampler **ret);
int om_sampler_read(struct om_sampler *s, struct om_sample *ret);
void om_sampler_free(struct om_sampler *s);

/* The tightest place of a sample, by share in use. */
const struct om_place *om_sample_tightest(const struct om_sample *s);
double om_place_usage(const struct om_place *p);

/* Have the C library give back what it holds and nobody uses. Bytes, as the process's size tells. */
uint64_t om_sys_heap_trim(void);

#endif
