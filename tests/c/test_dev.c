/* test_dev: plat/dev_host.c. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/om_base.h"
#include "om_test.h"
#include "plat/om_dev.h"

/* A sanitizer maps memory of its own: into the hole in a child, and beyond any RLIMIT_AS. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

static long resident_pages(void *p, uint64_t bytes)
{
	static unsigned char vec[8192];
	long n = 0;

	CHECK(bytes / OM_PAGE <= sizeof(vec));
	CHECK_EQ(mincore(p, bytes, vec), 0);
	for (uint64_t i = 0; i < bytes / OM_PAGE; i++)
		n += vec[i] & 1;
	return n;
}

static void test_map(void)
{
	static const uint64_t sizes[] = { OM_PAGE, 3 * OM_PAGE,       OM_HUGE - OM_PAGE,
		                          OM_HUGE, OM_HUGE + OM_PAGE, 5 * OM_HUGE };

	for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		unsigned char *p, *q;

		CHECK_EQ(om_host_map(sizes[i], (void **)&p), 0);
		CHECK_EQ(om_host_map(sizes[i], (void **)&q), 0);
		CHECK_EQ((uintptr_t)p % OM_PAGE, 0);
		if (sizes[i] >= OM_HUGE)
			CHECK_EQ((uintptr_t)p % OM_HUGE, 0);
		CHECK_EQ(resident_pages(p, sizes[i]), 0);
		memset(q, 7, sizes[i]);
		for (uint64_t j = 0; j < sizes[i]; j += 511)
			CHECK_EQ(p[j], 0);
		om_host_unmap(p, sizes[i]);
		CHECK_EQ(q[sizes[i] - 1], 7); /* the trim of one run touches no other */
		om_host_unmap(q, sizes[i]);
	}
	om_host_unmap(NULL, OM_PAGE);
}

static void test_bad_sizes(void)
{
	static const uint64_t sizes[] = { 0, 1, OM_PAGE + 1, OM_HUGE - 1 };
	void *p = &p;

	for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		CHECK_EQ(om_host_map(sizes[i], &p), OM_EVALUE);
		CHECK(!p);
	}
	CHECK_EQ(om_host_map(om_down(UINT64_MAX, OM_PAGE), &p), -ENOMEM); /* size overflow */
	CHECK_EQ(om_host_map(UINT64_C(1) << 60, &p), -ENOMEM);
	om_fault_arm(OM_FAULT_MAP, 1, false);
	CHECK_EQ(om_host_map(OM_PAGE, &p), -ENOMEM);
	CHECK(!p);
	om_fault_reset();
}

static void test_populate_contents(void)
{
	const uint64_t bytes = 2 * OM_HUGE;
	unsigned char *p;

	CHECK_EQ(om_host_map(bytes, (void **)&p), 0);
	p[5] = 42;
	CHECK_EQ(om_host_populate(p, bytes), 0);
	CHECK_EQ(resident_pages(p, bytes), (long)(bytes / OM_PAGE));
	CHECK_EQ(p[5], 42);
	memset(p, 9, bytes);
	om_host_discard(p, OM_HUGE);
	CHECK_EQ(p[5], 0);
	CHECK_EQ(p[OM_HUGE], 9);
	CHECK_EQ(om_host_populate(p, 0), 0);
	om_host_discard(p, 0);
	om_host_unmap(p, bytes);
}

static void test_populate(void)
{
	void *p;

	test_populate_contents();
	CHECK_EQ(om_host_map(OM_HUGE, &p), 0);
	om_host_unmap(p, OM_HUGE);
	CHECK_EQ(om_host_populate(p, OM_HUGE), -ENOMEM); /* nothing is mapped there */
}

static void in_child(void (*run)(void *), void *arg)
{
	int status;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid) {
		alarm(30);
		run(arg);
		_exit(0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
}

/* From here on madvise(MADV_POPULATE_WRITE) fails with EINVAL, as before Linux 5.14. */
static void forget_populate(void)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 23, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EINVAL),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { .len = 6, .filter = filter };

	CHECK_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
	CHECK_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

static void child_old_kernel(void *arg)
{
	(void)arg;
	forget_populate();
	test_populate_contents();
}

#if !SANITIZED
static void child_looks(void *p)
{
	unsigned char vec;

	CHECK(mincore(p, OM_PAGE, &vec) < 0 && errno == ENOMEM);
}

/* The child's address space has a hole where the run was. */
static void test_fork(void)
{
	void *p;

	CHECK_EQ(om_host_map(OM_HUGE, &p), 0);
	memset(p, 1, OM_HUGE);
	in_child(child_looks, p);
	om_host_unmap(p, OM_HUGE);
}

static void child_limit(void *arg)
{
	struct rlimit limit = { .rlim_cur = 512 * OM_MIB, .rlim_max = 512 * OM_MIB };
	void *p;

	(void)arg;
	CHECK_EQ(setrlimit(RLIMIT_AS, &limit), 0);
	CHECK_EQ(om_host_map(OM_GIB, &p), -ENOMEM);
	CHECK(!p);
	CHECK_EQ(om_host_map(OM_MIB, &p), 0);
	om_host_unmap(p, OM_MIB);
}
#endif

