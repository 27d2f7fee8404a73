/*
 * sys_linux: see om_sys.h. The system's own numbers, and a sample of all there is.
 *
 * Text files of the kernel are read whole into the stack. A sampler owns its path, the files that it keeps open, and the
 * GPUs' library.
 */
#include "plat/om_sys_int.h"

#include <errno.h>
#include <malloc.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/om_base.h"
#include "base/om_error.h"

static int read_system(struct om_texts *t, struct om_sample *ret)
{
	struct om_place *p = &ret->places[0];
	char text[OM_TEXT_BYTES];
	int code = om_text_read(t, "/proc", "meminfo", text);

	if (code < 0)
		return om_err(code, "cannot read %s/proc/meminfo: %s", t->root, om_err_text(code));
	if (!om_text_find(text, "MemTotal", &p->limit_bytes) || !p->limit_bytes ||
	    !om_text_find(text, "MemAvailable", &p->available_bytes))
		return om_err(-ENODATA, "%s/proc/meminfo tells no MemTotal and MemAvailable",
		              t->root);
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
	memset(s, 0, offsetof(struct om_sample, places));
	s->at_ns = om_now();
	s->stall_some_us = s->stall_full_us = s->rss_bytes = OM_UNTOLD;
	for (int i = 0; i < OM_STRAINS; i++)
		s->strains[i] = OM_UNTOLD;
}

int om_sys_memory(const char *root, struct om_memory *ret)
{
	struct om_texts texts = { .root = root ? root : "" };
	char own[OM_TEXT_BYTES];
	struct om_chain chains[2];
	const struct om_place *tightest;
	struct om_sample s;
	int code;

	begin(&s);
	code = read_system(&texts, &s);
	if (code)
		return code;
	if (om_text_read(&texts, "/proc/self", "cgroup", own) >= 0) {
		om_chain_find(&texts, own, chains);
		om_chain_read(&texts, om_chain_limits(chains), false, &s);
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
	struct om_texts texts;
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
	s->texts.root = s->root;
	s->texts.keep = s->stale = true;
	*ret = s;
	return 0;
}

void om_sampler_free(struct om_sampler *s)
{
	if (!s)
		return;
	om_gpus_close(s->gpus);
	om_texts_close(&s->texts);
	om_free(s->root);
	om_free(s);
}

static void read_cgroups(struct om_sampler *s, struct om_sample *ret)
{
	char own[OM_TEXT_BYTES];

	if (om_text_read(&s->texts, "/proc/self", "cgroup", own) < 0)
		return; /* no cgroups here */
	if (s->stale || strncmp(s->own, own, sizeof(s->own) - 1)) {
		om_texts_close(&s->texts);
		om_chain_find(&s->texts, own, s->chains);
		snprintf(s->own, sizeof(s->own), "%.*s", (int)sizeof(s->own) - 1, own);
	}
	s->stale = om_chain_read(&s->texts, om_chain_limits(s->chains), true, ret);
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
static void read_stalls(struct om_sampler *s, struct om_sample *ret)
{
	const struct om_chain *unified = &s->chains[1];
	char text[OM_TEXT_BYTES];

	if ((!unified->found ||
	     om_text_read(&s->texts, unified->own, "memory.pressure", text) < 0) &&
	    om_text_read(&s->texts, "/proc/pressure", "memory", text) < 0)
		return;
	find_total(text, "some ", &ret->stall_some_us);
	find_total(text, "full ", &ret->stall_full_us);
}

static uint64_t read_rss(struct om_texts *t)
{
	char text[OM_TEXT_BYTES], *at;
	int n = om_text_read(t, "/proc/self", "statm", text);

	at = n > 0 ? strchr(text, ' ') : NULL; /* size, resident, ..., in pages */
	return at ? strtoull(at, NULL, 10) * (uint64_t)sysconf(_SC_PAGESIZE) : OM_UNTOLD;
}

int om_sampler_read(struct om_sampler *s, struct om_sample *ret)
{
	int code;

	begin(ret);
	code = read_system(&s->texts, ret);
	if (code)
		return code;
	read_cgroups(s, ret);
	read_stalls(s, ret);
	ret->rss_bytes = read_rss(&s->texts);
	om_gpus_read(s->gpus, ret);
	return 0;
}

uint64_t om_sys_heap_trim(void)
{
#ifdef __GLIBC__
	struct om_texts texts = { .root = "" };
	uint64_t before = read_rss(&texts), after;

	malloc_trim(0);
	after = read_rss(&texts);
	return before == OM_UNTOLD || after > before ? 0 : before - after;
#else
	return 0;
#endif
}
