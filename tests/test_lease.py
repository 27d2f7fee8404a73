"""Leases, windows and views: what they show, and how long the bytes stay."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest

import omnimem
from omnimem import Store, _core

from .conftest import data

MIB = 1 << 20
Opener = Callable[..., Store]


def test_lease_object(store: Store) -> None:
    store.add("a", data(1000))
    lease = store.lease("a")
    assert isinstance(lease, omnimem.Lease)
    assert (lease.name, lease.nbytes, lease.dtype, lease.shape) == ("a", 1000, "uint8", (1000,))
    assert lease.writable is False
    assert lease.released is False
    assert "'a'" in repr(lease)
    with lease as same:
        assert same is lease
    assert lease.released
    assert "released" in repr(lease)
    lease.release()
    for call in (
        lambda: memoryview(lease),
        lambda: lease.__dlpack__(),
        lambda: lease.window(0, "uint8", (1,)),
        lambda: lease.__enter__(),
        lambda: lease.name,
        lambda: lease.nbytes,
        lambda: lease.dtype,
        lambda: lease.shape,
    ):
        with pytest.raises(omnimem.ClosedError, match="released"):
            call()
    with pytest.raises(TypeError):
        omnimem.Lease()  # type: ignore[call-arg]


def test_exit_releases_after_an_error(store: Store) -> None:
    store.add("a", b"x")
    with pytest.raises(ZeroDivisionError), store.lease("a"):
        raise ZeroDivisionError
    assert store.info("a").leases == 0


def test_a_dropped_lease_releases(store: Store) -> None:
    store.add("a", b"x")
    store.lease("a")
    gc.collect()
    assert store.info("a").leases == 0
    assert store.stats().leases == 0


def test_buffer(store: Store) -> None:
    store.add("a", memoryview(data(1000)).cast("B", (10, 100)))
    lease = store.lease("a")
    view = memoryview(lease)
    assert (view.ndim, view.format, view.itemsize, view.nbytes) == (1, "B", 1, 1000)
    assert view.readonly
    assert view.contiguous
    assert view == data(1000)
    with pytest.raises((TypeError, BufferError)):
        (ctypes.c_char * 10).from_buffer(lease)
    with pytest.raises(TypeError):
        view[0] = 1
    with pytest.raises(TypeError):
        view.cast("B", (2, 2))
    view.release()
    lease.release()
    with store.lease("a", write=True) as lease, memoryview(lease) as view:
        assert not view.readonly
        view[:4] = b"wxyz"
    assert bytes(store.lease("a"))[:4] == b"wxyz"


def test_empty_block(store: Store) -> None:
    store.add("a", b"")
    store.evict("a")
    with store.lease("a") as lease:
        assert lease.nbytes == 0
        assert bytes(lease) == b""
        assert lease.shape == (0,)
        assert lease.window(0, "float32", (0, 5)).nbytes == 0
        assert bytes(lease.window(0, "float32", (0, 5))) == b""
    with store.lease("a", write=True) as lease:
        assert lease.writable


def test_views_outlive_everything(open_store: Opener) -> None:
    store = open_store()
    store.add("a", data(MIB))
    lease = store.lease("a")
    view = memoryview(lease)
    assert store.stats().exported_bytes == MIB
    lease.release()
    assert store.info("a").leases == 1
    assert store.evict("a") is False
    store.remove("a")
    for i in range(40):  # what could reuse the memory
        store.add(f"b{i}", data(MIB // 2, i))
    assert view == data(MIB)
    assert store.stats().exported_bytes == MIB
    store.close()
    assert view == data(MIB)
    del store
    gc.collect()
    assert view == data(MIB)


def test_exported_bytes(store: Store) -> None:
    store.add("a", data(MIB))
    store.add("b", data(1000))
    with store.lease("a") as lease:
        assert store.stats().exported_bytes == 0
        first, second = memoryview(lease), memoryview(lease)
        assert store.stats().exported_bytes == MIB
        third = lease.window(0, "uint8", (10,))
        first.release()
        second.release()
        assert store.stats().exported_bytes == MIB
        with store.lease("b") as other, memoryview(other):
            assert store.stats().exported_bytes == MIB + 1000
        del third
        assert store.stats().exported_bytes == 0
    capsule = store.lease("a").__dlpack__()
    assert store.stats().exported_bytes == MIB
    del capsule
    assert store.stats().exported_bytes == 0


def test_window(store: Store) -> None:
    store.add("a", data(4096))
    with store.lease("a") as lease:
        window = lease.window(16, "float32", (3, 5))
        assert isinstance(window, omnimem.Window)
        assert (window.name, window.offset, window.nbytes) == ("a", 16, 60)
        assert (window.dtype, window.shape, window.strides) == ("float32", (3, 5), (5, 1))
        view = memoryview(window)
        assert (view.format, view.shape, view.strides) == ("f", (3, 5), (20, 4))
        assert view.tobytes() == data(4096)[16:76]
        assert "float32(3, 5)" in repr(window)
    assert memoryview(window).tobytes() == data(4096)[16:76]  # a window is a view


def test_unaligned_window(store: Store) -> None:
    store.add("a", data(64))
    with store.lease("a") as lease:
        assert memoryview(lease.window(3, "int64", 2)).tobytes() == data(64)[3:19]


def test_strided_window(store: Store) -> None:
    store.add("a", bytes(range(24)))
    with store.lease("a") as lease:
        window = lease.window(1, "uint8", (2, 3), strides=(8, 2))
        assert memoryview(window).tolist() == [[1, 3, 5], [9, 11, 13]]
        assert not memoryview(window).contiguous
        with pytest.raises(BufferError, match="format"):
            memoryview(lease.window(0, "bfloat16", (2, 2), strides=(4, 1)))
        transposed = lease.window(0, "int16", (3, 4), strides=(1, 3))
        assert memoryview(transposed).f_contiguous
        assert memoryview(transposed).tobytes() == b"".join(
            bytes([2 * (i + 3 * j), 2 * (i + 3 * j) + 1]) for i in range(3) for j in range(4)
        )
        repeated = lease.window(5, "uint8", (2, 3), strides=(0, 1))
        assert memoryview(repeated).tolist() == [[5, 6, 7], [5, 6, 7]]


def test_window_without_buffer_format_is_bytes(store: Store) -> None:
    store.add("a", data(64))
    with store.lease("a") as lease:
        view = memoryview(lease.window(8, "bfloat16", (2, 3)))
        assert (view.format, view.shape) == ("B", (12,))
        assert view == data(64)[8:20]


def test_zero_dimensional_window(store: Store) -> None:
    store.add("a", data(64))
    with store.lease("a") as lease:
        view = memoryview(lease.window(8, "int32", ()))
        assert (view.ndim, view.shape, view.nbytes) == (0, (), 4)
        assert view.tobytes() == data(64)[8:12]


@pytest.mark.parametrize(
    ("offset", "dtype", "shape", "strides"),
    [
        (0, "uint8", (101,), None),
        (100, "uint8", (1,), None),
        (101, "uint8", (0,), None),
        (97, "float32", (1,), None),
        (0, "float32", (5, 6), None),
        (0, "uint8", (-1,), None),
        (0, "uint8", (2**40, 2**40), None),
        (0, "complex128", (2**62,), None),
        (2**62, "uint8", (1,), None),
        (0, "uint8", (2, 2), (100, 1)),
        (0, "uint8", (2, 2), (2**62, 2**62)),
        (0, "uint8", (2,), (-1,)),
        (0, "uint8", (2, 2), (1,)),
        (0, "float4_e2m1fn", (2, 2), (4, 1)),
        (0, "uint8", (1,) * 17, None),
        (-1, "uint8", (1,), None),
        (0, "float33", (1,), None),
        (0, "nonsense", (1,), None),
        (0, "uint8", (2**70,), None),
    ],
)
def test_bad_windows(
    store: Store,
    offset: int,
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
) -> None:
    if "a" not in store:
        store.add("a", data(100))
    with store.lease("a") as lease, pytest.raises(ValueError):
        lease.window(offset, dtype, shape, strides)


def test_window_bounds_tell_the_sizes(store: Store) -> None:
    store.add("a", data(100))
    with store.lease("a") as lease, pytest.raises(ValueError, match=r"120 .*offset 8.* 100 bytes"):
        lease.window(8, "float32", (5, 6))


def test_windows_reach_the_last_byte(store: Store) -> None:
    store.add("a", data(100))
    with store.lease("a") as lease:
        assert bytes(lease.window(99, "uint8", (1,))) == data(100)[99:]
        assert bytes(lease.window(100, "uint8", (0,))) == b""
        assert lease.window(96, "float4_e2m1fn", (8,)).nbytes == 4
        assert lease.window(96, "float4_e2m1fn_x2", (4,)).nbytes == 4
        assert lease.window(97, "float6_e2m3fn", (4,)).nbytes == 3


def test_write_window(store: Store) -> None:
    store.add("a", bytes(100))
    with store.lease("a", write=True) as lease:
        memoryview(lease.window(8, "int32", (2,)))[1] = -1
    assert bytes(store.lease("a")) == bytes(12) + b"\xff" * 4 + bytes(84)
    with store.lease("a") as lease:
        assert memoryview(lease.window(8, "int32", (2,))).readonly


@pytest.mark.parametrize(
    ("dtype", "code"),
    [
        ("bfloat16", (4, 16, 1)),
        ("float16", (2, 16, 1)),
        ("float32", (2, 32, 1)),
        ("float64", (2, 64, 1)),
        ("int8", (0, 8, 1)),
        ("int64", (0, 64, 1)),
        ("uint8", (1, 8, 1)),
        ("uint64", (1, 64, 1)),
        ("bool", (6, 8, 1)),
        ("complex64", (5, 64, 1)),
        ("float8_e3m4", (7, 8, 1)),
        ("float8_e4m3", (8, 8, 1)),
        ("float8_e4m3b11fnuz", (9, 8, 1)),
        ("float8_e4m3fn", (10, 8, 1)),
        ("float8_e4m3fnuz", (11, 8, 1)),
        ("float8_e5m2", (12, 8, 1)),
        ("float8_e5m2fnuz", (13, 8, 1)),
        ("float8_e8m0fnu", (14, 8, 1)),
        ("float6_e2m3fn", (15, 6, 1)),
        ("float6_e3m2fn", (16, 6, 1)),
        ("float4_e2m1fn", (17, 4, 1)),
        ("float4_e2m1fn_x2", (17, 4, 2)),
        ("int4", (0, 4, 1)),
        ("float32x4", (2, 32, 4)),
    ],
)
def test_dtype_names(store: Store, dtype: str, code: tuple[int, int, int]) -> None:
    assert _core._dtype_code(dtype) == code
    store.add("a", data(96))
    with store.lease("a") as lease:
        assert lease.window(0, dtype, (1,)).dtype == dtype


@pytest.mark.parametrize(
    "dtype", ["", "float", "32", "float0", "uint8x", "uint8x0", "int8 ", "Float32"]
)
def test_bad_dtype_names(dtype: str) -> None:
    with pytest.raises(ValueError, match="dtype"):
        _core._dtype_code(dtype)
