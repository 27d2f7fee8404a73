"""Capsules that lie: each is an error, never a crash; a deleter that is owed runs exactly once.

A lie that nothing gives away (a shape that is larger than the memory behind it, but not larger than
memory can be) is no case here: no consumer can see it.
"""

from __future__ import annotations

import ctypes
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import omnimem
from omnimem import Store, _core

from .capsules import DELETER, READ_ONLY, Forged, Versioned, api, elements, name_of
from .conftest import SOAK, data

MIB = 1 << 20
Opener = Callable[..., Store]
REFUSED = (BufferError, ValueError, omnimem.Error)


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": (-1,)},
        {"shape": (2**40, 2**40)},
        {"shape": (2**62,), "dtype": (2, 64, 1)},
        {"shape": (4,), "data": None},
        {"shape": (4,), "ndim": -1},
        {"shape": (1,) * 16, "ndim": 17},
        {"shape": (4,), "ndim": 10**6},
        {"shape": (4,), "ndim": 2**31 - 1},
        {"shape": (4,), "ndim": -(2**31)},
        {"shape": (2**57,)},
        {"shape": (2, 2**56)},
        {"shape": (-(2**63), 0)},
        {"shape": (0, -1)},
        {"shape": None, "ndim": 2},
        {"shape": (2, 2), "strides": (2**62, 1)},
        {"shape": (2, 2), "strides": (-(2**63), 1)},
        {"shape": (2, 2), "strides": (2**60, 1), "dtype": (2, 64, 1)},
        {"shape": (2, 2), "strides": (2**56, 2**56)},
        {"shape": (2, 2), "strides": (-(2**50), 1)},
        {"shape": (2, 2), "strides": (1, -(2**63))},
        {"shape": (2**31, 2**31), "strides": (2**31, -(2**31))},
        {"shape": (4,), "data": 2**64 - 2},
        {"shape": (4,), "data": 2**63, "byte_offset": 2**63},
        {"shape": (4,), "byte_offset": 2**64 - 1},
        {"shape": (4,), "dtype": (1, 0, 1)},
        {"shape": (4,), "dtype": (1, 8, 0)},
        {"shape": (4,), "dtype": (3, 64, 1)},
        {"shape": (4,), "dtype": (99, 8, 1)},
        {"shape": (4,), "dtype": (0, 3, 1)},
        {"shape": (4,), "dtype": (2, 129, 1)},
        {"shape": (4,), "dtype": (10, 16, 1)},
        {"shape": (4,), "dtype": (17, 8, 1)},
        {"shape": (4,), "dtype": (6, 255, 65535)},
        {"shape": (4, 4), "strides": (8, 1), "dtype": (17, 4, 1)},
        {"shape": (4,), "major": 2},
        {"shape": (4,), "major": 0},
        {"shape": (4,), "major": 2**32 - 1, "ndim": -7, "data": None},
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


# ---- generated ----

CODES = range(18)
NARROW = {**dict.fromkeys(range(7, 15), 8), 15: 6, 16: 6, 17: 4}  # the one width of these codes
BUFFER = 4096
INTS = (-(2**63), -(2**31), -9, -2, -1, 0, 1, 2, 3, 5, 2**31, 2**40, 2**57, 2**62, 2**63 - 1)


def known(code: int, bits: int, lanes: int) -> bool:
    if not bits or not lanes or code not in CODES or code == 3:
        return False
    return bits == NARROW[code] if code in NARROW else bits <= 128 and bits & (bits - 1) == 0


