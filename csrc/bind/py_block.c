/*
 * py_block: _core.Block, a block by reference: the base of omnimem.MemoryBlock, and the store's methods
 * that find, access and register blocks.
 *
 * Made on demand, one for a block as long as somebody holds it: the core's record points back to it, and
 * the GIL guards that pointer. It holds the record and no bytes: each buffer and each export leases
 * them anew. One that a user built has no record behind it (`b` is NULL) and no bytes.
 *
 * A pool's block has a chunk instead, from allocate to deallocate, and then only its number and size. It holds no
 * bytes either: who drops it without deallocating leaves the chunk allocated.
 */
#include "bind/py_bind.h"

#include <string.h>

PyTypeObject *py_block_type;

struct py_block {
	PyObject_HEAD struct py_core *core;
	struct om_block *b;    /* NULL: unbound, or a pool's */
	struct py_bank *bank;  /* a pool's */
	struct om_chunk *c;    /* NULL: freed */
	uint64_t serial, size; /* once it is freed */
};

/* The class that is made for blocks (a subclass of _core.Block), and who decodes one that is encoded:
 * called with the object, on a thread that needs its bytes. */
static PyObject *made_type, *unpacker;

PyObject *py_block_setup(PyObject *Py_UNUSED(module), PyObject *args)
{
	PyObject *type, *function;

	if (!PyArg_ParseTuple(args, "OO:_block_setup", &type, &function))
		return NULL;
	Py_XDECREF(made_type);
	Py_XDECREF(unpacker);
	made_type = Py_NewRef(type);
	unpacker = Py_NewRef(function);
	return Py_NewRef(Py_None);
}

PyObject *py_block_of(struct py_core *core, struct om_block *b)
{
	void **face = om_block_face(b);
	struct py_block *o = *face;

	if (o) {
		om_block_unref(b);
		return Py_NewRef((PyObject *)o);
	}
	o = (struct py_block *)PyType_GenericAlloc(
		made_type ? (PyTypeObject *)made_type : py_block_type, 0);
	if (!o) {
		om_block_unref(b);
		return NULL;
	}
	o->core = py_core_ref(core);
	o->b = b;
	*face = o;
	return (PyObject *)o;
}

