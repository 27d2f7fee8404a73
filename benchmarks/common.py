"""What the benchmarks share: child processes under a memory cgroup, cold caches, fio, tables.

Nothing here imports torch or omnimem, so that a parent process stays small and its threads idle.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import importlib.metadata
import json
import mmap
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CGROUP_ROOT = Path("/sys/fs/cgroup/memory")
MADV_POPULATE_WRITE = 23
MARK = "OMNIMEM-BENCH-RESULT "
GB = 1e9
PACKAGES = (
    "torch", "transformers", "diffusers", "accelerate", "safetensors", "runai-model-streamer",
    "fastsafetensors", "numpy", "deepspeed", "zstandard", "lz4", "blosc2", "zipnn", "omnimem",
)  # fmt: skip
console = Console(stderr=True)


class BenchError(RuntimeError):
    """A benchmark cannot run here; the text says why and what would help."""


# -- what a run needs of the machine ---------------------------------------------------------------


def cgroup_refusal() -> str | None:
    """Why no memory cgroup can be made here, or None if one can.

    Returns
    -------
    str or None
        One sentence with the missing thing.
    """
    if os.geteuid() != 0:
        return "memory cgroups need root; run this as root"
    if not (CGROUP_ROOT / "memory.limit_in_bytes").exists():
        return f"no memory controller of cgroup v1 at {CGROUP_ROOT}"
    if not os.access(CGROUP_ROOT, os.W_OK):
        return f"{CGROUP_ROOT} is read-only"
    return None


def drop_caches() -> None:
    """Write back and drop the page cache; raises BenchError when not root."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError as error:
        raise BenchError(f"cannot drop the page cache ({error}); run this as root") from error


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM for as long as the block runs: what it takes away has to go."""
    former = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class Cgroup:
    """A memory cgroup (v1) of its own for one child process.

    Parameters
    ----------
    name : str
        Folder name under the memory controller's root.
    limit : int or None
        Bytes of memory, page cache included; None sets no limit and only accounts.
    swap : bool
        True leaves memory+swap unlimited, so that the kernel may swap.
    """

    def __init__(self, name: str, limit: int | None = None, *, swap: bool = False) -> None:
        self.path = CGROUP_ROOT / name
        self.limit = limit
        self.swap = swap

    def __enter__(self) -> Cgroup:
        self.path.mkdir()
        if self.limit is not None:
            self._write("memory.limit_in_bytes", self.limit)
            if not self.swap and (self.path / "memory.memsw.limit_in_bytes").exists():
                self._write("memory.memsw.limit_in_bytes", self.limit)
        return self

    def __exit__(self, *exc: object) -> None:
        with uninterrupted():
            for _ in range(50):
                with contextlib.suppress(OSError):
                    self._write("memory.force_empty", 0)
                try:
                    self.path.rmdir()
                    return
                except OSError:
                    time.sleep(0.1)
        console.print(f"[yellow]could not remove {self.path}[/yellow]")

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def peak(self) -> int:
        """Highest use since creation or since the child's own reset, in bytes."""
        return int((self.path / "memory.max_usage_in_bytes").read_text())


def reset_peak(cgroup: str | None) -> int:
    """Start the peak of a cgroup anew (called by a child); returns the peak until now."""
    if not cgroup:
        return 0
    file = Path(cgroup) / "memory.max_usage_in_bytes"
    before = int(file.read_text())
    file.write_text("0")
    return before


