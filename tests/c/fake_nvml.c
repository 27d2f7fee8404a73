/*
 * A stand-in for libnvidia-ml.so.1, which tests load by OMNIMEM_NVML: its devices are what FAKE_NVML says, one a
 * line, "uuid total free mig", in MiB. FAKE_NVML_OLD=1: a driver without the second version of memory. A device
 * of no bytes has fallen off the bus.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIB 1048576ull

struct memory {
	unsigned long long total, free, used;
};
struct memory_v2 {
	unsigned version;
	unsigned long long total, reserved, free, used;
};

static int open_count;

static int tell(unsigned index, char uuid[64], unsigned long long *total, unsigned long long *free,
                unsigned *mig)
{
	const char *line = getenv("FAKE_NVML");

	for (; line && index; index--) {
		line = strchr(line, '\n');
		line += line != NULL;
	}
	return line && sscanf(line, "%63s %llu %llu %u", uuid, total, free, mig) == 4 ? 0 : 2;
}

int nvmlInit_v2(void)
{
	open_count++;
	return getenv("FAKE_NVML") ? 0 : 9;
}

int nvmlShutdown(void)
{
	return --open_count < 0;
}

int nvmlDeviceGetCount_v2(unsigned *ret)
{
	unsigned long long total, free;
	char uuid[64];
	unsigned mig;

	for (*ret = 0; !tell(*ret, uuid, &total, &free, &mig); ++*ret)
		;
	return open_count < 1;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **ret)
{
	*ret = (char *)NULL + index + 1;
	return 0;
}

static unsigned index_of(void *device)
{
	return (unsigned)((char *)device - (char *)NULL) - 1;
}

int nvmlDeviceGetUUID(void *device, char *ret, unsigned size)
{
	unsigned long long total, free;
	unsigned mig;
	char uuid[64];

	if (tell(index_of(device), uuid, &total, &free, &mig))
		return 2;
	snprintf(ret, size, "%s", uuid);
	return 0;
}

int nvmlDeviceGetName(void *device, char *ret, unsigned size)
{
	snprintf(ret, size, "Fake %u", index_of(device));
	return 0;
}

int nvmlDeviceGetMigMode(void *device, unsigned *ret_current, unsigned *ret_pending)
{
	unsigned long long total, free;
	char uuid[64];

	*ret_pending = 0;
	return tell(index_of(device), uuid, &total, &free, ret_current);
}

int nvmlDeviceGetMemoryInfo(void *device, struct memory *ret)
{
	unsigned mig;
	char uuid[64];

	if (tell(index_of(device), uuid, &ret->total, &ret->free, &mig) || !ret->total)
		return 15;
	ret->total *= MIB;
	ret->free = ret->free * MIB + MIB; /* here what is reserved is free */
	return 0;
}

int nvmlDeviceGetMemoryInfo_v2(void *device, struct memory_v2 *ret)
{
	struct memory m;

	if (getenv("FAKE_NVML_OLD") || ret->version != (sizeof(*ret) | 2u << 24) ||
	    nvmlDeviceGetMemoryInfo(device, &m))
		return 13;
	ret->total = m.total;
	ret->free = m.free - MIB;
	ret->reserved = MIB;
	return 0;
}
