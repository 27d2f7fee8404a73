"""The doctor's checks of memory, limits, the kernel, the processor, GPUs and software."""

from __future__ import annotations

import platform
import re

import omnimem
from omnimem._doctor_world import Check, World
from omnimem.config import format_size, parse_size

LEAST = {"torch": (2, 9), "transformers": (5, 16), "safetensors": (0, 5)}
"""The oldest versions that work: those of the extras in pyproject.toml."""
_LEAST_KERNEL = (5, 11)
_LOCKED = 64 << 20
_CAP_IPC_LOCK = 14
_LEAST_FILES = 256
_LEAST_TASKS = 64
_TIGHT = 0.1


# -- memory ----------------------------------------------------------------------------------------


def check_memory(world: World) -> Check:
    """Is there the memory that stores may use?"""
    total, available, source = world.memory()
    swap_total, swap_free = (_kib(world, name) for name in ("SwapTotal", "SwapFree"))
    swapped = swap_total - swap_free
    limit = _host_limit(world)
    data = {
        "total_bytes": total,
        "available_bytes": available,
        "source": source,
        "swap_total_bytes": swap_total,
        "swap_used_bytes": swapped,
        "host_limit": limit,
    }
    fact = f"{format_size(available)} of {format_size(total)} available ({source})"
    if available < limit:
        fact += f", less than host_limit, {format_size(limit)}"
        fix = f"export OMNIMEM_HOST_LIMIT={max(available // 2 >> 20, 1)}MiB, or end other programs"
        return Check("memory", "WARN", fact, fix, data)
    if swap_total and swapped > swap_total // 2:
        fact += f"; {format_size(swapped)} of {format_size(swap_total)} swap in use"
        fix = "end other programs: what the kernel swaps comes back far slower than what streams"
        return Check("memory", "WARN", fact, fix, data)
    swap = f"{format_size(swapped)} of {format_size(swap_total)} swap in use"
    return Check("memory", "OK", f"{fact}; {swap if swap_total else 'no swap'}", data=data)


def _kib(world: World, name: str) -> int:
    text = (world.field("proc/meminfo", name) or "0").split()[0]
    return int(text) * 1024


def _host_limit(world: World) -> int:
    try:
        return parse_size(world.config().host_limit)
    except (ValueError, TypeError):
        return 0  # told by its own check


def check_cgroup(world: World) -> Check:
    """Which limit of a container or a unit binds, and how much room is left?"""
    groups = world.cgroups()
    if not groups:
        return Check("cgroup", "OK", "no memory cgroup limits this process", data={"versions": []})
    versions = sorted({group.version for group in groups})
    name = f"version {' and '.join(map(str, versions))}"
    tightest = min(groups, key=lambda group: group.limit - group.used)
    bound, room = tightest.limit, tightest.limit - tightest.used
    data = {
        "versions": versions,
        "source": tightest.path,
        "limit_bytes": tightest.limit,
        "high_bytes": tightest.high,
        "used_bytes": tightest.used,
        "room_bytes": max(room, 0),
    }
    key = "memory.limit_in_bytes" if tightest.version == 1 else "memory.max"
    if tightest.high is not None and bound == tightest.high:
        key = "memory.high"
    left = format_size(max(room, 0))
    fact = f"{name}: {key} of {tightest.path} is {format_size(bound)}, {left} left"
    if room >= max(bound * _TIGHT, 1):
        return Check("cgroup", "OK", fact, data=data)
    if key == "memory.high" and room <= 0:
        fact += ": the kernel slows this process down"
    fix = (
        f"echo {2 * bound} | sudo tee {tightest.path}/{key} (docker: --memory, systemd: "
        f"{'MemoryHigh' if key == 'memory.high' else 'MemoryMax'}=), or end what else runs in it"
    )
    return Check("cgroup", "WARN", fact, fix, data)


