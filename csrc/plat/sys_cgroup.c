/*
 * sys_cgroup: see om_sys.h. Where memory cgroups lie, and what they say.
 *
 * Owns nothing; the caller serialises. A file that is not there, or cannot be read, says nothing.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/om_base.h"
#include "plat/om_sys_int.h"

#define NO_LIMIT (UINT64_C(1) << 60) /* version 1 writes "none" as nearly 2^63 */

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

/* From the mount down to this process's directory. */
static void join(const struct hierarchy *h, struct om_chain *ret)
{
	size_t origin = strcmp(h->origin, "/") ? strlen(h->origin) : 0;
	const char *below = strncmp(h->own, h->origin, origin) ? "" : h->own + origin;

	ret->found = true;
	ret->mount = strlen(h->mount);
	snprintf(ret->own, sizeof(ret->own), "%s%s", h->mount, strcmp(below, "/") ? below : "");
}

void om_chain_find(struct om_texts *t, const char *own, struct om_chain ret[2])
{
	char mounts[OM_TEXT_BYTES];
	bool any = om_text_read(t, "/proc/self", "mountinfo", mounts) >= 0;

	for (int unified = 0; unified < 2; unified++) {
		struct hierarchy h = { .unified = unified };

		ret[unified] = (struct om_chain){ .unified = unified };
		if (any && find_mount(mounts, &h) && find_own(own, &h))
			join(&h, &ret[unified]);
	}
}

struct om_chain *om_chain_limits(struct om_chain chains[2])
{
	return &chains[chains[0].found ? 0 : 1];
}

/* One cgroup's limit and what it has left. False: no limit, or not to be read. */
static bool read_place(struct om_texts *t, const char *directory, bool unified,
                       struct om_place *ret)
{
	uint64_t limit = UINT64_MAX, high = UINT64_MAX, used, cache = 0;
	char text[OM_TEXT_BYTES];

	if (!om_text_number(t, directory, unified ? "memory.max" : "memory.limit_in_bytes", &limit))
		limit = UINT64_MAX;
	if (unified && om_text_number(t, directory, "memory.high", &high))
		limit = OM_MIN(limit, high);
	if (!limit || limit >= NO_LIMIT ||
	    !om_text_number(t, directory, unified ? "memory.current" : "memory.usage_in_bytes",
	                    &used))
		return false;
	if (om_text_read(t, directory, "memory.stat", text) > 0)
		om_text_find(text, unified ? "inactive_file" : "total_inactive_file", &cache);
	used -= OM_MIN(cache, used);
	*ret = (struct om_place){ .limit_bytes = limit,
		                  .high_bytes = high < NO_LIMIT ? high : 0,
		                  .used_bytes = used,
		                  .available_bytes = limit - OM_MIN(used, limit) };
	snprintf(ret->source, sizeof(ret->source), "cgroup %.*s", (int)sizeof(ret->source) - 8,
	         directory);
	return true;
}

/* Where there is no room for another, the last one makes way for a tighter one. */
static void add_place(struct om_sample *s, const struct om_place *p)
{
	if (s->place_count < OM_PLACES)
		s->places[s->place_count++] = *p;
	else if (om_place_usage(p) > om_place_usage(&s->places[OM_PLACES - 1]))
		s->places[OM_PLACES - 1] = *p;
}

static void count(struct om_sample *s, enum om_strain which, uint64_t n)
{
	s->strains[which] = n + (s->strains[which] == OM_UNTOLD ? 0 : s->strains[which]);
}

/* How often a directory's own limits were met: below it others may have limits, which are not ours. */
static void read_events(struct om_texts *t, const char *directory, bool unified,
                        struct om_sample *s)
{
	static const char *const names[OM_STRAINS] = { "high", "max", "oom", "oom_kill" };
	char text[OM_TEXT_BYTES];
	uint64_t n;

	if (!unified) {
		if (om_text_number(t, directory, "memory.failcnt", &n))
			count(s, OM_STRAIN_MAX, n);
		if (om_text_read(t, directory, "memory.oom_control", text) > 0 &&
		    om_text_find(text, "oom_kill", &n))
			count(s, OM_STRAIN_OOM_KILL, n);
		return;
	}
	if (om_text_read(t, directory, "memory.events.local", text) < 0 &&
	    om_text_read(t, directory, "memory.events", text) < 0)
		return;
	for (int i = 0; i < OM_STRAINS; i++)
		if (om_text_find(text, names[i], &n))
			count(s, (enum om_strain)i, n);
}

bool om_chain_read(struct om_texts *t, struct om_chain *c, bool events, struct om_sample *ret)
{
	uint64_t told = 0, depth = 0;
	char directory[2 * PATH_MAX];
	bool lost;

	if (!c->found)
		return false;
	snprintf(directory, sizeof(directory), "%s", c->own);
	for (;; depth++) {
		struct om_place place;
		char *slash;

		if (read_place(t, directory, c->unified, &place)) {
			add_place(ret, &place);
			told |= UINT64_C(1) << OM_MIN(depth, 63);
		}
		if (events)
			read_events(t, directory, c->unified, ret);
		slash = strrchr(directory, '/');
		if (!slash || strlen(directory) <= c->mount)
			break;
		*slash = '\0';
	}
	lost = (c->told & ~told) != 0;
	c->told = told;
	return lost;
}
