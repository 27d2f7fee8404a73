"""Writes through read-only views, which torch makes without a word: what was stored stays stored.

A block with an origin, or with a valid copy below memory, is never written out from memory that a
consumer could have written to, and what is brought in next is what was stored. (A block that is in
memory alone has nothing else: what is written there is what it holds from then on.)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnimem import Store

from .capsules import opened
from .conftest import SOAK, data

MIB = 1 << 20
MARK = b"written through a read-only view"
Opener = Callable[..., Store]


def torch_writes(exporter: Any) -> None:
    torch = pytest.importorskip("torch")
    mark = torch.frombuffer(bytearray(MARK), dtype=torch.uint8)
    torch.from_dlpack(exporter)[: len(MARK)].copy_(mark)


def anyone_writes(exporter: Any) -> None:
    ctypes.memmove(opened(exporter.__dlpack__()).tensor.data, MARK, len(MARK))


@pytest.fixture(params=[torch_writes, anyone_writes])
def write(request: pytest.FixtureRequest) -> Callable[[Any], None]:
    return request.param  # type: ignore[no-any-return]


def stain(store: Store, name: str, write: Callable[[Any], None]) -> None:
    with store.lease(name) as lease:
        write(lease)
        assert bytes(lease).startswith(MARK)  # it does go through
    assert bytes(store.lease(name)).startswith(MARK)  # and others see it, until the next fill


def on_disk(directory: Path, store: Store) -> bytes:
    """All that the store's swap file holds."""
    found = set()  # the file is open twice
    for fd in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(fd).startswith(str(directory)):
                found.add(fd.read_bytes())
        except OSError:
            continue
    assert len(found) == (store.stats().disk.mapped_bytes > 0)
    return b"".join(found)


@pytest.mark.parametrize("verify", ["always", "first"])
def test_an_origin(
    tmp_path: Path,
    open_store: Opener,
    file_of: Callable[..., Path],
    write: Callable[[Any], None],
    verify: str,
) -> None:
    content = data(2 * MIB)
    path = file_of(content)
    store = open_store(verify=verify)
    store.add_file("a", path, 4096, MIB)
    for leave in (lambda: store.evict("a"), lambda: store.group("default", 4096)):
        stain(store, "a", write)
        leave()
        assert store.info("a").tiers == ()
        store.group("default", 0)
        assert bytes(store.lease("a")) == content[4096 : 4096 + MIB]
    assert path.read_bytes() == content
    assert store.stats().disk.mapped_bytes == 0  # nothing was ever written
    assert store.stats().corrupt == 0


@pytest.mark.parametrize("verify", ["always", "first"])
def test_a_lower_copy(
    tmp_path: Path, open_store: Opener, write: Callable[[Any], None], verify: str
) -> None:
    store = open_store(verify=verify)
    store.add("a", data(MIB))
    assert store.evict("a")
    written = store.stats().writes
    for leave in (lambda: store.evict("a"), lambda: store._swap_out("default", MIB)):
        stain(store, "a", write)
        assert store.info("a").tiers == ("host", "disk")
        leave()
        assert store.info("a").tiers == ("disk",)
        assert bytes(store.lease("a")) == data(MIB)
    assert store.stats().writes == written
    held = on_disk(tmp_path / "swap", store)
    assert data(MIB) in held
    assert MARK not in held


def test_a_writer_after_it(
    tmp_path: Path, store: Store, file_of: Callable[..., Path], write: Callable[[Any], None]
) -> None:
    """A lease for writing makes memory the only copy; it begins with what was stored."""
    path = file_of(data(MIB, 1))
    store.add_file("origin", path, 0, MIB)
    store.add("lower", data(MIB, 1))
    store.evict("lower")
    for name in ("origin", "lower"):
        stain(store, name, write)
        with store.lease(name, write=True) as lease:
            assert bytes(lease) == data(MIB, 1)
            memoryview(lease)[-5:] = b"ended"
        assert store.evict(name)
        assert bytes(store.lease(name)) == data(MIB, 1)[:-5] + b"ended"
    assert path.read_bytes() == data(MIB, 1)
    assert MARK not in on_disk(tmp_path / "swap", store)


def test_taken_memory(store: Store, write: Callable[[Any], None]) -> None:
    """Once its bytes are below, the same holds; a producer's read-only bytes are its own."""
    store.take("a", bytearray(data(MIB)))
    assert store.evict("a")
    stain(store, "a", write)
    assert store.evict("a")
    assert bytes(store.lease("a")) == data(MIB)


def test_a_full_disk(tmp_path: Path, open_store: Opener, write: Callable[[Any], None]) -> None:
    """Copies on disk of blocks that are in memory too give way, but not to what was written to."""
    store = open_store(host_limit="8MiB", disk_limit="4MiB")
    for i in range(4):
        store.add(f"b{i}", data(MIB, i), group="below")
        store.evict(f"b{i}")
    for name in ("b0", "b2"):
        stain(store, name, write)
    for name in ("b1", "b3"):
        store.lease(name).release()
    store.group("other", MIB)
    for i in range(3):  # the first two have to go to the disk, which is full
        store.add(f"c{i}", data(MIB, 10 + i), group="other")
    tiers = {name: store.info(name).tiers for name in store.names("below")}
    assert tiers == dict.fromkeys(("b0", "b2"), ("disk",)) | dict.fromkeys(("b1", "b3"), ("host",))
    assert MARK not in on_disk(tmp_path / "swap", store)
    for name in ("b0", "b1", "b2", "b3"):
        assert bytes(store.lease(name)) == data(MIB, int(name[1]))
    for i in range(3):
        assert bytes(store.lease(f"c{i}")) == data(MIB, 10 + i)
    assert store.stats().corrupt == 0


def test_while_it_is_written_out(
    tmp_path: Path, open_store: Opener, write: Callable[[Any], None]
) -> None:
    """A lease may catch a copy on its way out. Either the one or the other comes back, whole."""
    store = open_store(host_limit="64MiB")
    content = data(8 * MIB)
    for i in range(60 if SOAK else 12):
        store.add("a", content)
        with contextlib.suppress(TimeoutError):
            store.evict("a", timeout=0.0)  # begun, and left as it is
        with store.lease("a") as lease:
            write(lease.window(len(content) - len(MARK), "uint8", (len(MARK),)))
        store.evict("a")
        got = bytes(store.lease("a"))
        assert got in (content, content[: -len(MARK)] + MARK), i
        store.remove("a")
    assert store.stats().corrupt == 0
