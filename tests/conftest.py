"""Fixtures of the Python tests: stores on both I/O back ends, files with known bytes, children."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import omnimem
from omnimem import _core

from .memory import Memory

SOAK = os.environ.get("OMNIMEM_SOAK") == "1"
"""`make soak`: the long loops run whole. Tests that have one are marked so."""

PACKAGE_DIR = Path(omnimem.__file__).resolve().parent.parent


@functools.cache
def uring_refusal() -> str | None:
    """Why io_uring cannot be had here; None when it can."""
    with tempfile.TemporaryDirectory() as directory:
        config = omnimem.StoreConfig(host_limit="4MiB", directory=directory, io_backend="uring")
        try:
            omnimem.Store(config).close()
        except omnimem.Error as error:
            return str(error)
    return None


@pytest.fixture(params=["uring", "threads"])
def io_backend(request: pytest.FixtureRequest) -> str:
    if request.param == "uring" and uring_refusal():
        pytest.skip(f"no io_uring here: {uring_refusal()}")
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_faults_left() -> Iterator[None]:
    yield
    _core._fault_reset()


@pytest.fixture
def open_store(tmp_path: Path, io_backend: str) -> Iterator[Callable[..., omnimem.Store]]:
    """Opens stores (16 MiB of RAM, 64 MiB of disk unless told); checks and closes them."""
    stores = []

    def open_one(**fields: object) -> omnimem.Store:
        fields = {
            "host_limit": "16MiB",
            "disk_limit": "64MiB",
            "directory": tmp_path / "swap",
            "io_backend": io_backend,
        } | fields
        stores.append(omnimem.Store(omnimem.StoreConfig(**fields)))
        return stores[-1]

    (tmp_path / "swap").mkdir(exist_ok=True)
    yield open_one
    _core._fault_reset()
    for store in stores:
        try:
            store.check()
        except omnimem.ClosedError:
            pass
        finally:
            store.close()


@pytest.fixture
def open_swapper(
    tmp_path: Path, io_backend: str
) -> Iterator[Callable[..., omnimem.AdvancedMemorySwapper]]:
    """Opens swappers (64 MiB of RAM, 64 MiB of disk unless told); checks and cleans them up."""
    swappers = []

    def open_one(**fields: Any) -> omnimem.AdvancedMemorySwapper:
        fields = {
            "host_limit": "64MiB",
            "max_swap_size": "64MiB",
            "nvme_optimizer": omnimem.NVMeOptimizer(swap_directory=tmp_path / "swap"),
            "io_backend": io_backend,
        } | fields
        swappers.append(omnimem.AdvancedMemorySwapper(**fields))
        return swappers[-1]

    yield open_one
    _core._fault_reset()
    for swapper in swappers:
        try:
            swapper.store.check()
        except omnimem.ClosedError:
            pass
        finally:
            swapper.cleanup()


@pytest.fixture
def open_eager_swapper(
    tmp_path: Path, open_swapper: Callable[..., omnimem.AdvancedMemorySwapper]
) -> Callable[..., omnimem.AdvancedMemorySwapper]:
    """As `open_swapper`; `perform_swapping` moves out all that can go, in small requests."""

    def open_one(
        directory: Path | None = None, block_size: str = "64KiB", **fields: Any
    ) -> omnimem.AdvancedMemorySwapper:
        nvme = omnimem.NVMeOptimizer(
            block_size, directory or tmp_path / "swap", 8, allow_ram_file_system=True
        )
        return open_swapper(**{"swap_threshold": 0.0, "nvme_optimizer": nvme} | fields)

    return open_one


@pytest.fixture
def swapper(
    open_swapper: Callable[..., omnimem.AdvancedMemorySwapper],
) -> omnimem.AdvancedMemorySwapper:
    return open_swapper()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """1 GiB of memory, of which the blocks of `memory.swapper` and `memory.others` are in use."""
    stand_in = Memory()
    monkeypatch.setattr(_core, "memory", stand_in)
    return stand_in


@pytest.fixture
def store(open_store: Callable[..., omnimem.Store]) -> omnimem.Store:
    return open_store()


def data(nbytes: int, seed: int = 0) -> bytes:
    """Bytes that no other seed has."""
    return random.Random(f"{nbytes} {seed}").randbytes(nbytes)


@pytest.fixture
def file_of(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file with given bytes."""

    def write(content: bytes, name: str = "origin.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def run_python(code: str, *args: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds this omnimem."""
    path = os.pathsep.join([str(PACKAGE_DIR), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )


def run_clean(code: str, *args: str, timeout: float = 120.0) -> str:
    """As run_python; it must exit with 0 and say nothing on standard error."""
    done = run_python(code, *args, timeout=timeout)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout
