/*
 * py_foreign: the store as leases, tickets and streams hold it, and the memory of producers that
 * Store.take keeps.
 *
 * Guarded by the GIL. The core says through `py_foreign_release`, which it calls only from
 * om_store_collect and so on a thread of ours that has the GIL, that a producer's memory is no
 * longer needed. Views may show such memory when its store is closed and its Python object is gone:
 * every operation of any store therefore looks at all stores that keep some (`py_keepers`), and a
 * store lives until it keeps none. What is still seen when the interpreter exits stays: a producer's
 * code may be gone when its last view goes.
 */
#include "bind/py_bind.h"
#include "bind/py_foreign.h"

#include <stdlib.h>

struct py_core *py_keepers;
static bool finished; /* the interpreter is about to go, and producers' code with it */

struct py_core *py_core_new(struct om_store *s)
{
	struct py_core *c = calloc(1, sizeof(*c));

	if (!c) {
		PyErr_NoMemory();
		return NULL;
	}
	c->codecs = PyList_New(0);
	if (!c->codecs) {
		free(c);
		return NULL;
	}
	c->s = s;
	c->refs = 1;
	return c;
}

struct py_core *py_core_ref(struct py_core *c)
{
	c->refs++;
	return c;
}

static void link_keeper(struct py_core *c)
{
	if (c->keeps)
		return;
	c->keeps = true;
	c->prev = NULL;
	c->next = py_keepers;
	if (c->next)
		c->next->prev = c;
	py_keepers = c;
}

static void unlink_keeper(struct py_core *c)
{
	if (!c->keeps)
		return;
	c->keeps = false;
	if (c->prev)
		c->prev->next = c->next;
	else
		py_keepers = c->next;
	if (c->next)
		c->next->prev = c->prev;
}

static void destroy(struct py_core *c)
{
	struct om_store *s = c->s;

	unlink_keeper(c);
	Py_DECREF(c->codecs);
	free(c);
	Py_BEGIN_ALLOW_THREADS om_store_unref(s);
	Py_END_ALLOW_THREADS
}

void py_core_unref(struct py_core *c)
{
	if (--c->refs)
		return;
	if (c->foreign)
		py_collect_slow();
	else
		destroy(c);
}

void py_collect_slow(void)
{
	static bool running; /* a producer's code may come here again */
	PyObject *type, *value, *trace;
	struct py_core *c, *next;

	if (running || finished)
		return;
	running = true;
	PyErr_Fetch(&type, &value, &trace);
	for (c = py_keepers; c; c = next) {
		c->refs++; /* a producer's code may drop what holds it */
		om_store_drain(c->s);
		om_store_collect(c->s);
		c->refs--;
		next = c->next;
		if (c->foreign)
			continue;
		unlink_keeper(c);
		if (!c->refs) {
			destroy(c); /* drops the GIL: the list may be another */
			next = py_keepers;
		}
	}
	PyErr_Restore(type, value, trace);
	running = false;
}

void py_collect_last(void)
{
	py_collect();
	finished = true;
}

struct py_foreign *py_foreign_new(struct py_core *core, const struct py_data *data)
{
	struct py_foreign *f = malloc(sizeof(*f));

	if (!f) {
		PyErr_NoMemory();
		return NULL;
	}
	f->core = core;
	f->data = *data;
	f->prev = NULL;
	f->next = core->foreign;
	if (f->next)
		f->next->prev = f;
	core->foreign = f;
	link_keeper(core);
	return f;
}

void py_foreign_release(void *context)
{
	struct py_foreign *f = context;

	if (f->prev)
		f->prev->next = f->next;
	else
		f->core->foreign = f->next;
	if (f->next)
		f->next->prev = f->prev;
	py_data_fini(&f->data);
	free(f);
}

bool py_core_is_readonly(struct py_core *c, const void *data)
{
	for (struct py_foreign *f = c->foreign; f; f = f->next)
		if (f->data.readonly && f->data.data == data && f->data.nbytes)
			return true;
	return false;
}
