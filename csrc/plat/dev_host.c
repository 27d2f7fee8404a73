/* dev_host: host memory in page runs, see om_dev.h. Owns nothing; safe from any thread; every
 * failure, but for those of locking, is -ENOMEM with the size in the message. */
#include "plat/om_dev.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "base/om_base.h"
#include "base/om_error.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif

static int map_failed(uint64_t bytes, int error)
{
	return om_err(-ENOMEM, "cannot map %" PRIu64 " bytes of host memory: %s", bytes,
	              om_err_text(-error));
}

/* Anonymous memory has no alignment of its own beyond a page: map too much, cut both ends. */
static void *map_aligned(uint64_t bytes, int protection, int flags)
{
	uint64_t whole, slack = bytes >= OM_HUGE ? OM_HUGE : 0;

	if (om_add_overflows(bytes, slack, &whole)) {
		errno = ENOMEM;
		return MAP_FAILED;
	}
	char *raw = mmap(NULL, whole, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

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

static int map(uint64_t bytes, int protection, int flags, void **ret)
{
	void *p;

	*ret = NULL;
	if (!bytes || bytes % OM_PAGE)
		return om_err(OM_EVALUE,
		              "a run of host memory must be whole pages, not %" PRIu64 " bytes",
		              bytes);
	if (om_fault(OM_FAULT_MAP))
		return map_failed(bytes, ENOMEM);
	p = map_aligned(bytes, protection, flags);
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

int om_host_map(uint64_t bytes, void **ret)
{
	return map(bytes, PROT_READ | PROT_WRITE, 0, ret);
}

int om_host_reserve(uint64_t bytes, void **ret)
{
	return map(bytes, PROT_NONE, MAP_NORESERVE, ret);
}

int om_host_commit(void *p, uint64_t bytes)
{
	if (om_fault(OM_FAULT_MAP))
		return map_failed(bytes, ENOMEM);
	return mprotect(p, bytes, PROT_READ | PROT_WRITE) ? map_failed(bytes, errno) : 0;
}

bool om_host_addresses_scarce(void)
{
	struct rlimit limit;

	return !getrlimit(RLIMIT_AS, &limit) && limit.rlim_cur != RLIM_INFINITY;
}

/* Bytes that this process has locked, as the kernel counts them; 0 when it does not tell. */
static uint64_t locked_bytes(void)
{
	FILE *f = fopen("/proc/self/status", "re");
	unsigned long long kib = 0;
	char line[256];

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "VmLck: %llu", &kib) == 1)
			break;
	if (f)
		fclose(f);
	return kib * OM_KIB;
}

static int lock_failed(uint64_t bytes, int error)
{
	struct rlimit limit = { .rlim_cur = RLIM_INFINITY };
	uint64_t locked = locked_bytes();

	getrlimit(RLIMIT_MEMLOCK, &limit);
	if (limit.rlim_cur == RLIM_INFINITY || bytes + locked <= limit.rlim_cur)
		return om_err(OM_EDEVICE, "cannot lock %" PRIu64 " bytes of memory: %s", bytes,
		              om_err_text(-error));
	om_err(OM_ELIMIT,
	       "cannot lock %" PRIu64 " bytes of memory: %" PRIu64 " are locked and RLIMIT_MEMLOCK "
	       "allows %" PRIu64 "; raise it (ulimit -l, LimitMEMLOCK= of systemd, --ulimit "
	       "memlock=-1 of docker) or give the process CAP_IPC_LOCK",
	       bytes, locked, (uint64_t)limit.rlim_cur);
	om_err_limit("RLIMIT_MEMLOCK", bytes, locked, limit.rlim_cur);
	return OM_ELIMIT;
}

int om_host_lock(void *p, uint64_t bytes)
{
	if (om_fault(OM_FAULT_MAP))
		return lock_failed(bytes, ENOMEM);
	return mlock2(p, bytes, MLOCK_ONFAULT) ? lock_failed(bytes, errno) : 0;
}

void om_host_unlock(void *p, uint64_t bytes)
{
	if (bytes)
		munlock(p, bytes);
}

bool om_host_discard_locked(void *p, uint64_t bytes)
{
	return !bytes || !madvise(p, bytes, MADV_DONTNEED_LOCKED);
}

int om_host_move(void *to, void *from, uint64_t bytes)
{
	int error = ENOMEM;

	if (!om_fault(OM_FAULT_MAP)) {
		if (mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to)
			return 0;
		error = errno;
	} else
		munmap(to, bytes);
	return om_err(-ENOMEM, "cannot move %" PRIu64 " bytes of host memory: %s", bytes,
	              om_err_text(-error));
}

void om_host_unmap(void *p, uint64_t bytes)
{
	if (p && bytes)
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
