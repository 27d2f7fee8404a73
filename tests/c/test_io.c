/*
 * test_io: plat/io.c with both back ends against an image in memory.
 *
 * Without arguments every test runs with each back end that this system has (threads always);
 * TEST_IO_NEED_URING=1 makes a missing io_uring a failure.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/om_base.h"
#include "om_test.h"
#include "plat/om_dev.h"
#include "plat/om_io.h"

#define SECONDS(n) om_deadline((n)*OM_NSEC)
#define FILE_BYTES (UINT32_C(8) << 20)

/* ThreadSanitizer refuses to start threads in a child of a process with threads. */
#if defined(__SANITIZE_THREAD__)
#define TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TSAN 1
#endif
#endif
#ifndef TSAN
#define TSAN 0
#endif

static enum om_io_backend backend;
static char directory[] = "/var/tmp/om_test_io.XXXXXX";
static unsigned long long seed = 88172645463325252ULL;

static uint64_t dice(uint64_t n)
{
	return om_test_random(&seed) % n;
}

static struct om_io *io_new(unsigned depth)
{
	struct om_io_config config = {
		.backend = backend, .directory = directory, .depth = depth, .threads = 4
	};
	struct om_io *io;

	CHECK_EQ(om_io_create(&config, &io), 0);
	CHECK(!strcmp(om_io_name(io), backend == OM_IO_URING ? "uring" : "threads"));
	CHECK(!om_io_fell_back(io));
	CHECK(om_io_reason(io)[0]);
	return io;
}

static unsigned char *map(uint64_t bytes)
{
	void *p;

	CHECK_EQ(om_host_map(bytes, &p), 0);
	return p;
}

/* A checkpoint-like file below the test's directory with random bytes; `image` gets a copy. */
static struct om_file *file_new(char *path, size_t size, unsigned char *image, uint32_t bytes)
{
	struct om_file *f;
	int fd;

	snprintf(path, size, "%s/data", directory);
	for (uint32_t i = 0; i < bytes; i++)
		image[i] = (unsigned char)(om_test_random(&seed) >> 32);
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	CHECK(fd >= 0);
	CHECK_EQ(write(fd, image, bytes), bytes);
	CHECK_EQ(fsync(fd), 0);
	close(fd);
	CHECK_EQ(om_file_open(path, &f), 0);
	return f;
}

static void drain_all(struct om_io *io, struct om_io_req **reqs, unsigned n)
{
	unsigned got = 0;

	while (got < n) {
		unsigned k = om_io_reap(io, reqs + got, n - got, 1, SECONDS(60));

		CHECK(k > 0);
		got += k;
	}
}

static int transfer(struct om_io *io, struct om_io_req *req)
{
	struct om_io_req *back;

	om_io_submit(io, req);
	CHECK_EQ(om_io_reap(io, &back, 1, 1, SECONDS(60)), 1);
	CHECK(back == req);
	return req->code;
}

#define DEPTH 48

/* Reads and writes at odd and aligned places, many in flight, never overlapping in time. */
static void random_file(struct om_file *f, unsigned char *image)
{
	struct om_io *io = io_new(16); /* more are out than fit: the rest waits */
	struct om_io_req reqs[DEPTH], *back[DEPTH];
	unsigned char *buf = map(DEPTH * OM_MIB);
	const uint32_t stripe = FILE_BYTES / DEPTH;

	for (int round = 0; round < 12; round++) {
		for (uint32_t i = 0; i < DEPTH; i++) {
			uint32_t at = (uint32_t)dice(stripe - 1),
				 len = 1 + (uint32_t)dice(stripe - at);
			uint64_t offset = (uint64_t)i * stripe + at;

			if (round % 2) { /* aligned: through O_DIRECT where there is one */
				offset = om_up((uint64_t)i * stripe, OM_PAGE) +
				         om_down(dice(16384), OM_PAGE);
				len = (uint32_t)(OM_PAGE * (1 + dice(30)));
			}
			reqs[i] = (struct om_io_req){ .file = f,
				                      .buf = buf + i * OM_MIB +
				                             (round % 2 ? 0 : dice(100)),
				                      .write = f->writable && dice(2),
				                      .len = len,
				                      .need = len,
				                      .offset = offset };
			if (reqs[i].write)
				for (uint32_t j = 0; j < len; j++)
					((unsigned char *)reqs[i].buf)[j] = image[offset + j] =
						(unsigned char)(om_test_random(&seed) >> 24);
			om_io_submit(io, &reqs[i]);
		}
		drain_all(io, back, DEPTH);
		for (uint32_t i = 0; i < DEPTH; i++) {
			CHECK_EQ(reqs[i].code, 0);
			CHECK_EQ(reqs[i].done, reqs[i].len);
			CHECK(!memcmp(reqs[i].buf, image + reqs[i].offset, reqs[i].len));
		}
	}
	CHECK_EQ(om_io_reap(io, back, DEPTH, 0, 0), 0);
	om_io_destroy(io);
	om_host_unmap(buf, DEPTH * OM_MIB);
}

