"""The doctor's checks of I/O and of the swap directory."""

from __future__ import annotations

import os
import re
import stat

from omnimem._doctor_world import Check, State, World
from omnimem._storage import RAM_FILE_SYSTEMS
from omnimem.config import format_size, parse_size
from omnimem.errors import Error

_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|9p|ceph|lustre|glusterfs|gpfs|afs|virtiofs|fuse\.(?!ntfs).*"
)
_ENOUGH = 64 << 20
_FEW_GBPS = 0.3


def _elsewhere(why: str = "a local disk (ext4, xfs or btrfs)") -> str:
    return f"export OMNIMEM_DIRECTORY=DIR, with DIR on {why}"


def check_configuration(world: World) -> Check:
    """Can a store be configured from the environment?"""
    try:
        config = world.config()
    except (ValueError, TypeError) as error:
        variable = str(error).partition("=")[0]
        return Check(
            "configuration", "FAIL", f"{error}", f"unset {variable}, or set it to such a value"
        )
    set_here = sorted(
        name for name in os.environ if name.startswith("OMNIMEM_") and os.environ[name]
    )
    data = {"host_limit": config.host_limit, "disk_limit": config.disk_limit, "set": set_here}
    fact = (
        f"host_limit {format_size(parse_size(config.host_limit))}, "
        f"disk_limit {format_size(parse_size(config.disk_limit))}, io_backend {config.io_backend}"
    )
    return Check("configuration", "OK", fact + (f"; {', '.join(set_here)} set" if set_here else ""),
                 data=data)  # fmt: skip


def check_io_uring(world: World) -> Check:
    """Does a real write and read through a store go by io_uring?"""
    wanted = _wanted_backend(world)
    sysctl = world.number("proc/sys/kernel/io_uring_disabled")
    seccomp = world.field("proc/self/status", "Seccomp")
    data = {"io_uring_disabled": sysctl, "seccomp": seccomp and int(seccomp), "wanted": wanted}
    try:
        backend = world.backend("auto" if wanted == "uring" else wanted)
    except (Error, OSError) as error:
        text = f"no store can do I/O below {world.directory()}: {error}"
        return Check("io_uring", "FAIL", text, _elsewhere("a disk that can be written"), data)
    data |= {"backend": backend.name, "reason": backend.reason}
    if not backend.fell_back and backend.name == "uring":
        return Check("io_uring", "OK", backend.reason, data=data)
    if not backend.fell_back:
        return Check("io_uring", "OK", f"not used, as configured: {backend.reason}", data=data)
    fact = f"denied, so threads do the I/O: {backend.reason.partition('; not uring: ')[2]}"
    state: State = "FAIL" if wanted == "uring" else "WARN"
    if wanted == "uring":
        fact = f"OMNIMEM_IO_BACKEND=uring, but io_uring is {fact}"
    return Check("io_uring", state, fact, _allow_uring(sysctl, seccomp, backend.reason), data)


def _wanted_backend(world: World) -> str:
    try:
        return world.config().io_backend
    except (ValueError, TypeError):
        return "auto"  # told by its own check


def _allow_uring(sysctl: int | None, seccomp: str | None, reason: str) -> str:
    if sysctl:
        return "sudo sysctl -w kernel.io_uring_disabled=0"
    if "RLIMIT_MEMLOCK" in reason:
        return "ulimit -l unlimited (docker: --ulimit memlock=-1)"
    if seccomp == "2":
        return (
            "docker run --security-opt seccomp=FILE, with FILE docker's default profile and "
            "io_uring_setup, io_uring_enter, io_uring_register allowed"
        )
    return "use Linux 5.11 or later, and an omnimem that was built with liburing"


def check_direct_io(world: World) -> Check:
    """Can files in the directory be read past the page cache?"""
    if not _writable(world):
        return _untried("direct_io", world)
    try:
        world.direct()
    except OSError as error:
        fact = f"{world.directory()}: {error.strerror or error}; reads take more memory and time"
        return Check("direct_io", "WARN", fact, _elsewhere())
    return Check("direct_io", "OK", f"O_DIRECT works in {world.place()}")


def _writable(world: World) -> bool:
    try:
        world.write()
    except OSError:
        return False
    return True


def _untried(name: str, world: World) -> Check:
    fact = f"not tried: no file can be made in {world.place()}"
    return Check(name, "WARN", fact, 'that of the check "directory"')


