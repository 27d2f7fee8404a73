/*
 * dlpack: our own declarations of the DLPack 1.3 ABI (CPU part).
 *
 * A capsule named "dltensor_versioned" (or "dltensor", the form before 1.0) carries a pointer to a
 * managed tensor. Whoever takes it renames the capsule to "used_...", and calls `deleter` exactly
 * once, on any thread. The layout is compared with a published header by tests/test_dlpack.py.
 */
#ifndef OM_DLPACK_H
#define OM_DLPACK_H

#include <stdint.h>

#define OM_DL_MAJOR 1
#define OM_DL_MINOR 3

#define OM_DL_NAME           "dltensor"
#define OM_DL_NAME_USED      "used_dltensor"
#define OM_DL_VERSIONED      "dltensor_versioned"
#define OM_DL_VERSIONED_USED "used_dltensor_versioned"

enum om_dl_device_type {
	OM_DL_CPU = 1,
	OM_DL_CUDA_HOST = 3, /* page-locked RAM: the CPU reads it */
	OM_DL_ROCM_HOST = 11,
};

enum om_dl_code {
	OM_DL_INT,
	OM_DL_UINT,
	OM_DL_FLOAT,
	OM_DL_OPAQUE,
	OM_DL_BFLOAT,
	OM_DL_COMPLEX,
	OM_DL_BOOL,
	OM_DL_FLOAT8_E3M4,
	OM_DL_FLOAT8_E4M3,
	OM_DL_FLOAT8_E4M3B11FNUZ,
	OM_DL_FLOAT8_E4M3FN,
	OM_DL_FLOAT8_E4M3FNUZ,
	OM_DL_FLOAT8_E5M2,
	OM_DL_FLOAT8_E5M2FNUZ,
	OM_DL_FLOAT8_E8M0FNU,
	OM_DL_FLOAT6_E2M3FN,
	OM_DL_FLOAT6_E3M2FN,
	OM_DL_FLOAT4_E2M1FN,
	OM_DL_CODES
};

enum om_dl_flag {
	OM_DL_READ_ONLY = 1,
	OM_DL_IS_COPIED = 2,
	OM_DL_SUBBYTE_PADDED = 4,
};

struct om_dl_device {
	int32_t type; /* enum om_dl_device_type */
	int32_t id;
};

struct om_dl_type {
	uint8_t code; /* enum om_dl_code */
	uint8_t bits;
	uint16_t lanes;
};

struct om_dl_tensor {
	void *data;
	struct om_dl_device device;
	int32_t ndim;
	struct om_dl_type dtype;
	int64_t *shape;
	int64_t *strides; /* in elements; NULL: C-contiguous */
	uint64_t byte_offset;
};

struct om_dl_managed {
	struct om_dl_tensor tensor;
	void *manager_ctx;
	void (*deleter)(struct om_dl_managed *self);
};

struct om_dl_version {
	uint32_t major, minor;
};

struct om_dl_managed_versioned {
	struct om_dl_version version;
	void *manager_ctx;
	void (*deleter)(struct om_dl_managed_versioned *self);
	uint64_t flags; /* enum om_dl_flag */
	struct om_dl_tensor tensor;
};

#endif