static struct om_file *swap_new(const char *where, unsigned char *image)
{
	struct om_file *f;

	CHECK_EQ(om_file_create_swap(where, &f), 0);
	CHECK_EQ(om_file_grow(f, FILE_BYTES), 0);
	memset(image, 0, FILE_BYTES);
	return f;
}

static void test_random(void)
{
	unsigned char *image = map(FILE_BYTES);
	char path[128];
	struct om_file *f = file_new(path, sizeof(path), image, FILE_BYTES);

	random_file(f, image);
	om_file_unref(f);
	f = swap_new(directory, image);
	random_file(f, image);
	om_file_unref(f);
	f = swap_new("/dev/shm", image); /* no O_DIRECT, or a kernel that gives tmpfs one */
	random_file(f, image);
	om_file_unref(f);
	f = swap_new(directory, image);
	om_file_refuse_direct(f);
	random_file(f, image);
	om_file_unref(f);
	om_host_unmap(image, FILE_BYTES);
}

static void test_deep(void)
{
	enum { N = 2000 };
	struct om_io_req *reqs = calloc(N, sizeof(*reqs)), **back = calloc(N, sizeof(*back));
	unsigned char *image = map(FILE_BYTES), *buf = map(N * OM_PAGE);
	char path[128];
	struct om_file *f = file_new(path, sizeof(path), image, FILE_BYTES);
	struct om_io *io = io_new(128);

	for (uint32_t i = 0; i < N; i++) {
		reqs[i] = (struct om_io_req){ .file = f,
			                      .buf = buf + i * OM_PAGE,
			                      .len = OM_PAGE,
			                      .need = OM_PAGE,
			                      .offset = OM_PAGE * dice(FILE_BYTES / OM_PAGE) };
		om_io_submit(io, &reqs[i]);
	}
	for (unsigned got = 0; got < N;) {
		unsigned k = om_io_reap(io, back + got, 100, 37, SECONDS(60));

		CHECK(k >= OM_MIN(37u, N - got) && k <= 100);
		got += k;
	}
	for (uint32_t i = 0; i < N; i++) {
		CHECK_EQ(reqs[i].code, 0);
		CHECK(!memcmp(reqs[i].buf, image + reqs[i].offset, OM_PAGE));
	}
	om_io_destroy(io);
	om_file_unref(f);
	om_host_unmap(buf, N * OM_PAGE);
	om_host_unmap(image, FILE_BYTES);
	free(back);
	free(reqs);
}

