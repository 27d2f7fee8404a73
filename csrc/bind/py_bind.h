/*
 * py_bind: what the files of the binding share.
 *
 * Everything here runs with the GIL unless it says otherwise. The binding holds no lock of its own:
 * its own fields are guarded by the GIL, the rest by the core. Functions that return int return 0,
 * or -1 with a Python exception set, unless they say that they return a code of the core.
 */
#ifndef PY_BIND_H
#define PY_BIND_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "omnimem.h"
#include "bind/dlpack.h"

/* ---- errors (py_core.c) ---- */

/* Raises this thread's error of the core as the class of its code; returns NULL. */
PyObject *py_raise(int code);
/* None for 0, else as py_raise; PY_RAISED leaves the exception that is set. Then py_collect. */
PyObject *py_done(int code);
/* Raises omnimem.errors.ClosedError or DeviceError. */
PyObject *py_raise_closed(const char *text);
PyObject *py_raise_device(const char *fmt, ...);

/* ---- arguments and waiting (py_args.c) ---- */

/* Spreads vectorcall arguments over `out` (as many as `names`, which ends with NULL); those not
 * given stay NULL. The first `required` must be given, at most `positional` by place. */
int py_args(const char *function, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
            const char *const *names, int required, int positional, PyObject **out);
/* UTF-8 of a str without NUL; NULL with TypeError or ValueError. `what` names the argument. */
const char *py_text(PyObject *o, const char *what);
/* As py_text; None and NULL give *ret NULL. */
int py_text_or_null(PyObject *o, const char *what, const char **ret);
/* A size: an int from 0 to 2^62. */
int py_size(PyObject *o, const char *what, uint64_t *ret);
/* Seconds (None: for ever; NULL: 30) to a deadline of the core's clock. */
int py_deadline(PyObject *timeout, uint64_t *ret);
/* A deadline that stands for "the caller did not say". */
#define PY_DEFAULT_TIMEOUT_NS (30 * OM_NSEC)

/* Calls `call` without the GIL, in slices, until it returns anything but OM_EBUSY or the deadline
 * is over; between slices signals are seen. Returns the core's code, or PY_RAISED. */
#define PY_RAISED 1
int py_wait(int (*call)(void *arg, uint64_t deadline_ns), void *arg, uint64_t deadline_ns);

/* ---- element types (py_dtype.c) ---- */

/* "bfloat16" -> code, bits, lanes; ValueError when unknown. */
int py_dtype_parse(const char *name, struct om_dl_type *ret);
PyObject *py_dtype_name(struct om_dl_type type);
/* False for a type that no name stands for: no producer means it. */
bool py_dtype_is_known(struct om_dl_type type);
/* The type of a PEP 3118 format; false when there is none. */
bool py_dtype_of_format(const char *format, Py_ssize_t itemsize, struct om_dl_type *ret);
/* The PEP 3118 format of a type; NULL when there is none. */
const char *py_dtype_format(struct om_dl_type type);
/* Whole bytes of one element, 0 when it has none (packed sub-byte types). */
static inline uint64_t py_dtype_size(struct om_dl_type t)
{
	unsigned bits = (unsigned)t.bits * t.lanes;

	return bits % 8 ? 0 : bits / 8;
}
/* Bytes of a contiguous array; false on overflow or a negative dimension. */
bool py_dtype_nbytes(struct om_dl_type type, int ndim, const int64_t *shape, uint64_t *ret);
/* Reads a shape or strides (any iterable of int, or one int); *ret_ndim is their number. */
int py_dims(PyObject *o, const char *what, int64_t *ret, int *ret_ndim);
PyObject *py_dims_tuple(const int64_t *dims, int ndim);
/* C-contiguous strides, in elements. */
void py_dims_strides(int ndim, const int64_t *shape, int64_t *ret_strides);
bool py_dims_contiguous(int ndim, const int64_t *shape, const int64_t *strides);
struct om_dl_type py_desc_type(const struct om_desc *desc);
/* dtype and shape for `total` bytes; a missing shape is one dimension, a missing dtype uint8; without both
 * they are unknown. */
int py_desc_read(PyObject *dtype, PyObject *shape, uint64_t total, struct om_desc *ret);

/* ---- the store as its dependents see it (py_store.c) ---- */

struct py_foreign;

/* A store of the core and the memory of others that it keeps. Tickets and streams hold one reference
 * each, so that none of them needs the Python object. */
