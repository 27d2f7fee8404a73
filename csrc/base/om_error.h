/*
 * om_error: the one table of errors, and the message of this thread.
 *
 * A function that can fail returns int: 0, or a negative code. OS failures are -errno; ours
 * start at -4096. `return om_err(code, fmt, ...)` sets this thread's message and returns the code.
 * Details that a program wants (file, sizes, holders) travel beside the text in struct om_error,
 * which is plain data: an asynchronous move copies it from the thread that failed to the thread
 * that waits. No locks; nothing here can fail.
 */
#ifndef OM_ERROR_H
#define OM_ERROR_H

#include <stdint.h>

/* X(symbol, code, text, Python class) */
#define OM_ERROR_TABLE(X)                                                       \
	X(OM_ELIMIT, -4096, "a byte limit is reached", "LimitError")            \
	X(OM_EDISKFULL, -4097, "no room on disk", "DiskFullError")              \
	X(OM_ECORRUPT, -4098, "bytes differ from those stored", "CorruptError") \
	X(OM_EBUSY, -4099, "still in use", "BusyError")                         \
	X(OM_ECLOSED, -4100, "closed", "ClosedError")                           \
	X(OM_EDEVICE, -4101, "device not usable", "DeviceError")                \
	X(OM_ENAME, -4102, "no such name", "KeyError")                          \
	X(OM_EVALUE, -4103, "bad value", "ValueError")                          \
	X(OM_ETIMEOUT, -4104, "deadline passed", "BusyError")                   \
	X(OM_ECANCELED, -4105, "canceled", "Error")                             \
	X(OM_EAGAIN, -4106, "not yet", "Error")                                 \
	X(OM_EPACKED, -4107, "encoded", "Error")

#define OM_ERROR_ENUM(sym, code, text, pyclass) sym = (code),
enum om_error_code { OM_ERROR_TABLE(OM_ERROR_ENUM) };
#undef OM_ERROR_ENUM

#define OM_ERROR_TEXT    768
#define OM_ERROR_FILE    512
#define OM_ERROR_HOLDERS 384

struct om_error {
	int code;                       /* 0: none */
	char text[OM_ERROR_TEXT];       /* what, which item, sizes and limits, next step */
	char filename[OM_ERROR_FILE];   /* "" when no file is involved */
	char holders[OM_ERROR_HOLDERS]; /* OM_EBUSY: names, separated by '\n' */
	uint64_t need, used, limit;     /* OM_ELIMIT: bytes */
	char which[32];                 /* OM_ELIMIT: which limit binds ("host", "group x") */
};

/* Sets this thread's error (all details cleared) and returns `code`. */
int om_err(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* This thread's last error; valid until the next om_err on this thread. Never NULL. */
struct om_error *om_err_last(void);

/* Makes `src` this thread's error and returns its code. */
int om_err_set(const struct om_error *src);

/* Add details to this thread's error. */
void om_err_file(const char *filename);
void om_err_limit(const char *which, uint64_t need, uint64_t used, uint64_t limit);

/* "no room on disk" for OM_EDISKFULL, strerror for -errno. */
const char *om_err_text(int code);

/* The Python class for a code: "LimitError", ...; "DiskFullError" for -ENOSPC, "MemoryError" for
 * -ENOMEM, "IOFailure" for any other -errno. */
const char *om_err_class(int code);

#endif
