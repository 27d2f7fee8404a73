/* Tests of base/: errors, checked sizes, the clock, fault points, fork, locks, threads, lists. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/om_base.h"
#include "base/om_error.h"
#include "base/om_list.h"
#include "base/om_sync.h"
#include "om_test.h"

static bool same(const char *a, const char *b)
{
	return strcmp(a, b) == 0;
}

/* ---- errors ---- */

static void test_error_table(void)
{
	static const struct {
		int code;
		const char *name, *text, *pyclass;
	} rows[] = {
#define ROW(sym, code, text, pyclass) { sym, #sym, text, pyclass },
		OM_ERROR_TABLE(ROW)
#undef ROW
	};
	int n = sizeof(rows) / sizeof(rows[0]);

	for (int i = 0; i < n; i++) {
		CHECK_EQ(rows[i].code, -4096 - i); /* codes are stable: new ones come last */
		CHECK(same(om_err_text(rows[i].code), rows[i].text));
		CHECK(same(om_err_class(rows[i].code), rows[i].pyclass));
	}
	CHECK_EQ(OM_ELIMIT, -4096);
	CHECK(same(om_err_class(OM_ELIMIT), "LimitError"));
	CHECK(same(om_err_class(OM_ENAME), "KeyError"));
	CHECK(same(om_err_class(-ENOSPC), "DiskFullError"));
	CHECK(same(om_err_class(-EDQUOT), "DiskFullError"));
	CHECK(same(om_err_class(-ENOMEM), "MemoryError"));
	CHECK(same(om_err_class(-EIO), "IOFailure"));
	CHECK(same(om_err_text(-EIO), strerror(EIO)));
}

static void test_error_details(void)
{
	char longest[2 * OM_ERROR_TEXT];
	struct om_error copy;

	CHECK_EQ(om_err(OM_ELIMIT, "block %s: %d", "a", 7), OM_ELIMIT);
	om_err_limit("group a", 1, 2, UINT64_MAX);
	om_err_file("/some/file");
	CHECK(same(om_err_last()->text, "block a: 7"));
	CHECK(same(om_err_last()->which, "group a"));
	CHECK(same(om_err_last()->filename, "/some/file"));
	CHECK(om_err_last()->need == 1 && om_err_last()->used == 2);
	CHECK(om_err_last()->limit == UINT64_MAX);
	copy = *om_err_last();

	om_err(-EIO, "another"); /* clears all details */
	CHECK(!om_err_last()->which[0] && !om_err_last()->filename[0] && !om_err_last()->limit);
	CHECK_EQ(om_err_set(&copy), OM_ELIMIT);
	CHECK(same(om_err_last()->filename, "/some/file"));
	CHECK_EQ(om_err_set(om_err_last()), OM_ELIMIT); /* itself */

	memset(longest, 'x', sizeof(longest) - 1); /* too long: cut, never overrun */
	longest[sizeof(longest) - 1] = '\0';
	om_err(-EIO, "%s", longest);
	om_err_file(longest);
	om_err_limit(longest, 0, 0, 0);
	CHECK_EQ(strlen(om_err_last()->text), OM_ERROR_TEXT - 1);
	CHECK_EQ(strlen(om_err_last()->filename), OM_ERROR_FILE - 1);
	CHECK_EQ(strlen(om_err_last()->which), sizeof(copy.which) - 1);
}

static void *error_elsewhere(void *arg)
{
	*(int *)arg = om_err_last()->code; /* a new thread has none */
	om_err(-EPERM, "elsewhere");
	return NULL;
}

static void test_error_thread(void)
{
	pthread_t thread;
	int code = 1;

	om_err(-EIO, "here");
	CHECK_EQ(om_thread_start(&thread, "om-test", error_elsewhere, &code), 0);
	pthread_join(thread, NULL);
	CHECK_EQ(code, 0);
	CHECK(same(om_err_last()->text, "here"));
}

/* ---- sizes, memory, time ---- */

static void test_sizes(void)
{
	uint64_t r;

	CHECK(!om_add_overflows(UINT64_MAX - 1, 1, &r) && r == UINT64_MAX);
	CHECK(om_add_overflows(UINT64_MAX, 1, &r));
	CHECK(!om_mul_overflows(UINT64_C(1) << 32, (UINT64_C(1) << 32) - 1, &r));
	CHECK(om_mul_overflows(UINT64_C(1) << 32, UINT64_C(1) << 32, &r));
	CHECK(om_up(0, 4096) == 0 && om_up(1, 4096) == 4096 && om_up(4096, 4096) == 4096);
	CHECK(om_down(4095, 4096) == 0 && om_down(4097, 4096) == 4096);
	CHECK(om_up((UINT64_C(1) << 63) - 1, UINT64_C(1) << 62) == UINT64_C(1) << 63);
}