/* Every fault point, fired at the nth pass and at every pass from there. */
static void test_faults(void)
{
	static const struct {
		enum om_fault point;
		bool write;
		int once, always; /* the code expected */
	} rows[] = {
		{ OM_FAULT_READ, false, -EIO, -EIO },   { OM_FAULT_WRITE, true, -EIO, -EIO },
		{ OM_FAULT_SHORT, false, 0, 0 },        { OM_FAULT_SHORT, true, 0, 0 },
		{ OM_FAULT_SUBMIT, false, 0, -EAGAIN }, { OM_FAULT_SUBMIT, true, 0, -EAGAIN },
	};
	unsigned char *image = map(FILE_BYTES), *buf = map(OM_MIB);
	struct om_file *f = swap_new(directory, image);
	struct om_io *io = io_new(4);

	for (int direct = 1; direct >= 0; direct--) {
		for (unsigned r = 0; r < sizeof(rows) / sizeof(rows[0]); r++)
			for (int sticky = 0; sticky < 2; sticky++) {
				struct om_io_req req = { .file = f,
					                 .write = rows[r].write,
					                 .buf = buf,
					                 .len = 300 * 1024,
					                 .need = 300 * 1024,
					                 .offset = OM_MIB };
				int want = sticky ? rows[r].always : rows[r].once;

				for (uint32_t i = 0; i < req.len; i++)
					buf[i] = rows[r].write ? (image[OM_MIB + i] =
					                                  (unsigned char)dice(256))
					                       : 0;
				om_fault_arm(rows[r].point, 1, sticky);
				CHECK_EQ(transfer(io, &req), want);
				CHECK(om_fault_fired(rows[r].point) >= 1);
				om_fault_reset();
				if (want && rows[r].write)
					CHECK_EQ(transfer(io, &req), 0); /* the next one is well */
				req.write = false;
				memset(buf, 0, req.len);
				CHECK_EQ(transfer(io, &req), 0);
				CHECK(!memcmp(buf, image + OM_MIB, req.len));
			}
		om_file_refuse_direct(f);
	}
	struct om_io_req req = {
		.file = f, .buf = buf, .len = 4096, .need = 4096, .offset = OM_MIB
	};
	CHECK_EQ(transfer(io, &req), 0);
	memcpy(image, buf, 4096);
	om_fault_arm(OM_FAULT_FLIP, 1, false);
	CHECK_EQ(transfer(io, &req), 0);
	unsigned bits = 0;
	for (int i = 0; i < 4096; i++)
		bits += (unsigned)__builtin_popcount(image[i] ^ buf[i]);
	CHECK_EQ(bits, 1);
	om_fault_reset();
	om_io_destroy(io);
	om_file_unref(f);
	om_host_unmap(buf, OM_MIB);
	om_host_unmap(image, FILE_BYTES);
}

/* The nth of many reads is short, each time. */
static void test_short_nth(void)
{
	unsigned char *image = map(FILE_BYTES);
	char path[128];
	struct om_file *f = file_new(path, sizeof(path), image, FILE_BYTES);
	struct om_io *io = io_new(8);
	unsigned char *buf = map(8 * OM_MIB);
	struct om_io_req reqs[8], *back[8];

	for (uint64_t nth = 1; nth <= 20; nth++) {
		om_fault_arm(OM_FAULT_SHORT, nth, nth % 2);
		for (uint32_t i = 0; i < 8; i++) {
			uint32_t len = (uint32_t)(OM_PAGE * (1 + dice(250)));
			reqs[i] = (struct om_io_req){ .file = f,
				                      .buf = buf + i * OM_MIB,
				                      .len = len,
				                      .need = len - 5,
				                      .offset = OM_PAGE * dice((FILE_BYTES - len) /
				                                               OM_PAGE) };
			om_io_submit(io, &reqs[i]);
		}
		drain_all(io, back, 8);
		for (uint32_t i = 0; i < 8; i++) {
			CHECK_EQ(reqs[i].code, 0);
			CHECK(!memcmp(reqs[i].buf, image + reqs[i].offset, reqs[i].need));
		}
		om_fault_reset();
	}
	om_io_destroy(io);
	om_file_unref(f);
	om_host_unmap(buf, 8 * OM_MIB);
	om_host_unmap(image, FILE_BYTES);
}

/* The superset's tail may pass the end; the needed part may not. Then the file shrinks. */
static void test_end_of_file(void)
{
	const uint32_t size = 1000003;
	unsigned char *image = map(OM_MIB), *buf = map(OM_MIB);
	char path[128];
	struct om_file *f = file_new(path, sizeof(path), image, size);
	struct om_io *io = io_new(0);

	for (int direct = 1; direct >= 0; direct--) {
		struct om_io_req req = { .file = f, .buf = buf, .len = OM_MIB, .need = size };

		CHECK_EQ(transfer(io, &req), 0);
		CHECK(!memcmp(buf, image, size));
		om_fault_arm(OM_FAULT_SHORT, 1, true); /* many short steps up to the end */
		memset(buf, 0, size);
		CHECK_EQ(transfer(io, &req), 0);
		CHECK(!memcmp(buf, image, size));
		om_fault_reset();
		req.need = size + 1;
		CHECK_EQ(transfer(io, &req), -ENODATA);
		req.need = OM_MIB;
		CHECK_EQ(transfer(io, &req), -ENODATA);
		req.offset = OM_MIB;
		req.need = 1;
		CHECK_EQ(transfer(io, &req), -ENODATA);
		om_file_refuse_direct(f);
	}
	CHECK_EQ(om_file_check(f), 0);
	CHECK_EQ(truncate(path, 5000), 0);
	struct om_io_req req = { .file = f, .buf = buf, .len = OM_MIB, .need = size };
	CHECK_EQ(transfer(io, &req), -ENODATA);
	req.need = req.len = 5000;
	CHECK_EQ(transfer(io, &req), 0);
	CHECK(!memcmp(buf, image, 5000));
	CHECK_EQ(om_file_check(f), OM_ECORRUPT);
	om_file_unref(f);
	CHECK_EQ(om_file_open(path, &f), 0); /* direct again, 5000 bytes */
	req = (struct om_io_req){ .file = f, .buf = buf, .len = 8192, .need = 5001 };
	CHECK_EQ(transfer(io, &req), -ENODATA);
	req.need = 5000;
	CHECK_EQ(transfer(io, &req), 0);
	om_io_destroy(io);
	om_file_unref(f);
	om_host_unmap(buf, OM_MIB);
	om_host_unmap(image, OM_MIB);
}

