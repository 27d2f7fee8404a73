/* dev_host: host memory in page runs, see om_dev.h. Owns nothing; safe from any thread; every
 * failure is -ENOMEM with the size in the message. */
#include "plat/om_dev.h"

#include <errno.h>
#include <inttypes.h>
#include <sys/mman.h>

#include "base/om_base.h"
#include "base/om_error.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

static int map_failed(uint64_t bytes, int error)
{
	return om_err(-ENOMEM, "cannot map %" PRIu64 " bytes of host memory: %s", bytes,
	              om_err_text(-error));
}

/* Anonymous memory has no alignment of its own beyond a page: map too much, cut both ends. */
static void *map_aligned(uint64_t bytes)
{
	uint64_t whole, slack = bytes >= OM_HUGE ? OM_HUGE : 0;

	if (om_add_overflows(bytes, slack, &whole)) {
		errno = ENOMEM;
		return MAP_FAILED;
	}
	char *raw = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (raw == MAP_FAILED || !slack)
		return raw;
	char *start = (char *)(uintptr_t)om_up((uintptr_t)raw, OM_HUGE);
	char *end = start + bytes;

	if (start > raw)
		munmap(raw, (size_t)(start - raw));
	if (raw + whole > end)
		munmap(end, (size_t)(raw + whole - end));
	return start;
}

int om_host_map(uint64_t bytes, void **ret)
{
	void *p;

	*ret = NULL;
	if (!bytes || bytes % OM_PAGE)
		return om_err(OM_EVALUE,
		              "a run of host memory must be whole pages, not %" PRIu64 " bytes",
		              bytes);
	if (om_fault(OM_FAULT_MAP))
		return map_failed(bytes, ENOMEM);
	p = map_aligned(bytes);
	if (p == MAP_FAILED)
		return map_failed(bytes, errno);
	/* A forked child must not share pages that the kernel may be reading into. */
	if (madvise(p, bytes, MADV_DONTFORK)) {
		int error = errno;

		munmap(p, bytes);
		return map_failed(bytes, error);
	}
	if (bytes >= OM_HUGE)
		madvise(p, bytes, MADV_HUGEPAGE); /* advice: a kernel without huge pages refuses */
	*ret = p;
	return 0;
}

void om_host_unmap(void *p, uint64_t bytes)
{
	if (p)
		munmap(p, bytes);
}

/* One write a page that changes nothing, also while another thread writes there. */
static void touch(char *p, uint64_t bytes)
{
	for (uint64_t i = 0; i < bytes; i += OM_PAGE)
		__atomic_fetch_or(p + i, 0, __ATOMIC_RELAXED);
}

int om_host_populate(void *p, uint64_t bytes)
{
	int code;

	if (!bytes)
		return 0;
	do
		code = madvise(p, bytes, MADV_POPULATE_WRITE) ? errno : 0;
	while (code == EINTR || code == EAGAIN);
	if (code == EINVAL || code == ENOSYS || code == EPERM) { /* an older kernel, a filter */
		touch(p, bytes);
		code = 0;
	}
	return code ? om_err(-ENOMEM, "cannot populate %" PRIu64 " bytes of host memory: %s", bytes,
	                     om_err_text(-code))
	            : 0;
}

void om_host_discard(void *p, uint64_t bytes)
{
	if (bytes)
		madvise(p, bytes, MADV_DONTNEED);
}
