/* om_sys on trees of text files: the system alone, cgroups of both versions, nested, without a limit,
 * seen from inside a container, unreadable. And once on the real machine. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "om_test.h"
#include "plat/om_sys.h"

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

static void for_real(void)
{
	struct om_memory m;

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
	for_real();
	run("rm -rf '%s'", root);
	return 0;
}