static void block_dealloc(PyObject *self)
{
	struct py_block *o = (struct py_block *)self;
	PyTypeObject *type = Py_TYPE(self);

	if (o->b) {
		*om_block_face(o->b) = NULL;
		om_block_unref(o->b);
		py_core_unref(o->core);
	}
	if (o->c)
		*om_chunk_face(o->c) = NULL;
	if (o->bank)
		py_bank_unref(o->bank);
	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

static struct py_block *bound(PyObject *self)
{
	struct py_block *o = (struct py_block *)self;

	if (o->b)
		return o;
	PyErr_SetString(PyExc_BufferError,
	                o->bank ? "a pool's block cannot be swapped, pinned or encoded"
	                        : "this block is a record without memory: register it to get some");
	return NULL;
}

/* ---- chunks of pools ---- */

PyObject *py_chunk_face(struct py_bank *bank, struct om_chunk *c)
{
	struct py_block *o = *om_chunk_face(c);

	if (o)
		return Py_NewRef((PyObject *)o);
	o = (struct py_block *)PyType_GenericAlloc(
		made_type ? (PyTypeObject *)made_type : py_block_type, 0);
	if (!o)
		return NULL;
	o->bank = py_bank_ref(bank);
	o->c = c;
	*om_chunk_face(c) = o;
	return (PyObject *)o;
}

void py_chunk_gone(struct om_chunk *c)
{
	struct py_block *o = *om_chunk_face(c);
	struct om_chunk_state st;

	if (!o)
		return;
	om_chunk_state(c, &st);
	o->serial = st.serial;
	o->size = st.bytes;
	o->c = NULL;
	*om_chunk_face(c) = NULL;
}

static PyObject *chunk_name(const struct py_block *o)
{
	struct om_chunk_state st = { .serial = o->serial };

	if (o->c)
		om_chunk_state(o->c, &st);
	return PyUnicode_FromFormat("%U:%llu", o->bank->device, (unsigned long long)st.serial);
}

static int chunk_gone_error(const struct py_block *o, PyObject *class)
{
	PyObject *name = chunk_name(o);

	if (name)
		PyErr_Format(class,
		             "block '%U' has no memory: it was deallocated, or its pool was closed",
		             name);
	Py_XDECREF(name);
	return -1;
}

int py_chunk_of(PyObject *block, struct py_bank **ret_bank, struct om_chunk **ret)
{
	struct py_block *o = (struct py_block *)block;

	if (om_unlikely(!PyObject_TypeCheck(block, py_block_type))) {
		PyErr_Format(PyExc_TypeError, "block must be a MemoryBlock, not %R",
		             Py_TYPE(block));
		return -1;
	}
	if (om_unlikely(!o->bank)) {
		PyErr_Format(PyExc_ValueError, "%R is no pool's block: allocate made none like it",
		             block);
		return -1;
	}
	if (om_unlikely(!o->c))
		return chunk_gone_error(o, PyExc_ValueError);
	*ret_bank = o->bank;
	*ret = o->c;
	return 0;
}

/* The chunk with one more view; NULL with BufferError or ClosedError. */
static struct om_chunk *view_chunk(struct py_block *o)
{
	int code;

	if (!o->c) {
		chunk_gone_error(o, PyExc_BufferError);
		return NULL;
	}
	code = om_chunk_view_ref(o->c);
	if (code)
		py_raise(code);
	return code ? NULL : o->c;
}

static int chunk_getbuffer(struct py_block *o, Py_buffer *view, int flags)
{
	struct om_chunk *c = view_chunk(o);

	view->obj = NULL;
	if (!c)
		return -1;
	if (PyBuffer_FillInfo(view, (PyObject *)o, om_chunk_data(c), (Py_ssize_t)om_chunk_bytes(c),
	                      0, flags)) {
		om_chunk_view_unref(c);
		return -1;
	}
	view->internal = c;
	return 0;
}

static PyObject *chunk_dlpack(struct py_block *o, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
	struct om_chunk *c = view_chunk(o);
	PyObject *capsule;
	int64_t shape;

	if (!c)
		return NULL;
	shape = (int64_t)om_chunk_bytes(c);
	capsule = py_export_args(&(struct py_view){ .chunk = c,
	                                            .data = om_chunk_data(c),
	                                            .type = { OM_DL_UINT, 8, 1 },
	                                            .ndim = 1,
	                                            .shape = &shape,
	                                            .writable = true },
	                         args, nargs, kwnames);
	om_chunk_view_unref(c);
	return capsule;
}

static PyObject *chunk_state(const struct py_block *o)
{
	struct om_chunk_state st = { .bytes = o->size };

	if (o->c)
		om_chunk_state(o->c, &st);
	return Py_BuildValue("(KddKKOIiOOOOOz)", (unsigned long long)st.bytes,
	                     (double)st.created_ns / 1e9, (double)st.used_ns / 1e9,
	                     (unsigned long long)st.uses, (unsigned long long)(uintptr_t)st.data,
	                     Py_None, st.views, 0, o->c ? Py_True : Py_False,
	                     o->bank->locked ? Py_True : Py_False, Py_False, Py_False,
	                     o->bank->device, st.label);
}

int py_block_unpack(struct py_core *core, struct om_block *b)
{
	PyObject *o = py_block_of(core, b), *done = NULL;

	if (o && unpacker)
		done = PyObject_CallFunctionObjArgs(unpacker, o, NULL);
	else if (o)
		py_raise(OM_EPACKED);
	Py_XDECREF(o);
	Py_XDECREF(done);
	return done ? 0 : -1;
}

/* ---- leasing ---- */

struct bytes_call {
	struct py_block *o;
	struct om_lease *lease;
	uint8_t codec;
	const struct py_data *data;
};

static int call_lease(void *arg, uint64_t deadline_ns)
{
	struct bytes_call *c = arg;

	return om_block_lease_bytes(c->o->core->s, c->o->b, OM_SHARE, deadline_ns, &c->lease);
}

/* The bytes, brought in and decoded if need be; NULL with an exception. */
static struct om_lease *lease_bytes(struct py_block *o)
{
	struct bytes_call c = { .o = o };
	uint64_t deadline_ns = om_deadline(PY_DEFAULT_TIMEOUT_NS);
	int code = py_wait(call_lease, &c, deadline_ns);

	while (code == OM_EPACKED) {
		om_block_ref(o->b);
		if (py_block_unpack(o->core, o->b))
			return NULL;
		code = py_wait(call_lease, &c, deadline_ns);
	}
	if (code == 0)
		return c.lease;
	if (code != PY_RAISED)
		py_raise(code);
	return NULL;
}

/* Memory that its producer made read-only stays so until it is swapped out. */
static bool writable(const struct py_block *o, const struct om_lease *l)
{
	return !o->core->foreign || !py_core_is_readonly(o->core, om_lease_data(l));
}

static int block_getbuffer(PyObject *self, Py_buffer *view, int flags)
{
	struct py_block *o = (struct py_block *)self;
	struct om_lease *l;

	if (o->bank)
		return chunk_getbuffer(o, view, flags);
	o = bound(self);
	l = o ? lease_bytes(o) : NULL;
	view->obj = NULL;
	if (!l)
		return -1;
	if (PyBuffer_FillInfo(view, self, om_lease_data(l), (Py_ssize_t)om_lease_nbytes(l),
	                      !writable(o, l), flags)) {
		om_lease_unref(l);
		return -1;
	}
	om_lease_view_ref(l);
	om_lease_unref(l);
	view->internal = l;
	return 0;
}

static void block_releasebuffer(PyObject *self, Py_buffer *view)
{
	if (((struct py_block *)self)->bank) {
		om_chunk_view_unref(view->internal);
		return;
	}
	om_lease_view_unref(view->internal);
	py_collect();
}

static PyObject *block_dlpack(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                              PyObject *kwnames)
{
	struct py_block *o = (struct py_block *)self;
	struct om_lease *l;
	PyObject *capsule;
	struct py_view v;
	int64_t bytes_shape;

	if (o->bank)
		return chunk_dlpack(o, args, nargs, kwnames);
	o = bound(self);
	l = o ? lease_bytes(o) : NULL;
	if (!l)
		return NULL;
	v = py_lease_view(l, &bytes_shape);
	v.writable = writable(o, l);
	capsule = py_export_args(&v, args, nargs, kwnames);
	om_lease_unref(l);
	return capsule;
}

/* ---- what a block is ---- */

/* (nbytes, created, accessed: seconds of the monotonic clock, accesses, address or 0, offset in the
 * swap file or None, leases, tag, named, pinned, swapped, blank, device, label or None). */
static PyObject *block_state(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_block *o = (struct py_block *)self;
	struct om_block_state st;
	PyObject *offset;

	if (o->bank)
		return chunk_state(o);
	if (!o->b)
		return Py_NewRef(Py_None);
	om_block_state(o->core->s, o->b, &st);
	offset = st.on_disk ? PyLong_FromUnsignedLongLong(st.disk_offset) : Py_NewRef(Py_None);
	return Py_BuildValue("(KddKKNIiNNNNsO)", (unsigned long long)st.nbytes,
	                     (double)st.created_ns / 1e9, (double)st.accessed_ns / 1e9,
	                     (unsigned long long)st.accesses, (unsigned long long)st.data, offset,
	                     st.leases, st.tag, PyBool_FromLong(st.named),
	                     PyBool_FromLong(st.pinned), PyBool_FromLong(st.swapped),
	                     PyBool_FromLong(st.blank), "cpu", Py_None);
}

static PyObject *block_mark(PyObject *self, PyObject *args)
{
	struct py_block *o = bound(self);
	int pinned, tag, code;

	if (!o || !PyArg_ParseTuple(args, "pi:_mark", &pinned, &tag))
		return NULL;
	code = om_block_mark(o->core->s, o->b, pinned, (uint8_t)tag);
	return code ? py_raise(code) : Py_NewRef(Py_None);
}

/* (accesses, the most of any block, accesses since its last or 0, accesses until it is expected or
 * None) */
static PyObject *block_outlook(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct py_block *o = bound(self);
	struct om_outlook l;
	int code = o ? om_block_outlook(o->core->s, o->b, &l) : 0;

	if (!o || code)
		return o ? py_raise(code) : NULL;
	return Py_BuildValue("(KKKN)", (unsigned long long)l.accesses,
	                     (unsigned long long)l.most_accesses, (unsigned long long)l.age,
	                     l.distance == UINT64_MAX ? Py_NewRef(Py_None)
	                                              : PyLong_FromUnsignedLongLong(l.distance));
}

static int call_lease_packed(void *arg, uint64_t deadline_ns)
{
	struct bytes_call *c = arg;

	return om_block_lease_packed(c->o->core->s, c->o->b, deadline_ns, &c->lease, &c->codec);
}

/* (lease of the encoded bytes, number of who encoded them), or None when they are not needed. */
static PyObject *block_lease_packed(PyObject *self, PyObject *Py_UNUSED(unused))
{
	struct bytes_call c = { .o = bound(self) };
	PyObject *lease;
	int code;

	if (!c.o)
		return NULL;
	code = py_wait(call_lease_packed, &c, om_deadline(PY_DEFAULT_TIMEOUT_NS));
	if (code == OM_EAGAIN)
		return Py_NewRef(Py_None);
	if (code)
		return code == PY_RAISED ? NULL : py_raise(code);
	lease = py_lease_new(c.lease);
	return lease ? Py_BuildValue("(Ni)", lease, c.codec) : NULL;
}

static int call_unpack(void *arg, uint64_t deadline_ns)
{
	const struct bytes_call *c = arg;

	return om_block_unpack(c->o->core->s, c->o->b, c->data->data, c->data->nbytes, deadline_ns);
}

static PyObject *block_unpack(PyObject *self, PyObject *plain)
{
	struct bytes_call c = { .o = bound(self) };
	struct py_data data;
	PyObject *done;

	if (!c.o || py_data_init(&data, plain, PY_STRIDED_COPIED))
		return NULL;
	c.data = &data;
	done = py_done(py_wait(call_unpack, &c, om_deadline(PY_DEFAULT_TIMEOUT_NS)));
	py_data_fini(&data);
	return done;
}

static PyObject *get_name(PyObject *self, void *Py_UNUSED(unused))
{
	struct py_block *o = (struct py_block *)self;

	if (o->bank)
		return chunk_name(o);
	return o->b ? PyUnicode_FromString(om_block_name(o->b)) : Py_NewRef(Py_None);
}

/* Who encoded blocks of this store, by number. */
static PyObject *get_codecs(PyObject *self, void *Py_UNUSED(unused))
{
	struct py_block *o = bound(self);

	return o ? Py_NewRef(o->core->codecs) : NULL;
}

static PyMethodDef block_methods[] = {
	{ "__dlpack__", PY_FAST(block_dlpack), PY_FAST_FLAGS,
	  "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n"
	  "A DLPack capsule that keeps the bytes." },
	{ "__dlpack_device__", py_export_device, METH_NOARGS, NULL },
	{ "_state", block_state, METH_NOARGS,
	  "_state($self, /)\n--\n\nWhat the core knows; None: unbound." },
	{ "_outlook", block_outlook, METH_NOARGS,
	  "_outlook($self, /)\n--\n\nAccesses, the most of any block, age, distance or None." },
	{ "_mark", block_mark, METH_VARARGS, "_mark($self, pinned, tag, /)\n--\n\nSet both." },
	{ "_lease_packed", block_lease_packed, METH_NOARGS,
	  "_lease_packed($self, /)\n--\n\nThe encoded bytes and who encoded them, or None." },
	{ "_unpack", block_unpack, METH_O,
	  "_unpack($self, plain, /)\n--\n\nThese are the decoded bytes." },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef block_getset[] = {
	{ "_name", get_name, NULL, "The block's name; None: unbound.", NULL },
	{ "_codecs", get_codecs, NULL, "Who encoded blocks of its store, by number.", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot block_slots[] = {
	{ Py_tp_doc, "A block by reference (see omnimem.MemoryBlock)." },
	{ Py_tp_new, PyType_GenericNew },
	{ Py_tp_dealloc, block_dealloc },
	{ Py_tp_methods, block_methods },
	{ Py_tp_getset, block_getset },
	{ Py_bf_getbuffer, block_getbuffer },
	{ Py_bf_releasebuffer, block_releasebuffer },
	{ 0, NULL },
};

PyType_Spec py_block_spec = {
	.name = "omnimem._core.Block",
	.basicsize = sizeof(struct py_block),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = block_slots,
};

/* ---- methods of the store ---- */

PyObject *py_store_block(PyObject *self, PyObject *name)
{
	struct py_core *core = py_store_core(self);
	const char *text = core ? py_text(name, "name") : NULL;
	struct om_block *b;
	int code;

	if (!text)
		return NULL;
	code = om_store_block(core->s, text, &b);
	if (code == OM_ENAME)
		return Py_NewRef(Py_None);
	return code ? py_raise(code) : py_block_of(core, b);
}

struct access_call {
	struct om_store *s;
	const char *group, *name;
	struct om_block *b;
};

static int call_access(void *arg, uint64_t deadline_ns)
{
	struct access_call *c = arg;

	return om_store_access(c->s, c->group, c->name, deadline_ns, &c->b);
}

static int unpack_by_name(struct py_core *core, const char *name)
{
	struct om_block *b;
	int code = om_store_block(core->s, name, &b);

	return code ? code : py_block_unpack(core, b) ? PY_RAISED : 0;
}

/* The block, its bytes in memory; None when the group has none of that name. */
PyObject *py_store_access(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
	struct py_core *core = py_store_core(self);
	struct access_call c = { .s = core ? core->s : NULL };
	PyObject *result;
	int code;

	if (nargs != 2) {
		PyErr_SetString(PyExc_TypeError, "_access() takes a group and a name");
		return NULL;
	}
	c.group = core ? py_text(args[0], "group") : NULL;
	c.name = c.group ? py_text(args[1], "block_id") : NULL;
	if (om_unlikely(!c.name))
		return NULL;
	code = om_store_access_now(c.s, c.group, c.name, &c.b);
	if (om_unlikely(code == OM_EAGAIN)) {
		uint64_t deadline_ns = om_deadline(PY_DEFAULT_TIMEOUT_NS);

		code = py_wait(call_access, &c, deadline_ns);
		while (code == OM_EPACKED) {
			code = unpack_by_name(core, c.name);
			if (!code)
				code = py_wait(call_access, &c, deadline_ns);
		}
	}
	if (om_likely(!code))
		result = py_block_of(core, c.b);
	else if (code == OM_ENAME)
		result = Py_NewRef(Py_None);
	else
		result = code == PY_RAISED ? NULL : py_raise(code);
	py_collect();
	return result;
}

PyObject *py_store_add_zeros(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *kwnames)
{
	static const char *const names[] = { "name", "nbytes", "group", "dtype", "shape", NULL };
	PyObject *a[5] = { NULL };
	struct py_core *core = py_store_core(self);
	struct om_desc desc = { 0 };
	const char *name, *group;
	uint64_t nbytes;
	int code;

	if (!core || py_args("_add_zeros", args, nargs, kwnames, names, 2, 5, a))
		return NULL;
	name = py_text(a[0], "name");
	if (!name || py_size(a[1], "nbytes", &nbytes) || py_text_or_null(a[2], "group", &group) ||
	    py_desc_read(a[3], a[4], nbytes, &desc))
		return NULL;
	code = om_store_add_zeros(core->s, name, group, nbytes, desc.ndim < 0 ? NULL : &desc);
	return code ? py_raise(code) : Py_NewRef(Py_None);
}