def check_directory(world: World) -> Check:
    """Is the swap directory, or its nearest parent, ours to write in?"""
    directory, place = world.directory(), world.place()
    status = os.stat(place)
    mode = stat.S_IMODE(status.st_mode)
    data = {"directory": directory, "existing": str(place), "mode": mode, "owner": status.st_uid}
    try:
        world.write()
    except OSError as error:
        fact = f"{directory}: no folder can be made in {place} ({error.strerror or error})"
        fix = (
            f"sudo install -d -m 0700 -o {world.uid()} {directory}; or {_elsewhere('such a disk')}"
        )
        return Check("directory", "FAIL", fact, fix, data)
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        fact = f"{place} can be written by anyone (mode {mode:04o}), who could take files away"
        return Check("directory", "WARN", fact, f"chmod o-w {place}", data)
    made = "can be written" if str(place) == directory else f"can be made in {place}"
    return Check(
        "directory",
        "OK",
        f"{directory} {made}; the swap file in it is nameless and 0600",
        data=data,
    )


def check_file_system(world: World) -> Check:
    """Does the directory lie on a local disk?"""
    kind, point = world.mount()
    data = {"file_system": kind, "mount_point": point}
    where = f"{world.directory()} lies on {kind}"
    if kind in RAM_FILE_SYSTEMS:
        fact = f"{where}, which is RAM: what is swapped out there frees no memory"
        return Check("file_system", "WARN", fact, _elsewhere(), data)
    if _NETWORK.fullmatch(kind):
        fact = f"{where}, which other machines or a daemon serve: slower, and it may stall"
        return Check("file_system", "WARN", fact, _elsewhere(), data)
    if kind == "overlay":
        fact = f"{where}, a container's layer: what it lies on is not told, and it may be small"
        fix = "docker run -v /a/local/disk:/swap -e OMNIMEM_DIRECTORY=/swap"
        return Check("file_system", "WARN", fact, fix, data)
    if not kind:
        return Check("file_system", "OK", "the kernel does not tell", data=data)
    return Check("file_system", "OK", f"{kind}, mounted at {point}", data=data)


def check_disk_space(world: World) -> Check:
    """Is there room for the swap file that is allowed?"""
    free = world.free_bytes()
    try:
        limit = parse_size(world.config().disk_limit)
    except (ValueError, TypeError):
        limit = 0  # told by its own check
    data = {"free_bytes": free, "disk_limit": limit}
    fact = f"{format_size(free)} free"
    if free >= limit:
        return Check("disk_space", "OK", f"{fact}, disk_limit is {format_size(limit)}", data=data)
    if free < _ENOUGH:
        fact = f"{fact} in {world.place()}: next to nothing can be swapped out"
        return Check(
            "disk_space", "FAIL", fact, f"make room, or {_elsewhere('a disk with room')}", data
        )
    fix = f"export OMNIMEM_DISK_LIMIT={free >> 20}MiB, or make room in {world.place()}"
    fact = f"{fact}, less than disk_limit, {format_size(limit)}: a full disk is an error then"
    return Check("disk_space", "WARN", fact, fix, data)


def check_storage(world: World) -> Check:
    """How fast is the disk, by a short read of what was just written?"""
    if not _writable(world):
        return _untried("storage", world)
    kind, _ = world.mount()
    if kind in RAM_FILE_SYSTEMS:
        return Check("storage", "OK", f"not measured: {kind} is RAM", data={"kind": kind})
    found = world.storage()
    data = {
        "kind": found.kind,
        "rotational": found.rotational,
        "read_bytes_per_second": found.read_gbps * 1e9,
    }
    if found.read_gbps == 0.0:
        fact = f"its speed could not be measured: {found.reason}"
        return Check("storage", "WARN", fact, _elsewhere(), data)
    if found.kind == "hdd" or found.read_gbps < _FEW_GBPS:
        fact = f"{found.kind}: {found.reason}; a pass takes as long as reading what streams"
        return Check("storage", "WARN", fact, _elsewhere("an NVMe disk"), data)
    return Check("storage", "OK", f"{found.kind}: {found.reason}", data=data)


CHECKS = (
    check_configuration,
    check_io_uring,
    check_direct_io,
    check_directory,
    check_file_system,
    check_disk_space,
    check_storage,
)
