/*
 * py_pools: _core.Pools, the base of omnimem.MemoryPoolManager: one bank of the core a device.
 *
 * Owns references to its banks. The GIL, which allocate and deallocate keep, guards which object belongs to which
 * chunk; it is dropped where memory goes back to the system. Fails with an exception, and then nothing has
 * changed.
 */
#include "bind/py_bind.h"

#define MAX_POOLS         16
#define DEFAULT_ALIGNMENT OM_BANK_GRANULE

PyTypeObject *py_pools_type;

struct py_pools {
	PyObject_HEAD struct py_bank *banks[MAX_POOLS];
	int count;
	bool closed;
};

struct py_bank *py_bank_ref(struct py_bank *bank)
{
	bank->refs++;
	return bank;
}

void py_bank_unref(struct py_bank *bank)
{
	uint64_t chunks, bytes;

	if (--bank->refs)
		return;
	om_bank_close(bank->b, &chunks, &bytes); /* views may be left */
	om_bank_unref(bank->b);
	Py_DECREF(bank->device);
	PyMem_Free(bank);
}

int py_pools_banks(PyObject *pools, struct om_bank **ret, int room)
{
	const struct py_pools *p = (struct py_pools *)pools;
	int count = 0;

	if (!PyType_IsSubtype(Py_TYPE(pools), py_pools_type)) {
		PyErr_Format(PyExc_TypeError, "pools must be a Pools, not %R", Py_TYPE(pools));
		return -1;
	}
	for (; count < p->count && count < room; count++)
		ret[count] = p->banks[count]->b;
	return count;
}

