/*
 * py_foreign: see py_foreign.c. For the files that make stores and keep producers' memory.
 */
#ifndef PY_FOREIGN_H
#define PY_FOREIGN_H

#include "bind/py_bind.h"

struct py_foreign {
	struct py_core *core;
	struct py_foreign *prev, *next;
	struct py_data data;
};

/* Takes over the reference on `s`; NULL with MemoryError, and then does not. */
struct py_core *py_core_new(struct om_store *s);
/* Remembers what the core keeps; `data` is moved into it. */
struct py_foreign *py_foreign_new(struct py_core *core, const struct py_data *data);
/* The `release` of om_store_take. */
void py_foreign_release(void *context);

#endif
