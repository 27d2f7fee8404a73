/*
 * py_foreign: the store as leases, tickets and streams hold it, and the memory of producers that
 * Store.take keeps.
 *
 * Guarded by the GIL. The core says through `release_foreign`, which it calls only from
 * om_store_collect and so on a thread of ours that has the GIL, that a producer's memory is no
 * longer needed. A store whose Python object is gone while a view still shows such memory waits in
 * the list of dead cores; any later operation looks at it.
 */
#include "bind/py_bind.h"
#include "bind/py_foreign.h"

#include <stdlib.h>

struct py_core *py_dead_cores;

struct py_core *py_core_new(struct om_store *s)
{
	struct py_core *c = calloc(1, sizeof(*c));

	if (!c) {
		PyErr_NoMemory();
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

static void destroy(struct py_core *c)
{
	struct om_store *s = c->s;

	free(c);
	Py_BEGIN_ALLOW_THREADS
	om_store_unref(s);
	Py_END_ALLOW_THREADS
}

void py_core_unref(struct py_core *c)
{
	if (--c->refs)
		return;
	if (c->foreign) { /* collect may run Python code, so hold it meanwhile */
		c->refs = 1;
		py_core_collect_slow(c);
		c->refs--;
	}
	if (!c->foreign) {
		destroy(c);
		return;
	}
	c->next_dead = py_dead_cores;
	py_dead_cores = c;
}

static void collect_dead(void)
{
	struct py_core *c = py_dead_cores;

	py_dead_cores = NULL;
	while (c) {
		struct py_core *next = c->next_dead;

		c->refs = 1;
		om_store_drain(c->s);
		om_store_collect(c->s);
		c->refs = 0;
		if (c->foreign) {
			c->next_dead = py_dead_cores;
			py_dead_cores = c;
		} else {
			destroy(c);
		}
		c = next;
	}
}

void py_core_collect_slow(struct py_core *c)
{
	PyObject *type, *value, *trace;

	PyErr_Fetch(&type, &value, &trace);
	if (c->foreign) {
		py_core_ref(c); /* a producer's code may drop what holds it */
		om_store_drain(c->s);
		om_store_collect(c->s);
		if (--c->refs == 0) {
			c->refs = 1;
			py_core_unref(c);
		}
	}
	if (py_dead_cores)
		collect_dead();
	PyErr_Restore(type, value, trace);
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