struct py_core {
	struct om_store *s;
	size_t refs;
	struct py_foreign *foreign;  /* list of what om_store_take keeps */
	PyObject *codecs;            /* list: who encoded blocks, by number */
	struct py_core *prev, *next; /* in py_keepers, while `keeps` */
	bool keeps;
};
struct py_core *py_core_ref(struct py_core *c);
void py_core_unref(struct py_core *c);
/* Lets producers' memory go that no store needs any more; keeps the exception that is set. */
void py_collect_slow(void);
/* The same for the last time: what is needed yet never goes. */
void py_collect_last(void);
extern struct py_core *py_keepers;
static inline void py_collect(void)
{
	if (om_unlikely(py_keepers))
		py_collect_slow();
}
/* True when `data` lies in memory kept from a producer that made it read-only. */
bool py_core_is_readonly(struct py_core *c, const void *data);

/* ---- data that comes in (py_import.c) ---- */

/* Bytes of a DLPack or buffer producer, held until py_data_fini. */
struct py_data {
	void *managed; /* DLPack: the managed tensor; its deleter is owed */
	bool versioned;
	Py_buffer *buffer; /* else the buffer */
	void *copy;        /* contiguous bytes made from strided ones */
	void *data;
	uint64_t nbytes;
	struct om_desc desc;
	bool readonly;
	/* PY_STRIDED_KEPT: the elements do not lie together. */
	bool strided;
	uint64_t itemsize;
	int ndim;
	int64_t shape[OM_MAX_NDIM], strides[OM_MAX_NDIM]; /* strides in bytes */
};
/* What becomes of strided data: a ValueError; contiguous; as it is (see py_data_array). */
enum py_strided { PY_STRIDED_REFUSED, PY_STRIDED_COPIED, PY_STRIDED_KEPT };
/* Takes the bytes of `o`, DLPack first. */
int py_data_init(struct py_data *d, PyObject *o, enum py_strided strided);
static inline struct om_array py_data_array(const struct py_data *d)
{
	return (struct om_array){ d->data, d->ndim, d->shape, d->strides, d->itemsize };
}
void py_data_fini(struct py_data *d);

