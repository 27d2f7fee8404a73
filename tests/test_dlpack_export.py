"""DLPack, out: what capsules say, who keeps the bytes, what is refused."""

from __future__ import annotations

import ctypes
import enum
import gc
import sys
import threading
from typing import Any

import pytest

import omnimem
from omnimem import Store, _core

from .capsules import IS_COPIED, READ_ONLY, Versioned, api, consumed, name_of, opened
from .conftest import data

MIB = 1 << 20
VERSIONS = (None, (0, 0), (0, 8), (1, 0), (1, 3), (100, 3), (2**31 - 1, 0))


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
        assert name_of(capsule) == name
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


@pytest.fixture(params=["lease", "window", "block"])
def exporter(request: pytest.FixtureRequest, store: Store) -> Any:
    """What can be exported; all of it the same twelve int16."""
    store.add("a", memoryview(data(24)).cast("h", (3, 4)))
    if request.param == "lease":
        return store.lease("a")
    if request.param == "window":
        return store.lease("a").window(0, "int16", (3, 4))
    return store._block("a")


@pytest.mark.parametrize("version", VERSIONS)
def test_references(exporter: Any, version: tuple[int, int] | None) -> None:
    """A capsule holds the bytes, not the object that it came from."""
    before = sys.getrefcount(exporter)
    capsule = exporter.__dlpack__(max_version=version)
    assert (sys.getrefcount(exporter), sys.getrefcount(capsule)) == (before, 2)
    del capsule
    assert sys.getrefcount(exporter) == before


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("copy", [None, True, False])
def test_everything_asked_at_once(
    store: Store, exporter: Any, version: tuple[int, int] | None, copy: bool | None
) -> None:
    held, exported = store.info("a").leases, store.stats().exported_bytes
    capsule = exporter.__dlpack__(stream=None, max_version=version, dl_device=(1, 0), copy=copy)
    managed = opened(capsule)
    new = version is not None and version[0] >= 1
    assert isinstance(managed, Versioned) is new
    if isinstance(managed, Versioned):
        assert (managed.major, managed.minor) == (1, 3)
        writable = isinstance(exporter, _core.Block)  # blocks are shared
        assert managed.flags == (IS_COPIED if copy else 0 if writable else READ_ONLY)
    assert managed.tensor.shape[:2] == [3, 4]
    assert managed.tensor.strides[:2] == [4, 1]
    assert ctypes.string_at(managed.tensor.data, 24) == data(24)
    assert store.stats().exported_bytes == (exported if copy else 24)
    del capsule, managed
    assert (store.info("a").leases, store.stats().exported_bytes) == (held, exported)


@pytest.mark.parametrize("dtype", ["float4_e2m1fn", "float4_e2m1fn_x2", "float6_e2m3fn", "int4"])
def test_elements_below_a_byte_are_packed(store: Store, dtype: str) -> None:
    code, bits, lanes = _core._dtype_code(dtype)
    nbytes = (15 * bits * lanes + 7) // 8
    store.add("a", data(nbytes))
    with store.lease("a") as lease:
        managed = opened(lease.window(0, dtype, (3, 5)).__dlpack__(max_version=(1, 0)))
        assert isinstance(managed, Versioned)
        assert managed.flags == READ_ONLY
        tensor = managed.tensor
        assert (tensor.code, tensor.bits, tensor.lanes) == (code, bits, lanes)
        assert (tensor.shape[:2], tensor.strides[:2]) == ([3, 5], [5, 1])
        copied = opened(lease.window(0, dtype, (3, 5)).__dlpack__(copy=True))
        assert ctypes.string_at(copied.tensor.data, nbytes) == data(nbytes)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1), (1,) * 16])
@pytest.mark.parametrize("copy", [False, True])
def test_shapes(store: Store, shape: tuple[int, ...], copy: bool) -> None:
    nbytes = 8 if 0 not in shape else 0
    store.add("a", data(16))
    lease = store.lease("a")
    tensor = opened(lease.window(8, "complex64", shape).__dlpack__(copy=copy)).tensor
    assert tensor.ndim == len(shape)
    assert tuple(tensor.shape[: len(shape)]) == shape
    assert bool(tensor.data) is bool(nbytes)  # NULL where there is no element
    assert bool(tensor.strides)
    assert all(step >= 0 for step in tensor.strides[: len(shape)])
    if nbytes:
        assert ctypes.string_at(tensor.data, nbytes) == data(16)[8:]
        assert copy or tensor.data == opened(lease.__dlpack__()).tensor.data + 8


