/*
 * om_sys: how much memory this process can still have: the system's, and that of every memory cgroup
 * from its own up to the root (versions 1 and 2, found by /proc/self/cgroup and /proc/self/mountinfo).
 * Stateless: limits may change at any time, so everything is read anew. Safe from any thread.
 */
#ifndef OM_SYS_H
#define OM_SYS_H

#include <stdint.h>

#include "omnimem.h"

/* The tightest of them: the one with the largest share in use. Page cache that can be dropped at once
 * (a cgroup's inactive file pages, what MemAvailable counts) is not in use. `root` goes before every
 * path ("" or NULL: none), for tests. A cgroup that cannot be read is passed over; -errno when the
 * system's own numbers cannot be. */
int om_sys_memory(const char *root, struct om_memory *ret);

#endif
