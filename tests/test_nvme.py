"""The I/O side of a swapper: where its swap file lies, its room, its statistics."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem import AdvancedMemorySwapper, NVMeOptimizer, _storage

from .swappers import KIB, MIB, Opener, content, fill, group_of, read, settle, swap_all

RAM = Path("/dev/shm")
KEYS = {
    "active_swaps",
    "max_concurrent_swaps",
    "block_size",
    "swap_directory",
    "read_bytes",
    "written_bytes",
    "read_gbps",
    "write_gbps",
    "read_latency_p50",
    "read_latency_p99",
    "write_latency_p50",
    "write_latency_p99",
    "queue_depth",
    "max_queue_depth",
    "io_errors",
    "backend",
    "backend_reason",
}
ram_only = pytest.mark.skipif(
    _storage.ram_file_system(RAM) is None, reason="/dev/shm is no RAM file system"
)


def swap_files() -> list[tuple[str, int]]:
    """Paths and sizes of the nameless files that this process has open."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            path, state = os.readlink(link), os.stat(link)
        except OSError:
            continue
        if path.endswith("(deleted)") and "omnimem-" in path:
            found[state.st_ino] = (path, state.st_size)
    return list(found.values())


# -- settings


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    optimizer = NVMeOptimizer()
    assert optimizer.block_size == 4 * MIB
    assert optimizer.max_concurrent_swaps == 4
    assert optimizer.swap_directory == str(tmp_path / "cache/omnimem")
    assert not (tmp_path / "cache").exists()
    with AdvancedMemorySwapper(nvme_optimizer=optimizer) as swapper:
        fill(swapper, 1)
        assert swap_all(swapper) == 1
        assert [path for path, _ in swap_files() if path.startswith(str(tmp_path / "cache"))]


