"""What a directory lies on: flash or a spinning disk, RAM or neither, and what room is left.

The kernel's word on a disk is a flag ("rotational") that virtual disks often set wrongly, so that
a short read through a store has the last word. Paths need not exist yet: the nearest existing
parent stands for them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from omnimem import _core
from omnimem.config import StoreConfig
from omnimem.errors import Error
from omnimem.store import Store

__all__ = [
    "StorageKind",
    "default_directory",
    "free_bytes",
    "open_store",
    "ram_file_system",
    "storage_kind",
]

KEPT_FREE = 0.05
"""Of a disk, for others."""

SPINNING_MOST_GBPS = 0.3
"""Above what one spinning disk reads: outer tracks of 7200 rpm disks give 0.26 to 0.29 GB/s by
their data sheets."""

SATA_MOST_GBPS = 0.6
"""What no SATA device can pass, a disk's own cache included: 6 Gbit/s in 8b/10b code."""

PROBE_MIB = (1, 1, 2, 4, 8, 16)
"""Blocks of the probe, 32 MiB together: growing, so that a slow disk is done after the first."""

PROBE_SECONDS = 0.2
"""No further block is written once this has passed; reading takes about as long again."""

RAM_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs", "rootfs", "hugetlbfs"})
"""As mountinfo calls file systems that live in RAM; rootfs is the one that a kernel boots into."""


@dataclass(frozen=True, slots=True)
class StorageKind:
    """What a directory lies on (`storage_kind`)."""

    kind: Literal["nvme", "ssd", "hdd"]
    """As it performs: "nvme" is flash that is faster than SATA, whatever bus it hangs on."""
    rotational: bool | None
    """The kernel's flag; True if any disk below has it, None: no block device is known."""
    read_gbps: float
    """GB/s that the probe read; 0.0: it could not."""
    reason: str
    """What decided, in words."""


class _Mount(NamedTuple):
    """One line of mountinfo."""

    point: str
    file_system: str
    source: str
    options: dict[str, str]


def storage_kind(directory: str | os.PathLike[str], root: str = "/") -> StorageKind:
    """Decide what a directory lies on, by the kernel's flag and a probe of at most 32 MiB.

    Parameters
    ----------
    directory : path
        Where blocks would go; it need not exist.
    root : str
        Where `sys` and `proc` are looked for; another one than "/" is for tests.

    Returns
    -------
    StorageKind
        Never an error: where the probe fails, the flag decides, and `reason` says so.

    Notes
    -----
    Takes about 0.1 s on flash and twice `PROBE_SECONDS` on a spinning disk. A disk whose driver
    calls it NVMe is one; else what is faster than SATA counts as "nvme", and what is faster than
    a spinning disk is none, whatever its flag says.
    """
    place = _existing(directory)
    disks = _disks(place, root)
    flags = [flag for disk in disks if (flag := _flag(disk)) is not None]
    rotational = any(flags) if flags else None
    try:
        gbps, failure = _probe(place), None
    except (Error, OSError) as error:
        gbps, failure = 0.0, str(error)
    names = ", ".join(disk.name for disk in disks) or "an unknown device"
    words = {True: "says that it rotates", False: "says that it does not rotate", None: "is silent"}
    said = f"{names}: the kernel {words[rotational]}"

    if disks and all(disk.name.startswith("nvme") for disk in disks):
        return StorageKind("nvme", rotational, gbps, f"{names}: an NVMe disk by its name")
    if failure is not None:
        kind: Literal["ssd", "hdd"] = "ssd" if rotational is False else "hdd"
        return StorageKind(kind, rotational, gbps, f"{said}; the probe failed: {failure}")
    read = f"{said}; read at {gbps:.2f} GB/s"
    if gbps > SATA_MOST_GBPS:
        return StorageKind("nvme", rotational, gbps, f"{read}, faster than SATA can be")
    if gbps > SPINNING_MOST_GBPS:
        return StorageKind("ssd", rotational, gbps, f"{read}, faster than a spinning disk is")
    if rotational is False:
        return StorageKind("ssd", rotational, gbps, read)
    return StorageKind("hdd", rotational, gbps, f"{read}, no faster than a spinning disk is")


def ram_file_system(directory: str | os.PathLike[str], root: str = "/") -> str | None:
    """Name of the RAM file system ("tmpfs", "ramfs", ...) that a directory lies on, else None.

    An overlay lies on what its upper directory lies on, where that can be seen.
    """
    mount = _mount(_existing(directory), root)
    return mount.file_system if mount and mount.file_system in RAM_FILE_SYSTEMS else None


def default_directory() -> str:
    """The first of the user's cache and /var/tmp that can be written and lies on no RAM."""
    cache, home = os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", "")
    choices = [
        *([f"{cache}/omnimem"] if cache.startswith("/") else []),
        *([f"{home}/.cache/omnimem"] if home.startswith("/") else []),
    ]
    for choice in choices:
        if os.access(_existing(choice), os.W_OK) and not ram_file_system(choice):
            return choice
    return "/var/tmp"