def test_alignment_of_what_comes_from_a_file(store: Store, file_of: Any) -> None:
    """Tensors of a checkpoint lie at any multiple of 8: a block of one begins on a cache line."""
    path = file_of(data(100_000))
    for offset in (0, 8, 24, 4104, 5000):
        store.add_file(f"b{offset}", path, offset, 1000)
        with store.lease(f"b{offset}") as lease:
            assert opened(lease.__dlpack__()).tensor.data % 64 == 0
    with store.lease("b8") as lease:
        copied = opened(lease.window(8, "uint8", (9,)).__dlpack__(copy=True)).tensor
        assert copied.data % 64 == 0


class Odd:
    """A value that is asked for an int, or a bool, and raises something of its own."""

    def __index__(self) -> int:
        raise ZeroDivisionError

    def __bool__(self) -> bool:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "keywords", [{"copy": Odd()}, {"max_version": (1, Odd())}, {"dl_device": (Odd(), 0)}]
)
def test_exceptions_of_arguments_pass(exporter: Any, keywords: dict[str, Any]) -> None:
    with pytest.raises(ZeroDivisionError):
        exporter.__dlpack__(**keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_version": (2**70, 0)},
        {"max_version": (1.0, 0)},
        {"max_version": [1, 0]},
        {"max_version": "10"},
        {"dl_device": (1,)},
        {"dl_device": (None, None)},
        {"dl_device": (2**70, 0)},
        {"dl_device": (3, 0), "copy": True},
        {"dl_device": (2, 0), "copy": False},
        {"stream": 0},
        {"stream": 2},
        {"stream": object()},
    ],
)
def test_more_refusals(store: Store, exporter: Any, keywords: dict[str, Any]) -> None:
    held = store.info("a").leases
    with pytest.raises(BufferError):
        exporter.__dlpack__(**keywords)
    assert store.info("a").leases == held


def test_enums_are_ints(exporter: Any) -> None:
    class Device(enum.IntEnum):
        CPU = 1

    capsule = exporter.__dlpack__(dl_device=(Device.CPU, False), max_version=(True, 0))
    assert name_of(capsule) == b"dltensor_versioned"


def test_a_released_lease_is_exported_no_more(store: Store) -> None:
    store.add("a", data(24))
    lease = store.lease("a")
    capsule = lease.__dlpack__()
    lease.release()
    with pytest.raises(omnimem.ClosedError, match="released"):
        lease.__dlpack__()
    assert ctypes.string_at(opened(capsule).tensor.data, 24) == data(24)


def test_each_capsule_is_one_view(store: Store) -> None:
    np = pytest.importorskip("numpy")
    store.add("a", data(24))
    lease = store.lease("a")
    capsules = [lease.__dlpack__(max_version=(1, 0)) for _ in range(3)]
    assert len({api.PyCapsule_GetPointer(c, name_of(c)) for c in capsules}) == 3
    lease.release()

    class Once:
        def __dlpack__(self, **_: Any) -> object:
            return capsules[0]

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    array = np.from_dlpack(Once())
    assert name_of(capsules[0]) == b"used_dltensor_versioned"
    with pytest.raises(ValueError):
        np.from_dlpack(Once())  # taken
    del capsules[:]
    gc.collect()
    assert store.info("a").leases == 1
    assert bytes(array) == data(24)
    del array
    assert store.info("a").leases == 0


def test_capsules_go_in_any_thread_and_any_order(store: Store) -> None:
    store.add("a", data(4096))
    capsules = [store.lease("a").__dlpack__(max_version=(i % 2, 0)) for i in range(64)]
    threads = [threading.Thread(target=capsules.pop, args=(0,)) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not capsules
    assert store.info("a").leases == 0


def test_a_deleter_needs_no_python(store: Store) -> None:
    """A consumer calls it from a thread that Python does not know, as soon as it likes."""
    store.add("a", data(4096))
    capsule = store.lease("a").__dlpack__(max_version=(1, 0))
    deleter, pointer = consumed(capsule)
    libc = ctypes.CDLL(None)
    thread = ctypes.c_ulong()
    assert libc.pthread_create(
        ctypes.byref(thread), None, ctypes.c_void_p(deleter), ctypes.c_void_p(pointer)
    ) == 0  # fmt: skip
    assert libc.pthread_join(thread, None) == 0
    del capsule
    assert store.info("a").leases == 0
    assert store.stats().exported_bytes == 0
