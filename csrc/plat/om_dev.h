/*
 * om_dev: host memory in page runs. Stateless; safe from any thread; nothing is locked.
 *
 * A run is anonymous, private, not inherited by fork, 2 MiB aligned and huge-page advised when it
 * is 2 MiB or larger, and not populated.
 */
#ifndef OM_DEV_H
#define OM_DEV_H

#include <stdint.h>

/* Map `bytes` (a multiple of OM_PAGE, > 0). -ENOMEM on failure. */
int om_host_map(uint64_t bytes, void **ret);
void om_host_unmap(void *p, uint64_t bytes);
/* Fault pages in (MADV_POPULATE_WRITE, else one write a page that keeps its content). Page
 * multiples. -ENOMEM when the system or cgroup has none left. */
int om_host_populate(void *p, uint64_t bytes);
/* Give the pages back to the system; the next read sees zeros. */
void om_host_discard(void *p, uint64_t bytes);

#endif