@contextlib.contextmanager
def swap_file(scratch: Path, nbytes: int) -> Iterator[None]:
    """Give the kernel a swap file for as long as the block runs; it goes whatever happens."""
    file = scratch / f"omnimem-bench-swap-{os.getpid()}"
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        os.close(fd)
        for command in (["mkswap", str(file)], ["swapon", str(file)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise BenchError(f"{command[0]}: {done.stderr.strip()}")
        yield
    finally:
        with uninterrupted():
            subprocess.run(["swapoff", str(file)], capture_output=True)
            file.unlink(missing_ok=True)


@dataclass
class ChildRun:
    """What became of one child process.

    Attributes
    ----------
    result : dict or None
        What the child reported; None when it failed.
    error : str or None
        Why it failed: exit status and the last line of its stderr.
    peak_bytes : int or None
        Peak of its cgroup.
    wall_s : float
        Seconds from start to end.
    """

    result: dict[str, Any] | None
    error: str | None
    peak_bytes: int | None
    wall_s: float
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return a dictionary for the JSON file."""
        return {"result": self.result, "error": self.error, "peak_bytes": self.peak_bytes,
                "wall_s": self.wall_s, **self.extra}  # fmt: skip


_serial = 0


def run_child(
    script: str,
    args: Sequence[str],
    *,
    limit: int | None = None,
    cgroup: bool = True,
    swap: bool = False,
    cold: bool = True,
    timeout: float = 1800.0,
) -> ChildRun:
    """Run `script args` in a fresh process, inside its own cgroup before it execs.

    Parameters
    ----------
    script : str
        Path of the benchmark; it gets `args` and, with a cgroup, `--cgroup PATH`.
    limit : int or None
        Bytes; see `Cgroup`.
    cgroup : bool
        False runs without any accounting.
    cold : bool
        Drop the page cache first.
    timeout : float
        Seconds until the child is killed.
    """
    global _serial
    _serial += 1
    if cold:
        drop_caches()
    command = [sys.executable, script, *args]
    with contextlib.ExitStack() as stack:
        group = None
        if cgroup:
            name = f"omnimem-bench-{os.getpid()}-{_serial}"
            group = stack.enter_context(Cgroup(name, limit, swap=swap))
            command += ["--cgroup", str(group.path)]
            enter = f'echo $$ > "{group.path}/cgroup.procs" && exec "$@"'
            command = ["/bin/sh", "-c", enter, "sh", *command]
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
               "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
               "RUNAI_STREAMER_LOG_LEVEL": "ERROR"}  # fmt: skip
        started = time.monotonic()
        error = None
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired:
            code, out, err, error = -1, "", "", f"no result within {timeout:.0f} s"
        wall = time.monotonic() - started
        peak = group.peak() if group else None
        lines = [line for line in out.splitlines() if line.startswith(MARK)]
        result = json.loads(lines[-1][len(MARK) :]) if lines and code == 0 else None
        if result is None and error is None:
            tail = [line for line in err.splitlines() if line.strip()][-1:] or ["no message"]
            killed = " (killed, most likely at the memory limit)" if code in (-9, 137) else ""
            error = f"exit {code}{killed}: {tail[0].strip()[:300]}"
    return ChildRun(result, error, peak, wall)


def report(result: dict[str, Any]) -> None:
    """Hand a child's result to its parent."""
    print(MARK + json.dumps(result), flush=True)


# -- the disk --------------------------------------------------------------------------------------


def fio_read(path: Path, nbytes: int, *, bs: str = "1M", depth: int = 16) -> float | None:
    """GB/s at which fio reads `path` with io_uring and O_DIRECT, or None without fio."""
    size = min(nbytes, path.stat().st_size) >> 20 << 20
    return fio_rate(path, size, bs=bs, depth=depth)


def fio_rate(
    path: Path,
    nbytes: int,
    *,
    write: bool = False,
    bs: str = "1M",
    depth: int = 16,
    engine: str = "io_uring",
) -> float | None:
    """GB/s at which fio reads or overwrites `path` with O_DIRECT; None without fio or engine."""
    if shutil.which("fio") is None:
        return None
    mode = ["--rw=write"] if write else ["--rw=read", "--readonly"]
    command = ["fio", "--name=rate", f"--filename={path}", *mode, "--direct=1",
               f"--ioengine={engine}", f"--bs={bs}", f"--iodepth={depth}", f"--size={nbytes}",
               "--output-format=json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        console.print(f"[yellow]fio failed: {done.stderr.strip()[:200]}[/yellow]")
        return None
    text = done.stdout
    job = json.loads(text[text.index("{") :])["jobs"][0]
    return job["write" if write else "read"]["bw_bytes"] / GB


# -- memory ----------------------------------------------------------------------------------------


def private_memory(nbytes: int) -> mmap.mmap:
    """Memory of the kind that stores map; Python's default is shared memory, without huge pages."""
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def populate(nbytes: int) -> dict[str, Any]:
    """Rate at which fresh pages are populated, by one thread and by one a core; the better."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    huge = 2 << 20
    best: dict[str, Any] = {"seconds": float("inf"), "bytes": nbytes}
    for threads in sorted({1, os.cpu_count() or 1}):
        memory = private_memory(nbytes + huge)
        memory.madvise(mmap.MADV_HUGEPAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        first = -(-base // huge) * huge
        part = -(-nbytes // threads // huge) * huge
        failed: list[int] = []

        def work(low: int, high: int, failed: list[int] = failed) -> None:
            for at in range(low, high, 16 * huge):
                if libc.madvise(at, min(16 * huge, high - at), MADV_POPULATE_WRITE) != 0:
                    failed.append(ctypes.get_errno())
                    return

        crew = [
            threading.Thread(target=work, args=(first + i * part,
                                                first + min((i + 1) * part, nbytes)))
            for i in range(threads)
        ]  # fmt: skip
        started = time.perf_counter()
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        seconds = time.perf_counter() - started
        if failed:
            raise OSError(failed[0], "MADV_POPULATE_WRITE (Linux 5.14 or newer)")
        best[f"gb_s_threads_{threads}"] = nbytes / GB / seconds
        if seconds < best["seconds"]:
            best["seconds"] = seconds
        with contextlib.suppress(BufferError):
            memory.madvise(mmap.MADV_DONTNEED)
    return best


def free_bytes() -> int:
    """Memory that is available to a new process, less what others may want meanwhile."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 * 85 // 100
    raise BenchError("no MemAvailable in /proc/meminfo")


# -- model folders ---------------------------------------------------------------------------------


def default_folder() -> Path:
    """Return `$OMNIMEM_BENCH_DIR`, or build/bench/qwen3vl-2b under the repository."""
    chosen = os.environ.get("OMNIMEM_BENCH_DIR")
    return Path(chosen or Path(__file__).parent.parent / "build" / "bench" / "qwen3vl-2b")


def ensure_model(folder: Path, preset: str = "2b") -> Path:
    """Return `folder`, made by `omnimem synth` first if it holds no config.json."""
    if not (folder / "config.json").exists():
        console.print(f"making a checkpoint ({preset}) in {folder}")
        code = "from omnimem.cli import main; main()"
        command = [sys.executable, "-c", code, "synth", "--preset", preset, str(folder)]
        if subprocess.run(command).returncode != 0:
            raise BenchError(f"no model in {folder}, and `omnimem synth` could not make one")
    return folder


# -- checkpoints, without any library --------------------------------------------------------------


@dataclass(frozen=True)
class TensorAt:
    """Where one tensor lies: file, absolute offset, bytes, dtype (safetensors' name), shape."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def shards(model_dir: Path) -> list[Path]:
    """Return the safetensors files of a model folder, sorted; BenchError when it has none."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise BenchError(f"no .safetensors file in {model_dir}")
    return files


def tensors(model_dir: Path) -> dict[str, TensorAt]:
    """Read the headers of every shard: name to place, in file order."""
    found: dict[str, TensorAt] = {}
    for path in shards(model_dir):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"][0]):
            low, high = item["data_offsets"]
            where = TensorAt(path, 8 + length + low, high - low, item["dtype"],
                             tuple(item["shape"]))  # fmt: skip
            found[name] = where
    return found


def weights(folder: Path) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(at.nbytes for at in tensors(folder).values())


# -- numbers and tables ----------------------------------------------------------------------------


def median(values: Iterable[float | None]) -> float | None:
    """Median of the values that exist; None when none does."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def rotated(items: Sequence[Any], by: int) -> list[Any]:
    """Return the items, beginning `by` places later, so that no one is always first."""
    by %= max(len(items), 1)
    return [*items[by:], *items[:by]]


def fmt(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Return a number for a cell; a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def show_table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool
) -> None:
    """Print one table to stdout: for people, or as Markdown to paste."""
    if markdown:
        print(f"\n### {title}\n")
        print("| " + " | ".join(head) + " |")
        print("|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|")
        for row in rows:
            print("| " + " | ".join(row) + " |")
        return
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, 150)).print(table)


def machine_facts(*folders: Path) -> dict[str, Any]:
    """Describe the machine and the versions that a number depends on."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if shutil.which("fio"):
        versions["fio"] = subprocess.run(["fio", "--version"], capture_output=True,
                                         text=True).stdout.strip()  # fmt: skip
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "ram_bytes": ram,
        "kernel": platform.release(),
        "transparent_hugepage": thp.read_text().strip() if thp.exists() else None,
        "filesystems": {str(folder): _mount_of(folder) for folder in folders},
        "versions": versions,
        "load_average": os.getloadavg(),
    }


def _mount_of(folder: Path) -> str:
    best, kind = "", "unknown"
    target = str(folder.resolve())
    for line in Path("/proc/mounts").read_text().splitlines():
        device, point, fstype = line.split()[:3]
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, f"{fstype} on {device}"
    return kind


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write the results, whole or not at all; nothing when no path was given."""
    if path is None:
        return
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(data, indent=1, default=str) + "\n")
    part.replace(path)