static void test_memory(void)
{
	char *p = om_alloc(3, 100), *s;

	for (int i = 0; i < 300; i++)
		CHECK_EQ(p[i], 0);
	p[299] = 7;
	om_fault_arm(OM_FAULT_ALLOC, 1, false);
	CHECK(!om_realloc(p, 1000, 1)); /* the old one stays */
	CHECK_EQ(om_err_last()->code, -ENOMEM);
	CHECK_EQ(p[299], 7);
	p = om_realloc(p, 1000, 1);
	CHECK(p && p[299] == 7);
	CHECK(!om_realloc(p, SIZE_MAX / 2, 3)); /* the product overflows */
	CHECK_EQ(p[299], 7);
	om_free(p);
	om_free(NULL);
	p = om_alloc(0, 0); /* an empty array is not a failure */
	CHECK(p);
	om_free(p);
	s = om_strdup("abc");
	CHECK(same(s, "abc"));
	om_free(s);
}

static void test_clock(void)
{
	uint64_t before = om_now();

	CHECK(om_now() >= before);
	CHECK(om_now_coarse() <= om_now());
	CHECK(om_now_coarse() + OM_NSEC / 10 >= before);
	CHECK(om_deadline(OM_NSEC) >= before + OM_NSEC);
	CHECK(om_deadline(UINT64_MAX) == UINT64_MAX);
	CHECK(om_deadline(UINT64_MAX - 1) == UINT64_MAX); /* saturates */
}

/* ---- fault points ---- */

static void test_faults(void)
{
	for (int i = 0; i < OM_FAULT_COUNT; i++)
		CHECK(!om_fault((enum om_fault)i)); /* nothing is armed */
	CHECK_EQ(om_fault_armed, 0);

	om_fault_arm(OM_FAULT_READ, 3, false);
	for (int i = 1; i <= 6; i++) {
		CHECK_EQ(om_fault(OM_FAULT_READ), i == 3);
		CHECK(!om_fault(OM_FAULT_WRITE)); /* another point is not counted */
	}
	CHECK_EQ(om_fault_fired(OM_FAULT_READ), 1);
	CHECK_EQ(om_fault_armed, 0); /* used up: free again */

	om_fault_arm(OM_FAULT_READ, 2, true);
	om_fault_arm(OM_FAULT_WRITE, 1, false);
	CHECK_EQ(om_fault_fired(OM_FAULT_READ), 0); /* arming starts anew */
	CHECK(om_fault(OM_FAULT_WRITE) && !om_fault(OM_FAULT_WRITE));
	for (int i = 1; i <= 5; i++)
		CHECK_EQ(om_fault(OM_FAULT_READ), i >= 2);
	CHECK_EQ(om_fault_fired(OM_FAULT_READ), 4);
	om_fault_arm(OM_FAULT_READ, 0, false);
	CHECK(!om_fault(OM_FAULT_READ));

	om_fault_arm(OM_FAULT_ALLOC, 2, false);
	void *p = om_alloc(1, 1);
	CHECK(p && !om_alloc(1, 1));
	om_free(p);
	om_fault_arm(OM_FAULT_ALLOC, 1, true);
	CHECK(!om_strdup("x") && !om_alloc(1, 1) && !om_realloc(NULL, 1, 1));
	om_fault_reset();
	CHECK_EQ(om_fault_armed, 0);

	pthread_t thread;
	om_fault_arm(OM_FAULT_THREAD, 1, false);
	CHECK_EQ(om_thread_start(&thread, "om-test", error_elsewhere, NULL), -EAGAIN);
	CHECK_EQ(om_fault_fired(OM_FAULT_THREAD), 1);
}

/* ---- fork, locks ---- */

static void test_fork(void)
{
	unsigned born = om_fork_generation();
	int status;
	pid_t pid;

	CHECK_EQ(om_fork_watch(), 0);
	CHECK_EQ(om_fork_watch(), 0); /* counts once all the same */
	pid = fork();
	if (pid == 0)
		_exit(om_fork_generation() == born + 1 ? 0 : 1);
	CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	CHECK_EQ(om_fork_generation(), born);
}

