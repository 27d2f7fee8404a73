"""What `omnimem doctor` looks at: small probes of this machine, each of which a test can replace.

Text files of the kernel are looked for below a root, so that a fixture tree can stand for another
machine. Nothing that a probe makes outlives it: it has no name, or lies in a folder that goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from omnimem import _core, _storage
from omnimem.config import StoreConfig
from omnimem.store import Store

State = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    """Stable: what was looked at."""
    state: State
    """"WARN": it works, slower or with less; "FAIL": it does not."""
    fact: str
    """What is so, in words."""
    fix: str = ""
    """A command or a setting, whole; "" where all is well."""
    data: dict[str, Any] = field(default_factory=dict)
    """The numbers: raw bytes, seconds, bytes per second."""


class Backend(NamedTuple):
    """How a store does its I/O."""

    name: str
    reason: str
    fell_back: bool


class Cgroup(NamedTuple):
    """A memory cgroup that limits this process."""

    path: str
    version: int
    limit: int
    """Bytes, the lower one of two."""
    high: int | None
    """Of version 2: above it the kernel slows the process down."""
    used: int
    """Bytes that cannot be dropped at once."""


class Gpu(NamedTuple):
    """A GPU, as its driver tells."""

    name: str
    total_bytes: int
    free_bytes: int


class World:
    """This machine, as seen from a swap directory.

    Parameters
    ----------
    directory : path, optional
        Where a swap file would lie; by default as `StoreConfig.from_env` and a store have it.
    root : str
        Where `proc` and `sys` are looked for.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, root: str = "/") -> None:
        self.root = root
        self._asked = directory

    # -- configuration

    def config(self) -> StoreConfig:
        """What the environment configures.

        Raises
        ------
        ValueError
            A variable holds what its field refuses.
        """
        return StoreConfig.from_env()

    def directory(self) -> str:
        """Where a swap file would lie."""
        chosen = self._asked
        if chosen is None:
            with contextlib.suppress(ValueError):
                chosen = self.config().directory
        return os.path.abspath(chosen or _storage.default_directory())

    def place(self) -> Path:
        """The nearest parent of the directory that exists."""
        return _storage._existing(self.directory())

    # -- files of the kernel

    def text(self, path: str) -> str | None:
        """A file's text below the root; None where it cannot be read."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return Path(self.root, path.lstrip("/")).read_text()
        return None

    def number(self, path: str) -> int | None:
        """A file's number; None for "max" and where there is none."""
        text = (self.text(path) or "").strip()
        return int(text) if text.isascii() and text.isdigit() else None

    def field(self, path: str, name: str) -> str | None:
        """What follows "name:" or "name " at the start of a line."""
        found = re.search(rf"^{re.escape(name)}:?[ \t]+(.*)$", self.text(path) or "", re.MULTILINE)
        return found[1].strip() if found else None

    # -- the machine

    def uid(self) -> int:
        """Who runs this."""
        return os.geteuid()

    def machine(self) -> str:
        """The processor's architecture."""
        return platform.machine()

    def kernel(self) -> str:
        """Its release: "6.1.0-18-amd64"."""
        return (self.text("proc/sys/kernel/osrelease") or platform.release()).strip()

    def page_size(self) -> int:
        """Bytes."""
        return os.sysconf("SC_PAGESIZE")

    def rlimit(self, which: str) -> tuple[int | None, int | None]:
        """Soft and hard limit ("MEMLOCK", "NOFILE", "NPROC"); None: none."""
        limits = resource.getrlimit(getattr(resource, f"RLIMIT_{which}"))
        soft, hard = (None if value == resource.RLIM_INFINITY else value for value in limits)
        return soft, hard

    def memory(self) -> tuple[int, int, str]:
        """(total, available, source) of the tightest of machine and cgroups."""
        return _core.memory(None if self.root == "/" else self.root)

    def cgroups(self) -> list[Cgroup]:
        """Memory cgroups that limit this process, its own first, as a monitor sees them."""
        monitor = _core.Monitor(act=False, root=None if self.root == "/" else self.root)
        try:
            places = monitor.sample()["places"]
        except OSError:
            return []  # told by the check of memory
        finally:
            monitor.close()
        return [
            Cgroup(path, self._version(path), limit, high, used)
            for source, limit, high, used, _ in places
            if (path := source.removeprefix("cgroup ")) != source
        ]

    def _version(self, path: str) -> int:
        """Of the hierarchy that a cgroup is in."""
        mounts = [m for m in _storage._mounts(self.root) if f"{path}/".startswith(f"{m.point}/")]
        nearest = max(mounts, key=lambda mount: len(mount.point), default=None)
        return 1 if nearest is not None and nearest.file_system == "cgroup" else 2

    def pids_max(self) -> int | None:
        """Threads and processes that this process's cgroup may have; None: no limit."""
        own = self._own_cgroup("pids")
        limit = self.number(f"sys/fs/cgroup/pids/{own}/pids.max")
        return limit or self.number(f"sys/fs/cgroup/{self._own_cgroup('')}/pids.max")

    def _own_cgroup(self, controller: str) -> str:
        """This process's directory in a hierarchy of version 1; "": in that of version 2."""
        for line in (self.text("proc/self/cgroup") or "").splitlines():
            controllers, _, own = line.partition(":")[2].partition(":")
            if controller in controllers.split(","):
                return own.lstrip("/")
        return ""

    # -- storage

    def mount(self) -> tuple[str, str]:
        """(file system, mount point) of the directory; "" where the kernel does not tell."""
        mount = _storage._mount(self.place(), self.root)
        return (mount.file_system, mount.point) if mount else ("", "")

    def free_bytes(self) -> int:
        """Bytes that may still be taken there."""
        return _storage.free_bytes(self.place())

    def backend(self, name: str) -> Backend:
        """Open a store in the directory, which moves real bytes once.

        Raises
        ------
        Error
            No store can be opened there.
        """
        config = StoreConfig(
            host_limit="4MiB", disk_limit="4MiB", directory=self.place(), io_backend=name
        )
        with Store(config) as store:
            stats = store.stats()
        return Backend(stats.io_backend, stats.io_reason, stats.io_fell_back)

    def direct(self) -> None:
        """Raise OSError where files cannot be read past the page cache."""
        _storage._refuse_cached(self.place())

    def write(self) -> None:
        """Raise OSError where no private folder can be made."""
        with tempfile.TemporaryDirectory(prefix="omnimem-", dir=self.place()):
            pass

    def storage(self) -> _storage.StorageKind:
        """What the directory lies on, by a short read."""
        return _storage.storage_kind(self.place(), self.root)

    # -- software

    def version(self, package: str) -> str | None:
        """Of an installed package."""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
        return None

    def torch_cuda(self) -> str | None:
        """The CUDA version that torch is built for, without importing it."""
        spec = importlib.util.find_spec("torch")
        folder = os.path.dirname(spec.origin) if spec and spec.origin else ""
        with contextlib.suppress(OSError):
            text = Path(folder, "version.py").read_text()
            found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
            return found[1] if found else None
        return None

    def openmp(self) -> list[str]:
        """Files of the OpenMP runtimes: those in this process, else those that torch brings."""
        known = re.compile(r"/lib(gomp|iomp5|omp)\b[^/\s]*$", re.MULTILINE)
        maps = self.text("proc/self/maps") or ""
        loaded = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if known.search(line)}
        if loaded:
            return sorted(loaded)
        spec = importlib.util.find_spec("torch")
        folder = Path(os.path.dirname(spec.origin), "lib") if spec and spec.origin else None
        files = sorted(folder.glob("lib*omp*")) if folder else []
        return [str(file) for file in files if known.search(str(file))]

    def codec(self) -> str:
        """The widest way of coding that this processor can, which is the one in use."""
        return next(path for path in ("avx512", "avx2", "plain") if _core._codec_use(path))

    # -- GPUs

    def gpu_driver(self) -> str | None:
        """The version of NVIDIA's kernel driver, or "" where only its devices are seen."""
        text = self.text("proc/driver/nvidia/version")
        if text is not None:
            found = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text)
            return found[1] if found else ""
        return "" if Path(self.root, "dev/nvidiactl").exists() else None

    def gpus(self) -> list[Gpu] | None:
        """What NVML tells; None where its library is not installed.

        Raises
        ------
        OSError
            NVML fails, with its own words.
        """
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
        nvml.nvmlErrorString.restype = ctypes.c_char_p

        def call(name: str, *arguments: Any) -> None:
            code = getattr(nvml, name)(*arguments)
            if code:
                raise OSError(f"{name}: {nvml.nvmlErrorString(code).decode()}")

        call("nvmlInit_v2")
        try:
            count = ctypes.c_uint()
            call("nvmlDeviceGetCount_v2", ctypes.byref(count))
            return [_gpu(call, number) for number in range(count.value)]
        finally:
            nvml.nvmlShutdown()


class _NvmlMemory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def _gpu(call: Any, number: int) -> Gpu:
    device, memory = ctypes.c_void_p(), _NvmlMemory()
    name = ctypes.create_string_buffer(96)
    call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(number), ctypes.byref(device))
    call("nvmlDeviceGetName", device, name, ctypes.c_uint(len(name)))
    call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
    return Gpu(name.value.decode(errors="replace"), int(memory.total), int(memory.free))
