/*
 * om_test: checks for the C tests. A test is one program: exit status 0 means passed; the first
 * check that fails prints where and what, with this thread's error text, and exits with 1.
 */
#ifndef OM_TEST_H
#define OM_TEST_H

#include <stdio.h>
#include <stdlib.h>

#include "base/om_error.h"

#define CHECK(cond)                                                                               \
	do {                                                                                      \
		if (!(cond)) {                                                                    \
			fprintf(stderr, "%s:%d: CHECK(%s) failed; last error: %d %s\n", __FILE__, \
			        __LINE__, #cond, om_err_last()->code, om_err_last()->text);       \
			exit(1);                                                                  \
		}                                                                                 \
	} while (0)

/* Two integers that must be equal; both are printed. */
#define CHECK_EQ(a, b)                                                                         \
	do {                                                                                   \
		long long om_a_ = (long long)(a), om_b_ = (long long)(b);                      \
		if (om_a_ != om_b_) {                                                          \
			fprintf(stderr, "%s:%d: %s is %lld, %s is %lld; last error: %d %s\n",  \
			        __FILE__, __LINE__, #a, om_a_, #b, om_b_, om_err_last()->code, \
			        om_err_last()->text);                                          \
			exit(1);                                                               \
		}                                                                              \
	} while (0)

/* A small, seeded generator (xorshift64*): the same run every time. */
static inline unsigned long long om_test_random(unsigned long long *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 2685821657736338717ULL;
}

#endif
