"""DLPack: our declarations against the published header, and the names of element types."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from omnimem import Store, _core

from .capsules import Forged, opened
from .conftest import data

ROOT = Path(__file__).resolve().parent.parent


LAYOUT = r"""
#include <stddef.h>
#include <dlpack/dlpack.h>
#include "bind/dlpack.h"
#define SAME(a, b) _Static_assert((long long)(a) == (long long)(b), #a " differs from " #b)
SAME(sizeof(DLTensor), sizeof(struct om_dl_tensor));
SAME(sizeof(DLDataType), sizeof(struct om_dl_type));
SAME(sizeof(DLDevice), sizeof(struct om_dl_device));
SAME(sizeof(DLManagedTensor), sizeof(struct om_dl_managed));
SAME(sizeof(DLManagedTensorVersioned), sizeof(struct om_dl_managed_versioned));
#define FIELD(t, f, u, g) SAME(offsetof(t, f), offsetof(struct u, g))
FIELD(DLTensor, data, om_dl_tensor, data);
FIELD(DLTensor, device, om_dl_tensor, device);
FIELD(DLTensor, ndim, om_dl_tensor, ndim);
FIELD(DLTensor, dtype, om_dl_tensor, dtype);
FIELD(DLTensor, shape, om_dl_tensor, shape);
FIELD(DLTensor, strides, om_dl_tensor, strides);
FIELD(DLTensor, byte_offset, om_dl_tensor, byte_offset);
FIELD(DLDataType, code, om_dl_type, code);
FIELD(DLDataType, bits, om_dl_type, bits);
FIELD(DLDataType, lanes, om_dl_type, lanes);
FIELD(DLDevice, device_type, om_dl_device, type);
FIELD(DLDevice, device_id, om_dl_device, id);
FIELD(DLManagedTensor, dl_tensor, om_dl_managed, tensor);
FIELD(DLManagedTensor, manager_ctx, om_dl_managed, manager_ctx);
FIELD(DLManagedTensor, deleter, om_dl_managed, deleter);
FIELD(DLManagedTensorVersioned, version, om_dl_managed_versioned, version);
FIELD(DLManagedTensorVersioned, manager_ctx, om_dl_managed_versioned, manager_ctx);
FIELD(DLManagedTensorVersioned, deleter, om_dl_managed_versioned, deleter);
FIELD(DLManagedTensorVersioned, flags, om_dl_managed_versioned, flags);
FIELD(DLManagedTensorVersioned, dl_tensor, om_dl_managed_versioned, tensor);
SAME(DLPACK_MAJOR_VERSION, OM_DL_MAJOR);
_Static_assert(DLPACK_MINOR_VERSION <= OM_DL_MINOR || DLPACK_MAJOR_VERSION == 1, "minor");
SAME(DLPACK_FLAG_BITMASK_READ_ONLY, OM_DL_READ_ONLY);
SAME(DLPACK_FLAG_BITMASK_IS_COPIED, OM_DL_IS_COPIED);
SAME(DLPACK_FLAG_BITMASK_IS_SUBBYTE_TYPE_PADDED, OM_DL_SUBBYTE_PADDED);
SAME(kDLCPU, OM_DL_CPU);
SAME(kDLCUDAHost, OM_DL_CUDA_HOST);
SAME(kDLROCMHost, OM_DL_ROCM_HOST);
SAME(kDLInt, OM_DL_INT);
SAME(kDLUInt, OM_DL_UINT);
SAME(kDLFloat, OM_DL_FLOAT);
SAME(kDLOpaqueHandle, OM_DL_OPAQUE);
SAME(kDLBfloat, OM_DL_BFLOAT);
SAME(kDLComplex, OM_DL_COMPLEX);
SAME(kDLBool, OM_DL_BOOL);
SAME(kDLFloat8_e3m4, OM_DL_FLOAT8_E3M4);
SAME(kDLFloat8_e4m3, OM_DL_FLOAT8_E4M3);
SAME(kDLFloat8_e4m3b11fnuz, OM_DL_FLOAT8_E4M3B11FNUZ);
SAME(kDLFloat8_e4m3fn, OM_DL_FLOAT8_E4M3FN);
SAME(kDLFloat8_e4m3fnuz, OM_DL_FLOAT8_E4M3FNUZ);
SAME(kDLFloat8_e5m2, OM_DL_FLOAT8_E5M2);
SAME(kDLFloat8_e5m2fnuz, OM_DL_FLOAT8_E5M2FNUZ);
SAME(kDLFloat8_e8m0fnu, OM_DL_FLOAT8_E8M0FNU);
SAME(kDLFloat6_e2m3fn, OM_DL_FLOAT6_E2M3FN);
SAME(kDLFloat6_e3m2fn, OM_DL_FLOAT6_E3M2FN);
SAME(kDLFloat4_e2m1fn, OM_DL_FLOAT4_E2M1FN);
int main(void) { return 0; }
"""


def test_layout_is_that_of_the_published_header(tmp_path: Path) -> None:
    tvm_ffi = pytest.importorskip("tvm_ffi")
    headers = [
        path.parent.parent for path in Path(tvm_ffi.__file__).parent.rglob("dlpack/dlpack.h")
    ]
    assert headers
    source = tmp_path / "layout.c"
    source.write_text(LAYOUT)
    for include in headers:
        command = ["cc", "-std=c11", "-fsyntax-only", f"-I{include}", f"-I{ROOT / 'csrc'}", source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


# ---- names of element types ----


def test_codes_agree_with_torch() -> None:
    torch = pytest.importorskip("torch")
    for name in ("float8_e4m3fn", "bfloat16", "complex64", "bool", "int64"):
        capsule = torch.zeros(2, dtype=getattr(torch, name)).__dlpack__(max_version=(1, 0))
        tensor = opened(capsule).tensor
        assert _core._dtype_code(name) == (tensor.code, tensor.bits, tensor.lanes)


def test_every_type_that_comes_in_has_a_name_that_leads_back(store: Store) -> None:
    accepted = 0
    for code in range(20):
        for bits in (*range(1, 20), 24, 31, 32, 33, 64, 127, 128, 129, 255):
            for lanes in (1, 2, 3, 4, 16):
                try:
                    store.add("a", Forged(data(4096), (8,), dtype=(code, bits, lanes)))
                except BufferError:
                    continue
                accepted += 1
                info = store.info("a")
                assert info.dtype is not None
                assert _core._dtype_code(info.dtype) == (code, bits, lanes)
                assert info.nbytes == (8 * bits * lanes + 7) // 8
                with store.lease("a") as lease:
                    assert bytes(lease) == data(4096)[: info.nbytes]
                    tensor = opened(lease.window(0, info.dtype, (8,)).__dlpack__()).tensor
                    assert (tensor.code, tensor.bits, tensor.lanes) == (code, bits, lanes)
                store.remove("a")
    assert accepted == (6 * 8 + 8 + 2 + 1) * 5  # powers of two of six bases; fp8, fp6, fp4


@pytest.mark.parametrize(
    "name",
    [
        *("", "float", "float7", "float8_e4m3fn_x", "float8_e4m3fn_x1", "float8_e4m3fn_x65536"),
        *("float32_x2", "int8x0", "int8x65536", "float4_e2m1fn_x2x2", "dlpack(3,64,1)", "opaque64"),
        *("uint3", "bool0", "int256", "float4_e2m1fn_x-2", "float4_e2m1fn_x2 "),
    ],
)
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(ValueError, match="dtype"):
        _core._dtype_code(name)