class Case:
    """What a producer says, and what has to come of it."""

    def __init__(self, rng: random.Random) -> None:
        self.dtype = rng.choice(((1, 8, 1), (2, 32, 1), (4, 16, 1), (5, 64, 1), (17, 4, 2)))
        self.shape = [rng.randrange(5) if rng.random() < 0.1 else rng.randrange(1, 5)
                      for _ in range(rng.randrange(5))]  # fmt: skip
        self.strides: list[int] | None = None
        if rng.random() < 0.6:
            self.strides = [rng.choice((-3, -1, 0, 1, 2, 4, 9)) for _ in self.shape]
        self.ndim = len(self.shape)
        self.offset = 1024 if rng.random() < 0.7 else 0
        self.device = (1, 0)
        self.version = (1, rng.randrange(5))
        self.flags = rng.choice((0, READ_ONLY, 2))
        self.null = False
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            self.spoil(rng)
        self.versioned = rng.random() < 0.6
        if not self.versioned:
            self.version, self.flags = (1, 0), 0

    def spoil(self, rng: random.Random) -> None:
        match rng.randrange(9):
            case 0 if self.shape:
                self.shape[rng.randrange(len(self.shape))] = rng.choice(INTS)
            case 1 if self.strides:
                self.strides[rng.randrange(len(self.strides))] = rng.choice(INTS)
            case 2:
                self.dtype = (rng.randrange(20), rng.choice((0, 1, 3, 4, 8, 16, 128, 255)),
                              rng.choice((0, 1, 2, 3, 65535)))  # fmt: skip
            case 3:
                self.ndim = rng.choice((-(2**31), -1, 0, 17, 10**6, 2**31 - 1))
            case 4:
                self.offset = rng.choice((3, 2**32, 2**57, 2**63, 2**64 - 1))
            case 5:
                self.device = (rng.choice((0, 1, 2, 3, 4, 11, 13, 18, -1, 2**31 - 1)),
                               rng.choice((-1, 0, 7)))  # fmt: skip
            case 6:
                self.version = (rng.choice((0, 1, 2, 2**32 - 1)), rng.randrange(9))
            case 7:
                self.flags = rng.choice((4, 2**63, 2**64 - 1))
            case 8:
                self.null = True

    def forge(self, content: bytes) -> Forged:
        fields: dict[str, Any] = {"ndim": self.ndim, "byte_offset": self.offset}
        if self.versioned:
            fields |= {"major": self.version[0], "minor": self.version[1], "flags": self.flags}
        if self.null:
            fields["data"] = None
        strides = None if self.strides is None else tuple(self.strides)
        return Forged(content, tuple(self.shape), strides, dtype=self.dtype,
                      versioned=self.versioned, device_type=self.device[0],
                      device_id=self.device[1], **fields)  # fmt: skip

    def is_refused(self, address: int) -> bool | None:
        """Whether it must be; None: it lies about what nobody can see."""
        _, bits, lanes = self.dtype
        shape = self.shape[: max(self.ndim, 0)]
        if self.device[0] not in (1, 3, 11) or not known(*self.dtype) or self.version[0] != 1:
            return True
        if self.ndim < 0 or self.ndim > 16 or any(n < 0 for n in shape):
            return True
        if self.flags & 4 and bits % 8:
            return True
        count = 1
        for n in shape:
            count *= n
        nbytes = (count * bits * lanes + 7) // 8
        address = 0 if self.null else address
        first = address + self.offset
        if self.offset >= 2**57:
            return True
        if not nbytes:
            return first >= 2**64
        if self.null or nbytes >= 2**57 or first + nbytes >= 2**64:
            return True
        size, low, high = bits * lanes / 8, 0, 0
        if self.strides is not None:
            for n, s in zip(shape, self.strides, strict=False):
                low, high = low + min((n - 1) * s, 0), high + max((n - 1) * s, 0)
            if not size.is_integer() and not self.contiguous(shape):
                return True
            if high * size >= 2**57 or -low * size >= first or first + high * size >= 2**64:
                return True
        else:
            high = count - 1
        inside = self.offset + low * size >= 0 and self.offset + (high + 1) * size <= BUFFER
        if nbytes > 16 * MIB:  # than the store, which says so before it looks
            return True
        return False if inside else None

    def contiguous(self, shape: list[int]) -> bool:
        assert self.strides is not None
        step = 1
        for n, s in reversed(list(zip(shape, self.strides, strict=False))):
            if n > 1 and s != step:
                return False
            step *= n
        return True

    def is_strided(self) -> bool:
        shape = self.shape[: self.ndim]
        return self.strides is not None and 0 not in shape and not self.contiguous(shape)

    def want(self, content: bytes) -> bytes:
        _, bits, lanes = self.dtype
        shape = self.shape[: self.ndim]
        count = 1
        for n in shape:
            count *= n
        if not self.is_strided():
            return content[self.offset : self.offset + (count * bits * lanes + 7) // 8]
        strides = tuple(self.strides[: self.ndim])
        return elements(content, bits * lanes // 8, tuple(shape), strides, self.offset)

    def __repr__(self) -> str:
        return repr(vars(self))


@pytest.mark.parametrize("call", ["add", "take"])
@pytest.mark.parametrize("seed", range(4))
def test_generated(store: Store, call: str, seed: int) -> None:
    rng = random.Random(seed)
    content = data(BUFFER)
    seen = {False: 0, True: 0}
    while sum(seen.values()) < (20_000 if SOAK else 1500):
        case = Case(rng)
        producer = case.forge(content)
        refused = case.is_refused(ctypes.addressof(producer.bytes))
        if refused is None:
            continue
        if call == "take" and not refused and case.is_strided():
            refused = True
        seen[refused] += 1
        if refused:
            with pytest.raises((*REFUSED, MemoryError)):
                getattr(store, call)("a", producer)
            assert producer.deleted == 1, case
            assert "a" not in store
            continue
        getattr(store, call)("a", producer)
        with store.lease("a") as lease:
            assert bytes(lease) == case.want(content), case
            assert lease.shape == tuple(case.shape[: case.ndim]), case
        assert producer.deleted == (call == "add"), case
        store.remove("a")
        assert producer.deleted == 1, case
        assert name_of(producer.capsule) == b"used_" + producer.name
    assert min(seen.values()) > 100
    store.check()


# ---- capsules and producers ----


def test_of_another_major_version_only_the_deleter_is_used(store: Store) -> None:
    """Nothing behind it has a meaning; there need be no memory."""
    deleted: list[int] = []
    deleter = DELETER(deleted.append)
    head = Versioned.flags.offset
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = (ctypes.c_void_p,)
    for call in (store.add, store.take):
        memory = libc.malloc(ctypes.c_size_t(head))  # just as much: what lies behind is not ours
        whole = Versioned(major=2, deleter=deleter)
        ctypes.memmove(memory, ctypes.addressof(whole), head)
        capsule = api.PyCapsule_New(memory, b"dltensor_versioned", None)
        with pytest.raises(BufferError, match=r"2\.0"):
            call("a", capsule)
        assert deleted.pop() == memory
        libc.free(memory)
    assert not deleted


def test_no_deleter(store: Store) -> None:
    """Memory that nobody frees is allowed: static tables."""
    for versioned in (True, False):
        for call in (store.add, store.take):
            producer = Forged(data(64), (64,), versioned=versioned, deleter=DELETER(0))
            call("a", producer)
            assert bytes(store.lease("a")) == data(64)
            store.remove("a")
            assert producer.deleted == 0


def test_used_twice(store: Store) -> None:
    for versioned in (True, False):
        producer = Forged(data(64), (64,), versioned=versioned)
        store.take("a", producer)
        for call in (store.add, store.take):
            for again in (producer, producer.capsule):
                with pytest.raises(BufferError, match="taken before"):
                    call("b", again)
        assert producer.deleted == 0
        assert bytes(store.lease("a")) == data(64)
        store.remove("a")
        assert producer.deleted == 1


def use(
    store: Store, name: str, producer: Forged, start: threading.Barrier, errors: list[BufferError]
) -> None:
    start.wait()
    try:
        store.add(name, producer)
    except BufferError as error:
        errors.append(error)


def test_used_by_many_threads(open_store: Opener) -> None:
    """One has it, the others hear that it was taken."""
    store = open_store()
    for round in range(20):
        producer = Forged(data(64), (64,))
        start = threading.Barrier(4)
        errors: list[BufferError] = []
        arguments = producer, start, errors
        threads = [
            threading.Thread(target=use, args=(store, f"{round} {i}", *arguments)) for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(errors), producer.deleted, len(store.names())) == (3, 1, round + 1)


def test_a_name_that_is_no_text(store: Store) -> None:
    for name in (b"", b"\xff\xfe", b"dltensor\xff", b"x" * 5000):
        producer = Forged(data(64), (64,))
        capsule = api.PyCapsule_New(ctypes.addressof(producer.managed), name, None)
        with pytest.raises(BufferError, match="capsule"):
            store.add("a", capsule)
        assert producer.deleted == 0
    nameless = api.PyCapsule_New(ctypes.addressof(producer.managed), None, None)
    with pytest.raises(BufferError, match="capsule"):
        store.take("a", nameless)


class Says:
    """A producer of which each step is given: a value, or an exception to raise."""

    def __init__(self, *answers: Any, device: Any = (1, 0)) -> None:
        self.answers = list(answers)
        self.device = device
        self.asked: list[dict[str, Any]] = []

    def __dlpack__(self, **keywords: Any) -> Any:
        self.asked.append(keywords)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def __dlpack_device__(self) -> Any:
        if isinstance(self.device, BaseException):
            raise self.device
        return self.device


@pytest.mark.parametrize("call", ["add", "take"])
def test_producers_that_raise(store: Store, call: str) -> None:
    add = getattr(store, call)
    for error in (ZeroDivisionError, KeyboardInterrupt, MemoryError, BufferError, OSError):
        producer = Says(error("mine"))
        with pytest.raises(error, match="mine"):
            add("a", producer)
        assert len(producer.asked) == 1
        with pytest.raises(error, match="mine"):
            add("a", Says(device=error("mine")))
    producer = Says(TypeError("first"), ZeroDivisionError("second"))
    with pytest.raises(ZeroDivisionError, match="second"):
        add("a", producer)
    assert producer.asked == [{"max_version": (1, 3)}, {}]
    producer = Says(TypeError("first"), TypeError("second"))
    with pytest.raises(TypeError, match="second"):
        add("a", producer)
    assert store.names() == []


@pytest.mark.parametrize("device", [None, (), (None, 0), ("cpu", 0), 1, (2**70, 0), [1.5, 0]])
def test_devices_that_are_none(store: Store, device: Any) -> None:
    forged = Forged(data(64), (64,))
    with pytest.raises((TypeError, OverflowError, IndexError)):
        store.add("a", Says(forged.capsule, device=device))
    assert forged.deleted == 0


@pytest.mark.parametrize("answer", [None, 3, b"dltensor", object, Says()])
def test_answers_that_are_no_capsule(store: Store, answer: Any) -> None:
    with pytest.raises(BufferError, match="capsule"):
        store.add("a", Says(answer))


def test_a_producer_that_meddles(open_store: Opener) -> None:
    """While it is asked it closes the store, or adds under the same name."""
    store = open_store()
    forged, inner = Forged(data(64), (64,)), Forged(data(32), (32,))

    class Meddles:
        def __init__(self, meddle: Callable[[], object]) -> None:
            self.meddle = meddle

        def __dlpack__(self, **_: Any) -> object:
            self.meddle()
            return forged.capsule

    with pytest.raises(ValueError, match="exists"):
        store.add("a", Meddles(lambda: store.add("a", inner)))
    assert (forged.deleted, inner.deleted) == (1, 1)
    assert bytes(store.lease("a")) == data(32)
    forged = Forged(data(64), (64,))
    with pytest.raises(omnimem.ClosedError):
        store.take("b", Meddles(store.close))
    assert forged.deleted == 1


@pytest.mark.parametrize("call", ["add", "take"])
@pytest.mark.parametrize("spoiled", [{}, {"ndim": -1}, {"major": 7}])
def test_a_deleter_that_leaves_an_exception(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str, spoiled: dict[str, int]
) -> None:
    """It is reported, and neither hides nor becomes the error of the call."""
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda hint: reported.append(hint.exc_type))
    bad = ctypes.cast(ctypes.pythonapi.PyErr_BadArgument, DELETER)  # sets a TypeError
    producer = Forged(data(64), (64,), deleter=bad, **spoiled)
    if spoiled:
        with pytest.raises(BufferError):
            getattr(store, call)("a", producer)
    else:
        getattr(store, call)("a", producer)
        assert bytes(store.lease("a")) == data(64)
        store.remove("a")
    assert reported == [TypeError]


def test_an_exception_that_is_under_way_survives(store: Store) -> None:
    """Code of ours, and of a producer, runs when capsules and leases go while it passes."""
    producer = Forged(data(64), (64,))
    store.take("a", producer)

    def use() -> None:
        lease = store.lease("a")
        capsule = lease.__dlpack__()
        window = lease.window(0, "uint8", (64,)).__dlpack__(max_version=(1, 0))
        store.remove("a")
        raise ZeroDivisionError(f"{len(name_of(capsule))} {len(name_of(window))}")

    with pytest.raises(ZeroDivisionError, match="8 18"):
        use()
    store.stats()
    assert producer.deleted == 1
    with pytest.raises(BufferError, match="bad DLPack"):
        store.add("b", Forged(data(64), (64,), ndim=-1))


def test_allocations_that_fail(store: Store) -> None:
    """The first, the second, ... of the core's fails: the deleter is called once all the same."""
    for call in ("add", "take"):
        for nth in range(1, 30):
            producer = Forged(data(5000), (50, 50), (1, 60) if call == "add" else None)
            _core._fault_arm("alloc", nth)
            try:
                getattr(store, call)("a", producer)
            except MemoryError:
                assert producer.deleted == 1
                assert "a" not in store
            finally:
                fired = _core._fault_fired("alloc")
                _core._fault_reset()
            if "a" in store:
                store.remove("a")
            store.check()
            assert producer.deleted == 1
            if not fired:
                break
        assert not fired
