/* sys_linux: see om_sys.h. Text files of the kernel, read whole into the stack. */
#include "plat/om_sys.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/om_base.h"
#include "base/om_error.h"

#define TEXT_BYTES 65536
#define NO_LIMIT   (UINT64_C(1) << 60) /* version 1 writes "none" as nearly 2^63 */

/* The file's text, cut at TEXT_BYTES; its length or -errno. */
static int read_text(const char *root, const char *directory, const char *name,
                     char text[TEXT_BYTES])
{
	char path[PATH_MAX];
	int fd, n, used = 0;

	if ((size_t)snprintf(path, sizeof(path), "%s%s/%s", root, directory, name) >= sizeof(path))
		return -ENAMETOOLONG;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	while (used < TEXT_BYTES - 1 &&
	       (n = (int)read(fd, text + used, (size_t)(TEXT_BYTES - 1 - used))) != 0) {
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0) {
			n = -errno;
			close(fd);
			return n;
		}
		used += n;
	}
	close(fd);
	text[used] = '\0';
	return used;
}

/* "key value" or "key: value" at the start of a line. */
static bool find_number(const char *text, const char *key, uint64_t *ret)
{
	size_t n = strlen(key);

	for (const char *line = text; line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (strncmp(line, key, n) || (line[n] != ' ' && line[n] != ':'))
			continue;
		*ret = strtoull(line + n + 1, NULL, 10);
		return true;
	}
	return false;
}

/* A file that holds one number; false when there is none ("max", no such file). */
static bool read_number(const char *root, const char *directory, const char *name, uint64_t *ret)
{
	char text[TEXT_BYTES], *end;

	if (read_text(root, directory, name, text) < 0)
		return false;
	*ret = strtoull(text, &end, 10);
	return end != text;
}

static int read_system(const char *root, struct om_memory *ret)
{
	char text[TEXT_BYTES];
	int code = read_text(root, "/proc", "meminfo", text);

	*ret = (struct om_memory){ .source = "system" };
	if (code < 0)
		return om_err(code, "cannot read %s/proc/meminfo: %s", root, om_err_text(code));
	if (!find_number(text, "MemTotal", &ret->total_bytes) || !ret->total_bytes ||
	    !find_number(text, "MemAvailable", &ret->available_bytes))
		return om_err(-ENODATA, "%s/proc/meminfo tells no MemTotal and MemAvailable", root);
	ret->total_bytes *= 1024;
	ret->available_bytes = OM_MIN(ret->available_bytes * 1024, ret->total_bytes);
	return 0;
}

/* ---- cgroups ---- */

struct hierarchy {
	bool unified;          /* version 2 */
	char mount[PATH_MAX];  /* where it is mounted */
	char origin[PATH_MAX]; /* the directory of the hierarchy that is mounted there */
	char own[PATH_MAX];    /* this process's directory in the hierarchy */
};

/* The next field of a line in mountinfo, which writes odd characters as \040. */
static const char *take_field(const char *at, char *ret, size_t size)
{
	size_t n = 0;

	while (*at == ' ')
		at++;
	for (; *at && *at != ' ' && *at != '\n'; n++) {
		char c = *at++;

		if (c == '\\' && at[0] >= '0' && at[0] <= '3' && at[1] && at[2]) {
			c = (char)((at[0] - '0') * 64 + (at[1] - '0') * 8 + (at[2] - '0'));
			at += 3;
		}
		if (n + 1 < size)
			ret[n] = c;
	}
	ret[OM_MIN(n, size - 1)] = '\0';
	return at;
}

static bool has_word(const char *list, const char *word)
{
	size_t n = strlen(word);

	for (const char *at = list; (at = strstr(at, word)); at += n)
		if ((at == list || at[-1] == ',') && (at[n] == ',' || !at[n]))
			return true;
	return false;
}

/* Where the hierarchy is mounted: mountinfo's lines are
 * "id parent device origin mount options... - type source superoptions". */
