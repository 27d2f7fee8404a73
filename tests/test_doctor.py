"""omnimem doctor: every finding, with its fix, in worlds that have that fault."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnimem import IOFailure, doctor
from omnimem import _doctor_storage as storage
from omnimem import _doctor_system as system
from omnimem._doctor_world import Backend, Cgroup, Gpu
from omnimem._storage import StorageKind
from omnimem.cli import main
from omnimem.config import StoreConfig
from omnimem.doctor import CHECKS, Check, World, diagnose

from .conftest import run_python, uring_refusal

ROOT = Path(__file__).resolve().parent.parent
GIB, MIB = 1 << 30, 1 << 20
NAMES = [check.__name__.removeprefix("check_") for check in CHECKS]
TOLD = ["omnimem" if name == "python" else name for name in NAMES]


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


class Healthy(World):
    """A machine without faults, but for what a test says: probes by name, values or functions."""

    def __init__(self, place: Path, texts: dict[str, str] | None = None, **probes: Any) -> None:
        super().__init__(place)
        self.texts = {
            "proc/self/status": "Seccomp:\t0\nCapEff:\t0000000000000000\n",
            "proc/meminfo": "SwapTotal: 0 kB\nSwapFree: 0 kB\n",
            "proc/pressure/memory": "some avg10=0.00\nfull avg10=0.00\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        } | (texts or {})
        values: dict[str, Any] = {
            "config": StoreConfig(),
            "machine": "x86_64",
            "kernel": "6.1.0",
            "page_size": 4096,
            "rlimit": lambda which: (None, None),
            "memory": (16 * GIB, 8 * GIB, "system"),
            "cgroups": [],
            "mount": ("ext4", "/"),
            "free_bytes": 100 * GIB,
            "backend": lambda name: Backend("uring", "io_uring with flags", False),
            "direct": None,
            "write": None,
            "storage": StorageKind("nvme", False, 2.0, "read at 2.00 GB/s"),
            "version": lambda package: "99.0",
            "torch_cuda": None,
            "openmp": ["/lib/libgomp.so.1"],
            "codec": "avx2",
            "gpu_driver": None,
            "gpus": None,
        }
        for name, value in (values | probes).items():
            probe = value if callable(value) else lambda *_, value=value: value
            setattr(self, name, probe)

    def text(self, path: str) -> str | None:
        return self.texts.get(path)


def fell_back(why: str) -> Callable[[str], Backend]:
    return lambda name: Backend("threads", f"8 of 8 threads; not uring: {why}", True)


def with_config(**fields: Any) -> StoreConfig:
    return StoreConfig(**fields)


DISABLED = "proc/sys/kernel/io_uring_disabled"
FULL = 4 * GIB - MIB
HUGE_PAGES = "sys/kernel/mm/transparent_hugepage/enabled"
DENIED = fell_back("a seccomp profile denies io_uring")
FAULTS: list[tuple[Any, dict[str, Any], str, str, str]] = [
    # check, the world, state, what the fact says, what the fix says
    (storage.check_configuration, {"config": raises(ValueError("OMNIMEM_VERIFY='no': verify"))},
     "FAIL", "OMNIMEM_VERIFY='no'", "unset OMNIMEM_VERIFY"),
    (storage.check_io_uring, {"backend": raises(IOFailure("no room"))},
     "FAIL", "no store can do I/O below", "export OMNIMEM_DIRECTORY=DIR"),
    (storage.check_io_uring, {"backend": DENIED, "texts": {DISABLED: "2\n"}},
     "WARN", "threads do the I/O: a seccomp profile", "sudo sysctl -w kernel.io_uring_disabled=0"),
    (storage.check_io_uring, {"backend": DENIED, "texts": {"proc/self/status": "Seccomp:\t2\n"}},
     "WARN", "threads do the I/O", "docker run --security-opt seccomp=FILE"),
    (storage.check_io_uring, {"backend": fell_back("raise RLIMIT_MEMLOCK")},
     "WARN", "RLIMIT_MEMLOCK", "ulimit -l unlimited"),
    (storage.check_io_uring, {"backend": fell_back("the kernel has no io_uring")},
     "WARN", "the kernel has no io_uring", "Linux 5.11 or later"),
    (storage.check_io_uring, {"backend": DENIED, "config": with_config(io_backend="uring")},
     "FAIL", "OMNIMEM_IO_BACKEND=uring, but io_uring is denied", "Linux 5.11"),
    (storage.check_direct_io, {"direct": raises(OSError(22, "no O_DIRECT there"))},
     "WARN", "no O_DIRECT there", "OMNIMEM_DIRECTORY=DIR, with DIR on a local disk (ext4"),
    (storage.check_direct_io, {"write": raises(OSError(13, "Permission denied"))},
     "WARN", "not tried: no file can be made", 'that of the check "directory"'),
    (storage.check_directory, {"write": raises(OSError(13, "Permission denied")), "uid": 1000},
     "FAIL", "no folder can be made in", "sudo install -d -m 0700 -o 1000 "),
    (storage.check_file_system, {"mount": ("tmpfs", "/tmp")},
     "WARN", "which is RAM", "export OMNIMEM_DIRECTORY=DIR, with DIR on a local disk"),
    (storage.check_file_system, {"mount": ("nfs4", "/home")},
     "WARN", "nfs4, which other machines", "export OMNIMEM_DIRECTORY=DIR, with DIR on a local"),
    (storage.check_file_system, {"mount": ("fuse.sshfs", "/home")},
     "WARN", "fuse.sshfs, which other", "export OMNIMEM_DIRECTORY=DIR"),
    (storage.check_file_system, {"mount": ("overlay", "/")},
     "WARN", "a container's layer", "docker run -v /a/local/disk:/swap -e OMNIMEM_DIRECTORY=/swap"),
    (storage.check_disk_space, {"free_bytes": GIB},
     "WARN", "1.00 GiB free, less than disk_limit, 8.00 GiB", "export OMNIMEM_DISK_LIMIT=1024MiB"),
    (storage.check_disk_space, {"free_bytes": MIB},
     "FAIL", "1.00 MiB free in", "make room, or export OMNIMEM_DIRECTORY=DIR"),
    (storage.check_storage, {"storage": StorageKind("hdd", True, 0.1, "read at 0.10 GB/s")},
     "WARN", "hdd: read at 0.10 GB/s", "with DIR on an NVMe disk"),
    (storage.check_storage, {"storage": StorageKind("ssd", False, 0.2, "read at 0.20 GB/s")},
     "WARN", "ssd: read at 0.20 GB/s", "with DIR on an NVMe disk"),
    (storage.check_storage, {"storage": StorageKind("ssd", False, 0.0, "the probe failed: x")},
     "WARN", "could not be measured: the probe failed: x", "export OMNIMEM_DIRECTORY=DIR"),
    (storage.check_storage, {"write": raises(OSError(30, "Read-only file system"))},
     "WARN", "not tried: no file can be made", 'that of the check "directory"'),
    (system.check_memory, {"memory": (16 * GIB, GIB, "system")},
     "WARN", "1.00 GiB of 16.00 GiB available (system), less than host_limit, 2.00 GiB",
     "export OMNIMEM_HOST_LIMIT=512MiB"),
    (system.check_memory, {"texts": {"proc/meminfo": "SwapTotal: 1024 kB\nSwapFree: 256 kB\n"}},
     "WARN", "768.00 KiB of 1.00 MiB swap in use", "end other programs"),
    (system.check_cgroup, {"cgroups": [Cgroup("/sys/fs/cgroup/a", 2, 4 * GIB, None, FULL)]},
     "WARN", "version 2: memory.max of /sys/fs/cgroup/a is 4.00 GiB, 1.00 MiB left",
     f"echo {8 * GIB} | sudo tee /sys/fs/cgroup/a/memory.max"),
    (system.check_cgroup, {"cgroups": [Cgroup("/sys/fs/cgroup/a", 2, GIB, GIB, 2 * GIB)]},
     "WARN", "memory.high of /sys/fs/cgroup/a is 1.00 GiB, 0 B left: the kernel slows",
     f"echo {2 * GIB} | sudo tee /sys/fs/cgroup/a/memory.high"),
    (system.check_cgroup, {"cgroups": [Cgroup("/sys/fs/cgroup/memory/a", 1, GIB, None, GIB)]},
     "WARN", "version 1: memory.limit_in_bytes of",
     f"echo {2 * GIB} | sudo tee /sys/fs/cgroup/memory/a/memory.limit_in_bytes"),
    (system.check_memlock, {"rlimit": lambda which: (MIB, MIB)},
     "WARN", "at most 1.00 MiB can be page-locked", "/etc/security/limits.d/omnimem.conf"),
    (system.check_memlock, {"rlimit": lambda which: (MIB, None)},
     "WARN", "at most 1.00 MiB", "ulimit -l unlimited"),
    (system.check_memlock, {"rlimit": lambda which: (MIB, 128 * MIB)},
     "WARN", "at most 1.00 MiB", "ulimit -l 131072"),
    (system.check_limits, {"rlimit": lambda which: (100, 1000)},
     "WARN", "only 100 open files (RLIMIT_NOFILE)", "ulimit -n 1000"),
    (system.check_limits, {"rlimit": lambda which: (10 if which == "NPROC" else 1024, None)},
     "WARN", "only 10 threads and processes (RLIMIT_NPROC)", "ulimit -u 4096"),
    (system.check_limits,
     {"texts": {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/pids.max": "20\n"}},
     "WARN", "only 20 threads and processes (pids.max", "docker run --pids-limit 4096"),
    (system.check_kernel, {"kernel": "5.4.0-200-generic"},
     "WARN", "Linux 5.4.0-200-generic on x86_64", "upgrade to Linux 5.11 or later"),
    (system.check_kernel, {"page_size": 65536},
     "WARN", "pages of 64.00 KiB", "boot a kernel with pages of 4 KiB"),
    (system.check_pressure, {"texts": {"proc/pressure/memory": ""}},
     "WARN", "no pressure stall information", "psi=1"),
    (system.check_huge_pages,
     {"texts": {HUGE_PAGES: "always madvise [never]\n"}},
     "WARN", "transparent huge pages: never",
     "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"),
    (system.check_codec, {"codec": "plain"}, "WARN", "shows no AVX2", "qemu: -cpu host"),
    (system.check_openmp, {"openmp": []},
     "WARN", "decoded by one thread", "pip install --force-reinstall torch"),
    (system.check_gpu, {"gpus": raises(OSError("nvmlInit_v2: Driver/library version mismatch"))},
     "WARN", "version mismatch", "sudo modprobe nvidia"),
    (system.check_gpu, {"gpus": [], "gpu_driver": "570.1"},
     "WARN", "shows no device", "docker run --gpus all"),
    (system.check_gpu, {"gpus": [], "gpu_driver": None},
     "WARN", "shows no device", "CUDA_VISIBLE_DEVICES"),
    (system.check_gpu, {"gpu_driver": "570.1"},
     "WARN", "libnvidia-ml.so.1 is not", "docker: --gpus all"),
    (system.check_torch, {"version": lambda package: "2.8.1+cu128"},
     "WARN", "2.8.1+cu128 is older than 2.9", "pip install --upgrade 'torch>=2.9'"),
    (system.check_transformers, {"version": lambda package: "4.57.1"},
     "WARN", "4.57.1 is older than 5.16", "pip install --upgrade 'transformers>=5.16'"),
    (system.check_safetensors, {"version": lambda package: "0.4.5"},
     "WARN", "0.4.5 is older than 0.5", "pip install --upgrade 'safetensors>=0.5'"),
]  # fmt: skip


@pytest.mark.parametrize(
    "fault", FAULTS, ids=[f"{f[0].__name__[6:]}-{n}" for n, f in enumerate(FAULTS)]
)
def test_a_fault_is_found_with_its_fix(fault: tuple[Any, ...], tmp_path: Path) -> None:
    check, probes, state, fact, fix = fault
    found = check(Healthy(tmp_path, **probes))
    assert (found.state, fact in found.fact, fix in found.fix) == (state, True, True), found
    json.dumps(found.data)


@pytest.mark.parametrize("check", CHECKS, ids=NAMES)
def test_a_healthy_machine(check: Callable[[World], Check], tmp_path: Path) -> None:
    found = check(Healthy(tmp_path))
    assert (found.state, found.fix) == ("OK", ""), found
    assert found.name == TOLD[CHECKS.index(check)]


def test_every_check_has_faults() -> None:
    never = {system.check_python}  # tells what runs, no more
    assert {fault[0] for fault in FAULTS} == set(CHECKS) - never


GOOD: list[tuple[Any, dict[str, Any], str]] = [
    (storage.check_io_uring,
     {"backend": lambda name: Backend(name, "8 of 8 threads", False),
      "config": with_config(io_backend="threads")},
     "not used, as configured: 8 of 8 threads"),
    (storage.check_file_system, {"mount": ("", "")}, "does not tell"),
    (storage.check_file_system, {"mount": ("fuseblk", "/mnt")}, "fuseblk"),
    (storage.check_storage, {"mount": ("tmpfs", "/tmp"), "storage": raises(AssertionError())},
     "not measured: tmpfs is RAM"),
    (system.check_memory, {"texts": {"proc/meminfo": "SwapTotal: 1024 kB\nSwapFree: 1000 kB\n"}},
     "24.00 KiB of 1.00 MiB swap in use"),
    (system.check_cgroup, {"cgroups": [Cgroup("/g", 2, 3 * GIB, 3 * GIB, GIB)]},
     "version 2: memory.high of /g is 3.00 GiB, 2.00 GiB left"),
    (system.check_cgroup, {"cgroups": []}, "no memory cgroup limits this process"),
    (system.check_cgroup,
     {"cgroups": [Cgroup("/g/a", 2, 8 * GIB, None, GIB), Cgroup("/g", 2, 4 * GIB, None, 2 * GIB)]},
     "memory.max of /g is 4.00 GiB, 2.00 GiB left"),
    (system.check_memlock,
     {"rlimit": lambda which: (MIB, MIB), "texts": {"proc/self/status": "CapEff:\t4000\n"}},
     "no limit (CAP_IPC_LOCK)"),
    (system.check_memlock, {"rlimit": lambda which: (128 * MIB, None)}, "at most 128.00 MiB"),
    (system.check_huge_pages, {"texts": {HUGE_PAGES: ""}},
     "does not tell"),
    (system.check_codec, {"codec": "plain", "machine": "aarch64"}, "decoded by plain"),
    (system.check_openmp, {"openmp": [], "version": lambda package: None}, "torch brings one"),
    (system.check_gpu, {"gpus": [Gpu("RTX 4090", 24 * GIB, 20 * GIB)], "gpu_driver": "570.86.10"},
     "RTX 4090 (24.00 GiB); driver 570.86.10"),
    (system.check_torch, {"version": lambda package: None},
     "not installed; models need it: pip install 'omnimem[torch]'"),
    (system.check_torch, {"version": lambda package: "2.13.0+cu130", "torch_cuda": "13.0"},
     "2.13.0+cu130, built for CUDA 13.0"),
    (system.check_torch, {"version": lambda package: "3.0"}, "3.0"),
]  # fmt: skip


@pytest.mark.parametrize("case", GOOD, ids=[f"{c[0].__name__[6:]}-{n}" for n, c in enumerate(GOOD)])
def test_what_is_no_fault(case: tuple[Any, ...], tmp_path: Path) -> None:
    check, probes, fact = case
    found = check(Healthy(tmp_path, **probes))
    assert (found.state, found.fix) == ("OK", ""), found
    assert fact in found.fact


def test_a_directory_that_anyone_can_write(tmp_path: Path) -> None:
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o777)
    found = storage.check_directory(Healthy(place))
    assert (found.state, found.fix) == ("WARN", f"chmod o-w {place}")
    place.chmod(0o1777)
    assert storage.check_directory(Healthy(place)).state == "OK"


def test_the_least_versions_are_those_of_the_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {}
    for line in project["optional-dependencies"]["transformers"]:
        name, _, version = line.partition(">=")
        wanted[name] = tuple(map(int, version.split(".")))
    assert {name: wanted[name] for name in system.LEAST} == system.LEAST


# ---- the probes ----


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


MEMINFO = "MemTotal: 1000000 kB\nMemAvailable: 500000 kB\n"


def test_cgroups_of_version_2(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/user/job\n")
    write(tmp_path, "proc/self/mountinfo", "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    write(tmp_path, "proc/meminfo", MEMINFO)
    top = "sys/fs/cgroup"
    write(tmp_path, f"{top}/user/job/memory.max", "max\n")
    write(tmp_path, f"{top}/user/job/memory.high", "3000\n")
    write(tmp_path, f"{top}/user/job/memory.current", "2000\n")
    write(tmp_path, f"{top}/user/job/memory.stat", "anon 5\ninactive_file 500\n")
    write(tmp_path, f"{top}/user/memory.max", "9000\n")
    write(tmp_path, f"{top}/user/memory.current", "4000\n")
    assert World("/", str(tmp_path)).cgroups() == [
        Cgroup("/sys/fs/cgroup/user/job", 2, 3000, 3000, 1500),
        Cgroup("/sys/fs/cgroup/user", 2, 9000, None, 4000),
    ]


def test_cgroups_of_version_1(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "9:memory:/docker/abc\n8:cpu:/\n")
    mount = "31 1 0:27 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    write(tmp_path, "proc/self/mountinfo", mount)
    write(tmp_path, "proc/meminfo", MEMINFO)
    top = "sys/fs/cgroup/memory"  # a container's own: its path is not below the mount
    write(tmp_path, f"{top}/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path, f"{top}/memory.usage_in_bytes", "700\n")
    write(tmp_path, f"{top}/memory.stat", "inactive_file 1\ntotal_inactive_file 200\n")
    assert World("/", str(tmp_path)).cgroups() == []
    write(tmp_path, f"{top}/memory.limit_in_bytes", "5000\n")
    assert World("/", str(tmp_path)).cgroups() == [
        Cgroup("/sys/fs/cgroup/memory", 1, 5000, None, 500)
    ]


@pytest.mark.parametrize(
    ("line", "place"), [("0::/a", "sys/fs/cgroup/a"), ("8:pids:/a", "sys/fs/cgroup/pids/a")]
)
def test_the_most_threads(line: str, place: str, tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", f"9:memory:/b\n{line}\n")
    assert World("/", str(tmp_path)).pids_max() is None
    write(tmp_path, f"{place}/pids.max", "20\n")
    assert World("/", str(tmp_path)).pids_max() == 20


def test_no_cgroups_and_no_kernel_files(tmp_path: Path) -> None:
    world = World("/", str(tmp_path))
    assert world.cgroups() == []
    assert world.text("proc/nothing") is None
    assert world.field("proc/nothing", "x") is None
    assert world.gpu_driver() is None


def test_the_gpu_driver(tmp_path: Path) -> None:
    write(tmp_path, "dev/nvidiactl", "")
    assert World("/", str(tmp_path)).gpu_driver() == ""
    text = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Thu Jan 23\nGCC version: 12\n"
    )
    write(tmp_path, "proc/driver/nvidia/version", text)
    assert World("/", str(tmp_path)).gpu_driver() == "570.86.10"


def test_real_probes(tmp_path: Path) -> None:
    world = World(tmp_path / "not" / "yet")
    assert world.place() == tmp_path.resolve()
    assert world.backend("threads").name == "threads"
    assert world.codec() in ("avx512", "avx2", "plain")
    assert world.kernel() == os.uname().release
    world.write()
    soft, hard = world.rlimit("NOFILE")
    assert soft is None or hard is None or soft <= hard
    total, available, _ = world.memory()
    assert 0 < available <= total
    assert list(tmp_path.iterdir()) == []


def test_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIMEM_DIRECTORY", str(tmp_path / "from-env"))
    assert World().directory() == str(tmp_path / "from-env")
    assert World(tmp_path / "mine").directory() == str(tmp_path / "mine")
    monkeypatch.setenv("OMNIMEM_VERIFY", "sometimes")  # told by its own check
    assert World().directory()
    assert storage.check_configuration(World()).fix.startswith("unset OMNIMEM_VERIFY")


# ---- all together ----


def test_a_check_that_raises_is_a_finding(tmp_path: Path) -> None:
    world = Healthy(
        tmp_path, memory=raises(RuntimeError("two\nlines")), codec=raises(KeyError("x"))
    )
    found = diagnose(world=world)
    assert [check.name for check in found.checks] == TOLD
    failed = [check for check in found.checks if check.state != "OK"]
    assert [(check.name, check.state) for check in failed] == [
        ("memory", "FAIL"),
        ("codec", "FAIL"),
    ]
    assert failed[0].fact == "the check itself failed: RuntimeError: two lines"
    assert "omnimem doctor --json" in failed[0].fix


def test_the_worst_state(tmp_path: Path) -> None:
    assert diagnose(world=Healthy(tmp_path)).state == "OK"
    assert diagnose(world=Healthy(tmp_path, page_size=65536)).state == "WARN"
    both = diagnose(world=Healthy(tmp_path, page_size=65536, free_bytes=0))
    assert (both.state, both.count("WARN"), both.count("FAIL")) == ("FAIL", 1, 1)
    assert diagnose(world=Healthy(tmp_path), checks=()).state == "OK"


def test_this_machine_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "a b" / "swap"
    found = diagnose(place)
    assert found.directory == str(place)
    assert [check.name for check in found.checks] == TOLD
    assert not [check for check in found.checks if "itself failed" in check.fact]
    assert list(tmp_path.iterdir()) == []
    for check in found.checks:
        assert bool(check.fix) == (check.state != "OK"), check


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def give(**probes: Any) -> None:
        world = Healthy(tmp_path, **probes)
        monkeypatch.setattr(
            "omnimem.cli.doctor.diagnose", lambda directory: doctor.diagnose(world=world)
        )

    give()
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("\n21 OK, 0 WARN, 0 FAIL\n")
    give(page_size=65536)
    assert main(["doctor"]) == 0
    assert "1 WARN" in capsys.readouterr().out
    give(page_size=65536, free_bytes=0)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    facts = [line for line in out.splitlines() if not line.lstrip().startswith("fix: ")]
    assert max(map(len, facts)) <= 80
    assert re.search(r"^FAIL +disk_space +0 B free", out, re.MULTILINE)
    assert re.search(r"^ +fix: boot a kernel with pages of 4 KiB", out, re.MULTILINE)
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["state"]) == (1, "FAIL")
    assert [check["name"] for check in told["checks"]] == TOLD
    assert all(set(c) == {"name", "state", "fact", "fix", "data"} for c in told["checks"])


@pytest.mark.parametrize("backend", ["auto", "threads"])
def test_json_of_this_machine(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("OMNIMEM_IO_BACKEND", backend)
    main(["doctor", "--directory", str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in told["checks"]}
    assert told["directory"] == str(tmp_path)
    assert checks["io_uring"]["data"]["wanted"] == backend
    assert backend == "auto" or checks["io_uring"]["data"]["backend"] == "threads"
    assert checks["memory"]["data"]["total_bytes"] > MIB


def test_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'numpy', 'safetensors'): sys.modules[name] = None\n"
        "from omnimem.cli import main\n"
        "sys.exit(main(['doctor', '--json', '--directory', sys.argv[1]]))"
    )
    done = run_python(code, str(tmp_path))
    assert done.returncode in (0, 1), done
    assert done.stderr == ""
    assert not [c for c in json.loads(done.stdout)["checks"] if "itself failed" in c["fact"]]


SECCOMP = """
import ctypes, struct, sys, omnimem.cli
def step(code, value, yes=0, no=0): return struct.pack("HBBI", code, yes, no, value)
# load the number of the call; io_uring_setup is 425 everywhere; allow others; that one is EPERM
program = step(0x20, 0) + step(0x15, 425, 1, 0) + step(6, 0x7FFF0000) + step(6, 0x00050001)
text = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]
prctl = ctypes.CDLL(None).prctl
assert prctl(38, 1, 0, 0, 0) == 0
if prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(text)))):
    sys.exit(77)
