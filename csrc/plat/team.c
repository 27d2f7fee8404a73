/* team: see om_team.h. Owns one function pointer, found once; no lock. */
#include "plat/om_team.h"

#include <dlfcn.h>
#include <link.h>
#include <stddef.h>
#include <string.h>

#include "base/om_base.h"

/* libgomp's entry point, which LLVM's and Intel's runtimes have as well. 0 threads: as many as it likes. */
typedef void (*parallel_fn)(void (*work)(void *), void *arg, unsigned threads, unsigned flags);

static int look_at(struct dl_phdr_info *info, size_t size, void *arg)
{
	static const char *const known[] = { "/libgomp", "/libiomp5.", "/libomp." };

	(void)size;
	for (size_t i = 0; i < sizeof(known) / sizeof(*known); i++) {
		void *library = strstr(info->dlpi_name, known[i])
		                        ? dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY)
		                        : NULL;
		void *found = library ? dlsym(library, "GOMP_parallel") : NULL;

		if (found) { /* the reference keeps it in the process */
			memcpy(arg, &found, sizeof(found));
			return 1;
		}
		if (library)
			dlclose(library);
	}
	return 0;
}

static parallel_fn find(void)
{
	static parallel_fn known; /* atomic */
	parallel_fn run = __atomic_load_n(&known, __ATOMIC_RELAXED);

	if (!run && dl_iterate_phdr(look_at, &run))
		__atomic_store_n(&known, run, __ATOMIC_RELAXED);
	return run;
}

bool om_team_found(void)
{
	return find() != NULL;
}

void om_team_run(void (*work)(void *arg), void *arg)
{
	find()(work, arg, 0, 0);
}
