"""DLPack: our declarations against the published header, exports, imports, and liars."""

from __future__ import annotations

import ctypes
import gc
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem import Store, _core

from .conftest import data

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
Opener = Callable[..., Store]

READ_ONLY, IS_COPIED = 1, 2
TORCH_DTYPES = (
    *("bfloat16", "float16", "float32", "float64", "complex64", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


# ---- the ABI ----

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


# ---- the same in ctypes, to read our capsules and to forge others ----


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


class Legacy(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", DELETER))


api = ctypes.pythonapi
api.PyCapsule_New.restype = ctypes.py_object
api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
api.PyCapsule_GetPointer.restype = ctypes.c_void_p
api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
api.PyCapsule_GetName.restype = ctypes.c_char_p
api.PyCapsule_GetName.argtypes = (ctypes.py_object,)


def opened(capsule: object) -> Versioned | Legacy:
    name = api.PyCapsule_GetName(capsule)
    kind = Versioned if name == b"dltensor_versioned" else Legacy
    return kind.from_address(api.PyCapsule_GetPointer(capsule, name))


class Forged:
    """A producer whose capsule says what a test wants, and that counts its deleter's calls."""

    NAMES = (b"dltensor", b"dltensor_versioned")

    def __init__(
        self,
        content: bytes,
        shape: tuple[int, ...] | None,
        strides: tuple[int, ...] | None = None,
        *,
        dtype: tuple[int, int, int] = (1, 8, 1),
        versioned: bool = True,
        name: bytes | None = None,
        **fields: Any,
    ) -> None:
        self.deleted = 0
        self.bytes = ctypes.create_string_buffer(content, max(len(content), 1))
        self.legacy_only = not versioned
        tensor = Tensor(data=ctypes.addressof(self.bytes), device_type=1)
        tensor.code, tensor.bits, tensor.lanes = dtype
        if shape is not None:
            self.shape = (ctypes.c_int64 * max(len(shape), 1))(*shape)
            tensor.ndim = len(shape)
            tensor.shape = self.shape
        if strides is not None:
            self.strides = (ctypes.c_int64 * max(len(strides), 1))(*strides)
            tensor.strides = self.strides
        for key in ("data", "device_type", "ndim", "byte_offset"):
            if key in fields:
                setattr(tensor, key, fields.pop(key))
        self.deleter = DELETER(self._delete)
        kind = Versioned if versioned else Legacy
        self.managed = kind(tensor=tensor, deleter=self.deleter)
        if versioned:
            self.managed.major, self.managed.minor = 1, 0
        for key, value in fields.items():
            setattr(self.managed, key, value)
        self.name = name or self.NAMES[versioned]
        self.capsule = api.PyCapsule_New(ctypes.addressof(self.managed), self.name, None)

    def _delete(self, _: int) -> None:
        self.deleted += 1

    def __dlpack__(self, **keywords: Any) -> object:
        if self.legacy_only and keywords:
            raise TypeError("__dlpack__() takes no keywords")
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


# ---- out ----


def test_versioned_and_legacy_capsules(store: Store) -> None:
    store.add("a", memoryview(data(24)).cast("B").cast("i", (2, 3)))
    lease = store.lease("a")
    assert lease.__dlpack_device__() == (1, 0)
    for version, name in (
        (None, b"dltensor"),
        ((0, 8), b"dltensor"),
        ((1, 0), b"dltensor_versioned"),
        ((1, 3), b"dltensor_versioned"),
        ((100, 3), b"dltensor_versioned"),
    ):
        capsule = lease.__dlpack__(max_version=version)
        assert api.PyCapsule_GetName(capsule) == name
        managed = opened(capsule)
        tensor = managed.tensor
        assert (tensor.device_type, tensor.device_id, tensor.byte_offset) == (1, 0, 0)
        assert (tensor.code, tensor.bits, tensor.lanes) == (0, 32, 1)
        assert tensor.shape[: tensor.ndim] == [2, 3]
        assert tensor.strides[: tensor.ndim] == [3, 1]
        assert ctypes.string_at(tensor.data, 24) == data(24)
        if isinstance(managed, Versioned):
            assert (managed.major, managed.flags) == (1, READ_ONLY)


def test_write_leases_are_not_read_only(store: Store) -> None:
    store.add("a", bytes(8))
    with store.lease("a", write=True) as lease:
        assert opened(lease.__dlpack__(max_version=(1, 0))).flags == 0


def test_alignment(store: Store) -> None:
    for i, size in enumerate((1, 100, 5000, MIB)):
        store.add(f"b{i}", data(size))
        with store.lease(f"b{i}") as lease:
            assert opened(lease.__dlpack__()).tensor.data % 64 == 0


def test_copy(store: Store) -> None:
    store.add("a", data(2 * MIB))
    lease = store.lease("a")
    shared = lease.__dlpack__(max_version=(1, 0), copy=False)
    copied = lease.__dlpack__(max_version=(1, 0), copy=True)
    assert opened(copied).flags == IS_COPIED
    assert opened(copied).tensor.data != opened(shared).tensor.data
    assert ctypes.string_at(opened(copied).tensor.data, 2 * MIB) == data(2 * MIB)
    del shared
    lease.release()
    assert store.info("a").leases == 0
    assert store.stats().exported_bytes == 0
    assert ctypes.string_at(opened(copied).tensor.data, 2 * MIB) == data(2 * MIB)


def test_copy_of_a_strided_window_is_contiguous(store: Store) -> None:
    store.add("a", bytes(range(24)))
    with store.lease("a") as lease:
        capsule = lease.window(0, "int16", (3, 4), strides=(1, 3)).__dlpack__(copy=True)
        tensor = opened(capsule).tensor
        assert tensor.strides[:2] == [4, 1]
        want = memoryview(lease.window(0, "int16", (3, 4), strides=(1, 3))).tobytes()
        assert ctypes.string_at(tensor.data, 24) == want


@pytest.mark.parametrize(
    "keywords",
    [
        {"stream": 1},
        {"stream": -1},
        {"stream": "x"},
        {"dl_device": (2, 0)},
        {"dl_device": (1, 1)},
        {"dl_device": 1},
        {"dl_device": "cpu"},
        {"max_version": 1},
        {"max_version": (1,)},
        {"max_version": ("a", "b")},
    ],
)
def test_refusals_are_never_type_errors(store: Store, keywords: dict[str, Any]) -> None:
    store.add("a", bytes(8))
    with store.lease("a") as lease:
        for view in (lease, lease.window(0, "uint8", (4,))):
            with pytest.raises((BufferError, ValueError)):
                view.__dlpack__(**keywords)
        with pytest.raises(TypeError):
            lease.__dlpack__(unknown=1)  # type: ignore[call-arg]
        lease.__dlpack__(stream=None, max_version=None, dl_device=(1, 0), copy=None)
    del view
    assert store.stats().exported_bytes == 0


def test_a_consumed_capsule_is_left_alone(store: Store) -> None:
    np = pytest.importorskip("numpy")
    store.add("a", data(100))
    with store.lease("a") as lease:
        array = np.from_dlpack(lease)
    gc.collect()
    assert bytes(array) == data(100)
    assert store.stats().exported_bytes == 100
    part = array[10:20]
    del array
    assert store.stats().exported_bytes == 100
    assert bytes(part) == data(100)[10:20]
    del part
    assert store.stats().exported_bytes == 0
    assert store.info("a").leases == 0


def test_numpy(store: Store) -> None:
    np = pytest.importorskip("numpy")
    for i, dtype in enumerate(("float32", "int8", "uint16", "bool", "complex64", "float16")):
        array = (np.arange(60).reshape(3, 4, 5) % 2).astype(dtype)
        store.add(f"b{i}", array[:, ::-2, 1:])
        assert store.info(f"b{i}").dtype == dtype
        assert store.info(f"b{i}").shape == (3, 2, 4)
        with store.lease(f"b{i}") as lease:
            back = np.from_dlpack(lease)
            assert back.dtype == array.dtype
            assert (back == array[:, ::-2, 1:]).all()
            assert not back.flags.writeable
            assert (np.frombuffer(lease, dtype) == array[:, ::-2, 1:].ravel()).all()
    with store.lease("b0", write=True) as lease:
        np.from_dlpack(lease)[...] = 7
    assert (np.from_dlpack(store.lease("b0")) == 7).all()


def test_numpy_oddities(store: Store) -> None:
    np = pytest.importorskip("numpy")
    frozen = np.arange(5.0)
    frozen.flags.writeable = False
    record = np.zeros(3, [("a", "i4"), ("b", "f8")])
    cases = {
        "frozen": frozen,
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 4), "int32"),
        "record": record,
        "big": np.arange(5, dtype=">i4"),
        "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
        "repeated": np.broadcast_to(np.arange(3), (4, 3)),
    }
    for name, array in cases.items():
        store.add(name, array)
        assert bytes(store.lease(name)) == array.tobytes()
    assert store.info("scalar").shape == ()
    assert store.info("empty").shape == (0, 4)
    assert store.info("record").dtype is None
    assert store.info("big").dtype is None
    assert np.from_dlpack(store.lease("empty")).shape == (0, 4)
    assert np.from_dlpack(store.lease("scalar")) == 3.5


def test_torch(store: Store) -> None:
    torch = pytest.importorskip("torch")
    for name in TORCH_DTYPES:
        dtype = getattr(torch, name)
        size = dtype.itemsize
        source = torch.frombuffer(bytearray(bytes([0, 1] * (12 * size // 2))), dtype=dtype)
        source = source.reshape(3, 4)
        store.add(name, source.t())
        info = store.info(name)
        assert (info.dtype, info.shape) == (name, (4, 3))
        with store.lease(name) as lease:
            back = torch.from_dlpack(lease)
            assert back.dtype == dtype
            assert torch.equal(back.view(torch.uint8), source.t().contiguous().view(torch.uint8))
            window = lease.window(size, name, (2, 2))
            part = torch.from_dlpack(window)
            assert part.data_ptr() == back.data_ptr() + size
            assert (part.dtype, part.shape) == (dtype, (2, 2))
        store.remove(name)
    assert store.stats().exported_bytes > 0
    del back, part, window, lease
    assert store.stats().exported_bytes == 0


def test_torch_float4(store: Store) -> None:
    torch = pytest.importorskip("torch")
    store.add("a", data(32))
    with store.lease("a") as lease:
        tensor = torch.from_dlpack(lease.window(0, "float4_e2m1fn_x2", (4, 8)))
        assert tensor.dtype == torch.float4_e2m1fn_x2
        assert bytes(tensor.view(torch.uint8).flatten().tolist()) == data(32)
        store.add("b", tensor)
    assert store.info("b").dtype == "float4_e2m1fn_x2"


def test_torch_shapes(store: Store) -> None:
    torch = pytest.importorskip("torch")
    for i, tensor in enumerate(
        (torch.tensor(1.5), torch.zeros(0), torch.zeros(3, 0, 2), torch.ones(1).expand(4, 5))
    ):
        store.add(f"b{i}", tensor)
        back = torch.from_dlpack(store.lease(f"b{i}"))
        assert back.shape == tensor.shape
        assert torch.equal(back, tensor)
        store.evict(f"b{i}")


def test_torch_refusals(store: Store) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(BufferError, match="grad"):
        store.add("a", torch.zeros(3, requires_grad=True))
    with pytest.raises((BufferError, omnimem.DeviceError, ValueError, RuntimeError)):
        store.add("a", torch.zeros(3, device="meta"))
    assert store.names() == []


def test_a_tensor_outlives_the_store(open_store: Opener) -> None:
    torch = pytest.importorskip("torch")
    store = open_store()
    store.add("a", data(MIB))
    tensor = torch.from_dlpack(store.lease("a"))[5:]
    store.close()
    del store
    gc.collect()
    assert bytes(tensor[:10].tolist()) == data(MIB)[5:15]


# ---- in ----


@pytest.mark.parametrize("versioned", [True, False])
def test_forged_tensors_work(store: Store, versioned: bool) -> None:
    producer = Forged(data(24), (2, 3), dtype=(0, 32, 1), versioned=versioned)
    store.add("a", producer)
    assert producer.deleted == 1
    assert (store.info("a").dtype, store.info("a").shape) == ("int32", (2, 3))
    assert bytes(store.lease("a")) == data(24)
    with pytest.raises(BufferError, match="taken before"):
        store.add("b", producer)
    assert producer.deleted == 1
    store.add("c", Forged(data(24), (4,), byte_offset=5, versioned=versioned))
    assert bytes(store.lease("c")) == data(24)[5:9]
    store.add("d", Forged(data(24), (2, 2), (-3, 1), byte_offset=10, versioned=versioned))
    assert bytes(store.lease("d")) == data(24)[10:12] + data(24)[7:9]
    store.add("e", Forged(data(24), (1, 2), (2**62, 1), versioned=versioned))
    assert bytes(store.lease("e")) == data(24)[:2]
    store.add("f", Forged(b"", (0, 2**62, 2**62), versioned=versioned, data=None))
    assert store.info("f").nbytes == 0
    store.add("g", Forged(data(24), (), dtype=(2, 64, 1), versioned=versioned))
    assert bytes(store.lease("g")) == data(24)[:8]


def test_a_capsule_itself(store: Store) -> None:
    producer = Forged(data(24), (24,))
    store.add("a", producer.capsule)
    assert producer.deleted == 1
    assert bytes(store.lease("a")) == data(24)


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": (-1,)},
        {"shape": (2**40, 2**40)},
        {"shape": (2**62,), "dtype": (2, 64, 1)},
        {"shape": (4,), "data": None},
        {"shape": (4,), "ndim": -1},
        {"shape": (1,) * 16, "ndim": 17},
        {"shape": None, "ndim": 2},
        {"shape": (2, 2), "strides": (2**62, 1)},
        {"shape": (2, 2), "strides": (-(2**63), 1)},
        {"shape": (2, 2), "strides": (2**60, 1), "dtype": (2, 64, 1)},
        {"shape": (4,), "byte_offset": 2**64 - 1},
        {"shape": (4,), "dtype": (1, 0, 1)},
        {"shape": (4,), "dtype": (1, 8, 0)},
        {"shape": (4,), "dtype": (3, 64, 1)},
        {"shape": (4,), "dtype": (99, 8, 1)},
        {"shape": (4, 4), "strides": (8, 1), "dtype": (17, 4, 1)},
        {"shape": (4,), "major": 2},
        {"shape": (4,), "major": 0},
        {"shape": (4,), "flags": 4, "dtype": (17, 4, 1)},
    ],
)
@pytest.mark.parametrize("call", ["add", "take"])
def test_lies_are_refused(store: Store, lie: dict[str, Any], call: str) -> None:
    producer = Forged(data(64), **lie)
    with pytest.raises((BufferError, ValueError)):
        getattr(store, call)("a", producer)
    assert producer.deleted == 1
    assert store.names() == []
    store.check()


@pytest.mark.parametrize("device", [2, 4, 13, 999])
def test_other_devices_are_refused(store: Store, device: int) -> None:
    producer = Forged(data(64), (4,), device_type=device)
    with pytest.raises(omnimem.DeviceError, match=str(device)):
        store.add("a", producer)
    assert producer.deleted == 1


def test_wrong_capsules(store: Store) -> None:
    for name in (b"used_dltensor", b"used_dltensor_versioned", b"something"):
        producer = Forged(data(64), (4,), name=name)
        with pytest.raises(BufferError, match="capsule"):
            store.add("a", producer)
        assert producer.deleted == 0

    class NoCapsule:
        def __dlpack__(self, **_: object) -> object:
            return 3

    with pytest.raises(BufferError, match="capsule"):
        store.add("a", NoCapsule())


def test_errors_of_the_producer_pass(store: Store) -> None:
    class Broken:
        def __dlpack__(self, **_: object) -> object:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.add("a", Broken())


def test_failing_adds_call_the_deleter_once(open_store: Opener) -> None:
    store = open_store(host_limit="1MiB", disk_limit=0)
    store.add("a", b"x")
    for call in (store.add, store.take):
        producer = Forged(data(64), (64,))
        with pytest.raises(ValueError, match="a"):
            call("a", producer)
        assert producer.deleted == 1
        producer = Forged(bytes(2 * MIB), (2 * MIB,))
        with pytest.raises((omnimem.LimitError, omnimem.DiskFullError)):
            call("b", producer)
        assert producer.deleted == 1


# ---- take ----


def test_take_keeps_the_memory(store: Store) -> None:
    producer = Forged(data(MIB), (MIB,))
    address = ctypes.addressof(producer.bytes)
    store.take("a", producer)
    assert producer.deleted == 0
    with store.lease("a") as lease:
        assert opened(lease.__dlpack__()).tensor.data == address
        assert bytes(lease) == data(MIB)
    assert store.stats().host.used_bytes >= MIB
    assert store.evict("a")
    store.stats()
    assert producer.deleted == 1
    assert bytes(store.lease("a")) == data(MIB)
    store.remove("a")
    assert producer.deleted == 1


def test_take_lets_go_at_remove_and_close(open_store: Opener) -> None:
    store = open_store()
    first, second, third = (Forged(data(1000, i), (1000,)) for i in range(3))
    store.take("a", first)
    store.take("b", second)
    store.take("c", third)
    view = memoryview(store.lease("a"))
    store.remove("a")
    assert first.deleted == 0
    assert view == data(1000)
    view.release()
    store.stats()
    assert first.deleted == 1
    lease = store.lease("c")
    capsule = lease.__dlpack__()
    lease.release()
    store.close()
    assert (second.deleted, third.deleted) == (1, 0)
    assert ctypes.string_at(opened(capsule).tensor.data, 1000) == data(1000, 2)
    del store, lease
    gc.collect()
    assert third.deleted == 0
    del capsule
    open_store().stats()
    assert third.deleted == 1


def test_take_buffers(store: Store) -> None:
    content = bytearray(data(5000))
    store.take("a", content)
    with pytest.raises(BufferError):
        content.append(1)
    assert bytes(store.lease("a")) == data(5000)
    store.evict("a")
    store.stats()
    content.append(1)
    with pytest.raises(ValueError, match="contiguous"):
        store.take("b", memoryview(content)[::2])


def test_take_tensor(store: Store) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(1000)
    pointer = tensor.data_ptr()
    store.take("a", tensor)
    del tensor
    assert torch.from_dlpack(store.lease("a")).data_ptr() == pointer
    assert torch.equal(torch.from_dlpack(store.lease("a")), torch.arange(1000))
    with store.lease("a", write=True) as lease:
        torch.from_dlpack(lease)[0] = 5
    store.evict("a")
    assert torch.from_dlpack(store.lease("a"))[0] == 5


def test_writing_never_touches_read_only_memory(store: Store) -> None:
    content = data(5000)
    untouched = bytes(bytearray(content))
    store.take("a", content)
    with store.lease("a", write=True) as lease:
        memoryview(lease)[:5] = b"01234"
    assert content == untouched
    assert bytes(store.lease("a")) == b"01234" + untouched[5:]


def test_dtype_codes_agree_with_torch_names() -> None:
    torch = pytest.importorskip("torch")
    for name in ("float8_e4m3fn", "bfloat16", "complex64", "bool", "int64"):
        capsule = torch.zeros(2, dtype=getattr(torch, name)).__dlpack__(max_version=(1, 0))
        tensor = opened(capsule).tensor
        assert _core._dtype_code(name) == (tensor.code, tensor.bits, tensor.lanes)