sys.exit(omnimem.cli.main(["doctor", "--json", "--directory", sys.argv[1]]))
"""


@pytest.mark.skipif(bool(uring_refusal()), reason="io_uring is denied here anyway")
@pytest.mark.parametrize(("backend", "state"), [("auto", "WARN"), ("uring", "FAIL")])
def test_io_uring_that_seccomp_denies(
    backend: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNIMEM_IO_BACKEND", backend)
    done = run_python(SECCOMP, str(tmp_path))
    if done.returncode == 77:
        pytest.skip("no seccomp filter can be set here")
    assert done.stderr == ""
    check = next(c for c in json.loads(done.stdout)["checks"] if c["name"] == "io_uring")
    assert (check["state"], check["data"]["seccomp"]) == (state, 2)
    assert "a seccomp profile or security module denies io_uring" in check["fact"]
    assert check["fix"].startswith("docker run --security-opt seccomp=FILE")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_unprivileged_user(tmp_path: Path) -> None:
    """Imports first: the interpreter may lie where others may not look."""
    code = (
        "import email.parser, os, sys, omnimem.cli\n"
        "omnimem.cli.main(['doctor', '--json'])\n"
        "print('---')\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); os.chdir('/')\n"
        "sys.exit(omnimem.cli.main(['doctor', '--json', '--directory', sys.argv[1]]))"
    )
    place = tmp_path / "private"
    place.mkdir(mode=0o700)
    done = run_python(code, str(place))
    assert done.returncode == 1, done
    checks = {c["name"]: c for c in json.loads(done.stdout.partition("---\n")[2])["checks"]}
    assert checks["directory"]["state"] == "FAIL"
    assert "-o 65534" in checks["directory"]["fix"]
    assert checks["storage"]["fact"].startswith("not tried")
    assert not [c for c in checks.values() if "itself failed" in c["fact"]]