/* Store.add, Store.take, Store.add_file, Store.encode (py_add.c). */
PyObject *py_store_add(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *py_store_take(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *py_store_add_file(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *py_store_encode(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
/* "fast" or "balanced"; -1 with an exception set. */
int py_coding_read(PyObject *o, enum om_coding *ret);

/* Blocks by reference (py_block.c). */
PyObject *py_store_block(PyObject *, PyObject *);
PyObject *py_store_access(PyObject *, PyObject *const *, Py_ssize_t);
PyObject *py_store_add_zeros(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *py_block_setup(PyObject *, PyObject *);
/* The object of a block; takes over one reference, also when it fails. */
PyObject *py_block_of(struct py_core *core, struct om_block *b);
/* Has the bytes of a block decoded that is there only encoded; takes over one reference. */
int py_block_unpack(struct py_core *core, struct om_block *b);

/* Pools (py_pools.c). A bank of the core with its device's name; each of its blocks' objects holds one reference,
 * so that blocks outlive the object that they came from. */
struct py_bank {
	struct om_bank *b;
	size_t refs;
	PyObject *device; /* str */
	bool locked;
};
struct py_bank *py_bank_ref(struct py_bank *bank);
void py_bank_unref(struct py_bank *bank);
/* Its banks, borrowed, at most `room`: how many. -1: no Pools. */
int py_pools_banks(PyObject *pools, struct om_bank **ret, int room);
/* The object of a chunk, which is not freed (py_block.c). */
PyObject *py_chunk_face(struct py_bank *bank, struct om_chunk *c);
/* The chunk of a pool's block: 0; ValueError when it has none, or is of no pool. *ret_bank is borrowed. */
int py_chunk_of(PyObject *block, struct py_bank **ret_bank, struct om_chunk **ret);
/* The chunk is freed: its object, if there is one, has no bytes from now on. */
void py_chunk_gone(struct om_chunk *c);

/* Giving memory back (py_swap.c). */
PyObject *py_store_swap_out(PyObject *, PyObject *);
PyObject *py_store_victim(PyObject *, PyObject *);
PyObject *py_store_pack(PyObject *, PyObject *);
PyObject *py_store_disk(PyObject *, PyObject *);
PyObject *py_store_trim(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *py_store_group_stats(PyObject *, PyObject *);
PyObject *py_store_ranked(PyObject *, PyObject *);
PyObject *py_store_events(PyObject *, PyObject *);
PyObject *py_same_bytes(PyObject *, PyObject *);

/* A list; takes over the names. Groups, marks and totals (py_meter.c). */
PyObject *py_names_list(char **names, size_t count);
PyObject *py_store_groups(PyObject *, PyObject *);
PyObject *py_store_mark(PyObject *, PyObject *);
PyObject *py_store_totals(PyObject *, PyObject *);
PyObject *py_mark_end(PyObject *, PyObject *);
PyObject *py_totals_closed(PyObject *, PyObject *);
/* Use and pressure (py_usage.c). */
PyObject *py_store_use_begin(PyObject *, PyObject *);
PyObject *py_store_use_end(PyObject *, PyObject *);
PyObject *py_store_usage(PyObject *, PyObject *);
PyObject *py_store_press(PyObject *, PyObject *);

/* encode, decode (py_codec.c). */
PyObject *py_encode(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *py_encode_into(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *py_decode(PyObject *, PyObject *);
PyObject *py_decode_into(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *py_coded_info(PyObject *, PyObject *);
PyObject *py_encode_bound(PyObject *, PyObject *);
PyObject *py_coded_compare(PyObject *, PyObject *);
PyObject *py_codec_use(PyObject *, PyObject *);

/* simulate (py_simulate.c), memory (py_pressure.c). */
PyObject *py_simulate(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
PyObject *py_memory(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
/* Three numbers from any sequence. */
int py_thresholds(PyObject *o, double ret[3]);

/* ---- data that goes out (py_export.c) ---- */

/* A typed view of a lease's bytes. The pointers belong to the caller. */
struct py_view {
	struct om_lease *lease;
	struct om_chunk *chunk; /* instead of a lease */
	char *data;
	struct om_dl_type type;
	int ndim;
	const int64_t *shape;
	const int64_t *strides; /* in elements; NULL: C-contiguous */
	bool writable;
};
/* A DLPack capsule that holds a view reference on the lease (or, with `copy`, its own bytes). */
PyObject *py_export(const struct py_view *v, bool versioned, bool copy);
/* The body of __dlpack__: reads the protocol's keywords. */
PyObject *py_export_args(const struct py_view *v, PyObject *const *args, Py_ssize_t nargs,
                         PyObject *kwnames);
PyObject *py_export_device(PyObject *self, PyObject *unused);

/* ---- objects ---- */

struct py_store {
	PyObject_HEAD struct py_core *core; /* NULL: not initialised */
};
/* The store of a Store, or NULL with ClosedError. */
struct py_core *py_store_core(PyObject *store);

/* Takes over one reference on `l`, also when it fails. */
PyObject *py_lease_new(struct om_lease *l);
/* The lease of a Lease, borrowed; NULL with ClosedError when it was released. */
struct om_lease *py_lease_held(PyObject *lease);
/* The whole block with its remembered type and shape, for reading. */
struct py_view py_lease_view(struct om_lease *l, int64_t *bytes_shape);
PyObject *py_window_new(struct om_lease *l, PyObject *const *args, Py_ssize_t nargs,
                        PyObject *kwnames);
PyObject *py_ticket_new(struct py_core *core, struct om_ticket *t);
/* Bounds of a window: 0, or -1 with ValueError telling the sizes. `strides` may be NULL. */
int py_window_check(uint64_t block_nbytes, uint64_t offset, struct om_dl_type type, int ndim,
                    const int64_t *shape, const int64_t *strides, uint64_t *ret_nbytes);

extern PyType_Spec py_store_spec, py_lease_spec, py_window_spec, py_ticket_spec, py_stream_spec,
	py_pressure_spec, py_block_spec, py_ranking_spec, py_cache_spec, py_pools_spec,
	py_monitor_spec, py_hook_spec;
extern PyTypeObject *py_store_type, *py_lease_type, *py_window_type, *py_ticket_type,
	*py_stream_type, *py_pressure_type, *py_block_type, *py_ranking_type, *py_cache_type,
	*py_pools_type, *py_monitor_type, *py_hook_type;

/* Casts a METH_FASTCALL | METH_KEYWORDS function for a method table. */
#define PY_FAST(function) ((PyCFunction)(void (*)(void))(function))
#define PY_FAST_FLAGS     (METH_FASTCALL | METH_KEYWORDS)

#endif
