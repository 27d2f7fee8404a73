"""DLPack with the libraries that speak it: every type that both sides know, both ways.

torch and NumPy come with the tests; the others are tried where they are installed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import omnimem
from omnimem import Store

from .capsules import Versioned, name_of, opened
from .conftest import data

MIB = 1 << 20
Opener = Callable[..., Store]

PLAIN = (
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float32", "float64", "bool", "complex64", "complex128"),
)
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
TORCH = (*PLAIN, "float16", "bfloat16", "complex32", *FLOAT8, "float4_e2m1fn_x2")
NUMPY = (*PLAIN, "float16")
JAX = (
    *("int8", "int16", "int32", "uint8", "uint16", "uint32", "float32", "bool", "complex64"),
    *("float16", "bfloat16", *FLOAT8),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
)
TVM = (*PLAIN[:11], "float16", "bfloat16", *FLOAT8, "float4_e2m1fn_x2", "float6_e2m3fn")
ARROW = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32")
STRICT = PLAIN


def window_of(store: Store, dtype: str, shape: tuple[int, ...]) -> Any:
    """Bytes that are a value of any type (0 or 1 each), as a window of a block."""
    if dtype not in store:
        store.add(dtype, bytes([0, 1] * 2048))
    with store.lease(dtype) as lease:
        return lease.window(0, dtype, shape)


def both_ways(
    store: Store, dtype: str, consume: Callable[[Any], Any], name: Callable[[Any], str]
) -> None:
    """What the library makes of a window has its type and shape; and comes back as it is."""
    for i, shape in enumerate(((3, 4), (), (5,), (2, 0, 3), (1, 1, 2))):
        window = window_of(store, dtype, shape)
        array = consume(window)
        assert name(array) == dtype
        assert tuple(array.shape) == shape
        store.add(f"{dtype} back {i}", array)
        info = store.info(f"{dtype} back {i}")
        assert (info.dtype, info.shape, info.nbytes) == (dtype, shape, window.nbytes)
        with store.lease(f"{dtype} back {i}") as lease:
            assert bytes(lease) == bytes([0, 1] * 2048)[: window.nbytes]
        store.take(f"{dtype} taken {i}", array)
        del array, window
        with store.lease(f"{dtype} taken {i}") as lease:
            assert bytes(lease) == bytes([0, 1] * 2048)[: lease.nbytes]
        for block in (f"{dtype} back {i}", f"{dtype} taken {i}"):
            store.evict(block)
            assert bytes(store.lease(block)) == bytes([0, 1] * 2048)[: store.info(block).nbytes]
            store.remove(block)


@pytest.fixture
def io_backend() -> str:
    return "threads"  # nothing here depends on it


@pytest.fixture(autouse=True)
def _all_goes_back(store: Store) -> Iterator[None]:
    yield
    if store.stats().exported_bytes:
        gc.collect()
    assert store.stats().exported_bytes == 0


@pytest.mark.parametrize("dtype", NUMPY)
def test_numpy_both_ways(store: Store, dtype: str) -> None:
    np = pytest.importorskip("numpy")
    both_ways(store, dtype, np.from_dlpack, lambda array: str(array.dtype))


@pytest.mark.parametrize("dtype", TORCH)
def test_torch_both_ways(store: Store, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    both_ways(store, dtype, torch.from_dlpack, lambda array: str(array.dtype).split(".")[1])


@pytest.mark.parametrize("dtype", JAX)
def test_jax_both_ways(store: Store, dtype: str) -> None:
    jax = pytest.importorskip("jax")
    both_ways(store, dtype, jax.numpy.from_dlpack, lambda array: str(array.dtype))
    window = window_of(store, dtype, (64,))
    array = jax.numpy.from_dlpack(window)
    assert array.unsafe_buffer_pointer() == opened(window.__dlpack__()).tensor.data


@pytest.mark.parametrize("dtype", TVM)
def test_tvm_ffi_both_ways(store: Store, dtype: str) -> None:
    tvm_ffi = pytest.importorskip("tvm_ffi")

    def name(array: Any) -> str:
        return str(array.dtype).replace("x2", "_x2") if "x2" in dtype else str(array.dtype)

    both_ways(store, dtype, tvm_ffi.from_dlpack, name)


@pytest.mark.parametrize("dtype", STRICT)
def test_array_api_strict_both_ways(store: Store, dtype: str) -> None:
    """It asks for everything that the array API says, and refuses what that does not."""
    strict = pytest.importorskip("array_api_strict")

    def consume(window: Any) -> Any:
        return strict.from_dlpack(window, device=strict.Device("CPU_DEVICE"), copy=None)

    both_ways(store, dtype, consume, lambda array: str(array.dtype).split(".")[1])
    copied = strict.from_dlpack(window_of(store, dtype, (4,)), copy=True)
    assert copied.shape == (4,)


@pytest.mark.parametrize("dtype", ARROW)
def test_pyarrow(store: Store, dtype: str) -> None:
    """It gives arrays of one dimension, by DLPack, and tensors by the buffer protocol."""
    np = pytest.importorskip("numpy")
    arrow = pytest.importorskip("pyarrow")
    values = np.arange(100).astype(dtype)
    for call in (store.add, store.take):
        call("a", arrow.array(values)[3:])
        assert (store.info("a").dtype, store.info("a").shape) == (dtype, (97,))
        assert bytes(store.lease("a")) == values[3:].tobytes()
        store.remove("a")
    store.add("a", arrow.Tensor.from_numpy(values.reshape(10, 10).T))
    assert (store.info("a").dtype, store.info("a").shape) == (dtype, (10, 10))
    assert bytes(store.lease("a")) == values.reshape(10, 10).T.tobytes()
    with store.lease("a") as lease:
        assert arrow.py_buffer(lease).to_pybytes() == bytes(lease)
    with pytest.raises(TypeError, match="null"):
        store.add("b", arrow.array([1, None]))


def test_jax_arrays_do_not_change(store: Store) -> None:
    """They come in capsules that cannot say so."""
    jax = pytest.importorskip("jax")
    array = jax.numpy.arange(1000)
    store.take("a", array)
    with store.lease("a", write=True) as lease:
        memoryview(lease)[:8] = b"\xff" * 8
    assert (array == jax.numpy.arange(1000)).all()


def test_torch_asks_for_devices_and_copies(store: Store) -> None:
    torch = pytest.importorskip("torch")
    window = window_of(store, "float32", (4,))
    shared = torch.from_dlpack(window, device="cpu", copy=False)
    copied = torch.from_dlpack(window, device="cpu", copy=True)
    assert torch.equal(shared, copied)
    assert shared.data_ptr() == opened(window.__dlpack__()).tensor.data != copied.data_ptr()
    del window, shared
    assert store.stats().exported_bytes == 0
    with pytest.raises(BufferError):
        torch.from_dlpack(window_of(store, "float4_e2m1fn", (4,)))  # it knows them by two


def test_numpy_asks_for_devices_and_copies(store: Store) -> None:
    np = pytest.importorskip("numpy")
    window = window_of(store, "float32", (4,))
    shared, copied = np.from_dlpack(window, device="cpu"), np.from_dlpack(window, copy=True)
    assert (shared.flags.writeable, copied.flags.writeable) == (False, True)
    assert np.from_dlpack(window, copy=False).ctypes.data == shared.ctypes.data
    assert copied.ctypes.data != shared.ctypes.data
    with pytest.raises(RuntimeError, match="dtype"):
        np.from_dlpack(window_of(store, "bfloat16", (4,)))


@pytest.mark.parametrize("asked", [None, (0, 8), (1, 0)])
def test_what_others_export_is_what_we_export(store: Store, asked: Any) -> None:
    """Field by field, beside NumPy's and torch's own capsules of the same array."""
    np = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    array = np.arange(24, dtype="float32").reshape(2, 3, 4)
    store.add("a", array)
    ours = opened(store.lease("a").__dlpack__(max_version=asked))
    for peer in (array, torch.from_numpy(array)):
        capsule = peer.__dlpack__(max_version=asked)
        theirs = opened(capsule)
        assert isinstance(ours, Versioned) is isinstance(theirs, Versioned)
        assert name_of(capsule) == (b"dltensor_versioned" if asked == (1, 0) else b"dltensor")
        for field in ("device_type", "device_id", "ndim", "code", "bits", "lanes", "byte_offset"):
            assert getattr(ours.tensor, field) == getattr(theirs.tensor, field), field
        assert ours.tensor.shape[:3] == theirs.tensor.shape[:3]
        assert ours.tensor.strides[:3] == theirs.tensor.strides[:3]


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
    for name in TORCH[:-1]:
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
