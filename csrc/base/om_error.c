/* om_error: see om_error.h. Owns one struct om_error a thread. */
#include "base/om_error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local struct om_error last;

int om_err(int code, const char *fmt, ...)
{
	va_list ap;

	last.code = code;
	last.filename[0] = last.holders[0] = last.which[0] = '\0';
	last.need = last.used = last.limit = 0;
	va_start(ap, fmt);
	vsnprintf(last.text, sizeof(last.text), fmt, ap);
	va_end(ap);
	return code;
}

struct om_error *om_err_last(void)
{
	return &last;
}

int om_err_set(const struct om_error *src)
{
	if (src != &last)
		last = *src;
	return last.code;
}

void om_err_file(const char *filename)
{
	snprintf(last.filename, sizeof(last.filename), "%s", filename);
}

void om_err_limit(const char *which, uint64_t need, uint64_t used, uint64_t limit)
{
	snprintf(last.which, sizeof(last.which), "%s", which);
	last.need = need;
	last.used = used;
	last.limit = limit;
}

const char *om_err_text(int code)
{
#define OM_ERROR_CASE(sym, value, text, pyclass) \
	case sym:                                \
		return text;
	switch (code) {
		OM_ERROR_TABLE(OM_ERROR_CASE)
	}
#undef OM_ERROR_CASE
	return strerror(-code);
}

const char *om_err_class(int code)
{
#define OM_ERROR_CASE(sym, value, text, pyclass) \
	case sym:                                \
		return pyclass;
	switch (code) {
		OM_ERROR_TABLE(OM_ERROR_CASE)
	case -ENOSPC:
	case -EDQUOT:
		return "DiskFullError";
	case -ENOMEM:
		return "MemoryError";
	}
#undef OM_ERROR_CASE
	return "IOFailure";
}
