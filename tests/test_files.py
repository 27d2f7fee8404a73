"""Blocks whose bytes are ranges of files: read in place, checked, and never trusted blindly."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import omnimem
from omnimem import Store, _core

from .conftest import data

MIB = 1 << 20
Opener = Callable[..., Store]
Writer = Callable[..., Path]


def read(store: Store, name: str) -> bytes:
    with store.lease(name) as lease:
        return bytes(lease)


def test_ranges_at_any_alignment(store: Store, file_of: Writer) -> None:
    content = data(3 * MIB + 123)
    path = file_of(content)
    ranges = [
        (0, 1),
        (1, 4096),
        (4095, 2),
        (8, 2 * MIB),
        (MIB + 1, MIB + 5),
        (3 * MIB, 123),
        (50, 0),
    ]
    for i, (offset, nbytes) in enumerate(ranges):
        store.add_file(f"r{i}", path, offset, nbytes)
    store.check()
    for _ in range(2):
        for i, (offset, nbytes) in enumerate(ranges):
            assert read(store, f"r{i}") == content[offset : offset + nbytes]
            assert store.evict(f"r{i}")
        store.check()
    assert store.stats().disk.used_bytes == 0


def test_several_ranges_and_files(store: Store, file_of: Writer) -> None:
    a, b = data(MIB + 77, 1), data(MIB, 2)
    first, second = file_of(a, "a"), file_of(b, "b")
    store.add_file("x", [(first, 13, MIB), (second, 4096, 1000), (first, 0, 13), (second, 0, 0)])
    want = a[13 : 13 + MIB] + b[4096:5096] + a[:13]
    for _ in range(2):
        assert read(store, "x") == want
        store.evict("x")
    info = store.info("x")
    assert (info.origin, info.origin_offset) == (str(first), 13)
    assert info.nbytes == len(want)
    assert info.tiers == ()


def test_no_bytes_at_all(store: Store, file_of: Writer) -> None:
    with pytest.raises(ValueError, match="no extents"):
        store.add_file("none", [])
    store.add_file("none", file_of(b""), 0, 0)
    assert read(store, "none") == b""


def test_symlinks_are_followed(store: Store, file_of: Writer, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file_of(data(5000)))
    store.add_file("x", link, 100, 4000)
    assert read(store, "x") == data(5000)[100:4100]


def test_dtype_and_shape(store: Store, file_of: Writer) -> None:
    path = file_of(data(4096))
    store.add_file("a", path, 0, 24, dtype="bfloat16", shape=(3, 4))
    store.add_file("b", path, 0, 24, dtype="float32")
    store.add_file("c", path, 0, 24)
    store.add_file("d", path, 0, 2, dtype="float16", shape=())
    store.add_file("e", path, 0, 3, dtype="float6_e3m2fn", shape=(4,))
    assert (store.info("a").dtype, store.info("a").shape) == ("bfloat16", (3, 4))
    assert (store.info("b").dtype, store.info("b").shape) == ("float32", (6,))
    assert (store.info("c").dtype, store.info("c").shape) == (None, None)
    assert (store.info("d").dtype, store.info("d").shape) == ("float16", ())
    assert store.info("e").dtype == "float6_e3m2fn"
    with store.lease("c") as lease:
        assert (lease.dtype, lease.shape) == ("uint8", (24,))
    for fields in (
        {"dtype": "float32", "shape": (5,)},
        {"dtype": "float33"},
        {"dtype": "float64", "shape": (3, -1)},
        {"dtype": "complex128"},
        {"shape": (25,)},
    ):
        with pytest.raises(ValueError, match=r"24|dtype"):
            store.add_file("n", path, 0, 24, **fields)  # type: ignore[arg-type]
    assert len(store.names()) == 5


def test_bad_files(store: Store, tmp_path: Path, file_of: Writer) -> None:
    path = file_of(data(1000))
    with pytest.raises(omnimem.IOFailure) as caught:
        store.add_file("n", tmp_path / "missing", 0, 10)
    assert caught.value.errno == 2
    assert caught.value.filename == str(tmp_path / "missing")
    for offset, nbytes in ((0, 1001), (1000, 1), (2**60, 1), (999, 2**60)):
        with pytest.raises((ValueError, omnimem.Error), match=r"1000|n"):
            store.add_file("n", path, offset, nbytes)
    for bad in (tmp_path, "/dev/null"):
        with pytest.raises((ValueError, omnimem.IOFailure)):
            store.add_file("n", bad, 0, 0 if bad == tmp_path else 1)
    with pytest.raises(TypeError, match="offset and nbytes"):
        store.add_file("n", path)
    with pytest.raises(TypeError):
        store.add_file("n", [(path, 0, 1)], 0, 1)
    with pytest.raises(ValueError, match="extent"):
        store.add_file("n", [(path, 0)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="offset"):
        store.add_file("n", path, -1, 1)
    assert store.names() == []
    store.check()


def test_files_need_no_disk(open_store: Opener, file_of: Writer) -> None:
    """More files than RAM and no swap: evicting them is free."""
    store = open_store(host_limit="4MiB", disk_limit=0)
    content = data(12 * MIB)
    path = file_of(content)
    for i in range(12):
        store.add_file(f"b{i}", path, i * MIB, MIB)
    for _ in range(2):
        for i in range(12):
            assert read(store, f"b{i}") == content[i * MIB : (i + 1) * MIB]
    assert store.stats().written_bytes == 0
    assert store.stats().drops >= 8


def test_write_lease_leaves_the_file_alone(store: Store, file_of: Writer) -> None:
    path = file_of(data(MIB))
    store.add_file("a", path, 0, MIB)
    with store.lease("a", write=True) as lease:
        memoryview(lease)[:4] = b"abcd"
    assert store.info("a").origin is None
    assert path.read_bytes() == data(MIB)
    path.unlink()
    store.evict("a")
    assert read(store, "a") == b"abcd" + data(MIB)[4:]


def change_content(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(MIB // 2)
        file.write(b"changed")


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(data(MIB, 7))
    other.replace(path)


@pytest.mark.parametrize(
    "damage", [change_content, lambda p: os.truncate(p, MIB // 2), lambda p: os.truncate(p, 0)]
)
def test_a_changed_file_is_an_error(
    store: Store, file_of: Writer, damage: Callable[[Path], None]
) -> None:
    path = file_of(data(MIB))
    healthy = file_of(data(MIB, 1), "healthy")
    store.add_file("block a", path, 0, MIB)
    store.add_file("b", healthy, 0, MIB)
    assert read(store, "block a") == data(MIB)
    store.evict("block a")
    damage(path)
    with pytest.raises((omnimem.CorruptError, omnimem.IOFailure), match="'block a'") as caught:
        store.lease("block a")
    assert caught.value.filename == str(path)
    assert isinstance(caught.value, OSError)
    store.check()
    assert read(store, "b") == data(MIB, 1)


def test_a_file_that_was_short_from_the_start(store: Store, file_of: Writer) -> None:
    path = file_of(data(MIB))
    store.add_file("a", path, 0, MIB)
    os.truncate(path, MIB - 1)
    with pytest.raises((omnimem.CorruptError, omnimem.IOFailure), match="a"):
        store.lease("a")
    store.check()


@pytest.mark.parametrize("origin", [True, False])
def test_a_flipped_bit_is_read_again(store: Store, file_of: Writer, origin: bool) -> None:
    if origin:
        store.add_file("a", file_of(data(MIB)), 0, MIB)
        read(store, "a")
    else:
        store.add("a", data(MIB))
    store.evict("a")
    _core._fault_arm("flip", 1)
    assert read(store, "a") == data(MIB)
    assert _core._fault_fired("flip") == 1
    assert store.stats().rereads == 1
    store.evict("a")
    _core._fault_arm("flip", 1, True)
    with pytest.raises(omnimem.CorruptError, match="a"):
        store.lease("a")
    _core._fault_reset()
    store.check()
    assert read(store, "a") == data(MIB)


def test_an_error_harms_one_block_only(store: Store, file_of: Writer) -> None:
    path = file_of(data(2 * MIB))
    store.add_file("a", path, 4096, MIB)
    store.add("b", data(MIB, 1))
    _core._fault_arm("read", 1, True)
    with pytest.raises(omnimem.IOFailure, match="a") as caught:
        store.lease("a")
    assert caught.value.errno == 5
    assert caught.value.filename == str(path)
    assert str(4096) in str(caught.value)
    assert read(store, "b") == data(MIB, 1)
    _core._fault_reset()
    assert read(store, "a") == data(2 * MIB)[4096 : 4096 + MIB]