static void pools_dealloc(PyObject *self)
{
	struct py_pools *p = (struct py_pools *)self;
	PyTypeObject *type = Py_TYPE(self);

	while (p->count)
		py_bank_unref(p->banks[--p->count]);
	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

/* The bank of a device; NULL with an exception. */
static struct py_bank *find(struct py_pools *p, PyObject *device)
{
	PyObject *done;

	if (om_unlikely(p->closed)) {
		py_raise_closed("the pools are closed");
		return NULL;
	}
	for (int i = 0; i < p->count; i++)
		if (p->banks[i]->device == device)
			return p->banks[i];
	for (int i = 0; i < p->count && PyUnicode_Check(device); i++)
		if (PyUnicode_Compare(p->banks[i]->device, device) == 0)
			return p->banks[i];
	done = PyObject_CallMethod((PyObject *)p, "_refuse", "O", device);
	if (done)
		PyErr_Format(PyExc_ValueError, "no pool for device %R", device);
	Py_XDECREF(done);
	return NULL;
}

/* Bytes: an int, or text for omnimem.config.parse_size. */
static int read_size(PyObject *o, uint64_t *ret)
{
	static PyObject *parse;
	PyObject *module, *value;
	int failed;

	if (om_likely(PyLong_CheckExact(o)))
		return py_size(o, "size", ret);
	if (!parse) {
		module = PyImport_ImportModule("omnimem.config");
		parse = module ? PyObject_GetAttrString(module, "parse_size") : NULL;
		Py_XDECREF(module);
	}
	value = parse ? PyObject_CallFunctionObjArgs(parse, o, NULL) : NULL;
	failed = value ? py_size(value, "size", ret) : -1;
	Py_XDECREF(value);
	return failed;
}

/* What should have happened by now happens here. */
static void decay(struct py_bank *bank)
{
	if (om_likely(!om_bank_due(bank->b)))
		return;
	py_bank_ref(bank);
	Py_BEGIN_ALLOW_THREADS om_bank_decay(bank->b);
	Py_END_ALLOW_THREADS py_bank_unref(bank);
}

static PyObject *pools_allocate(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                PyObject *kwnames)
{
	static const char *const names[] = { "size", "device", "alignment", "label", NULL };
	PyObject *a[4] = { NULL }, *block;
	uint64_t bytes, align = DEFAULT_ALIGNMENT;
	struct py_bank *bank;
	const char *label = NULL;
	struct om_chunk *c;
	int code;

	if (py_args("allocate", args, nargs, kwnames, names, 2, 4, a))
		return NULL;
	bank = find((struct py_pools *)self, a[1]);
	if (!bank || read_size(a[0], &bytes) || (a[2] && py_size(a[2], "alignment", &align)) ||
	    (a[3] && py_text_or_null(a[3], "label", &label)))
		return NULL;
	code = om_bank_alloc(bank->b, bytes, align ? align : 1, label, &c);
	if (om_unlikely(code))
		return py_raise(code);
	block = py_chunk_face(bank, c);
	if (om_unlikely(!block))
		om_bank_free(bank->b, c);
	decay(bank);
	return block;
}

static bool owns(const struct py_pools *p, const struct py_bank *bank)
{
	for (int i = 0; i < p->count; i++)
		if (p->banks[i] == bank)
			return true;
	return false;
}

static PyObject *pools_deallocate(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                                  PyObject *kwnames)
{
	static const char *const names[] = { "block", NULL };
	struct py_pools *p = (struct py_pools *)self;
	struct py_bank *bank;
	struct om_chunk *c;
	PyObject *block;
	int code;

	if (py_args("deallocate", args, nargs, kwnames, names, 1, 1, &block) ||
	    py_chunk_of(block, &bank, &c))
		return NULL;
	if (om_unlikely(!owns(p, bank))) {
		PyErr_Format(PyExc_ValueError, "%R belongs to another manager's pools", block);
		return NULL;
	}
	code = om_bank_free(bank->b, c);
	if (om_unlikely(code))
		return py_raise(code);
	py_chunk_gone(c);
	decay(bank);
	return Py_NewRef(Py_None);
}

static PyObject *pools_open(PyObject *self, PyObject *args)
{
	struct py_pools *p = (struct py_pools *)self;
	struct om_bank_config c = { 0 };
	struct py_bank *bank;
	PyObject *device;
	unsigned long long limit;
	double seconds;
	int locked, code;

	if (!PyArg_ParseTuple(args, "UKddp:_open", &device, &limit, &seconds, &c.most_fragmented,
	                      &locked))
		return NULL;
	c.name = PyUnicode_AsUTF8AndSize(device, NULL);
	c.limit_bytes = limit;
	c.locked = locked;
	c.decay_ns = seconds < 9.2e9 ? (uint64_t)(seconds * 1e9) : UINT64_MAX / 4;
	if (!c.name)
		return NULL;
	if (p->count == MAX_POOLS || p->closed) {
		PyErr_Format(PyExc_ValueError, "at most %d pools", MAX_POOLS);
		return NULL;
	}
	bank = PyMem_Malloc(sizeof(*bank));
	if (!bank)
		return PyErr_NoMemory();
	code = om_bank_create(&c, &bank->b);
	if (code) {
		PyMem_Free(bank);
		return py_raise(code);
	}
	bank->refs = 1;
	bank->locked = locked;
	bank->device = Py_NewRef(device);
	PyUnicode_InternInPlace(&bank->device); /* as the literals in programs are */
	p->banks[p->count++] = bank;
	return Py_NewRef(Py_None);
}

/* In the order of omnimem.PoolStats. */
static PyObject *pools_stats(PyObject *self, PyObject *device)
{
	struct py_bank *bank = find((struct py_pools *)self, device);
	struct om_bank_stats s;
	int code;

	if (!bank)
		return NULL;
	decay(bank);
	code = om_bank_stats(bank->b, &s);
	if (code)
		return py_raise(code);
	return Py_BuildValue(
		"(KKKdKKKKKKKKKKK)", (unsigned long long)s.limit_bytes,
		(unsigned long long)s.used_bytes, (unsigned long long)s.free_bytes, s.fragmentation,
		(unsigned long long)s.allocs, (unsigned long long)s.frees,
		(unsigned long long)s.held_bytes, (unsigned long long)s.chunks,
		(unsigned long long)s.fails, (unsigned long long)s.largest_bytes,
		(unsigned long long)s.mapped_bytes, (unsigned long long)s.exported_bytes,
		(unsigned long long)s.freed_bytes, (unsigned long long)s.peak_used_bytes,
		(unsigned long long)s.peak_held_bytes);
}

static PyObject *pools_trim(PyObject *self, PyObject *device)
{
	struct py_bank *bank = find((struct py_pools *)self, device);
	uint64_t bytes = 0;
	int code;

	if (!bank)
		return NULL;
	py_bank_ref(bank);
	Py_BEGIN_ALLOW_THREADS code = om_bank_trim(bank->b, &bytes);
	Py_END_ALLOW_THREADS py_bank_unref(bank);
	return code ? py_raise(code) : PyLong_FromUnsignedLongLong(bytes);
}

static PyObject *pools_set_limit(PyObject *self, PyObject *args)
{
	PyObject *device, *limit;
	struct py_bank *bank;
	uint64_t bytes;
	int code;

	if (!PyArg_ParseTuple(args, "OO:_set_limit", &device, &limit) ||
	    py_size(limit, "limit", &bytes))
		return NULL;
	bank = find((struct py_pools *)self, device);
	if (!bank)
		return NULL;
	code = om_bank_set_limit(bank->b, bytes);
	if (code)
		return py_raise(code);
	decay(bank);
	return Py_NewRef(Py_None);
}

static PyObject *faces(struct py_bank *bank, struct om_chunk **chunks, size_t count)
{
	PyObject *list = PyList_New((Py_ssize_t)count);

	for (size_t i = 0; list && i < count; i++) {
		PyObject *block = py_chunk_face(bank, chunks[i]);

		if (!block || PyList_SetItem(list, (Py_ssize_t)i, block))
			Py_CLEAR(list);
	}
	om_free(chunks);
	return list;
}

static PyObject *pools_blocks(PyObject *self, PyObject *device)
{
	struct py_bank *bank = find((struct py_pools *)self, device);
	struct om_chunk **chunks;
	size_t count;
	int code;

	if (!bank)
		return NULL;
	code = om_bank_chunks(bank->b, &chunks, &count);
	return code ? py_raise(code) : faces(bank, chunks, count);
}

static PyObject *pools_victims(PyObject *self, PyObject *args)
{
	PyObject *size, *device, *alignment;
	struct om_chunk **chunks;
	struct py_bank *bank;
	uint64_t bytes, align;
	size_t count;
	int code;

	if (!PyArg_ParseTuple(args, "OOO:_victims", &size, &device, &alignment) ||
	    read_size(size, &bytes) || py_size(alignment, "alignment", &align))
		return NULL;
	bank = find((struct py_pools *)self, device);
	if (!bank)
		return NULL;
	code = om_bank_victims(bank->b, bytes, align ? align : 1, &chunks, &count);
	return code ? py_raise(code) : faces(bank, chunks, count);
}

static PyObject *pools_block(PyObject *self, PyObject *args)
{
	unsigned long long serial;
	struct py_bank *bank;
	struct om_chunk *c;
	PyObject *device;
	int code;

	if (!PyArg_ParseTuple(args, "OK:_block", &device, &serial))
		return NULL;
	bank = find((struct py_pools *)self, device);
	if (!bank)
		return NULL;
	code = om_bank_find(bank->b, serial, &c);
	if (code)
		return py_raise(code);
	return c ? py_chunk_face(bank, c) : Py_NewRef(Py_None);
}

static PyObject *tell(const struct om_chunk_state *st)
{
	return Py_BuildValue("(KKKKddKIz)", (unsigned long long)st->serial,
	                     (unsigned long long)(uintptr_t)st->data, (unsigned long long)st->bytes,
	                     (unsigned long long)st->held, (double)st->created_ns / 1e9,
	                     (double)st->used_ns / 1e9, (unsigned long long)st->uses, st->views,
	                     st->label);
}

/* (serial, address, bytes, held, created, used, uses, views, label or None) of each, the one used longest ago
 * first. */
static PyObject *pools_snapshot(PyObject *self, PyObject *device)
{
	struct py_bank *bank = find((struct py_pools *)self, device);
	struct om_chunk_state st;
	struct om_chunk **chunks;
	PyObject *list;
	size_t count;
	int code;

	if (!bank)
		return NULL;
	code = om_bank_chunks(bank->b, &chunks, &count);
	if (code)
		return py_raise(code);
	list = PyList_New((Py_ssize_t)count);
	for (size_t i = 0; list && i < count; i++) {
		PyObject *told;

		om_chunk_state(chunks[i], &st);
		told = tell(&st);
		if (!told || PyList_SetItem(list, (Py_ssize_t)i, told))
			Py_CLEAR(list);
	}
	om_free(chunks);
	return list;
}

static PyObject *pools_check(PyObject *self, PyObject *device)
{
	struct py_bank *bank = find((struct py_pools *)self, device);
	int code = bank ? om_bank_check(bank->b) : 0;

	if (!bank)
		return NULL;
	return code ? py_raise(code) : Py_NewRef(Py_None);
}

/* No object has a chunk any more. A child of fork has no chunks to take. */
static int forget(struct py_bank *bank)
{
	struct om_chunk **chunks;
	size_t count;
	int code = om_bank_chunks(bank->b, &chunks, &count);

	if (code)
		return code == OM_ECLOSED ? 0 : code;
	for (size_t i = 0; i < count; i++)
		py_chunk_gone(chunks[i]);
	om_free(chunks);
	return 0;
}

static PyObject *pools_close(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_pools *p = (struct py_pools *)self;
	uint64_t chunks, bytes;

	if (p->closed)
		return Py_NewRef(Py_None);
	for (int i = 0; i < p->count; i++) {
		int code = forget(p->banks[i]);

		if (code)
			return py_raise(code);
	}
	p->closed = true;
	Py_BEGIN_ALLOW_THREADS for (int i = 0; i < p->count; i++)
		om_bank_close(p->banks[i]->b, &chunks, &bytes);
	Py_END_ALLOW_THREADS return Py_NewRef(Py_None);
}

static PyObject *get_closed(PyObject *self, void *Py_UNUSED(unused))
{
	return PyBool_FromLong(((struct py_pools *)self)->closed);
}

PyDoc_STRVAR(
	allocate_doc,
	"allocate($self, /, size, device, alignment=256, label=None)\n--\n\n"
	"A block of `size` bytes (int, or text such as \"2GiB\") at a multiple of `alignment`.");

static PyMethodDef pools_methods[] = {
	{ "allocate", PY_FAST(pools_allocate), PY_FAST_FLAGS, allocate_doc },
	{ "deallocate", PY_FAST(pools_deallocate), PY_FAST_FLAGS,
	  "deallocate($self, /, block)\n--\n\nThe block is gone; its bytes stay while views hold them." },
	{ "_open", pools_open, METH_VARARGS,
	  "_open($self, device, limit, decay, fragmentation, locked, /)\n--\n\nMake a pool." },
	{ "_stats", pools_stats, METH_O,
	  "_stats($self, device, /)\n--\n\nThe fields of PoolStats." },
	{ "_trim", pools_trim, METH_O,
	  "_trim($self, device, /)\n--\n\nGive free memory back; the bytes." },
	{ "_set_limit", pools_set_limit, METH_VARARGS,
	  "_set_limit($self, device, limit, /)\n--\n\nAnother limit." },
	{ "_blocks", pools_blocks, METH_O,
	  "_blocks($self, device, /)\n--\n\nAll blocks, the one used longest ago first." },
	{ "_block", pools_block, METH_VARARGS,
	  "_block($self, device, number, /)\n--\n\nThe block with that number, or None." },
	{ "_victims", pools_victims, METH_VARARGS,
	  "_victims($self, size, device, alignment, /)\n--\n\nBlocks that together make room." },
	{ "_snapshot", pools_snapshot, METH_O,
	  "_snapshot($self, device, /)\n--\n\nWhat there is to say about each block." },
	{ "_check", pools_check, METH_O,
	  "_check($self, device, /)\n--\n\nWhether all sums agree." },
	{ "_close", pools_close, METH_NOARGS, "_close($self, /)\n--\n\nClose all pools." },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef pools_getset[] = {
	{ "closed", get_closed, NULL, "True after close().", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot pools_slots[] = {
	{ Py_tp_doc, "One pool a device (see omnimem.MemoryPoolManager)." },
	{ Py_tp_new, PyType_GenericNew },
	{ Py_tp_dealloc, pools_dealloc },
	{ Py_tp_methods, pools_methods },
	{ Py_tp_getset, pools_getset },
	{ 0, NULL },
};

PyType_Spec py_pools_spec = {
	.name = "omnimem._core.Pools",
	.basicsize = sizeof(struct py_pools),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = pools_slots,
};
