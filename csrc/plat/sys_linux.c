/*
 * sys_linux: see om_sys.h. The system's own numbers, and a sample of all there is.
 *
 * Text files of the kernel are read whole into the stack. A sampler owns its path and the GPUs' library.
 */
#include "plat/om_sys_int.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/om_base.h"
#include "base/om_error.h"

int om_text_read(const char *root, const char *directory, const char *name,
                 char text[OM_TEXT_BYTES])
{
	char path[PATH_MAX];
	int fd, n, used = 0;

	if ((size_t)snprintf(path, sizeof(path), "%s%s/%s", root, directory, name) >= sizeof(path))
		return -ENAMETOOLONG;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	while (used < OM_TEXT_BYTES - 1 &&
	       (n = (int)read(fd, text + used, (size_t)(OM_TEXT_BYTES - 1 - used))) != 0) {
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

bool om_text_find(const char *text, const char *key, uint64_t *ret)
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

bool om_text_number(const char *root, const char *directory, const char *name, uint64_t *ret)
{
	char text[OM_TEXT_BYTES], *end;

	if (om_text_read(root, directory, name, text) < 0)
		return false;
	*ret = strtoull(text, &end, 10);
	return end != text;
}

static int read_system(const char *root, struct om_sample *ret)
{
	struct om_place *p = &ret->places[0];
	char text[OM_TEXT_BYTES];
	int code = om_text_read(root, "/proc", "meminfo", text);

	if (code < 0)
		return om_err(code, "cannot read %s/proc/meminfo: %s", root, om_err_text(code));
	if (!om_text_find(text, "MemTotal", &p->limit_bytes) || !p->limit_bytes ||
	    !om_text_find(text, "MemAvailable", &p->available_bytes))
		return om_err(-ENODATA, "%s/proc/meminfo tells no MemTotal and MemAvailable", root);
	p->limit_bytes *= 1024;
	p->available_bytes = OM_MIN(p->available_bytes * 1024, p->limit_bytes);
	p->used_bytes = p->limit_bytes - p->available_bytes;
	snprintf(p->source, sizeof(p->source), "system");
	ret->place_count = 1;
	if (om_text_find(text, "SwapTotal", &ret->swap_total_bytes) &&
	    om_text_find(text, "SwapFree", &ret->swap_free_bytes)) {
		ret->swap_total_bytes *= 1024;
		ret->swap_free_bytes *= 1024;
	}
	return 0;
}

double om_place_usage(const struct om_place *p)
{
	return 1.0 - (double)p->available_bytes / (double)p->limit_bytes;
}

const struct om_place *om_sample_tightest(const struct om_sample *s)
{
	const struct om_place *found = &s->places[0];

	for (unsigned i = 1; i < s->place_count; i++)
		if (om_place_usage(&s->places[i]) > om_place_usage(found))
			found = &s->places[i];
	return found;
}

static void begin(struct om_sample *s)
{
	memset(s, 0, sizeof(*s));
	s->at_ns = om_now();
	s->stall_some_us = s->stall_full_us = s->rss_bytes = OM_UNTOLD;
	for (int i = 0; i < OM_STRAINS; i++)
		s->strains[i] = OM_UNTOLD;
}

int om_sys_memory(const char *root, struct om_memory *ret)
{
	char own[OM_TEXT_BYTES];
	struct om_chain chains[2];
	const struct om_place *tightest;
	struct om_sample s;
	int code;

	root = root ? root : "";
	begin(&s);
	code = read_system(root, &s);
	if (code)
		return code;
	if (om_text_read(root, "/proc/self", "cgroup", own) >= 0) {
		om_chain_find(root, own, chains);
		for (int i = 0; i < 2; i++)
			om_chain_read(root, &chains[i], false, &s);
	}
	tightest = om_sample_tightest(&s);
	*ret = (struct om_memory){ .total_bytes = tightest->limit_bytes,
		                   .available_bytes = tightest->available_bytes };
	memcpy(ret->source, tightest->source, sizeof(ret->source));
	return 0;
}

/* ---- a sampler ---- */

struct om_sampler {
	char *root;
	struct om_chain chains[2];
	char own[4096]; /* what /proc/self/cgroup said when the chains were found */
	bool stale;     /* they are to be found anew */
	struct om_gpus *gpus;
};

int om_sampler_create(const char *root, struct om_sampler **ret)
{
	struct om_sampler *s = om_alloc(1, sizeof(*s));

	if (!s)
		return -ENOMEM;
	s->root = om_strdup(root ? root : "");
	if (!s->root || om_gpus_open(&s->gpus)) {
		om_sampler_free(s);
		return -ENOMEM;
	}
	s->stale = true;
	*ret = s;
	return 0;
}

void om_sampler_free(struct om_sampler *s)
{
	if (!s)
		return;
	om_gpus_close(s->gpus);
	om_free(s->root);
	om_free(s);
}

static void read_cgroups(struct om_sampler *s, struct om_sample *ret)
{
	char own[OM_TEXT_BYTES];

	if (om_text_read(s->root, "/proc/self", "cgroup", own) < 0)
		return; /* no cgroups here */
	if (s->stale || strncmp(s->own, own, sizeof(s->own) - 1)) {
		om_chain_find(s->root, own, s->chains);
		snprintf(s->own, sizeof(s->own), "%.*s", (int)sizeof(s->own) - 1, own);
	}
	s->stale = false;
	for (int i = 0; i < 2; i++)
		if (om_chain_read(s->root, &s->chains[i], true, ret))
			s->stale = true;
}

/* "some avg10=0.00 avg60=0.00 avg300=0.00 total=12345" */
static bool find_total(const char *text, const char *key, uint64_t *ret)
{
	const char *line = strstr(text, key), *at = line ? strstr(line, "total=") : NULL;

	if (!at || (strchr(line, '\n') && at > strchr(line, '\n')))
		return false;
	*ret = strtoull(at + 6, NULL, 10);
	return true;
}

/* Our own cgroup's stalls where it tells them, else the system's. */
static void read_stalls(const struct om_sampler *s, struct om_sample *ret)
{
	const struct om_chain *unified = &s->chains[1];
	char text[OM_TEXT_BYTES];

	if ((!unified->found || om_text_read(s->root, unified->own, "memory.pressure", text) < 0) &&
	    om_text_read(s->root, "/proc/pressure", "memory", text) < 0)
		return;
	find_total(text, "some ", &ret->stall_some_us);
	find_total(text, "full ", &ret->stall_full_us);
}

static uint64_t read_rss(const char *root)
{
	char text[OM_TEXT_BYTES], *at;
	int n = om_text_read(root, "/proc/self", "statm", text);

	at = n > 0 ? strchr(text, ' ') : NULL; /* size, resident, ..., in pages */
	return at ? strtoull(at, NULL, 10) * (uint64_t)sysconf(_SC_PAGESIZE) : OM_UNTOLD;
}

int om_sampler_read(struct om_sampler *s, struct om_sample *ret)
{
	int code;

	begin(ret);
	code = read_system(s->root, ret);
	if (code)
		return code;
	read_cgroups(s, ret);
	read_stalls(s, ret);
	ret->rss_bytes = read_rss(s->root);
	om_gpus_read(s->gpus, ret);
	return 0;
}

uint64_t om_sys_heap_trim(void)
{
#ifdef __GLIBC__
	uint64_t before = read_rss(""), after;

	malloc_trim(0);
	after = read_rss("");
	return before == OM_UNTOLD || after > before ? 0 : before - after;
#else
	return 0;
#endif
}
