/* om_sys_int: what the files of om_sys share: the kernel's text files, cgroups, GPUs. */
#ifndef OM_SYS_INT_H
#define OM_SYS_INT_H

#include <limits.h>
#include <stdbool.h>

#include "plat/om_sys.h"

/* ---- sys_text.c ---- */

#define OM_TEXT_BYTES 65536
#define OM_TEXTS      64u

/* The kernel's text files. With `keep` those that are read again stay open, the first OM_TEXTS of them: reading an open
 * one costs a third. Only files that the kernel makes as they are read are kept; others may be replaced. */
struct om_texts {
	const char *root;
	bool keep;
	unsigned count, next; /* next: where the one that is asked for now is likely to be */
	struct {
		char *path;
		int fd;
	} kept[OM_TEXTS];
};
void om_texts_close(struct om_texts *t); /* what is kept */
/* The file's text, cut at OM_TEXT_BYTES; its length or -errno. */
int om_text_read(struct om_texts *t, const char *directory, const char *name,
                 char text[OM_TEXT_BYTES]);
/* "key value" or "key: value" at the start of a line. */
bool om_text_find(const char *text, const char *key, uint64_t *ret);
/* A file that holds one number; false when there is none ("max", no such file). */
bool om_text_number(struct om_texts *t, const char *directory, const char *name, uint64_t *ret);

/* ---- sys_cgroup.c ---- */

/* Our directory in a hierarchy; its ancestors are what it begins with, down to the mount. */
struct om_chain {
	bool found, unified; /* unified: version 2 */
	size_t mount;        /* length of the mount's path */
	char own[2 * PATH_MAX];
	uint64_t told; /* a bit a directory, ours the lowest: it could be read */
};
/* Version 1 and version 2. `own`: what /proc/self/cgroup says. */
void om_chain_find(struct om_texts *t, const char *own, struct om_chain ret[2]);
/* The one that limits memory: version 1 where that is mounted, since a controller is in one hierarchy only. */
struct om_chain *om_chain_limits(struct om_chain chains[2]);
/* Add the places of a hierarchy, and with `events` what it says about them. True: one that could be read
 * before cannot be. */
bool om_chain_read(struct om_texts *t, struct om_chain *c, bool events, struct om_sample *ret);

/* ---- sys_gpu.c ---- */

struct om_gpus;
int om_gpus_open(struct om_gpus **ret); /* *ret NULL: there are none. -ENOMEM */
void om_gpus_read(struct om_gpus *g, struct om_sample *ret);
void om_gpus_close(struct om_gpus *g);

#endif
