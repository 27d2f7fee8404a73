/*
 * om_dev: host memory in page runs. Stateless; safe from any thread; nothing is locked.
 *
 * A run is anonymous, private, not inherited by fork, 2 MiB aligned and huge-page advised when it
 * is 2 MiB or larger, and not populated.
 */
#ifndef OM_DEV_H
#define OM_DEV_H

#include <stdbool.h>
#include <stdint.h>

/* Map `bytes` (a multiple of OM_PAGE, > 0). -ENOMEM on failure. */
int om_host_map(uint64_t bytes, void **ret);
void om_host_unmap(void *p, uint64_t bytes);
/* Move the pages of a run (or of a part of one that is in one mapping) to where another one's are, which go: what is
 * at `from` is then at `to`, and nothing is at `from`. -ENOMEM: nothing is at `to`, `from` is as it was. */
int om_host_move(void *to, void *from, uint64_t bytes);
/* Fault pages in (MADV_POPULATE_WRITE, else one write a page that keeps its content). Page
 * multiples. -ENOMEM when the system or cgroup has none left. */
int om_host_populate(void *p, uint64_t bytes);
/* Give the pages back to the system; the next read sees zeros. */
void om_host_discard(void *p, uint64_t bytes);

/* Addresses for `bytes` (a multiple of OM_HUGE), mapped as om_host_map does, which nobody may touch before
 * om_host_commit (page multiples; -ENOMEM when the system promises no more): until then they cost nothing,
 * whatever the system's policy of overcommitting is. */
int om_host_reserve(uint64_t bytes, void **ret);
int om_host_commit(void *p, uint64_t bytes);
/* Are addresses scarce (RLIMIT_AS)? */
bool om_host_addresses_scarce(void);
/* Keep the pages of a run, those to come too, out of the kernel's swap, or no longer. OM_ELIMIT (RLIMIT_MEMLOCK, with
 * the sizes) or OM_EDEVICE. */
int om_host_lock(void *p, uint64_t bytes);
void om_host_unlock(void *p, uint64_t bytes);
/* As om_host_discard for a locked run; false when the kernel cannot (before Linux 5.18): nothing has changed. */
bool om_host_discard_locked(void *p, uint64_t bytes);

#endif