struct writer {
	unsigned char *p;
	uint64_t bytes;
};

static void *write_all(void *arg)
{
	struct writer *w = arg;

	for (uint64_t i = 0; i < w->bytes; i += OM_PAGE)
		__atomic_store_n(w->p + i, 3, __ATOMIC_RELAXED);
	return NULL;
}

/* Populating while another thread writes loses no byte of it. */
static void test_populate_beside_writer(void)
{
	struct writer w = { .bytes = 8 * OM_HUGE };
	pthread_t thread;

	CHECK_EQ(om_host_map(w.bytes, (void **)&w.p), 0);
	CHECK_EQ(pthread_create(&thread, NULL, write_all, &w), 0);
	CHECK_EQ(om_host_populate(w.p, w.bytes), 0);
	pthread_join(thread, NULL);
	for (uint64_t i = 0; i < w.bytes; i += OM_PAGE)
		CHECK_EQ(w.p[i], 3);
	om_host_unmap(w.p, w.bytes);
}

/* Addresses cost nothing, whatever their number; what is committed is as what is mapped. */
static void test_reserve(void)
{
	uint64_t all = UINT64_C(64) << 30;
	unsigned char *p;

	CHECK_EQ(om_host_reserve(all, (void **)&p), 0);
	CHECK_EQ((uintptr_t)p % OM_HUGE, 0);
	CHECK_EQ(om_host_commit(p + OM_HUGE, 4 * OM_HUGE), 0);
	CHECK_EQ(resident_pages(p + OM_HUGE, 4 * OM_HUGE), 0);
	p[2 * OM_HUGE] = 7;
	CHECK(resident_pages(p + OM_HUGE, 4 * OM_HUGE) > 0);
	om_host_discard(p + OM_HUGE, 4 * OM_HUGE);
	CHECK_EQ(resident_pages(p + OM_HUGE, 4 * OM_HUGE), 0);
	CHECK_EQ(p[2 * OM_HUGE], 0);
	om_host_unmap(p, all);
	CHECK_EQ(om_host_reserve(OM_PAGE + 1, (void **)&p), OM_EVALUE);
	om_fault_arm(OM_FAULT_MAP, 1, true);
	CHECK_EQ(om_host_reserve(OM_HUGE, (void **)&p), -ENOMEM);
	CHECK_EQ(om_host_commit(NULL, OM_PAGE), -ENOMEM);
	om_fault_reset();
}

/* Locking touches nothing, and is refused with the limit's name. */
static void child_lock(void *arg)
{
	struct rlimit limit = { 4 * OM_PAGE, 4 * OM_PAGE };
	unsigned char *p;

	(void)arg;
	CHECK_EQ(om_host_map(OM_HUGE, (void **)&p), 0);
	if (geteuid() == 0)
		CHECK(!setuid(65534));
	CHECK(!setrlimit(RLIMIT_MEMLOCK, &limit));
	CHECK_EQ(om_host_lock((void *)8, OM_PAGE), OM_EDEVICE); /* nothing is mapped there */
	CHECK_EQ(om_host_lock(p, 2 * OM_PAGE), 0);
	CHECK_EQ(resident_pages(p, OM_HUGE), 0);
	p[0] = p[OM_PAGE] = 1;
	if (om_host_discard_locked(p, OM_PAGE)) /* Linux 5.18 */
		CHECK_EQ(p[0], 0);
	CHECK_EQ(p[OM_PAGE], 1);
	CHECK_EQ(om_host_lock(p, 8 * OM_PAGE), OM_ELIMIT);
	CHECK_EQ(om_err_last()->limit, 4 * OM_PAGE);
	CHECK_EQ(om_err_last()->used, 2 * OM_PAGE);
	CHECK_EQ(strcmp(om_err_last()->which, "RLIMIT_MEMLOCK"), 0);
	om_host_unlock(p, 2 * OM_PAGE);
#if !SANITIZED /* whose munlock does nothing */
	CHECK_EQ(om_host_lock(p + OM_HUGE / 2, 4 * OM_PAGE), 0);
#endif
	om_host_unmap(p, OM_HUGE);
	CHECK(!om_host_addresses_scarce());
	limit = (struct rlimit){ UINT64_C(1) << 40, UINT64_C(1) << 40 };
#if !SANITIZED
	CHECK(!setrlimit(RLIMIT_AS, &limit));
	CHECK(om_host_addresses_scarce());
#endif
}

int main(void)
{
	alarm(60);
	test_map();
	test_reserve();
	in_child(child_lock, NULL);
	test_bad_sizes();
	test_populate();
	in_child(child_old_kernel, NULL);
#if !SANITIZED
	test_fork();
	in_child(child_limit, NULL);
#endif
	test_populate_beside_writer();
	return 0;
}