/* Requests that can never work come back at once; a bad descriptor is its own error. */
static void test_bad_requests(void)
{
	unsigned char *image = map(OM_MIB);
	char path[128];
	struct om_file *f = file_new(path, sizeof(path), image, 8192);
	struct om_io *io = io_new(0);
	struct om_io_req req = { .file = f, .buf = image, .len = 0 };

	CHECK_EQ(transfer(io, &req), -EINVAL);
	req.len = OM_IO_MAX_REQUEST + 4096;
	CHECK_EQ(transfer(io, &req), -EINVAL);
	req.len = 4096;
	req.need = 4097;
	CHECK_EQ(transfer(io, &req), -EINVAL);
	req.need = 4096;
	req.write = true;
	CHECK_EQ(transfer(io, &req), -EINVAL);
	req.write = false;
	req.buf = (void *)(uintptr_t)4096;
	CHECK_EQ(transfer(io, &req), -EFAULT);
	om_io_destroy(io);
	om_file_unref(f);
	om_host_unmap(image, OM_MIB);
}

/* O_DIRECT that is refused when bytes move: an alignment that the file does not really take. */
static void test_refusal(void)
{
	unsigned char *image = map(OM_MIB), *buf = map(OM_MIB);
	char path[128];
	struct om_file *f = file_new(path, sizeof(path), image, OM_MIB);
	struct om_io *io = io_new(0);
	struct om_io_req req = { .file = f, .buf = buf, .len = 1000, .need = 1000, .offset = 7 };

	CHECK_EQ(transfer(io, &req), 0); /* odd: buffered, and nothing is refused for it */
	CHECK(!memcmp(buf, image + 7, 1000));
	if (f->fd_direct >= 0) {
		CHECK(!f->refused);
		f->align = 1;
		CHECK_EQ(transfer(io, &req), 0);
		CHECK(f->refused);
		CHECK_EQ(om_file_fd(f), f->fd);
		CHECK(!memcmp(buf, image + 7, 1000));
	}
	om_io_destroy(io);
	om_file_unref(f);
	om_host_unmap(buf, OM_MIB);
	om_host_unmap(image, OM_MIB);
}