static bool find_mount(const char *mountinfo, struct hierarchy *h)
{
	for (const char *line = mountinfo; line && *line; line = strchr(line, '\n')) {
		char skipped[PATH_MAX], type[64], options[PATH_MAX];
		const char *at;

		line += *line == '\n';
		at = line;
		for (int i = 0; i < 3; i++)
			at = take_field(at, skipped, sizeof(skipped));
		at = take_field(at, h->origin, sizeof(h->origin));
		at = take_field(at, h->mount, sizeof(h->mount));
		do
			at = take_field(at, skipped, sizeof(skipped));
		while (*skipped && strcmp(skipped, "-"));
		at = take_field(at, type, sizeof(type));
		at = take_field(at, skipped, sizeof(skipped));
		take_field(at, options, sizeof(options));
		if (h->unified ? !strcmp(type, "cgroup2")
		               : !strcmp(type, "cgroup") && has_word(options, "memory"))
			return true;
	}
	return false;
}

/* This process's directory: "number:controllers:directory", version 2 as "0::directory". */
static bool find_own(const char *text, struct hierarchy *h)
{
	for (const char *line = text; line && *line; line = strchr(line, '\n')) {
		char controllers[256];
		const char *colon, *end;

		line += *line == '\n';
		colon = strchr(line, ':');
		end = colon ? strchr(colon + 1, ':') : NULL;
		if (!end)
			return false;
		snprintf(controllers, sizeof(controllers), "%.*s", (int)(end - colon - 1),
		         colon + 1);
		if (h->unified ? *controllers : !has_word(controllers, "memory"))
			continue;
		snprintf(h->own, sizeof(h->own), "%.*s", (int)strcspn(end + 1, "\n"), end + 1);
		return true;
	}
	return false;
}

/* One cgroup's limit and what it has left. False: no limit, or not to be read. */
static bool read_cgroup(const char *root, const char *directory, bool unified,
                        struct om_memory *ret)
{
	uint64_t limit = UINT64_MAX, high, used, cache = 0;
	char text[TEXT_BYTES];

	if (!read_number(root, directory, unified ? "memory.max" : "memory.limit_in_bytes", &limit))
		limit = UINT64_MAX;
	if (unified && read_number(root, directory, "memory.high", &high))
		limit = OM_MIN(limit, high);
	if (!limit || limit >= NO_LIMIT ||
	    !read_number(root, directory, unified ? "memory.current" : "memory.usage_in_bytes",
	                 &used))
		return false;
	if (read_text(root, directory, "memory.stat", text) > 0)
		find_number(text, unified ? "inactive_file" : "total_inactive_file", &cache);
	used -= OM_MIN(cache, used);
	*ret = (struct om_memory){ .total_bytes = limit,
		                   .available_bytes = limit - OM_MIN(used, limit) };
	snprintf(ret->source, sizeof(ret->source), "cgroup %.*s", (int)sizeof(ret->source) - 8,
	         directory);
	return true;
}

static double share_used(const struct om_memory *m)
{
	return 1.0 - (double)m->available_bytes / (double)m->total_bytes;
}

/* From the process's own directory up to the mount. */
static void walk(const char *root, struct hierarchy *h, struct om_memory *tightest)
{
	size_t origin = strcmp(h->origin, "/") ? strlen(h->origin) : 0, mount = strlen(h->mount);
	const char *below = strncmp(h->own, h->origin, origin) ? "" : h->own + origin;
	char directory[2 * PATH_MAX];

	snprintf(directory, sizeof(directory), "%s%s", h->mount, strcmp(below, "/") ? below : "");
	for (;;) {
		struct om_memory here;
		char *slash;

		if (read_cgroup(root, directory, h->unified, &here) &&
		    share_used(&here) > share_used(tightest))
			*tightest = here;
		slash = strrchr(directory, '/');
		if (!slash || strlen(directory) <= mount)
			return;
		*slash = '\0';
	}
}

int om_sys_memory(const char *root, struct om_memory *ret)
{
	char mounts[TEXT_BYTES], own[TEXT_BYTES];
	int code;

	root = root ? root : "";
	code = read_system(root, ret);
	if (code)
		return code;
	if (read_text(root, "/proc/self", "mountinfo", mounts) < 0 ||
	    read_text(root, "/proc/self", "cgroup", own) < 0)
		return 0; /* no cgroups here */
	for (int unified = 0; unified < 2; unified++) {
		struct hierarchy h = { .unified = unified };

		if (find_mount(mounts, &h) && find_own(own, &h))
			walk(root, &h, ret);
	}
	return 0;
}
