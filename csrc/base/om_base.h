/*
 * om_base: checked size arithmetic, the one allocation door, the clock, fault points, fork guard.
 *
 * Every heap allocation of the core goes through om_alloc/om_free, so that a test can make the
 * nth one fail. Fault points cost one predictable branch when nothing is armed.
 */
#ifndef OM_BASE_H
#define OM_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define OM_KIB  (UINT64_C(1) << 10)
#define OM_MIB  (UINT64_C(1) << 20)
#define OM_GIB  (UINT64_C(1) << 30)
#define OM_PAGE UINT64_C(4096) /* unit of every extent that I/O touches */
#define OM_HUGE (UINT64_C(2) * OM_MIB)
#define OM_NSEC UINT64_C(1000000000)

#define om_likely(x)                       __builtin_expect(!!(x), 1)
#define om_unlikely(x)                     __builtin_expect(!!(x), 0)
#define om_container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))
#define OM_MIN(a, b)                       ((a) < (b) ? (a) : (b))
#define OM_MAX(a, b)                       ((a) > (b) ? (a) : (b))

/* Round to a power of two; the caller has checked that up() cannot overflow. */
static inline uint64_t om_down(uint64_t x, uint64_t pow2)
{
	return x & ~(pow2 - 1);
}
static inline uint64_t om_up(uint64_t x, uint64_t pow2)
{
	return (x + pow2 - 1) & ~(pow2 - 1);
}
/* True on overflow; *ret is then undefined. */
static inline bool om_add_overflows(uint64_t a, uint64_t b, uint64_t *ret)
{
	return __builtin_add_overflow(a, b, ret);
}
static inline bool om_mul_overflows(uint64_t a, uint64_t b, uint64_t *ret)
{
	return __builtin_mul_overflow(a, b, ret);
}

/* Heap memory, zeroed. NULL (and this thread's error -ENOMEM set) on failure. Free with om_free. */
void *om_alloc(size_t n, size_t size);
/* Grow an array to `n` elements; the old one stays valid on failure (NULL, error set). */
void *om_realloc(void *p, size_t n, size_t size);
char *om_strdup(const char *s);
void om_free(void *p);

/* CLOCK_MONOTONIC, nanoseconds. */
uint64_t om_now(void);
/* The same to a few milliseconds, in a fraction of the time. */
uint64_t om_now_coarse(void);
/* now + timeout, saturating; timeout UINT64_MAX means for ever. */
uint64_t om_deadline(uint64_t timeout_ns);

/* Fault points: where a test may make the core fail. */
enum om_fault {
	OM_FAULT_ALLOC,  /* om_alloc, om_realloc, om_strdup: -ENOMEM */
	OM_FAULT_MAP,    /* mapping host memory: -ENOMEM */
	OM_FAULT_SUBMIT, /* handing a request to the back end: -EAGAIN */
	OM_FAULT_READ,   /* a completed read: -EIO */
	OM_FAULT_SHORT,  /* a completed read or write is cut to half (kept aligned to 512) */
	OM_FAULT_WRITE,  /* a completed write: -EIO */
	OM_FAULT_NOSPC,  /* growing the swap file: -ENOSPC */
	OM_FAULT_THREAD, /* starting a thread: -EAGAIN */
	OM_FAULT_FLIP,   /* a completed read: one bit is flipped */
	OM_FAULT_COUNT
};
/* Make the nth (from 1) pass of `point` fail; with `sticky` every later one too. nth 0 disarms. */
void om_fault_arm(enum om_fault point, uint64_t nth, bool sticky);
void om_fault_reset(void);
/* How often the armed `point` fired since om_fault_arm. */
uint64_t om_fault_fired(enum om_fault point);
bool om_fault_slow(enum om_fault point);
extern int om_fault_armed;
/* True when this pass of `point` must fail. */
static inline bool om_fault(enum om_fault point)
{
	return om_unlikely(__atomic_load_n(&om_fault_armed, __ATOMIC_RELAXED)) &&
	       om_fault_slow(point);
}

/* Counts forks: 0 in the process that loaded us, one more in each child. A store remembers the
 * value of its birth; another value means that its threads and memory are not here. */
unsigned om_fork_generation(void);
/* Installs the fork handler; called by whoever creates the first store. Idempotent. */
int om_fork_watch(void);

/* Between these two the thread sanitizer takes no read of this thread for a race. For bytes on their way
 * out: who shares them may write to them meanwhile, and what went out is dropped then. */
#if defined(__has_feature)
#define OM_TSAN __has_feature(thread_sanitizer)
#elif defined(__SANITIZE_THREAD__)
#define OM_TSAN 1
#else
#define OM_TSAN 0
#endif
#if OM_TSAN
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateHappensBefore(const char *file, int line, const volatile void *address);
void AnnotateHappensAfter(const char *file, int line, const volatile void *address);
#define om_racy_reads_begin() AnnotateIgnoreReadsBegin(__FILE__, __LINE__)
#define om_racy_reads_end()   AnnotateIgnoreReadsEnd(__FILE__, __LINE__)
/* For what the kernel orders: all that came before the one comes before what comes after the other. */
#define om_order_before(what) AnnotateHappensBefore(__FILE__, __LINE__, what)
#define om_order_after(what)  AnnotateHappensAfter(__FILE__, __LINE__, what)
#else
#define om_racy_reads_begin() ((void)0)
#define om_racy_reads_end()   ((void)0)
#define om_order_before(what) ((void)(what))
#define om_order_after(what)  ((void)(what))
#endif

#endif