/* In a child, for the limit is the process's own. */
static void in_child(void (*run)(void))
{
	int status;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid) {
		alarm(60);
		run();
		_exit(0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
}

static void child_file_limit(void)
{
	struct om_io *io = io_new(0);
	unsigned char *buf = map(OM_MIB);
	struct om_file *f;
	struct rlimit limit = { .rlim_cur = OM_MIB + 300 * 1024, .rlim_max = RLIM_INFINITY };

	signal(SIGXFSZ, SIG_IGN);
	CHECK_EQ(om_file_create_swap(directory, &f), 0);
	CHECK_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
	struct om_io_req req = {
		.file = f, .write = true, .buf = buf, .len = OM_MIB, .need = OM_MIB
	};

	CHECK_EQ(transfer(io, &req), 0);
	req.offset = OM_MIB; /* only a part fits */
	int code = transfer(io, &req);
	CHECK(code == -EFBIG || code == -ENOSPC);
	req.offset = 2 * OM_MIB;
	code = transfer(io, &req);
	CHECK(code == -EFBIG || code == -ENOSPC);
	req.offset = 0;
	req.write = false;
	CHECK_EQ(transfer(io, &req), 0);
	code = om_file_grow(f, 4 * OM_MIB);
	CHECK(code == -EFBIG || code == OM_EDISKFULL);
	om_io_destroy(io);
	om_file_unref(f);
	om_host_unmap(buf, OM_MIB);
}

static void test_file_limit(void)
{
	in_child(child_file_limit);
}

static void *waker(void *arg)
{
	usleep(20000);
	om_io_wake(arg);
	return NULL;
}

static void test_wake(void)
{
	struct om_io *io = io_new(8);
	struct om_io_req reqs[8], *back[8];
	pthread_t thread;
	int pipes[2];
	struct om_file fake = { .path = "pipe", .align = 1, .fd_direct = -1, .refs = 1 };
	char bytes[8];

	CHECK_EQ(om_io_reap(io, back, 8, 1, SECONDS(0)), 0); /* a deadline that has passed */
	CHECK_EQ(om_io_reap(io, back, 8, 1, om_now() + OM_NSEC / 50), 0);
	om_io_wake(io); /* before the wait */
	CHECK_EQ(om_io_reap(io, back, 8, 1, UINT64_MAX), 0);
	for (int i = 0; i < 50; i++) { /* again and again, also twice before one wait */
		om_io_wake(io);
		om_io_wake(io);
		CHECK_EQ(om_io_reap(io, back, 8, 8, UINT64_MAX), 0);
	}
	CHECK_EQ(pthread_create(&thread, NULL, waker, io), 0);
	CHECK_EQ(om_io_reap(io, back, 8, 1, UINT64_MAX), 0);
	pthread_join(thread, NULL);
	/* Three reads of a pipe that stays empty: a wait for all of them must end by the wake too. */
	CHECK_EQ(pipe(pipes), 0);
	fake.fd = pipes[0];
	for (int i = 0; i < 3; i++) {
		reqs[i] =
			(struct om_io_req){ .file = &fake, .buf = bytes + i, .len = 1, .need = 1 };
		/* pread of a pipe is ESPIPE; only a ring reads it at "no offset". */
		reqs[i].offset = UINT64_MAX;
		if (backend == OM_IO_URING)
			om_io_submit(io, &reqs[i]);
	}
	CHECK_EQ(pthread_create(&thread, NULL, waker, io), 0);
	CHECK_EQ(om_io_reap(io, back, 8, 3, UINT64_MAX), 0);
	pthread_join(thread, NULL);
	if (backend == OM_IO_URING) {
		CHECK_EQ(write(pipes[1], "abc", 3), 3);
		drain_all(io, back, 3);
		for (int i = 0; i < 3; i++)
			CHECK_EQ(reqs[i].code, 0);
	}
	close(pipes[0]);
	close(pipes[1]);
	om_io_destroy(io);
}

static bool storm_over;

static void *storm(void *arg)
{
	while (!__atomic_load_n(&storm_over, __ATOMIC_RELAXED))
		om_io_wake(arg);
	return NULL;
}

/* Wakes without pause from another thread lose and double nothing. */
static void test_wake_storm(void)
{
	unsigned char *image = map(OM_MIB), *buf = map(16 * OM_PAGE);
	char path[128];
	struct om_file *f = file_new(path, sizeof(path), image, OM_MIB);
	struct om_io *io = io_new(16);
	struct om_io_req reqs[16], *back[16];
	pthread_t thread;

	storm_over = false;
	CHECK_EQ(pthread_create(&thread, NULL, storm, io), 0);
	for (int round = 0; round < 100; round++) {
		unsigned got = 0;

		for (uint32_t i = 0; i < 16; i++) {
			reqs[i] = (struct om_io_req){ .file = f,
				                      .buf = buf + i * OM_PAGE,
				                      .len = OM_PAGE,
				                      .need = OM_PAGE,
				                      .offset = OM_PAGE * dice(256) };
			om_io_submit(io, &reqs[i]);
		}
		while (got < 16)
			got += om_io_reap(io, back + got, 16 - got, 16, SECONDS(60));
		for (uint32_t i = 0; i < 16; i++) {
			CHECK_EQ(reqs[i].code, 0);
			CHECK(!memcmp(reqs[i].buf, image + reqs[i].offset, OM_PAGE));
		}
	}
	__atomic_store_n(&storm_over, true, __ATOMIC_RELAXED);
	pthread_join(thread, NULL);
	om_io_destroy(io);
	om_file_unref(f);
	om_host_unmap(buf, 16 * OM_PAGE);
	om_host_unmap(image, OM_MIB);
}

static int open_descriptors(void)
{
	int n = 0;

	for (int fd = 0; fd < 256; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

/* Creation fails at every point in turn, cleanly, until it does not. */
static void test_create_sweep(void)
{
	static const enum om_fault points[] = { OM_FAULT_ALLOC,  OM_FAULT_THREAD, OM_FAULT_MAP,
		                                OM_FAULT_SUBMIT, OM_FAULT_READ,   OM_FAULT_WRITE,
		                                OM_FAULT_SHORT,  OM_FAULT_FLIP,   OM_FAULT_NOSPC };
	struct om_io_config config = { .backend = backend, .directory = directory, .threads = 3 };
	int before = open_descriptors();

	for (unsigned p = 0; p < sizeof(points) / sizeof(points[0]); p++)
		for (int sticky = 0; sticky < 2; sticky++) {
			uint64_t nth = 0, fired;

			do {
				struct om_io *io = NULL;

				om_fault_arm(points[p], ++nth, sticky);
				int code = om_io_create(&config, &io);
				fired = om_fault_fired(points[p]);
				om_fault_reset();
				CHECK(code ? !io && fired && om_err_last()->code == code
				           : io != NULL);
				om_io_destroy(io);
			} while (fired);
			CHECK(nth < 100);
		}
	CHECK_EQ(open_descriptors(), before);
}

static struct om_io *forked_io;
static struct om_io_req forked_req;

static void child_of_fork(void)
{
	struct om_io_req *back;

	om_io_submit(forked_io, &forked_req);
	CHECK_EQ(om_io_reap(forked_io, &back, 1, 1, UINT64_MAX), 1);
	CHECK_EQ(back->code, OM_ECLOSED);
	CHECK_EQ(om_io_reap(forked_io, &back, 1, 1, UINT64_MAX), 0);
	om_io_destroy(forked_io);
	if (!TSAN)
		om_io_destroy(io_new(4)); /* a child may start its own */
}

static void test_fork(void)
{
	unsigned char *image = map(OM_MIB);
	char path[128];
	struct om_file *f = file_new(path, sizeof(path), image, OM_MIB);

	forked_io = io_new(4);
	forked_req = (struct om_io_req){ .file = f, .buf = image, .len = 4096, .need = 4096 };
	CHECK_EQ(transfer(forked_io, &forked_req), 0);
	in_child(child_of_fork);
	CHECK_EQ(transfer(forked_io, &forked_req), 0); /* the parent's lives on */
	om_io_destroy(forked_io);
	om_file_unref(f);
	om_host_unmap(image, OM_MIB);
}

/* What is in flight at destroy ends before destroy returns. */
static void test_destroy(void)
{
	unsigned char *image = map(FILE_BYTES), *buf = map(FILE_BYTES);
	char path[128];
	struct om_file *f = file_new(path, sizeof(path), image, FILE_BYTES);
	struct om_io *io = io_new(8);
	struct om_io_req reqs[8], *back[8];

	om_io_destroy(NULL);
	for (uint32_t i = 0; i < 8; i++) {
		reqs[i] = (struct om_io_req){ .file = f,
			                      .buf = buf + i * OM_MIB,
			                      .len = OM_MIB,
			                      .need = OM_MIB,
			                      .offset = i * OM_MIB };
		om_io_submit(io, &reqs[i]);
	}
	om_io_reap(io, back, 8, 0, 0);
	om_io_destroy(io);
	om_host_unmap(buf, FILE_BYTES);
	om_io_destroy(io_new(1)); /* nothing in flight */
	om_file_unref(f);
	om_host_unmap(image, FILE_BYTES);
}

/* ---- which back end ---- */

static void check_denied(const char *word)
{
	struct om_io_config config = { .backend = OM_IO_AUTO, .directory = directory };
	struct om_io *io;

	unsetenv("OMNIMEM_IO");
	CHECK_EQ(om_io_create(&config, &io), 0);
	CHECK(!strcmp(om_io_name(io), "threads"));
	CHECK(om_io_fell_back(io));
	if (!strstr(om_io_reason(io), word))
		fprintf(stderr, "reason: %s\n", om_io_reason(io));
	CHECK(strstr(om_io_reason(io), word));
	backend = OM_IO_THREADS;
	om_io_destroy(io);
	config.backend = OM_IO_URING;
	CHECK(om_io_create(&config, &io) < 0);
	CHECK(!io);
	CHECK(strstr(om_err_last()->text, word));
	setenv("OMNIMEM_IO", "uring", 1);
	config.backend = OM_IO_AUTO;
	CHECK(om_io_create(&config, &io) < 0);
}

#ifdef OM_WITHOUT_LIBURING
static void test_selection(void)
{
	check_denied("without liburing");
	unsetenv("OMNIMEM_IO");
}
#else
/* From here on this process (a forked child) gets `error` from system call `number`. */
static void deny(int number, int error)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { .len = 4, .filter = filter };

	CHECK_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
	CHECK_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

static void child_eperm(void)
{
	deny(SYS_io_uring_setup, EPERM);
	check_denied("seccomp");
}

static void child_enosys(void)
{
	deny(SYS_io_uring_setup, ENOSYS);
	check_denied("io_uring");
}

static void child_enomem(void)
{
	deny(SYS_io_uring_setup, ENOMEM);
	check_denied("MEMLOCK");
}

/* A ring that can be made and never entered. */
static void child_enter(void)
{
	deny(SYS_io_uring_enter, EPERM);
	check_denied("probe");
}

static void test_selection(void)
{
	in_child(child_eperm);
	in_child(child_enosys);
	in_child(child_enomem);
	in_child(child_enter);
}
#endif

static void test_environment(bool have_uring)
{
	struct om_io_config config = { .backend = OM_IO_AUTO, .directory = directory };
	struct om_io *io;

	setenv("OMNIMEM_IO", "threads", 1);
	CHECK_EQ(om_io_create(&config, &io), 0);
	CHECK(!strcmp(om_io_name(io), "threads"));
	CHECK(!om_io_fell_back(io));
	om_io_destroy(io);
	setenv("OMNIMEM_IO", "carrier pigeon", 1);
	CHECK_EQ(om_io_create(&config, &io), OM_EVALUE);
	CHECK(strstr(om_err_last()->text, "carrier pigeon"));
	unsetenv("OMNIMEM_IO");
	CHECK_EQ(om_io_create(&config, &io), 0);
	CHECK(!strcmp(om_io_name(io), have_uring ? "uring" : "threads"));
	om_io_destroy(io);
	config.directory = "/proc"; /* no file can be made: the running program is read */
	CHECK_EQ(om_io_create(&config, &io), 0);
	CHECK(!strcmp(om_io_name(io), have_uring ? "uring" : "threads"));
	om_io_destroy(io);
}

static void run_all(void)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} tests[] = {
		{ "random", test_random },
		{ "deep", test_deep },
		{ "faults", test_faults },
		{ "short_nth", test_short_nth },
		{ "end_of_file", test_end_of_file },
		{ "bad_requests", test_bad_requests },
		{ "refusal", test_refusal },
		{ "file_limit", test_file_limit },
		{ "wake", test_wake },
		{ "wake_storm", test_wake_storm },
		{ "create_sweep", test_create_sweep },
		{ "fork", test_fork },
		{ "destroy", test_destroy },
	};

	for (unsigned i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
		printf("%s %s\n", backend == OM_IO_URING ? "uring" : "threads", tests[i].name);
		fflush(stdout);
		tests[i].run();
	}
}

int main(void)
{
	struct om_io_config config = { .backend = OM_IO_URING, .directory = directory };
	struct om_io *io;
	bool have_uring;
	char path[128];

	alarm(300); /* a hang is a failure */
	CHECK(mkdtemp(directory));
	backend = OM_IO_THREADS;
	run_all();
	have_uring = !om_io_create(&config, &io);
	if (have_uring) {
		om_io_destroy(io);
		backend = OM_IO_URING;
		run_all();
		test_selection();
	} else {
		printf("no uring: %s\n", om_err_last()->text);
		CHECK(!getenv("TEST_IO_NEED_URING"));
#ifdef OM_WITHOUT_LIBURING
		test_selection();
#endif
	}
	test_environment(have_uring);
	snprintf(path, sizeof(path), "%s/data", directory);
	unlink(path);
	CHECK_EQ(rmdir(directory), 0); /* nothing else was left in it */
	return 0;
}
