"""DLPack and buffers, in: `Store.add` copies, `Store.take` keeps the producer's memory."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem import Store

from .capsules import Forged, elements, opened
from .conftest import data, run_clean

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
Opener = Callable[..., Store]


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


# ---- strided ----


@pytest.mark.parametrize("versioned", [True, False])
def test_strided_elements(store: Store, versioned: bool) -> None:
    """Reversed, repeated, permuted, with gaps: what comes in is every element, in order."""
    rng = random.Random(5)
    content = data(20_000)
    for round in range(150):
        size = rng.choice((1, 2, 4, 8, 16))
        shape = tuple(rng.randrange(1, 6) for _ in range(rng.randrange(1, 5)))
        strides = tuple(rng.choice((-7, -3, -1, 0, 1, 2, 5, 11)) for _ in shape)
        low = sum(min((n - 1) * s, 0) for n, s in zip(shape, strides, strict=True))
        offset = -low * size + rng.randrange(8)
        producer = Forged(
            content, shape, strides, dtype=(1, size * 8 // 2, 2), byte_offset=offset,
            versioned=versioned,
        )  # fmt: skip
        store.add("a", producer)
        assert producer.deleted == 1
        want = elements(content, size, shape, strides, offset)
        with store.lease("a") as lease:
            assert bytes(lease) == want, (round, shape, strides, size)
            assert (lease.shape, lease.nbytes) == (shape, len(want))
        store.remove("a")
        producer = Forged(
            content, shape, strides, dtype=(1, size * 8 // 2, 2), byte_offset=offset,
            versioned=versioned,
        )  # fmt: skip
        contiguous = all(
            n == 1 or s == math.prod(shape[i + 1 :])
            for i, (n, s) in enumerate(zip(shape, strides, strict=True))
        )
        if contiguous:
            store.take("a", producer)
            assert producer.deleted == 0
            assert bytes(store.lease("a")) == want
            store.remove("a")
        else:
            with pytest.raises(ValueError, match="contiguous"):
                store.take("a", producer)
        assert producer.deleted == 1


def test_strided_buffers(store: Store) -> None:
    np = pytest.importorskip("numpy")
    base = np.frombuffer(data(5000), [("a", "u1"), ("b", "V4")])["b"].reshape(10, 20, 5)
    for view in (base.T, base[::-1, ::3], base[:, 1:2], np.broadcast_to(base[:1], (3, 20, 5))):
        store.add("a", view)
        assert store.info("a").dtype is None
        assert bytes(store.lease("a")) == view.tobytes()
        store.remove("a")
        with pytest.raises(ValueError, match="contiguous"):
            store.take("a", view)


def test_what_cannot_fit_is_not_copied_first(open_store: Opener) -> None:
    """A repeated element is as large as it says; nothing may be spent on one that is refused."""
    store = open_store(host_limit="1MiB", disk_limit=0)
    for shape in ((2**30,), (2**20, 2**20), (2**50, 2)):
        producer = Forged(b"x" * 8, shape, (0,) * len(shape))
        with pytest.raises((omnimem.LimitError, omnimem.DiskFullError)):
            store.add("a", producer)
        assert producer.deleted == 1
    store.add("a", Forged(b"x", (2**19,), (0,)))
    assert bytes(store.lease("a")) == b"x" * 2**19


# ---- odd producers ----


def test_bare_producers(store: Store) -> None:
    """From before DLPack 1.0: no keywords, no __dlpack_device__."""

    class Bare:
        def __init__(self) -> None:
            self.forged = Forged(data(24), (24,), versioned=False)

        def __dlpack__(self, stream: None = None) -> object:
            return self.forged.capsule

    producer = Bare()
    store.add("a", producer)
    assert bytes(store.lease("a")) == data(24)
    assert producer.forged.deleted == 1


def test_a_producer_that_refuses_is_asked_for_its_buffer(store: Store) -> None:
    class Refuses(bytearray):
        def __dlpack__(self, **_: Any) -> object:
            raise BufferError("not like this")

    store.add("a", Refuses(data(24)))
    assert bytes(store.lease("a")) == data(24)
    store.take("b", Refuses(data(24)))
    assert bytes(store.lease("b")) == data(24)


def test_device_ids_are_not_looked_at(store: Store) -> None:
    """jax numbers its CPU devices; all of them are this memory."""
    for i, (kind, number) in enumerate(((1, 0), (1, 3), (3, 1), (11, 0), (1, -1))):
        store.add(f"b{i}", Forged(data(24), (24,), device_type=kind, device_id=number))
        assert bytes(store.lease(f"b{i}")) == data(24)


def test_newer_minor_versions_and_flags_are_read(store: Store) -> None:
    store.add("a", Forged(data(24), (24,), minor=99, flags=2**63 | 4))
    assert bytes(store.lease("a")) == data(24)


def test_numpy_types_without_a_format(store: Store) -> None:
    """What ml_dtypes adds to NumPy has no place in the buffer protocol; its bytes are plain."""
    np = pytest.importorskip("numpy")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e3m4"):
        array = np.arange(24).reshape(2, 3, 4).astype(getattr(ml_dtypes, name))
        store.add(name, array.T)
        assert (store.info(name).dtype, store.info(name).shape) == (name, (4, 3, 2))
        with store.lease(name) as lease:
            assert bytes(lease) == array.T.tobytes()
            back = np.frombuffer(lease, array.dtype).reshape(4, 3, 2)
            assert back.tobytes() == array.T.tobytes()
        store.take(f"{name} taken", array)
        assert bytes(store.lease(f"{name} taken")) == array.tobytes()
    store.add("int4", np.arange(3).astype(ml_dtypes.int4))  # a byte each: not DLPack's int4
    assert (store.info("int4").dtype, store.info("int4").nbytes) == (None, 3)


def test_nothing_but_bytes(store: Store) -> None:
    np = pytest.importorskip("numpy")
    store.add("dates", np.zeros(3, "M8[s]"))
    assert store.info("dates").dtype is None
    with pytest.raises(ValueError, match="objects"):
        store.add("objects", np.array([store, None]))
    for call in (store.add, store.take):
        for odd in (3, None, "text", [1, 2], object()):
            with pytest.raises(TypeError, match="DLPack or the buffer"):
                call("a", odd)


# ---- whose deleter runs when ----


def test_deleters_run_on_a_python_thread_without_a_lock(store: Store) -> None:
    """Whatever they call: no lock is held, and the last view may have gone anywhere."""
    calls = [store.names, store.stats, store.check, lambda: store.add("again", b"x")]
    for i, call in enumerate(calls):
        producer = Forged(data(5000), (5000,), on_delete=call)
        store.take(f"b{i}", producer)
        capsule = store.lease(f"b{i}").__dlpack__()
        store.remove(f"b{i}")
        assert producer.deleted == 0
        thread = threading.Thread(target=capsule.__class__.__repr__, args=(capsule,))
        thread.start()
        thread.join()
        del thread, capsule
        store.stats()
        assert (producer.deleted, producer.threads) == (1, [threading.get_ident()])
    assert bytes(store.lease("again")) == b"x"


def test_a_deleter_that_closes_the_store(open_store: Opener) -> None:
    store = open_store()
    first = Forged(data(5000), (5000,), on_delete=store.close)
    second = Forged(data(5000), (5000,))
    store.take("a", first)
    store.take("b", second)
    store.remove("a")
    assert (first.deleted, second.deleted) == (1, 1)
    with pytest.raises(omnimem.ClosedError):
        store.names()


@pytest.mark.parametrize("last", ["window", "capsule", "buffer of a window", "buffer"])
def test_the_last_view_gives_it_back(store: Store, last: str) -> None:
    """At once, where Python sees it go."""
    producer = Forged(data(5000), (5000,))
    store.take("a", producer)
    lease = store.lease("a")
    view: Any = lease.window(0, "uint8", (10,))
    if last == "capsule":
        view = lease.__dlpack__()
    elif last == "buffer":
        view = memoryview(lease)
    elif last == "buffer of a window":
        view = memoryview(view)
    store.remove("a")
    lease.release()
    del lease
    assert producer.deleted == 0
    del view
    assert producer.deleted == 1


def test_many_taken_at_once(open_store: Opener) -> None:
    """Each goes back once, also when stores go before their views, in any order."""
    rng = random.Random(3)
    producers, views = [], []
    for _ in range(3):
        store = open_store(host_limit="1MiB")
        for i in range(20):
            producers.append(Forged(data(4096, i), (4096,)))
            store.take(f"b{i}", producers[-1])
            if rng.random() < 0.5:
                views.append((producers[-1], store.lease(f"b{i}").__dlpack__()))
            if rng.random() < 0.5:
                store.evict(f"b{i}")
        if rng.random() < 0.5:
            store.close()
        del store
    rng.shuffle(views)
    while views:
        producer, capsule = views.pop()
        assert producer.deleted == 0
        del capsule
    gc.collect()
    open_store().stats()
    for producer in producers:
        assert producer.deleted <= 1
        assert producer.deleted == 1 or producer.threads == []


def test_a_capsule_from_before_1_0_is_never_written_to(store: Store) -> None:
    """It cannot say whether its memory may be written to; jax's, which comes so, may not."""
    producer = Forged(data(5000), (5000,), versioned=False)
    store.take("a", producer)
    with store.lease("a", write=True) as lease:
        memoryview(lease)[:5] = b"01234"
    assert producer.bytes.raw[:5000] == data(5000)
    assert bytes(store.lease("a")) == b"01234" + data(5000)[5:]
    assert producer.deleted == 1
    producer = Forged(data(5000), (5000,), versioned=True)
    store.take("b", producer)
    with store.lease("b", write=True) as lease:
        memoryview(lease)[:5] = b"01234"
    assert producer.bytes.raw[:5] == b"01234"


AT_EXIT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from tests.capsules import Forged
import omnimem
store = omnimem.Store(omnimem.StoreConfig(host_limit="1MiB", directory=sys.argv[2]))
producer = Forged(bytes(5000), (5000,), on_delete=lambda: os.write(1, b"back\\n"))
store.take("a", producer)
{then}
"""


SEEN = "capsule = store.lease('a').__dlpack__(); store.close()\n"
GONE_UNSEEN = """
from tests.capsules import DELETER, consumed
deleter, tensor = consumed(capsule)
DELETER(deleter)(tensor)
"""


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("", "back"),
        ("store.close()", "back"),
        ("kept = store.lease('a'); kept_too = [store]; kept_too.append(kept_too)", ""),
        (SEEN + "os.kept = capsule", ""),
        (SEEN + GONE_UNSEEN, "back"),
    ],
)
def test_at_exit(tmp_path: Any, then: str, said: str) -> None:
    """What nobody sees any more goes back at the latest then; what somebody sees stays."""
    code = AT_EXIT.replace("{then}", then)
    assert run_clean(code, str(ROOT), str(tmp_path)).strip() == said