/* Runs `body` in a child; returns the signal that ended it, 0 when it returned. */
static int run_in_child(void (*body)(void))
{
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		setrlimit(RLIMIT_CORE, &(struct rlimit){ 0, 0 });
		if (!freopen("/dev/null", "w", stderr))
			_exit(2);
		signal(SIGABRT, SIG_DFL);
		body();
		_exit(0);
	}
	CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
	CHECK(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
	return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

static struct om_mutex store, work, io;

static void lock_in_order(void)
{
	om_mutex_lock(&store);
	om_mutex_lock(&work);
	om_mutex_lock(&io);
	om_mutex_unlock(&work); /* any order of unlocking */
	om_mutex_unlock(&store);
	om_mutex_unlock(&io);
	om_mutex_lock(&store); /* nothing is held any more */
	om_mutex_unlock(&store);
}

static void lock_against_order(void)
{
	om_mutex_lock(&io);
	om_mutex_lock(&work);
}

static void lock_equal_rank(void)
{
	struct om_mutex other;

	om_mutex_init(&other, OM_RANK_STORE);
	om_mutex_lock(&store);
	om_mutex_lock(&other);
}

static void unlock_unheld(void)
{
	struct om_mutex other;

	om_mutex_init(&other, OM_RANK_IO);
	pthread_mutex_lock(&other.native);
	om_mutex_unlock(&other);
}

static void test_ranks(void)
{
#ifdef OM_DEBUG
	const int stopped = SIGABRT;
#else
	const int stopped = 0; /* no check, no cost */
#endif
	CHECK_EQ(om_mutex_init(&store, OM_RANK_STORE), 0);
	CHECK_EQ(om_mutex_init(&work, OM_RANK_WORK), 0);
	CHECK_EQ(om_mutex_init(&io, OM_RANK_IO), 0);
	lock_in_order();
	CHECK_EQ(run_in_child(lock_in_order), 0);
	CHECK_EQ(run_in_child(lock_against_order), stopped);
	CHECK_EQ(run_in_child(lock_equal_rank), stopped);
	CHECK_EQ(run_in_child(unlock_unheld), stopped);
	om_mutex_fini(&store);
	om_mutex_fini(&work);
	om_mutex_fini(&io);
}

struct meeting {
	struct om_mutex mutex;
	struct om_cond cond;
	bool told;
	sigset_t blocked;
	char name[16];
};

static void *tell(void *arg)
{
	struct meeting *m = arg;

	pthread_sigmask(SIG_BLOCK, NULL, &m->blocked);
	om_mutex_lock(&m->mutex); /* held by the starter until the thread has its name */
	pthread_getname_np(pthread_self(), m->name, sizeof(m->name));
	m->told = true;
	om_cond_broadcast(&m->cond);
	om_mutex_unlock(&m->mutex);
	return NULL;
}

static void test_cond(void)
{
	struct meeting m = { .told = false };
	uint64_t begin, deadline;
	sigset_t mine;
	pthread_t thread;

	CHECK_EQ(om_mutex_init(&m.mutex, OM_RANK_STORE), 0);
	CHECK_EQ(om_cond_init(&m.cond), 0);
	om_mutex_lock(&m.mutex);

	begin = om_now();
	deadline = om_deadline(20 * 1000 * 1000);
	while (om_cond_wait(&m.cond, &m.mutex, deadline))
		; /* spurious wake-ups */
	CHECK(om_now() >= deadline);
	CHECK(om_now() - begin < 10 * OM_NSEC);
	CHECK(!om_cond_wait(&m.cond, &m.mutex, begin)); /* already past: at once */
	CHECK(!om_cond_wait(&m.cond, &m.mutex, 0));

	for (int forever = 0; forever < 2; forever++) {
		m.told = false;
		CHECK_EQ(om_thread_start(&thread, "om-teller", tell, &m), 0);
		deadline = forever ? UINT64_MAX : om_deadline(10 * OM_NSEC);
		while (!m.told)
			CHECK(om_cond_wait(&m.cond, &m.mutex, deadline));
		om_mutex_unlock(&m.mutex);
		pthread_join(thread, NULL);
		om_mutex_lock(&m.mutex);
	}
	om_mutex_unlock(&m.mutex);
	CHECK(same(m.name, "om-teller"));
	CHECK(sigismember(&m.blocked, SIGINT) && sigismember(&m.blocked, SIGTERM));
	pthread_sigmask(SIG_BLOCK, NULL, &mine);
	CHECK(!sigismember(&mine, SIGINT)); /* the caller's mask is as it was */
	om_cond_fini(&m.cond);
	om_mutex_fini(&m.mutex);
}

/* ---- lists ---- */

struct item {
	int value;
	struct om_list link;
};

static int digits(struct om_list *head)
{
	int number = 0;

	OM_LIST_FOREACH(link, head) {
		CHECK(link->next->prev == link && link->prev->next == link);
		number = 10 * number + om_container_of(link, struct item, link)->value;
	}
	return number;
}

static void test_list(void)
{
	struct om_list head;
	struct item items[6];

	om_list_init(&head);
	CHECK(om_list_empty(&head));
	CHECK_EQ(digits(&head), 0);
	for (int i = 0; i < 6; i++) {
		items[i].value = i;
		om_list_init(&items[i].link);
	}
	om_list_push_tail(&head, &items[2].link);
	om_list_push_tail(&head, &items[3].link);
	om_list_push_head(&head, &items[1].link);
	om_list_insert(&items[3].link, &items[5].link);
	CHECK_EQ(digits(&head), 1253);
	om_list_del(&items[5].link);
	om_list_del(&items[5].link); /* unlinked: harmless */
	om_list_del(&items[4].link);
	CHECK_EQ(digits(&head), 123);
	CHECK(om_list_empty(&items[5].link) && !om_list_empty(&head));
	OM_LIST_FOREACH_SAFE(link, &head)
		if (om_container_of(link, struct item, link)->value != 2)
			om_list_del(link);
	CHECK_EQ(digits(&head), 2);
	om_list_del(&items[2].link);
	CHECK(om_list_empty(&head));
}

int main(void)
{
	test_error_table();
	test_error_details();
	test_error_thread();
	test_sizes();
	test_memory();
	test_clock();
	test_faults();
	test_fork();
	test_ranks();
	test_cond();
	test_list();
	return 0;
}
