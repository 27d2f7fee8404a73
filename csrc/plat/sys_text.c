/*
 * sys_text: see om_sys_int.h. The kernel's text files, read whole.
 *
 * Owns the files that an om_texts keeps open; the caller serialises. One that cannot be read any more, as a file of a
 * cgroup that is gone, is opened anew by its path. Without memory or descriptors nothing is kept.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/om_base.h"
#include "plat/om_sys_int.h"

static int read_whole(int fd, char text[OM_TEXT_BYTES])
{
	int used = 0;

	while (used < OM_TEXT_BYTES - 1) {
		ssize_t n = pread(fd, text + used, (size_t)(OM_TEXT_BYTES - 1 - used), used);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (!n)
			break;
		used += (int)n;
	}
	text[used] = '\0';
	return used;
}

/* Its place among what is kept, or `count`. They are asked for in the same order, mostly. */
static unsigned find(const struct om_texts *t, const char *path)
{
	for (unsigned i = 0; i < t->count; i++) {
		unsigned at = (t->next + i) % t->count;

		if (!strcmp(t->kept[at].path, path))
			return at;
	}
	return t->count;
}

static void drop(struct om_texts *t, unsigned at)
{
	close(t->kept[at].fd);
	om_free(t->kept[at].path);
	t->kept[at] = t->kept[--t->count];
}

void om_texts_close(struct om_texts *t)
{
	while (t->count)
		drop(t, t->count - 1);
}

/* What the kernel makes as it is read has text, but no size. False: it is not kept, and still the caller's. */
static bool keep(struct om_texts *t, const char *path, int fd, int used)
{
	struct stat st;
	char *copy;

	if (!t->keep || t->count == OM_TEXTS || used <= 0 || fstat(fd, &st) || st.st_size)
		return false;
	copy = om_strdup(path);
	if (!copy)
		return false;
	t->kept[t->count].path = copy;
	t->kept[t->count++].fd = fd;
	return true;
}

int om_text_read(struct om_texts *t, const char *directory, const char *name,
                 char text[OM_TEXT_BYTES])
{
	char path[PATH_MAX];
	unsigned at;
	int fd, used;

	if ((size_t)snprintf(path, sizeof(path), "%s%s/%s", t->root, directory, name) >=
	    sizeof(path))
		return -ENAMETOOLONG;
	at = find(t, path);
	if (at < t->count) {
		t->next = at + 1;
		used = read_whole(t->kept[at].fd, text);
		if (used > 0)
			return used;
		drop(t, at);
	}
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	used = read_whole(fd, text);
	if (!keep(t, path, fd, used))
		close(fd);
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

bool om_text_number(struct om_texts *t, const char *directory, const char *name, uint64_t *ret)
{
	char text[OM_TEXT_BYTES], *end;

	if (om_text_read(t, directory, name, text) < 0)
		return false;
	*ret = strtoull(text, &end, 10);
	return end != text;
}