def open_store(host_limit: int) -> Store:
    """A store for models: as the environment says, with the disk's free room for what must go.

    Without a directory on a disk nothing is ever written: `disk_limit` is 0 then.
    """
    overrides: dict[str, Any] = {"host_limit": host_limit}
    if not os.environ.get("OMNIMEM_DIRECTORY"):
        overrides["directory"] = default_directory()
    if not os.environ.get("OMNIMEM_DISK_LIMIT"):
        where = overrides.get("directory") or os.environ["OMNIMEM_DIRECTORY"]
        room = 0 if ram_file_system(where) else int(free_bytes(where) * (1 - KEPT_FREE))
        overrides["disk_limit"] = min(room, 2 * _core.memory()[0])
    return Store(StoreConfig.from_env(**overrides))


def free_bytes(directory: str | os.PathLike[str]) -> int:
    """Bytes that an ordinary user may still take where a directory is or would be."""
    state = os.statvfs(_existing(directory))
    return state.f_bavail * state.f_frsize


def _existing(directory: str | os.PathLike[str]) -> Path:
    """The nearest existing parent, without links."""
    place = Path(os.path.realpath(os.fspath(directory)))
    while not os.path.isdir(place) and place != place.parent:
        place = place.parent
    return place


# -- mounts ----------------------------------------------------------------------------------------


def _mounts(root: str) -> Iterator[_Mount]:
    with contextlib.suppress(OSError), open(Path(root, "proc/self/mountinfo")) as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            fields, tail = before.split(), after.split()
            if len(fields) < 6 or len(tail) < 2:
                continue
            pairs = (item.partition("=") for item in (tail[2] if len(tail) > 2 else "").split(","))
            options = {key: _plain(value) for key, _, value in pairs}
            yield _Mount(_plain(fields[4]), tail[0], _plain(tail[1]), options)


def _plain(field: str) -> str:
    """Undo the octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _mount(place: Path, root: str, depth: int = 0) -> _Mount | None:
    """The mount that holds a path: the longest mount point, of several the one on top."""
    found: _Mount | None = None
    for mount in _mounts(root):
        inside = place == Path(mount.point) or Path(mount.point) in place.parents
        if inside and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    upper = found.options.get("upperdir") if found else None
    if upper and depth < 4 and os.path.isdir(upper):
        return _mount(Path(os.path.realpath(upper)), root, depth + 1)
    return found


# -- disks -----------------------------------------------------------------------------------------


def _device_of(place: Path) -> tuple[int, int]:
    number = place.stat().st_dev
    return os.major(number), os.minor(number)


def _disks(place: Path, root: str) -> list[Path]:
    """The disks at the bottom, as directories of /sys; none where the kernel does not tell."""
    major, minor = _device_of(place)
    start = Path(root, "sys/dev/block", f"{major}:{minor}")
    if major == 0:  # a number of no device: btrfs, overlay, network, RAM
        mount = _mount(place, root)
        source = Path(root, mount.source.lstrip("/")) if mount else None
        if mount is None or source is None or not mount.source.startswith("/dev/"):
            return []
        start = Path(root, "sys/class/block", Path(os.path.realpath(source)).name)
    return sorted(set(_bottom(start))) if start.exists() else []


def _bottom(device: Path, depth: int = 0) -> Iterator[Path]:
    """A partition's disk; the disks below a mapped one (device mapper, md)."""
    device = Path(os.path.realpath(device))
    if (device / "partition").exists():
        device = device.parent
    slaves = sorted((device / "slaves").glob("*")) if depth < 16 else []
    if not slaves:
        yield device
    for slave in slaves:
        yield from _bottom(slave, depth + 1)


def _flag(disk: Path) -> bool | None:
    with contextlib.suppress(OSError):
        return {"0": False, "1": True}.get((disk / "queue/rotational").read_text().strip())
    return None


# -- the probe -------------------------------------------------------------------------------------


def _probe(place: Path) -> float:
    """GB/s at which a store there reads what it has just written.

    Raises
    ------
    Error, OSError
        No swap file can be made, or it would be read from the page cache.
    """
    _refuse_cached(place)
    config = StoreConfig(
        host_limit=2 * sum(PROBE_MIB) << 20,
        disk_limit=2 * sum(PROBE_MIB) << 20,
        directory=place,
    )
    noise = os.urandom(1 << 20)  # some file systems and disks compress
    with Store(config) as store:
        names: list[str] = []
        started = time.monotonic()
        for mib in PROBE_MIB:
            name = f"probe-{len(names)}"
            store.add(name, noise * mib)
            store.evict(name)
            names.append(name)
            if time.monotonic() - started > PROBE_SECONDS:
                break
        before = store.stats()
        store.prefetch(names).wait()
        after = store.stats()
    seconds = after.read_busy_seconds - before.read_busy_seconds
    nbytes = after.read_bytes - before.read_bytes
    return nbytes / 1e9 / seconds if seconds > 0 else 0.0


def _refuse_cached(place: Path) -> None:
    """Raise OSError where reads cannot pass by the page cache: their rate would be that of RAM."""
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            text = "files there cannot be read past the page cache (O_DIRECT)"
            raise OSError(error.errno, text) from None