def test_statistics_before_the_first_use(tmp_path: Path) -> None:
    optimizer = NVMeOptimizer("1MiB", tmp_path, 8)
    stats = optimizer.get_swap_stats()
    assert set(stats) >= KEYS
    assert stats["block_size"] == MIB
    assert stats["max_concurrent_swaps"] == 8
    assert stats["swap_directory"] == str(tmp_path)
    assert stats["max_queue_depth"] == 8
    assert stats["backend"] is None
    assert stats["backend_reason"] is None
    for key in KEYS - {
        "block_size",
        "max_concurrent_swaps",
        "swap_directory",
        "max_queue_depth",
        "backend",
        "backend_reason",
    }:
        assert stats[key] == 0, key


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size": 4095},
        {"block_size": 0},
        {"block_size": -1},
        {"block_size": "2GiB"},
        {"block_size": "big"},
        {"max_concurrent_swaps": 0},
        {"max_concurrent_swaps": -1},
        {"max_concurrent_swaps": 257},
    ],
)
def test_wrong_settings(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        NVMeOptimizer(**fields)


@pytest.mark.parametrize(
    ("block_size", "concurrent"), [(4096, 1), ("64KiB", 256), ("1GiB", 256), (5000, 3), (MIB, 1)]
)
def test_any_window_works(
    open_swapper: Opener, tmp_path: Path, block_size: int | str, concurrent: int
) -> None:
    optimizer = NVMeOptimizer(block_size, tmp_path / "other", concurrent)
    swapper = open_swapper(nvme_optimizer=optimizer)
    assert swapper.nvme_optimizer is optimizer
    names = fill(swapper, 6, 300_001)
    assert swap_all(swapper) == 6
    assert [read(swapper, name) for name in names] == [content(name, 300_001) for name in names]
    stats = optimizer.get_swap_stats()
    assert stats["max_queue_depth"] >= 1
    assert stats["max_concurrent_swaps"] == concurrent


# -- the directory


def test_a_private_nameless_file(
    open_swapper: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "deep" / "er"
    swapper = open_swapper(nvme_optimizer=NVMeOptimizer(swap_directory=directory))
    fill(swapper, 4)
    assert swap_all(swapper) == 4
    ((path, size),) = [file for file in swap_files() if file[0].startswith(str(directory))]
    assert size >= 4 * MIB
    folders = [entry for entry in directory.rglob("*") if entry.is_dir()]
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
    assert not [entry for entry in directory.rglob("*") if not entry.is_dir()]
    swapper.cleanup()
    assert path not in [file[0] for file in swap_files()]
    assert list(directory.iterdir()) == []


def test_settable_until_the_first_use(open_swapper: Opener, tmp_path: Path) -> None:
    optimizer = NVMeOptimizer(swap_directory=tmp_path / "first")
    optimizer.swap_directory = tmp_path / "second"
    assert optimizer.swap_directory == str(tmp_path / "second")
    swapper = open_swapper(nvme_optimizer=optimizer)
    names = fill(swapper, 3)
    optimizer.swap_directory = str(tmp_path / "third")
    assert optimizer.get_swap_stats()["swap_directory"] == str(tmp_path / "third")
    assert swap_all(swapper) == 3
    places = [path for path, _ in swap_files() if path.startswith(str(tmp_path))]
    assert len(places) == 1
    assert places[0].startswith(str(tmp_path / "third"))
    with pytest.raises(ValueError):
        optimizer.swap_directory = tmp_path / "fourth"
    assert optimizer.swap_directory == str(tmp_path / "third")
    assert optimizer.get_swap_stats()["swap_directory"] == str(tmp_path / "third")
    assert [read(swapper, name) for name in names] == [content(name) for name in names]


def test_a_relative_directory(
    open_swapper: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    swapper = open_swapper(nvme_optimizer=NVMeOptimizer(swap_directory="here"))
    assert swapper.nvme_optimizer.swap_directory == str(tmp_path / "here")
    monkeypatch.chdir("/")
    fill(swapper, 1)
    assert swap_all(swapper) == 1
    assert [path for path, _ in swap_files() if path.startswith(str(tmp_path / "here"))]


def test_a_directory_that_cannot_be(open_swapper: Opener, tmp_path: Path) -> None:
    """It is found out when something has to go; nothing is lost, and the status says why."""
    (tmp_path / "file").write_text("")
    swapper = open_swapper(nvme_optimizer=NVMeOptimizer(swap_directory=tmp_path / "file"))
    fill(swapper, 2)
    assert swap_all(swapper) == 0
    assert str(tmp_path / "file") in swapper.get_status()["swap_trouble"]
    assert read(swapper, "b1") == content("b1")
    swapper.nvme_optimizer.swap_directory = tmp_path / "folder"
    assert swap_all(swapper) == 2
    assert swapper.get_status()["swap_trouble"] is None
    assert read(swapper, "b1") == content("b1")


@ram_only
def test_a_ram_file_system_is_refused(tmp_path: Path) -> None:
    for directory in (RAM, RAM / "some" / "where", str(RAM)):
        with pytest.raises(ValueError, match="tmpfs") as caught:
            NVMeOptimizer(swap_directory=directory)
        assert "memory" in str(caught.value)
        assert "allow_ram_file_system" in str(caught.value)
    optimizer = NVMeOptimizer(swap_directory=tmp_path)
    with pytest.raises(ValueError, match="tmpfs"):
        optimizer.swap_directory = RAM
    assert optimizer.swap_directory == str(tmp_path)


@ram_only
def test_a_link_to_a_ram_file_system_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(RAM)
    with pytest.raises(ValueError, match="tmpfs"):
        NVMeOptimizer(swap_directory=tmp_path / "link")


@ram_only
def test_a_ram_file_system_that_is_asked_for(open_swapper: Opener) -> None:
    optimizer = NVMeOptimizer(swap_directory=RAM, allow_ram_file_system=True)
    swapper = open_swapper(nvme_optimizer=optimizer, io_backend="auto")
    names = fill(swapper, 2)
    assert swap_all(swapper) == 2
    assert [path for path, _ in swap_files() if path.startswith(str(RAM))]
    assert [read(swapper, name) for name in names] == [content(name) for name in names]


# -- one optimizer, one swapper


def test_two_swappers(open_swapper: Opener, open_store: Callable[..., Any]) -> None:
    first = open_swapper()
    with pytest.raises(ValueError, match="another swapper"):
        open_swapper(nvme_optimizer=first.nvme_optimizer)
    with pytest.raises(ValueError, match="another swapper"):
        AdvancedMemorySwapper(nvme_optimizer=first.nvme_optimizer, store=open_store())
    fill(first, 1)
    assert swap_all(first) == 1
    assert read(first, "b0") == content("b0")
    first.cleanup()
    with pytest.raises(ValueError, match="another swapper"):
        open_swapper(nvme_optimizer=first.nvme_optimizer)


def test_two_swappers_in_one_directory(open_swapper: Opener, tmp_path: Path) -> None:
    both = [
        open_swapper(nvme_optimizer=NVMeOptimizer(swap_directory=tmp_path / "same"))
        for _ in range(2)
    ]
    for i, swapper in enumerate(both):
        swapper.register_memory_block("a", MIB, data=content(f"b{i}"))
        assert swap_all(swapper) == 1
    for i, swapper in enumerate(both):
        assert read(swapper, "a") == content(f"b{i}")


# -- room


def test_room_on_the_disk(open_swapper: Opener, tmp_path: Path) -> None:
    swapper = open_swapper(max_swap_size="1000TiB")
    free = _storage.free_bytes(tmp_path)
    assert swapper.max_swap_size <= (free + 256 * MIB) * 0.95
    assert swapper.max_swap_size >= (free - 1024 * MIB) * 0.95
    assert swapper.get_status()["max_swap_size_GB"] == swapper.max_swap_size / 2**30


def test_little_room(open_swapper: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("omnimem.nvme.free_bytes", lambda _: 10 * MIB)
    swapper = open_swapper(max_swap_size="64MiB")
    assert swapper.max_swap_size == int(9.5 * MIB)
    names = fill(swapper, 20)
    assert 1 <= swap_all(swapper) <= 9
    assert swapper.get_status()["swap_trouble"]
    assert [read(swapper, name) for name in names] == [content(name) for name in names]
    monkeypatch.setattr("omnimem.nvme.free_bytes", lambda _: 100 * MIB)
    swapper.max_swap_size = "32MiB"
    assert swapper.max_swap_size == 32 * MIB
    assert swap_all(swapper) == 20


def test_wrong_limits(swapper: AdvancedMemorySwapper) -> None:
    for wrong in (-1, "all"):
        with pytest.raises(ValueError):
            swapper.max_swap_size = wrong
    assert swapper.max_swap_size == 64 * MIB


def test_a_smaller_limit(open_swapper: Opener) -> None:
    """What is on disk stays there; nothing more goes."""
    swapper = open_swapper()
    names = fill(swapper, 12)
    for name in names[8:]:
        swapper.blocks[name].pinned = True
    assert swap_all(swapper) == 8
    swapper.max_swap_size = "4MiB"
    assert swapper.max_swap_size == 4 * MIB
    for name in names[8:]:
        swapper.blocks[name].pinned = False
    assert swap_all(swapper) == 0
    assert swapper.get_status()["swap_trouble"]
    assert [read(swapper, name) for name in names] == [content(name) for name in names]


def test_a_swap_file_gives_room_back(open_swapper: Opener, tmp_path: Path) -> None:
    """All unregistered, the directory has its room again."""
    swapper = open_swapper(nvme_optimizer=NVMeOptimizer(swap_directory=tmp_path / "mine"))
    names = fill(swapper, 16)
    assert swap_all(swapper) == 16
    for name in names:
        swapper.unregister_memory_block(name)
    swapper.store.trim()  # else ten seconds later
    assert swapper.store.stats().disk.used_bytes == 0
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink() and str(tmp_path / "mine") in os.readlink(link):
            assert link.stat().st_blocks * 512 <= MIB


# -- statistics


def test_bytes_add_up(open_swapper: Opener, io_backend: str) -> None:
    swapper = open_swapper()
    optimizer = swapper.nvme_optimizer
    names = fill(swapper, 8)
    assert optimizer.get_swap_stats()["written_bytes"] == 0
    assert swap_all(swapper) == 8
    stats = optimizer.get_swap_stats()
    assert (stats["written_bytes"], stats["read_bytes"]) == (8 * MIB, 0)
    assert stats["write_gbps"] > 0.0
    assert 0.0 < stats["write_latency_p50"] <= stats["write_latency_p99"]
    assert stats["read_latency_p50"] == stats["read_latency_p99"] == stats["read_gbps"] == 0.0
    swapper.prefetch(names[:5]).wait()
    settle(swapper)
    stats = optimizer.get_swap_stats()
    assert stats["written_bytes"] == 8 * MIB
    assert stats["read_bytes"] == 5 * MIB == group_of(swapper).in_bytes
    assert stats["read_gbps"] > 0.0
    assert 0.0 < stats["read_latency_p50"] <= stats["read_latency_p99"]
    assert stats["active_swaps"] == stats["queue_depth"] == stats["io_errors"] == 0
    assert stats["backend"] == io_backend
    assert stats["backend_reason"]
    assert stats["read_bytes"] == swapper.store.stats().read_bytes
    assert stats["written_bytes"] == swapper.store.stats().written_bytes


def test_odd_sizes_are_aligned(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 5, 10_001)
    assert swap_all(swapper) == 5
    written = swapper.nvme_optimizer.get_swap_stats()["written_bytes"]
    assert 5 * 10_001 <= written <= 5 * 12 * KIB


def test_errors_are_counted(swapper: AdvancedMemorySwapper) -> None:
    fill(swapper, 2)
    omnimem._core._fault_arm("write", 1, True)
    assert swap_all(swapper) == 0
    omnimem._core._fault_reset()
    assert swapper.nvme_optimizer.get_swap_stats()["io_errors"] >= 1
    assert read(swapper, "b0") == content("b0")
