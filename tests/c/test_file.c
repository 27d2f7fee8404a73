/* test_file: plat/file.c. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/om_base.h"
#include "om_test.h"
#include "plat/om_file.h"

static char directory[] = "/var/tmp/om_test_file.XXXXXX";

/* A path below the test's directory; four may be in use at a time. */
static const char *at(const char *name)
{
	static char paths[4][PATH_MAX];
	static unsigned next;
	char *p = paths[next++ % 4];

	snprintf(p, PATH_MAX, "%s/%s", directory, name);
	return p;
}

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	CHECK(fd >= 0);
	CHECK_EQ(write(fd, text, strlen(text)), strlen(text));
	close(fd);
}

static int open_descriptors(void)
{
	int n = 0;

	for (int fd = 0; fd < 256; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

static unsigned entries(const char *path)
{
	DIR *dir = opendir(path);
	unsigned n = 0;

	CHECK(dir);
	for (struct dirent *e; (e = readdir(dir));)
		n += strcmp(e->d_name, ".") && strcmp(e->d_name, "..");
	closedir(dir);
	return n;
}

static void test_open(void)
{
	struct om_file *f;
	struct stat st;
	const char *path = at("data"), *link = at("link");

	put(path, "twelve bytes");
	CHECK_EQ(symlink(path, link), 0);
	CHECK_EQ(om_file_open(link, &f), 0);
	CHECK_EQ(stat(path, &st), 0);
	CHECK(!strcmp(f->path, link));
	CHECK(!f->writable);
	CHECK_EQ(f->id.size, 12);
	CHECK_EQ(f->id.inode, st.st_ino);
	CHECK_EQ(fcntl(f->fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
	CHECK_EQ(fcntl(f->fd, F_GETFL) & O_NONBLOCK, 0);
	CHECK(f->align && f->align <= OM_PAGE && !(f->align & (f->align - 1)));
	if (f->fd_direct >= 0) {
		CHECK_EQ(fcntl(f->fd_direct, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
		CHECK_EQ(fcntl(f->fd_direct, F_GETFL) & (O_DIRECT | O_NONBLOCK), O_DIRECT);
		CHECK_EQ(om_file_fd(f), f->fd_direct);
	} else {
		CHECK(f->refused);
	}
	om_file_refuse_direct(f);
	CHECK_EQ(om_file_fd(f), f->fd);
	CHECK_EQ(om_file_check(f), 0);
	om_file_ref(f);
	om_file_unref(f);
	CHECK_EQ(om_file_check(f), 0); /* one reference is left */
	om_file_unref(f);
	om_file_unref(NULL);
	unlink(path);
	unlink(link);
}

static void test_open_fails(void)
{
	struct om_file *f = NULL;
	const char *pipe = at("pipe");

	CHECK_EQ(om_file_open(at("absent"), &f), -ENOENT);
	CHECK(!f);
	CHECK(strstr(om_err_last()->text, "absent"));
	CHECK(!strcmp(om_err_last()->filename, at("absent")));
	CHECK_EQ(om_file_open(directory, &f), OM_EVALUE);
	CHECK(!strcmp(om_err_last()->filename, directory));
	CHECK_EQ(om_file_open("/dev/null", &f), OM_EVALUE);
	CHECK_EQ(mkfifo(pipe, 0600), 0);
	CHECK_EQ(om_file_open(pipe, &f), OM_EVALUE); /* at once: no writer is awaited */
	CHECK_EQ(om_file_open("", &f), -ENOENT);
	CHECK(!f);
	unlink(pipe);
}

static void test_check(void)
{
	const char *path = at("data"), *other = at("other");
	struct om_file *f;
	struct timespec times[2] = { { .tv_nsec = UTIME_OMIT }, { .tv_sec = 5 } };

	put(path, "0123456789");
	CHECK_EQ(om_file_open(path, &f), 0);
	CHECK_EQ(truncate(path, 9), 0);
	CHECK_EQ(om_file_check(f), OM_ECORRUPT);
	CHECK(strstr(om_err_last()->text, "size was 10, is 9"));
	CHECK(!strcmp(om_err_last()->filename, path));
	om_file_unref(f);
	CHECK_EQ(om_file_open(path, &f), 0);
	CHECK_EQ(utimensat(AT_FDCWD, path, times, 0), 0);
	CHECK_EQ(om_file_check(f), OM_ECORRUPT);
	CHECK(strstr(om_err_last()->text, "mtime"));
	om_file_unref(f);
	CHECK_EQ(om_file_open(path, &f), 0);
	put(other, "012345678");
	CHECK_EQ(rename(other, path), 0);
	CHECK_EQ(om_file_check(f), OM_ECORRUPT);
	CHECK(strstr(om_err_last()->text, "inode"));
	om_file_unref(f);
	CHECK_EQ(om_file_open(path, &f), 0);
	unlink(path);
	CHECK_EQ(om_file_check(f), 0); /* without a name its bytes are still there */
	om_file_unref(f);
}

static void test_swap(const char *where)
{
	struct om_file *f;
	struct stat st;
	uint64_t bytes;
	unsigned before = entries(where);

	CHECK_EQ(om_file_create_swap(where, &f), 0);
	CHECK_EQ(entries(where), before); /* neither the file nor its directory has a name */
	CHECK(strstr(f->path, where) && strstr(f->path, "(swap in "));
	CHECK(f->writable);
	CHECK_EQ(fstat(f->fd, &st), 0);
	CHECK_EQ(st.st_mode & 07777, 0600);
	CHECK_EQ(st.st_nlink, 0);
	CHECK_EQ(st.st_size, 0);
	CHECK_EQ(om_file_grow(f, 0), 0);
	CHECK_EQ(om_file_grow(f, 100 * OM_PAGE), 0);
	CHECK_EQ(om_file_grow(f, 50 * OM_PAGE), 0); /* never shrinks */
	CHECK_EQ(fstat(f->fd, &st), 0);
	CHECK_EQ(st.st_size, 100 * OM_PAGE);
	CHECK(st.st_blocks * 512 >= (long)(100 * OM_PAGE)); /* really there */
	CHECK_EQ(f->id.size, 100 * OM_PAGE);
	CHECK_EQ(om_file_check(f), 0);
	CHECK_EQ(pwrite(f->fd, "x", 1, 0), 1);
	CHECK_EQ(om_file_check(f), 0); /* our own writes are no change */
	CHECK_EQ(om_file_free_bytes(f, &bytes), 0);
	CHECK(bytes > 0 && bytes < UINT64_MAX);
	om_fault_arm(OM_FAULT_NOSPC, 1, false);
	CHECK_EQ(om_file_grow(f, 200 * OM_PAGE), OM_EDISKFULL);
	CHECK_EQ(f->id.size, 100 * OM_PAGE);
	CHECK_EQ(om_file_grow(f, 200 * OM_PAGE), 0);
	om_fault_reset();
	CHECK(om_file_grow(f, UINT64_C(1) << 50) < 0); /* a PiB: no disk, or too large a file */
	CHECK(om_file_grow(f, UINT64_MAX) < 0);
	CHECK_EQ(f->id.size, 200 * OM_PAGE);
	om_file_unref(f);
}

static void test_swap_directory(void)
{
	struct om_file *f;
	struct stat st;
	const char *deep = at("a/b/c"), *file = at("file");

	CHECK_EQ(om_file_create_swap(deep, &f), 0); /* made, for its user only */
	CHECK_EQ(stat(deep, &st), 0);
	CHECK_EQ(st.st_mode & 07777, 0700);
	CHECK_EQ(entries(deep), 0);
	om_file_unref(f);
	CHECK_EQ(rmdir(at("a/b/c")), 0);
	CHECK_EQ(rmdir(at("a/b")), 0);
	CHECK_EQ(rmdir(at("a")), 0);
	put(file, "x");
	CHECK_EQ(om_file_create_swap(file, &f), -ENOTDIR);
	CHECK(strstr(om_err_last()->text, file));
	CHECK(!f);
	CHECK_EQ(om_file_create_swap(at("file/below"), &f), -ENOTDIR);
	CHECK_EQ(om_file_create_swap("", &f), -ENOENT);
	CHECK(om_file_create_swap("/proc/nothing", &f) < 0);
	char *longest = calloc(1, 2 * PATH_MAX);
	CHECK(longest);
	memset(longest, 'x', 2 * PATH_MAX - 1);
	CHECK_EQ(om_file_create_swap(longest, &f), -ENAMETOOLONG);
	free(longest);
	unlink(at("file"));
}

static void test_default_directory(void)
{
	struct om_file *f;

	setenv("XDG_CACHE_HOME", at("cache"), 1);
	CHECK_EQ(om_file_create_swap(NULL, &f), 0);
	CHECK(strstr(f->path, "cache/omnimem)"));
	om_file_unref(f);
	CHECK_EQ(rmdir(at("cache/omnimem")), 0);
	CHECK_EQ(rmdir(at("cache")), 0);
	setenv("XDG_CACHE_HOME", "relative", 1); /* to be ignored, says its specification */
	setenv("HOME", at("home"), 1);
	CHECK_EQ(om_file_create_swap(NULL, &f), 0);
	CHECK(strstr(f->path, "home/.cache/omnimem)"));
	om_file_unref(f);
	CHECK_EQ(rmdir(at("home/.cache/omnimem")), 0);
	CHECK_EQ(rmdir(at("home/.cache")), 0);
	CHECK_EQ(rmdir(at("home")), 0);
	setenv("HOME", "/proc/nobody", 1); /* cannot be written: the next one */
	CHECK_EQ(om_file_create_swap(NULL, &f), 0);
	CHECK(!strcmp(f->path, "(swap in /var/tmp)"));
	om_file_unref(f);
	unsetenv("HOME");
	unsetenv("XDG_CACHE_HOME");
	CHECK_EQ(om_file_create_swap(NULL, &f), 0);
	om_file_unref(f);
}

/* Killed at any moment, nothing is left. */
static void test_killed(void)
{
	for (int i = 0; i < 20; i++) {
		int status;
		pid_t pid = fork();

		CHECK(pid >= 0);
		if (!pid) {
			struct om_file *f;

			CHECK_EQ(om_file_create_swap(directory, &f), 0);
			CHECK_EQ(om_file_grow(f, OM_MIB), 0);
			raise(SIGKILL);
		}
		CHECK_EQ(waitpid(pid, &status, 0), pid);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	}
	CHECK_EQ(entries(directory), 0);
}

static void test_file_limit(void)
{
	int status;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid) {
		struct rlimit limit = { .rlim_cur = OM_MIB, .rlim_max = RLIM_INFINITY };
		struct om_file *f;
		uint64_t bytes;

		signal(SIGXFSZ, SIG_IGN);
		CHECK_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
		CHECK_EQ(om_file_create_swap(directory, &f), 0);
		CHECK_EQ(om_file_free_bytes(f, &bytes), 0);
		CHECK(bytes <= OM_MIB);
		CHECK_EQ(om_file_grow(f, 2 * OM_MIB), -EFBIG);
		CHECK_EQ(om_file_grow(f, OM_MIB), 0);
		CHECK_EQ(om_file_free_bytes(f, &bytes), 0);
		CHECK_EQ(bytes, 0);
		om_file_unref(f);
		_exit(0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
}

/* Each allocation fails in turn; no descriptor and no entry is left behind. */
static void test_sweep(void)
{
	const char *path = at("data");
	int before = open_descriptors();

	put(path, "x");
	for (int swap = 0; swap < 2; swap++) {
		uint64_t nth = 0, fired;

		do {
			struct om_file *f;

			om_fault_arm(OM_FAULT_ALLOC, ++nth, false);
			int code = swap ? om_file_create_swap(directory, &f)
			                : om_file_open(path, &f);
			fired = om_fault_fired(OM_FAULT_ALLOC);
			om_fault_reset();
			CHECK_EQ(code, fired ? -ENOMEM : 0);
			CHECK(fired ? !f : f != NULL);
			om_file_unref(f);
		} while (fired);
		CHECK_EQ(nth, 3);
	}
	unlink(path);
	CHECK_EQ(open_descriptors(), before);
	CHECK_EQ(entries(directory), 0);
}

int main(void)
{
	int before;

	alarm(60);
	CHECK(mkdtemp(directory));
	before = open_descriptors();
	test_open();
	test_open_fails();
	test_check();
	test_swap(directory);
	test_swap("/dev/shm");
	test_swap_directory();
	test_default_directory();
	test_killed();
	test_file_limit();
	test_sweep();
	CHECK_EQ(open_descriptors(), before);
	CHECK_EQ(rmdir(directory), 0);
	return 0;
}