def check_memlock(world: World) -> Check:
    """How much memory may be page-locked (pools on "pinned")?"""
    soft, hard = world.rlimit("MEMLOCK")
    capable = int(world.field("proc/self/status", "CapEff") or "0", 16) >> _CAP_IPC_LOCK & 1
    data = {"soft_bytes": soft, "hard_bytes": hard, "cap_ipc_lock": bool(capable)}
    if soft is None or capable:
        why = "RLIMIT_MEMLOCK is unlimited" if soft is None else "CAP_IPC_LOCK"
        return Check("memlock", "OK", f"no limit ({why})", data=data)
    fact = f"at most {format_size(soft)} can be page-locked (RLIMIT_MEMLOCK)"
    if soft >= _LOCKED:
        return Check("memlock", "OK", fact, data=data)
    fix = (
        "echo '* - memlock unlimited' | sudo tee /etc/security/limits.d/omnimem.conf, then log in "
        "anew (docker: --ulimit memlock=-1, systemd: LimitMEMLOCK=infinity)"
    )
    if hard is None or hard >= _LOCKED:
        fix = f"ulimit -l {'unlimited' if hard is None else hard >> 10}"
    return Check("memlock", "WARN", f'{fact}: pools on "pinned" get no more', fix, data)


# -- limits and the kernel -------------------------------------------------------------------------


def check_limits(world: World) -> Check:
    """Are there descriptors and threads enough?"""
    files, hard = world.rlimit("NOFILE")
    tasks, _ = world.rlimit("NPROC")
    pids = world.pids_max()
    data = {"open_files": files, "processes": tasks, "pids_max": pids}
    if files is not None and files < _LEAST_FILES:
        fix = f"ulimit -n {min(hard or 4096, 4096)}"
        return Check("limits", "WARN", f"only {files} open files (RLIMIT_NOFILE)", fix, data)
    for value, what, fix in (
        (tasks, "RLIMIT_NPROC", "ulimit -u 4096"),
        (pids, "pids.max of the cgroup", "docker run --pids-limit 4096 (systemd: TasksMax=4096)"),
    ):
        if value is not None and value < _LEAST_TASKS:
            return Check(
                "limits", "WARN", f"only {value} threads and processes ({what})", fix, data
            )
    most = [f"{'unlimited' if v is None else v} {what}"
            for v, what in ((files, "open files"), (tasks, "processes"))]  # fmt: skip
    return Check("limits", "OK", ", ".join(most), data=data)


def check_kernel(world: World) -> Check:
    """Is the kernel one that is known to do?"""
    release, page = world.kernel(), world.page_size()
    data = {"release": release, "machine": world.machine(), "page_bytes": page}
    fact = f"Linux {release} on {world.machine()}, pages of {format_size(page)}"
    if _version(release) < _LEAST_KERNEL:
        fact += ": older than 5.11, so that threads do the I/O"
        return Check("kernel", "WARN", fact, "upgrade to Linux 5.11 or later", data)
    if page != 4096:
        fact += ": tried with pages of 4 KiB only"
        return Check("kernel", "WARN", fact, "boot a kernel with pages of 4 KiB", data)
    return Check("kernel", "OK", fact, data=data)


def check_pressure(world: World) -> Check:
    """Does the kernel tell how long programs wait for memory (PSI)?"""
    text = world.text("proc/pressure/memory")
    if text is not None and text.startswith("some"):
        return Check("pressure", "OK", "/proc/pressure/memory tells stalls", data={"psi": True})
    fact = "the kernel has no pressure stall information: the monitor goes by bytes alone"
    fix = "add psi=1 to the kernel's command line and boot again"
    return Check("pressure", "WARN", fact, fix, {"psi": False})


def check_huge_pages(world: World) -> Check:
    """Can stores have huge pages, which they ask for?"""
    path = "sys/kernel/mm/transparent_hugepage/enabled"
    found = re.search(r"\[(\w+)\]", world.text(path) or "")
    setting = found[1] if found else None
    data = {"transparent_hugepage": setting}
    if setting in ("always", "madvise"):
        return Check("huge_pages", "OK", f"transparent huge pages: {setting}", data=data)
    if setting is None:
        return Check("huge_pages", "OK", "the kernel has none, or does not tell", data=data)
    fact = (
        f"transparent huge pages: {setting}; memory is faulted in small pages, which takes longer"
    )
    return Check("huge_pages", "WARN", fact, f"echo madvise | sudo tee /{path}", data)


# -- processor and GPUs ----------------------------------------------------------------------------


