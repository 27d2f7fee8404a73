/*
 * sys_gpu: see om_sys.h. GPUs as NVML tells them: no CUDA context, nothing of the GPU's memory is taken.
 *
 * Owns the library and one NVML initialisation; the caller serialises. Without the library, a driver or a
 * device there are no GPUs; a device that stops answering is passed over. What is declared here is NVML's ABI.
 */
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/om_base.h"
#include "plat/om_sys_int.h"

typedef void *device;
struct memory {
	unsigned long long total, free, used;
};
struct memory_v2 { /* here what the driver keeps for itself is not free */
	unsigned version;
	unsigned long long total, reserved, free, used;
};
#define MEMORY_V2 ((unsigned)(sizeof(struct memory_v2) | 2u << 24))

struct om_gpus {
	void *library;
	int (*shutdown)(void);
	int (*count)(unsigned *);
	int (*by_index)(unsigned, device *);
	int (*uuid)(device, char *, unsigned);
	int (*name)(device, char *, unsigned);
	int (*memory)(device, struct memory *);
	int (*memory_v2)(device, struct memory_v2 *); /* NULL: an older driver */
	int (*mig_mode)(device, unsigned *, unsigned *);
	device devices[OM_GPUS];
	struct om_gpu facts[OM_GPUS];
	unsigned found;
};

/* ISO C has no cast from an object's address to a function's. */
static bool find(void *library, const char *name, void *ret_function)
{
	void *p = dlsym(library, name);

	memcpy(ret_function, &p, sizeof(p));
	return p != NULL;
}

static bool load(struct om_gpus *g)
{
	const char *path = getenv("OMNIMEM_NVML");
	int (*init)(void);

	g->library = dlopen(path && *path ? path : "libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
	if (!g->library)
		return false;
	find(g->library, "nvmlDeviceGetMemoryInfo_v2", &g->memory_v2);
	find(g->library, "nvmlDeviceGetMigMode", &g->mig_mode);
	if (!find(g->library, "nvmlInit_v2", &init) ||
	    !find(g->library, "nvmlShutdown", &g->shutdown) ||
	    !find(g->library, "nvmlDeviceGetCount_v2", &g->count) ||
	    !find(g->library, "nvmlDeviceGetHandleByIndex_v2", &g->by_index) ||
	    !find(g->library, "nvmlDeviceGetUUID", &g->uuid) ||
	    !find(g->library, "nvmlDeviceGetName", &g->name) ||
	    !find(g->library, "nvmlDeviceGetMemoryInfo", &g->memory) || init()) {
		dlclose(g->library);
		return false;
	}
	return true;
}

static void add(struct om_gpus *g, unsigned index)
{
	struct om_gpu *facts = &g->facts[g->found];
	unsigned mig = 0, pending;
	device d;

	if (g->found == OM_GPUS || g->by_index(index, &d) ||
	    g->uuid(d, facts->uuid, sizeof(facts->uuid)) ||
	    g->name(d, facts->name, sizeof(facts->name)))
		return;
	if (g->mig_mode && !g->mig_mode(d, &mig, &pending) && mig)
		return; /* this process has a part of it, if anything */
	facts->index = index;
	g->devices[g->found++] = d;
}

/* The device that an element of CUDA_VISIBLE_DEVICES means: an index, or a UUID or its beginning; -1: none. */
static int resolve(struct om_gpus *g, const char *text, unsigned count)
{
	char uuid[96], *end;
	unsigned long index = strtoul(text, &end, 10);
	device d;

	if (isdigit((unsigned char)*text) && !*end)
		return index < count ? (int)index : -1;
	for (unsigned i = 0; i < count && !strncmp(text, "GPU-", 4); i++)
		if (!g->by_index(i, &d) && !g->uuid(d, uuid, sizeof(uuid)) &&
		    !strncmp(uuid, text, strlen(text)))
			return (int)i;
	return -1;
}

/* As CUDA reads it: what comes after the first element that means nothing is not visible. MIG devices are
 * passed over. */
static void add_visible(struct om_gpus *g, const char *list, unsigned count)
{
	while (*list) {
		char item[96];
		size_t n = strcspn(list, ",");
		int index;

		snprintf(item, sizeof(item), "%.*s", (int)n, list + strspn(list, " "));
		item[strcspn(item, ", ")] = '\0';
		index = resolve(g, item, count);
		if (index < 0 && strncmp(item, "MIG-", 4))
			return;
		if (index >= 0)
			add(g, (unsigned)index);
		list += n + (list[n] == ',');
	}
}

int om_gpus_open(struct om_gpus **ret)
{
	const char *visible = getenv("CUDA_VISIBLE_DEVICES");
	struct om_gpus *g = om_alloc(1, sizeof(*g));
	unsigned count = 0;

	*ret = NULL;
	if (!g)
		return -ENOMEM;
	if (!load(g)) {
		om_free(g);
		return 0;
	}
	if (g->count(&count))
		count = 0;
	if (visible)
		add_visible(g, visible, count);
	else
		for (unsigned i = 0; i < count; i++)
			add(g, i);
	if (g->found)
		*ret = g;
	else
		om_gpus_close(g);
	return 0;
}

void om_gpus_read(struct om_gpus *g, struct om_sample *ret)
{
	for (unsigned i = 0; g && i < g->found; i++) {
		struct memory_v2 v2 = { .version = MEMORY_V2 };
		struct om_gpu *gpu = &ret->gpus[ret->gpu_count];
		struct memory v1;

		*gpu = g->facts[i];
		if (g->memory_v2 && !g->memory_v2(g->devices[i], &v2)) {
			gpu->total_bytes = v2.total;
			gpu->free_bytes = v2.free;
		} else if (!g->memory(g->devices[i], &v1)) {
			gpu->total_bytes = v1.total;
			gpu->free_bytes = v1.free;
		}
		ret->gpu_count += gpu->total_bytes > 0;
	}
}

void om_gpus_close(struct om_gpus *g)
{
	if (!g)
		return;
	g->shutdown();
	dlclose(g->library);
	om_free(g);
}
