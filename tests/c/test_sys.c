/* om_sys on trees of text files: the system alone, cgroups of both versions, nested, without a limit,
 * seen from inside a container, unreadable; samples of them, while they change; GPUs of a stand-in for NVML. And
 * once on the real machine. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "om_test.h"
#include "plat/om_sys_int.h"

#define MIB UINT64_C(1048576)

static char root[] = "/var/tmp/omnimem-test-XXXXXX";

static void run(const char *format, ...)
{
	char command[512];
	va_list args;

	va_start(args, format);
	vsnprintf(command, sizeof(command), format, args);
	va_end(args);
	CHECK(system(command) == 0);
}

/* A file below the root, with its directories. */
static void put(const char *path, const char *text)
{
	char whole[512];
	FILE *f;

	snprintf(whole, sizeof(whole), "%s%s", root, path);
	for (char *at = whole + strlen(root) + 1; (at = strchr(at, '/')); at++) {
		*at = '\0';
		CHECK(mkdir(whole, 0700) == 0 || errno == EEXIST);
		*at = '/';
	}
	f = fopen(whole, "w");
	CHECK(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

static void empty(void)
{
	run("rm -rf '%s' && mkdir -m 700 '%s'", root, root);
	put("/proc/meminfo",
	    "MemTotal:        8388608 kB\nMemFree: 1 kB\nMemAvailable:    6291456 kB\n");
}

static void expect(uint64_t total_mib, uint64_t available_mib, const char *source)
{
	struct om_memory m;

	CHECK_EQ(om_sys_memory(root, &m), 0);
	CHECK_EQ(m.total_bytes / MIB, total_mib);
	CHECK_EQ(m.available_bytes / MIB, available_mib);
	if (strcmp(m.source, source)) {
		fprintf(stderr, "source is '%s', not '%s'\n", m.source, source);
		CHECK(!"source");
	}
}

static void the_system(void)
{
	struct om_memory m;

	empty();
	expect(8192, 6144, "system");
	put("/proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 200 kB\n");
	CHECK_EQ(om_sys_memory(root, &m), 0);
	CHECK_EQ(m.available_bytes, m.total_bytes); /* never more than all */
	put("/proc/meminfo", "MemTotally: 5 kB\nMemAvailable: 5 kB\n");
	CHECK_EQ(om_sys_memory(root, &m), -ENODATA);
	CHECK(strstr(om_err_last()->text, "MemTotal"));
	run("rm '%s/proc/meminfo'", root);
	CHECK_EQ(om_sys_memory(root, &m), -ENOENT);
	CHECK(strstr(om_err_last()->text, "meminfo"));
}

#define V2 "/sys/fs/cgroup"

static void version_2(void)
{
	empty();
	put("/proc/self/mountinfo",
	    "22 1 0:5 / /proc rw - proc proc rw\n"
	    "29 22 0:26 / " V2 " rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n");
	put("/proc/self/cgroup", "0::/work/child\n");
	expect(8192, 6144, "system"); /* no file there */
	put(V2 "/work/child/memory.max", "max\n");
	put(V2 "/work/child/memory.current", "943718400\n");
	put(V2 "/work/memory.max", "1073741824\n");
	put(V2 "/work/memory.current", "943718400\n"); /* 900 MiB */
	put(V2 "/work/memory.stat", "anon 5\ninactive_file 104857600\nactive_file 7\n");
	expect(1024, 224, "cgroup " V2 "/work"); /* the ancestor's, less 100 MiB of page cache */
	put(V2 "/work/child/memory.high", "954204160\n"); /* 910 MiB */
	expect(910, 10, "cgroup " V2 "/work/child");
	put(V2 "/work/child/memory.high", "2097152\n"); /* over it: nothing is left, not less */
	expect(2, 0, "cgroup " V2 "/work/child");
	put(V2 "/work/child/memory.high", "0\n"); /* makes no sense: passed over */
	expect(1024, 224, "cgroup " V2 "/work");
	put("/proc/self/cgroup", "0::/\n"); /* the root, or a container's own namespace */
	expect(8192, 6144, "system");
	put(V2 "/memory.max", "1073741824\n");
	put(V2 "/memory.current", "1063256064\n");
	expect(1024, 10, "cgroup " V2);
	put(V2 "/memory.max", "107374182400\n"); /* 100 GiB: the system binds */
	expect(8192, 6144, "system");
}

static void version_1(void)
{
	empty();
	put("/proc/self/mountinfo",
	    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
	    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
	    "35 31 0:32 /docker/a\\040b /cg\\040roup/memory rw,relatime - cgroup cgroup rw,memory\n"
	    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
	put("/proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/docker/a b/inner\n0::/\n");
	put("/cg roup/memory/memory.limit_in_bytes", "9223372036854771712\n"); /* none */
	put("/cg roup/memory/memory.usage_in_bytes", "9000000000\n");
	expect(8192, 6144, "system");
	put("/cg roup/memory/inner/memory.limit_in_bytes", "536870912\n");
	put("/cg roup/memory/inner/memory.usage_in_bytes", "524288000\n");
	put("/cg roup/memory/inner/memory.stat", "inactive_file 1\ntotal_inactive_file 20971520\n");
	expect(512, 32, "cgroup /cg roup/memory/inner");
	put("/proc/self/cgroup", "4:memory:/elsewhere\n"); /* not below what is mounted */
	put("/cg roup/memory/memory.limit_in_bytes", "1073741824\n");
	expect(1024, 0, "cgroup /cg roup/memory");
}

static void garbage(void)
{
	empty();
	put("/proc/self/mountinfo", "\n\n - \n1 2\n3 4 5 6 7 8 9\n- - -\n1 1 1 / /x o - cgroup2");
	put("/proc/self/cgroup", "0\n0:\n::::\nmemory\n");
	expect(8192, 6144, "system");
	put("/proc/self/cgroup", "");
	expect(8192, 6144, "system");
	put("/proc/self/cgroup", "0::/");
	put("/x/memory.max", "many");
	expect(8192, 6144, "system");
}

/* ---- samples ---- */

static struct om_sample sampled(struct om_sampler *sampler)
{
	struct om_sample s;

	CHECK_EQ(om_sampler_read(sampler, &s), 0);
	CHECK(s.place_count > 0 && !strcmp(s.places[0].source, "system"));
	return s;
}

static struct om_sampler *open_sampler(void)
{
	struct om_sampler *sampler;

	CHECK_EQ(om_sampler_create(root, &sampler), 0);
	return sampler;
}

static void the_whole_system(void)
{
	struct om_sampler *sampler;
	struct om_sample s;

	empty();
	sampler = open_sampler();
	s = sampled(sampler);
	CHECK_EQ(s.place_count, 1);
	CHECK_EQ(s.places[0].used_bytes / MIB, 2048);
	CHECK(s.rss_bytes == OM_UNTOLD && s.stall_some_us == OM_UNTOLD);
	CHECK(s.stall_full_us == OM_UNTOLD && s.swap_total_bytes == 0);
	for (int i = 0; i < OM_STRAINS; i++)
		CHECK(s.strains[i] == OM_UNTOLD);
	put("/proc/meminfo", "MemTotal: 8192 kB\nMemAvailable: 4096 kB\nSwapTotal: 100 kB\n"
	                     "SwapFree: 60 kB\n");
	put("/proc/self/statm", "9000 17 3 4 5\n");
	put("/proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1500\n"
	                             "full avg10=0.00 avg60=0.00 avg300=0.00 total=700\n");
	s = sampled(sampler);
	CHECK_EQ(s.swap_total_bytes, 102400);
	CHECK_EQ(s.swap_free_bytes, 61440);
	CHECK_EQ(s.rss_bytes, 17 * sysconf(_SC_PAGESIZE));
	CHECK_EQ(s.stall_some_us, 1500);
	CHECK_EQ(s.stall_full_us, 700);
	put("/proc/pressure/memory", "some avg10=0.00\nfull total=5\n"); /* half of it */
	s = sampled(sampler);
	CHECK(s.stall_some_us == OM_UNTOLD && s.stall_full_us == 5);
	run("rm '%s/proc/meminfo'", root);
	CHECK_EQ(om_sampler_read(sampler, &s), -ENOENT);
	om_sampler_free(sampler);
	om_sampler_free(NULL);
}

static void every_place(void)
{
	struct om_sampler *sampler;
	struct om_sample s;

	empty();
	put("/proc/self/mountinfo", "29 22 0:26 / " V2 " rw - cgroup2 cgroup2 rw\n");
	put("/proc/self/cgroup", "0::/a/b/c\n");
	put(V2 "/a/b/c/memory.max", "max\n"); /* no limit: no place, but events */
	put(V2 "/a/b/c/memory.current", "5\n");
	put(V2 "/a/b/c/memory.events", "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\n");
	put(V2 "/a/b/memory.max", "1073741824\n");
	put(V2 "/a/b/memory.high", "536870912\n");
	put(V2 "/a/b/memory.current", "104857600\n");
	put(V2 "/a/b/memory.events", "high 1000\nmax 1000\n"); /* with those of others below */
	put(V2 "/a/b/memory.events.local", "high 10\nmax 20\noom 0\noom_kill 1\n");
	put(V2 "/a/memory.max", "2147483648\n");
	put(V2 "/a/memory.current", "2147483648\n");
	put(V2 "/a/b/c/memory.pressure", "some total=40\nfull total=30\n");
	put("/proc/pressure/memory", "some total=4000\nfull total=3000\n");
	sampler = open_sampler();
	s = sampled(sampler);
	CHECK_EQ(s.place_count, 3); /* ours first, then those above */
	CHECK(!strcmp(s.places[1].source, "cgroup " V2 "/a/b"));
	CHECK_EQ(s.places[1].limit_bytes / MIB, 512);
	CHECK_EQ(s.places[1].high_bytes / MIB, 512);
	CHECK_EQ(s.places[1].used_bytes / MIB, 100);
	CHECK_EQ(s.places[1].available_bytes / MIB, 412);
	CHECK_EQ(s.places[2].high_bytes, 0);
	CHECK(om_sample_tightest(&s) == &s.places[2]);
	CHECK_EQ(s.strains[OM_STRAIN_HIGH], 11);
	CHECK_EQ(s.strains[OM_STRAIN_MAX], 22);
	CHECK_EQ(s.strains[OM_STRAIN_OOM], 3);
	CHECK_EQ(s.strains[OM_STRAIN_OOM_KILL], 5);
	CHECK_EQ(s.stall_some_us, 40); /* ours, not the machine's */
	CHECK_EQ(s.stall_full_us, 30);
	put(V2 "/a/b/memory.high", "268435456\n"); /* lowered while we look */
	CHECK_EQ(sampled(sampler).places[1].limit_bytes / MIB, 256);
	put("/proc/self/cgroup", "0::/a\n"); /* moved */
	s = sampled(sampler);
	CHECK_EQ(s.place_count, 2);
	CHECK(!strcmp(s.places[1].source, "cgroup " V2 "/a"));
	CHECK_EQ(s.stall_some_us, 4000); /* it tells none of its own */
	om_sampler_free(sampler);
}

/* Where the hierarchy is mounted elsewhere, the sampler finds out once it cannot read what it could. */
static void moved_mount(void)
{
	struct om_sampler *sampler;

	empty();
	put("/proc/self/mountinfo", "29 22 0:26 / " V2 " rw - cgroup2 cgroup2 rw\n");
	put("/proc/self/cgroup", "0::/a\n");
	put(V2 "/a/memory.max", "1073741824\n");
	put(V2 "/a/memory.current", "104857600\n");
	sampler = open_sampler();
	CHECK_EQ(sampled(sampler).place_count, 2);
	put("/proc/self/mountinfo", "29 22 0:26 / /mnt/cg rw - cgroup2 cgroup2 rw\n");
	CHECK_EQ(sampled(sampler).place_count, 2); /* it need not look */
	run("mkdir -p '%s/mnt' && mv '%s" V2 "' '%s/mnt/cg'", root, root, root);
	CHECK_EQ(sampled(sampler).place_count, 1);
	CHECK_EQ(sampled(sampler).place_count, 2);
	run("rm '%s/mnt/cg/a/memory.current'", root); /* for good */
	for (int i = 0; i < 3; i++)
		CHECK_EQ(sampled(sampler).place_count, 1);
	om_sampler_free(sampler);
}

static void a_hybrid(void)
{
	struct om_sampler *sampler;
	struct om_sample s;

	empty();
	put("/proc/self/mountinfo", "35 31 0:32 / /cg/memory rw - cgroup cgroup rw,memory\n"
	                            "41 31 0:38 / /cg/unified rw - cgroup2 cgroup2 rw\n");
	put("/proc/self/cgroup", "4:memory:/one/two\n0::/other\n");
	put("/cg/memory/one/two/memory.limit_in_bytes", "536870912\n");
	put("/cg/memory/one/two/memory.usage_in_bytes", "104857600\n");
	put("/cg/memory/one/two/memory.failcnt", "7\n");
	put("/cg/memory/one/two/memory.oom_control",
	    "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n");
	put("/cg/memory/one/memory.limit_in_bytes", "268435456\n");
	put("/cg/memory/one/memory.usage_in_bytes", "134217728\n");
	put("/cg/memory/one/memory.failcnt", "1\n");
	put("/cg/unified/other/memory.pressure", "some total=1\nfull total=1\n");
	put("/cg/unified/other/memory.max",
	    "1024\n"); /* the controller is not there: nobody looks */
	put("/cg/unified/other/memory.current", "512\n");
	sampler = open_sampler();
	s = sampled(sampler);
	CHECK_EQ(s.place_count, 3);
	CHECK(om_sample_tightest(&s) == &s.places[2]);
	CHECK_EQ(s.strains[OM_STRAIN_MAX], 8);
	CHECK_EQ(s.strains[OM_STRAIN_OOM_KILL], 2);
	CHECK(s.strains[OM_STRAIN_HIGH] == OM_UNTOLD);
	CHECK_EQ(s.stall_some_us, 1);
	om_sampler_free(sampler);
}

/* More cgroups with limits than a sample has room for: the tightest is among them all the same. */
static void a_deep_tree(void)
{
	struct om_sampler *sampler;
	char path[400] = "", file[480];
	struct om_sample s;

	empty();
	put("/proc/self/mountinfo", "29 22 0:26 / " V2 " rw - cgroup2 cgroup2 rw\n");
	for (int i = 0; i < 40; i++) {
		snprintf(path + strlen(path), sizeof(path) - strlen(path), "/d%d", i);
		snprintf(file, sizeof(file), V2 "%s/memory.max", path);
		put(file, "1073741824\n");
		snprintf(file, sizeof(file), V2 "%s/memory.current", path);
		put(file, i == 3 ? "1000000000\n" : "100000000\n");
	}
	snprintf(file, sizeof(file), "0::%s\n", path);
	put("/proc/self/cgroup", file);
	sampler = open_sampler();
	s = sampled(sampler);
	CHECK_EQ(s.place_count, OM_PLACES);
	CHECK(!strcmp(om_sample_tightest(&s)->source, "cgroup " V2 "/d0/d1/d2/d3"));
	expect(1024, 1024 - 954 + 0, "cgroup " V2 "/d0/d1/d2/d3");
	om_sampler_free(sampler);
}

/* ---- files that stay open ---- */

static uint64_t pages(struct om_texts *t)
{
	static char text[OM_TEXT_BYTES];

	CHECK(om_text_read(t, "/proc/self", "statm", text) > 0);
	return strtoull(text, NULL, 10);
}

static void kept(void)
{
	struct om_texts here = { .root = root, .keep = true }, t = { .root = "", .keep = true };
	uint64_t n, before;
	void *more;
	int fd;

	empty();
	put("/number", "1\n");
	CHECK(om_text_number(&here, "", "number", &n) && n == 1);
	CHECK_EQ(here.count, 0); /* an ordinary file may be replaced */
	run("echo 2 > '%s/other' && mv '%s/other' '%s/number'", root, root, root);
	CHECK(om_text_number(&here, "", "number", &n) && n == 2);
	before = pages(&t);
	CHECK_EQ(t.count, 1);
	more = mmap(NULL, 64 * MIB, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(more != MAP_FAILED && pages(&t) > before); /* read anew */
	CHECK_EQ(munmap(more, 64 * MIB), 0);
	CHECK(om_text_number(&t, "/proc/sys/kernel", "pid_max", &n));
	CHECK_EQ(t.count, 2);
	fd = open("/dev/null", O_WRONLY);
	CHECK(dup2(fd, t.kept[0].fd) >= 0 && close(fd) == 0); /* not to be read any more */
	CHECK(pages(&t) > 0 && pages(&t) > 0);
	CHECK_EQ(t.count, 2);
	om_texts_close(&t);
	CHECK_EQ(t.count, 0);
	om_fault_arm(OM_FAULT_ALLOC, 1, false);
	CHECK(pages(&t) > 0); /* without memory it is not kept */
	CHECK_EQ(t.count, 0);
	om_fault_reset();
}

/* ---- GPUs ---- */

static const char *devices = "GPU-aaaa-1 8192 8000 0\n"
			     "GPU-bbbb-2 4096 1024 0\n"
			     "GPU-cccc-3 2048 2048 1\n" /* cut into MIG devices */
			     "GPU-dddd-4 1024 512 0\n";

/* Builds the stand-in beside the fixture tree; its path. */
static const char *fake_nvml(void)
{
	static char path[600];
	const char *cc = getenv("CC") ? getenv("CC") : "gcc", *slash = strrchr(__FILE__, '/');

	snprintf(path, sizeof(path), "%s-nvml.so", root);
	run("%s -shared -fPIC -o '%s' '%.*s/fake_nvml.c'", cc, path, (int)(slash - __FILE__),
	    __FILE__);
	return path;
}

static struct om_sample with_gpus(const char *visible)
{
	struct om_sampler *sampler;
	struct om_sample s;

	if (visible)
		setenv("CUDA_VISIBLE_DEVICES", visible, 1);
	else
		unsetenv("CUDA_VISIBLE_DEVICES");
	sampler = open_sampler();
	s = sampled(sampler);
	om_sampler_free(sampler);
	return s;
}

static void gpus(void)
{
	const char *path = fake_nvml();
	struct om_sampler *sampler;
	struct om_sample s;

	empty();
	setenv("OMNIMEM_NVML", path, 1);
	CHECK_EQ(with_gpus(NULL).gpu_count, 0); /* no driver */
	setenv("FAKE_NVML", devices, 1);
	s = with_gpus(NULL);
	CHECK_EQ(s.gpu_count, 3);
	CHECK_EQ(s.gpus[1].total_bytes / MIB, 4096);
	CHECK_EQ(s.gpus[1].free_bytes / MIB, 1024);
	CHECK(!strcmp(s.gpus[2].uuid, "GPU-dddd-4") && s.gpus[2].index == 3);
	CHECK(!strcmp(s.gpus[2].name, "Fake 3"));
	s = with_gpus("3, 0");
	CHECK(s.gpu_count == 2 && s.gpus[0].index == 3 && s.gpus[1].index == 0);
	s = with_gpus("GPU-bbbb,MIG-xyz,GPU-aaaa-1");
	CHECK(s.gpu_count == 2 && s.gpus[0].index == 1 && s.gpus[1].index == 0);
	CHECK_EQ(with_gpus("").gpu_count, 0);
	CHECK_EQ(with_gpus("-1,0").gpu_count, 0);
	CHECK_EQ(with_gpus("1,9,0").gpu_count, 1); /* up to the one that is not there */
	CHECK_EQ(with_gpus("GPU-eeee").gpu_count, 0);
	setenv("FAKE_NVML_OLD", "1", 1);
	CHECK_EQ(with_gpus("1").gpus[0].free_bytes / MIB, 1025);
	unsetenv("FAKE_NVML_OLD");
	unsetenv("CUDA_VISIBLE_DEVICES");
	sampler = open_sampler();
	setenv("FAKE_NVML", "GPU-aaaa-1 0 0 0\nGPU-bbbb-2 4096 2048 0\n", 1); /* one fell off */
	s = sampled(sampler);
	CHECK(s.gpu_count == 1 && s.gpus[0].index == 1 && s.gpus[0].free_bytes / MIB == 2048);
	om_sampler_free(sampler);
	setenv("OMNIMEM_NVML", "/nowhere/libnvidia-ml.so.1", 1);
	CHECK_EQ(with_gpus(NULL).gpu_count, 0);
	for (uint64_t nth = 1; nth <= 3; nth++) {
		om_fault_arm(OM_FAULT_ALLOC, nth, false);
		CHECK_EQ(om_sampler_create(root, &sampler), -ENOMEM);
	}
	om_fault_reset();
	run("rm '%s'", path);
}

static void for_real(void)
{
	struct om_sampler *sampler;
	struct om_sample s;
	struct om_memory m;

	unsetenv("OMNIMEM_NVML");
	CHECK_EQ(om_sampler_create(NULL, &sampler), 0);
	CHECK_EQ(om_sampler_read(sampler, &s), 0);
	CHECK(s.rss_bytes > MIB / 2 && s.rss_bytes < s.places[0].limit_bytes);
	om_sampler_free(sampler);

	CHECK_EQ(om_sys_memory(NULL, &m), 0);
	CHECK(m.total_bytes > 64 * MIB && m.available_bytes <= m.total_bytes && *m.source);
}

int main(void)
{
	CHECK(mkdtemp(root));
	the_system();
	version_2();
	version_1();
	garbage();
	the_whole_system();
	every_place();
	moved_mount();
	a_hybrid();
	a_deep_tree();
	kept();
	gpus();
	for_real();
	run("rm -rf '%s'", root);
	return 0;
}