def check_codec(world: World) -> Check:
    """How are encoded weights decoded?"""
    path, machine = world.codec(), world.machine()
    data = {"path": path, "machine": machine}
    if path == "plain" and machine in ("x86_64", "AMD64"):
        fact = "weights are decoded by plain C, several times slower: the processor shows no AVX2"
        fix = "give a virtual machine the host's processor (qemu: -cpu host), or --compression off"
        return Check("codec", "WARN", fact, fix, data)
    return Check("codec", "OK", f"weights are decoded by {path}", data=data)


def check_openmp(world: World) -> Check:
    """Is there an OpenMP runtime, on whose threads weights are decoded?"""
    files = world.openmp()
    data = {"files": files}
    if files:
        names = ", ".join(sorted({file.rpartition("/")[2] for file in files}))
        return Check("openmp", "OK", f"{names}: decoding shares the model's threads", data=data)
    if world.version("torch") is None:
        return Check("openmp", "OK", "none; torch brings one", data=data)
    fact = "torch brings none that is known: weights are decoded by one thread"
    return Check("openmp", "WARN", fact, "pip install --force-reinstall torch", data)


def check_gpu(world: World) -> Check:
    """Which GPUs are there?"""
    driver = world.gpu_driver()
    data: dict[str, object] = {"driver": driver, "devices": []}
    try:
        gpus = world.gpus()
    except OSError as error:
        fact = f"NVIDIA's driver answers with an error: {error}"
        fix = "sudo modprobe nvidia; if nvidia-smi fails then, install the driver again and boot"
        return Check("gpu", "WARN", fact, fix, data)
    if gpus:
        data["devices"] = [gpu._asdict() for gpu in gpus]
        fact = ", ".join(f"{gpu.name} ({format_size(gpu.total_bytes)})" for gpu in gpus)
        return Check("gpu", "OK", fact + (f"; driver {driver}" if driver else ""), data=data)
    if gpus is None and driver is None:
        return Check("gpu", "OK", "none found", data=data)
    if gpus is None:
        fact = "NVIDIA's kernel driver is here, its library libnvidia-ml.so.1 is not"
        fix = "install the driver's libraries of the same version (docker: --gpus all)"
        return Check("gpu", "WARN", fact, fix, data)
    fact = "NVIDIA's driver is here, but it shows no device"
    fix = "docker run --gpus all, or unset CUDA_VISIBLE_DEVICES and look at nvidia-smi"
    return Check("gpu", "WARN", fact, fix, data)


# -- software --------------------------------------------------------------------------------------


def check_python(world: World) -> Check:
    """Which omnimem runs on which Python?"""
    data = {"omnimem": omnimem.__version__, "python": platform.python_version()}
    fact = f"omnimem {omnimem.__version__} on {platform.python_implementation()} {data['python']}"
    return Check("omnimem", "OK", fact, data=data)


def check_torch(world: World) -> Check:
    """Is torch one that is known to do?"""
    cuda = world.torch_cuda() if world.version("torch") else None
    found = _package(world, "torch", "torch")
    fact = found.fact + (f", built for CUDA {cuda}" if cuda else "")
    return Check(found.name, found.state, fact, found.fix, found.data | {"cuda": cuda})


def check_transformers(world: World) -> Check:
    """Is transformers one that is known to do?"""
    return _package(world, "transformers", "transformers")


def check_safetensors(world: World) -> Check:
    """Is safetensors one that is known to do?"""
    return _package(world, "safetensors", "transformers")


def _package(world: World, name: str, extra: str) -> Check:
    version, least = world.version(name), ".".join(map(str, LEAST[name]))
    data = {"version": version, "least": least}
    if version is None:
        fact = f"not installed; models need it: pip install 'omnimem[{extra}]'"
        return Check(name, "OK", fact, data=data)
    if _version(version) < LEAST[name]:
        fix = f"pip install --upgrade '{name}>={least}'"
        return Check(name, "WARN", f"{version} is older than {least}", fix, data)
    return Check(name, "OK", version, data=data)


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


CHECKS = (
    check_memory,
    check_cgroup,
    check_memlock,
    check_limits,
    check_kernel,
    check_pressure,
    check_huge_pages,
    check_codec,
    check_openmp,
    check_gpu,
    check_python,
    check_torch,
    check_transformers,
    check_safetensors,
)
