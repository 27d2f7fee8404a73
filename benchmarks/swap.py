"""How fast is swapping out and in, beside the machine's limits and the peers?

Random blocks, which nothing can compress, are moved out of memory and back by a fresh process for
each contender; contenders take turns, and the bytes are compared by hash after each round.

- Out and in, whole: `perform_swapping()` at a threshold of 0, then `prefetch(ids).wait()`. Right
  before and after each, after the same rest, fio moves as many bytes in the same direction with
  the best of its settings; for the way in, the rate at which fresh pages are populated counts, too.
  Nothing can beat the smaller of the two. Peers do their own way out and in, after the same rests.
- One access to a block that is out: `access_memory_block` and a memoryview, in turns with plain
  O_DIRECT reads of as many bytes, one at a time, into memory that is there already.
- Calls: a hit, registering, and `get_status()`, from Python.

fio gives the limits; root and a memory cgroup are needed only for the kernel's own swap.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import mmap
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from common import (
    GB,
    MADV_POPULATE_WRITE,
    BenchError,
    ChildRun,
    cgroup_refusal,
    console,
    fio_rate,
    fmt,
    machine_facts,
    median,
    populate,
    private_memory,
    report,
    rotated,
    run_child,
    show_table,
    write_json,
)
from omnimem import parse_size

try:
    from omnimem import AdvancedMemorySwapper, NVMeOptimizer, SwapAlgorithm
except ImportError:  # a build without the swapper: peers and limits can still be measured
    AdvancedMemorySwapper = None

PEERS = ("pickle", "torch", "memmap", "deepspeed", "kernel-swap")
CONTENDERS = ("omnimem", *PEERS)
PARTS = ("bulk", "access", "calls", "registering")
ALGORITHMS = ("lru", "clock", "adaptive")
FIO_SETTINGS = [(bs, depth) for bs in ("256k", "512k", "1M", "4M") for depth in (4, 16, 32)]
MADV_PAGEOUT = 21
FEW = 1000  # blocks of which hits are timed, besides the many
AIO_CALLS = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}  # io_setup, _getevents, _submit
HUGE = 2 << 20
# Targets: of the limit, of a depth-1 read, nanoseconds a hit.
TARGET_BULK, TARGET_ACCESS, TARGET_HIT_NS = 0.97, 1.15, 600


@dataclass(frozen=True)
class Task:
    """What a child is to do.

    Attributes
    ----------
    folder : str
        Where files go; the parent makes it and takes it away.
    size, block : int
        Bytes altogether and of one block.
    seed : int
        Of the bytes.
    rest : float
        Seconds of idling before each thing that is measured.
    fio : dict
        By direction ("in", "out") the setting that was best: block size, depth, engine.
    accesses : int
        Single accesses.
    hits, registered : int
        Blocks of which hits are timed, and that are registered.
    """

    folder: str
    size: int
    block: int
    seed: int = 0
    rest: float = 6.0
    fio: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    accesses: int = 64
    hits: int = 100_000
    registered: int = 1_000_000

    @property
    def ids(self) -> list[str]:
        """Names of all blocks."""
        return [f"block-{i}" for i in range(self.size // self.block)]

    def path(self, name: str) -> Path:
        """A file of this run."""
        return Path(self.folder) / name

    def data(self, index: int) -> bytes:
        """The bytes of a block."""
        return np.random.Generator(np.random.SFC64([self.seed, index])).bytes(self.block)


def digest(data: Any) -> bytes:
    """Return a block's hash."""
    return hashlib.sha256(data).digest()


def compare(task: Task, digests: list[bytes], blocks: Iterator[Any]) -> bool:
    """Whether all blocks came back as they were; they are looked at one by one."""
    return [digest(block) for block in blocks] == digests and len(digests) == len(task.ids)


# -- out and in, in children -----------------------------------------------------------------------


def pause(task: Task) -> dict[str, Any]:
    """Rest, so that the disk's allowance fills up, and leave free memory that is warm.

    A virtual machine gives its host what was free for two seconds, and a page that has to come
    from there again takes ten times as long. So memory that is in use while this rests is freed
    last, and nothing else is freed meanwhile.

    Returns
    -------
    dict
        The rate at which fresh pages are populated, by the number of threads.
    """
    gc.collect()
    populate(task.size)
    rates = populate(task.size)
    with private_memory(task.size + task.size // 8) as kept:
        kept.madvise(mmap.MADV_HUGEPAGE)
        kept.madvise(MADV_POPULATE_WRITE)
        time.sleep(task.rest)
    return rates


def limit(task: Task, direction: str) -> float | None:
    """What fio moves in that direction, after the same rest; GB/s."""
    if direction not in task.fio:
        return None
    pause(task)
    bs, depth, engine = task.fio[direction]
    file = task.path("fio")
    return fio_rate(file, task.size, write=direction == "out", bs=bs, depth=depth, engine=engine)


def timed(task: Task, move: Callable[[], object]) -> dict[str, Any]:
    """Seconds and GB/s of one move, after a rest."""
    pages = pause(task)
    started = time.perf_counter()
    move()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "gb_s": task.size / GB / seconds,
            "pages_gb_s": pages["bytes"] / GB / pages["seconds"],
            "pages_gb_s_threads_1": pages["gb_s_threads_1"]}  # fmt: skip


def beside_fio(task: Task, direction: str, move: Callable[[], object]) -> dict[str, Any]:
    """A move with fio before and after it, and what it reached of the limit."""
    before = limit(task, direction)
    result = timed(task, move)
    after = limit(task, direction)
    known = [rate for rate in (before, after) if rate]
    fio = sum(known) / len(known) if known else None
    rates = [rate for rate in (fio, result["pages_gb_s"] if direction == "in" else None) if rate]
    bound = min(rates) if fio else None
    return {**result, "fio_before": before, "fio_after": after, "fio_gb_s": fio, "limit": bound,
            "of_limit": result["gb_s"] / bound if bound else None}  # fmt: skip


def open_swapper(task: Task, algorithm: str = "adaptive", max_swap: int | None = None) -> Any:
    """Return a swapper that moves nothing out on its own."""
    if AdvancedMemorySwapper is None:
        raise BenchError("this build of omnimem has no AdvancedMemorySwapper")
    return AdvancedMemorySwapper(
        swap_algorithm=SwapAlgorithm(algorithm),
        swap_threshold=0.99,
        max_swap_size=max_swap or task.size + task.size // 4,
        nvme_optimizer=NVMeOptimizer(block_size=task.block, swap_directory=task.folder),
    )


def swap_all(swapper: Any) -> None:
    """Move every block out."""
    swapper.swap_threshold = 0.0
    swapper.perform_swapping()


def all_out(swapper: Any, count: int) -> None:
    """Check that every block is out, and leave them so."""
    swapped = swapper.get_status()["swapped_blocks"]
    swapper.swap_threshold = 0.99
    if swapped != count:
        raise BenchError(f"one perform_swapping() left {count - swapped} of {count} blocks")


def bulk_omnimem(task: Task) -> dict[str, Any]:
    """One call moves all blocks out, one brings them in."""
    swapper = open_swapper(task)
    ids, digests = task.ids, []
    for index, name in enumerate(ids):
        data = task.data(index)
        digests.append(digest(data))
        swapper.register_memory_block(name, task.block, data=data)
    out = beside_fio(task, "out", lambda: swap_all(swapper))
    all_out(swapper, len(ids))
    back = beside_fio(task, "in", lambda: swapper.prefetch(ids).wait())

    def blocks() -> Iterator[memoryview]:
        for name in ids:
            with memoryview(swapper.access_memory_block(name)) as view:
                yield view

    same = compare(task, digests, blocks())
    swapper.cleanup()
    return {"out": out, "in": back, "identical": same}


def settle(path: Path) -> float:
    """Write a file back and drop it from the page cache; the seconds that the disk still took."""
    started = time.perf_counter()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return seconds


def by_file(
    task: Task,
    blocks: dict[str, Any],
    dump: Callable[[dict[str, Any], Path], object],
    load: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    """Out to a file of its own, and back from it with the page cache dropped."""
    digests = [digest(block) for block in blocks.values()]
    path = task.path("peer")
    out = timed(task, lambda: dump(blocks, path))
    out["synced_gb_s"] = task.size / GB / (out["seconds"] + settle(path))
    blocks.clear()
    back = timed(task, lambda: blocks.update(load(path)))
    path.unlink()
    same = compare(task, digests, iter(blocks.values()))
    return {"out": out, "in": back, "identical": same}


def bulk_pickle(task: Task) -> dict[str, Any]:
    """A dictionary of bytes, pickled."""
    import pickle

    def dump(blocks: dict[str, Any], path: Path) -> None:
        with path.open("wb") as file:
            pickle.dump(blocks, file, protocol=pickle.HIGHEST_PROTOCOL)

    def load(path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            return dict(pickle.load(file))

    blocks = {name: task.data(index) for index, name in enumerate(task.ids)}
    return by_file(task, blocks, dump, load)


def bulk_torch(task: Task) -> dict[str, Any]:
    """A dictionary of tensors: torch.save and torch.load."""
    import torch

    def tensor(index: int) -> Any:
        return torch.frombuffer(bytearray(task.data(index)), dtype=torch.uint8)

    blocks = {name: tensor(index).numpy() for index, name in enumerate(task.ids)}

    def dump(blocks: dict[str, Any], path: Path) -> None:
        torch.save({name: torch.from_numpy(block) for name, block in blocks.items()}, path)

    def load(path: Path) -> dict[str, Any]:
        return {name: loaded.numpy() for name, loaded in torch.load(path).items()}

    return by_file(task, blocks, dump, load)


def bulk_memmap(task: Task) -> dict[str, Any]:
    """Written through a map and flushed; read back by copying out of one."""
    shape = (len(task.ids), task.block)

    def dump(blocks: dict[str, Any], path: Path) -> None:
        mapped = np.memmap(path, np.uint8, "w+", shape=shape)
        for row, block in zip(mapped, blocks.values(), strict=True):
            row[:] = block
        mapped.flush()

    def load(path: Path) -> dict[str, Any]:
        mapped = np.memmap(path, np.uint8, "r", shape=shape)
        return {name: np.array(row) for name, row in zip(task.ids, mapped, strict=True)}

    blocks = {name: np.frombuffer(task.data(i), np.uint8) for i, name in enumerate(task.ids)}
    return by_file(task, blocks, dump, load)


def bulk_deepspeed(task: Task) -> dict[str, Any]:
    """DeepSpeed's aio handle, from and to one pinned tensor, which stays in memory all along."""
    try:
        import torch
        from deepspeed.ops.op_builder import AsyncIOBuilder

        handle = AsyncIOBuilder().load(verbose=False).aio_handle(1 << 20, 32, False, True, 2)
    except Exception as error:  # it compiles when it loads: many things can be missing
        return {"skipped": f"no aio handle of DeepSpeed: {type(error).__name__}: {error}"[:300]}
    pinned = handle.new_cpu_locked_tensor(task.size, torch.empty(0, dtype=torch.uint8))
    rows = pinned.numpy().reshape(len(task.ids), task.block)
    for index, row in enumerate(rows):
        row[:] = np.frombuffer(task.data(index), np.uint8)
    digests = [digest(row) for row in rows]
    path = task.path("peer")
    out = timed(task, lambda: handle.sync_pwrite(pinned, str(path)))
    out["synced_gb_s"] = task.size / GB / (out["seconds"] + settle(path))
    rows[:] = 0
    back = timed(task, lambda: handle.sync_pread(pinned, str(path)))
    path.unlink()
    return {"out": out, "in": back, "identical": compare(task, digests, iter(rows))}


def swap_cached() -> int:
    """Bytes that are in swap and still in memory, too."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("SwapCached:"):
            return int(line.split()[1]) * 1024
    return 0


def bulk_kernel_swap(task: Task, cgroup: str | None) -> dict[str, Any]:
    """MADV_PAGEOUT, then a touch of each page, in order; the swap file is the parent's."""
    if cgroup is None:
        raise BenchError("the kernel keeps what it swapped out in memory, too, but for a cgroup")
    memory = mmap.mmap(-1, task.size)
    rows = np.frombuffer(memory, np.uint8).reshape(len(task.ids), task.block)
    digests = []
    for index, row in enumerate(rows):
        row[:] = np.frombuffer(task.data(index), np.uint8)
        digests.append(digest(row))
    out = timed(task, lambda: memory.madvise(MADV_PAGEOUT))
    # The pages stay as a cache of the swap file until somebody needs memory; not timed.
    for _ in range(20):
        with contextlib.suppress(OSError):
            Path(cgroup, "memory.force_empty").write_text("0")
        if swap_cached() < task.size // 50:
            break
        time.sleep(0.2)
    left = swap_cached()
    back = timed(task, lambda: rows.reshape(-1)[:: mmap.PAGESIZE].sum())
    return {"out": out, "in": back, "identical": compare(task, digests, iter(rows)),
            "left_in_memory": left}  # fmt: skip


def bulk(name: str, task: Task, cgroup: str | None) -> dict[str, Any]:
    """Run one contender."""
    if name == "kernel-swap":
        return bulk_kernel_swap(task, cgroup)
    known = {"omnimem": bulk_omnimem, "pickle": bulk_pickle, "torch": bulk_torch,
             "memmap": bulk_memmap, "deepspeed": bulk_deepspeed}  # fmt: skip
    return known[name](task)


# -- one access, in a child ------------------------------------------------------------------------


class Iocb(ctypes.Structure):
    """A request of Linux AIO (struct iocb)."""

    _fields_ = [
        ("data", ctypes.c_uint64), ("key", ctypes.c_uint32), ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16), ("priority", ctypes.c_int16), ("fd", ctypes.c_uint32),
        ("buf", ctypes.c_uint64), ("nbytes", ctypes.c_uint64), ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("resfd", ctypes.c_uint32),
    ]  # fmt: skip


class PlainReads:
    """O_DIRECT reads of one block from a file into memory that is there already.

    Parameters
    ----------
    path : Path
        The file; made, with `count` blocks of `block` random bytes.
    block, count : int
        Bytes of a block, blocks.
    """

    def __init__(self, path: Path, block: int, count: int) -> None:
        self.block = block
        self.memory = mmap.mmap(-1, block + HUGE)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.low = -base % HUGE
        self.view = memoryview(self.memory)[self.low : self.low + block]
        self.address = base + self.low
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        for index in range(count):
            self.view[:] = np.random.bytes(block)
            os.pwrite(self.fd, self.view, index * block)
        os.fsync(self.fd)
        self.context = ctypes.c_uint64(0)
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.calls = AIO_CALLS.get(platform.machine())
        if self.calls and self._call(self.calls[0], 64, ctypes.byref(self.context)) != 0:
            self.calls = None

    def _call(self, number: int, *args: Any) -> int:
        return int(self.libc.syscall(ctypes.c_long(number), *args))

    def one(self, index: int) -> None:
        """One preadv of a whole block."""
        if os.preadv(self.fd, [self.view], index * self.block) != self.block:
            raise BenchError("a short read")

    def split(self, index: int, parts: int = 4) -> None:
        """As many bytes in `parts` requests that are submitted together."""
        assert self.calls is not None
        part = self.block // parts
        requests = [
            Iocb(fd=self.fd, buf=self.address + i * part, nbytes=part,
                 offset=index * self.block + i * part)
            for i in range(parts)
        ]  # fmt: skip
        pointers = (ctypes.c_void_p * parts)(*[ctypes.addressof(r) for r in requests])
        events = (ctypes.c_int64 * (4 * parts))()
        done = self._call(self.calls[2], self.context, ctypes.c_long(parts), pointers)
        if done != parts:
            raise BenchError(f"io_submit took {done} of {parts} requests")
        done = self._call(self.calls[1], self.context, ctypes.c_long(parts), ctypes.c_long(parts),
                          events, None)  # fmt: skip
        if done != parts or any(events[4 * i + 2] != part for i in range(parts)):
            raise BenchError("a short read")


def access(task: Task) -> dict[str, Any]:
    """Milliseconds of single accesses and of plain reads, in turns, each in a random order."""
    count = min(len(task.ids), 2 * task.accesses)
    task = replace(task, size=count * task.block)
    order = random.Random(task.seed)
    reads = PlainReads(task.path("plain"), task.block, count)
    kinds: dict[str, Callable[[int], object]] = {"one preadv": reads.one}
    if reads.calls:
        kinds["four requests together"] = reads.split
    swapper = None
    if AdvancedMemorySwapper is not None:
        swapper = open_swapper(task)
        for index, name in enumerate(task.ids):
            swapper.register_memory_block(name, task.block, data=task.data(index))
        swap_all(swapper)
        all_out(swapper, count)

        def one(index: int) -> None:
            memoryview(swapper.access_memory_block(names[index])).release()

        names = task.ids
        kinds["access"] = one
    pause(task)
    sequences = {kind: order.sample(range(count), task.accesses) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(task.accesses):
        for kind in rotated(list(kinds), turn):
            index = sequences[kind][turn]
            started = time.perf_counter()
            kinds[kind](index)
            times[kind].append((time.perf_counter() - started) * 1e3)
    if swapper is not None:
        swapper.cleanup()
    middle = {kind: median(taken) for kind, taken in times.items()}
    return {"ms": middle, "samples_ms": times}


# -- calls, in a child -----------------------------------------------------------------------------


class Empty:
    """What a call costs that does nothing."""

    def method(self, key: str) -> None:
        """Do nothing."""


def per_call(call: Callable[[str], object], keys: Sequence[str]) -> float:
    """Nanoseconds a call, the loop included."""
    started = time.perf_counter()
    for key in keys:
        call(key)
    return (time.perf_counter() - started) / len(keys) * 1e9


def rss() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def status_ns(swapper: Any, times: int) -> float | None:
    """Nanoseconds of get_status(), the median of several."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        swapper.get_status()
        taken.append((time.perf_counter() - started) * 1e9)
    return median(taken)


def calls(task: Task) -> dict[str, Any]:
    """Hits by algorithm, beside what Python itself costs: few blocks, and many."""
    found: dict[str, float] = {}
    for count in sorted({FEW, task.hits}):
        for name, value in hits(task, count).items():
            found[f"{name}, {count:,} blocks"] = value
    return {"ns": found}


def hits(task: Task, count: int) -> dict[str, float]:
    """Nanoseconds of a hit on `count` blocks in random order."""
    keys = [f"block-{i}" for i in range(count)]
    table = {key: index for index, key in enumerate(keys)}
    shuffled = random.Random(task.seed).sample(keys, len(keys))
    timings: dict[str, Callable[[str], object]] = {
        "dict.get": table.get,
        "an empty method": Empty().method,
    }
    swappers = []
    if AdvancedMemorySwapper is not None:
        for algorithm in ALGORITHMS:
            swapper = open_swapper(task, algorithm)
            swappers.append(swapper)
            for key in keys:
                swapper.register_memory_block(key, 64, data=bytes(64))
            timings[f"hit, {algorithm}"] = swapper.access_memory_block
    taken: dict[str, list[float]] = {name: [] for name in timings}
    for turn in range(5):
        for name in rotated(list(timings), turn):
            taken[name].append(per_call(timings[name], shuffled))
    for swapper in swappers:
        swapper.cleanup()
    return {name: median(values) for name, values in taken.items()}


def registering(task: Task) -> dict[str, Any]:
    """What many blocks without data cost; a process of its own, whose memory nobody used before."""
    if AdvancedMemorySwapper is None:
        return {"skipped": "this build has no swapper"}
    keys = [f"block-{i}" for i in range(task.registered)]
    few = open_swapper(task)
    per_call(lambda key: few.register_memory_block(key, 1024), keys[:1000])
    found: dict[str, Any] = {"status_ns_1000": status_ns(few, 300)}
    many = open_swapper(task, max_swap=2 * 1024 * task.registered)
    gc.collect()
    before = rss()
    found["register_ns"] = per_call(lambda key: many.register_memory_block(key, 1024), keys)
    found["bytes_a_block"] = (rss() - before) / task.registered
    found["status_ns_registered"] = status_ns(many, 300)
    many.cleanup()
    few.cleanup()
    return found


# -- parent ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def kernel_swap(path: Path, nbytes: int) -> Iterator[None]:
    """A swap file that is in use meanwhile and gone afterwards, whatever happens."""
    try:
        with path.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            os.posix_fallocate(file.fileno(), 0, nbytes)
        for command in (["mkswap", str(path)], ["swapon", "--priority", "32767", str(path)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise BenchError(f"{command[0]} failed: {done.stderr.strip()[:200]}")
        yield
    finally:
        swaps = Path("/proc/swaps").read_text().splitlines()
        if any(line.split()[0] == str(path) for line in swaps):
            subprocess.run(["swapoff", str(path)], check=True)
        path.unlink(missing_ok=True)


def best_settings(task: Task, number: int, nbytes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find fio's best setting in each direction; all rates, too."""
    if shutil.which("fio") is None:
        console.print("[yellow]no fio: there are no limits to compare with[/yellow]")
        return {}, {}
    best: dict[str, Any] = {}
    rates: dict[str, Any] = {"out": {}, "in": {}}
    file = task.path("fio")
    fio_rate(file, task.size, write=True)  # lays the file out
    for direction in ("out", "in"):
        found = rates[direction]

        def attempt(
            bs: str,
            depth: int,
            engine: str,
            *,
            found: dict[str, Any] = found,
            write: bool = direction == "out",
        ) -> None:
            rate = fio_rate(file, nbytes, write=write, bs=bs, depth=depth, engine=engine)
            if rate is not None:
                found[f"bs {bs}, depth {depth}, {engine}"] = (rate, (bs, depth, engine))

        for bs, depth in rotated(FIO_SETTINGS, number):
            attempt(bs, depth, "io_uring")
        ranked = sorted(found.values(), reverse=True) or [(0.0, (*s, "")) for s in FIO_SETTINGS]
        for _, (bs, depth, _) in ranked[:3]:
            attempt(bs, depth, "libaio")
        if found:
            best[direction] = max(found.values())[1]
            rates[direction] = {label: rate for label, (rate, _) in found.items()}
    return best, rates


def run_part(part: str, name: str, task: Task, timeout: float) -> dict[str, Any]:
    """Run one child; a kernel's swap file around it where it is that one's turn."""
    argv = ["--child", part, "--contender", name, "--task", json.dumps(asdict(task))]
    with contextlib.ExitStack() as stack:
        own = name == "kernel-swap"
        if own:
            refusal = cgroup_refusal()
            if refusal is None:
                try:
                    room = task.size + task.size // 4
                    stack.enter_context(kernel_swap(task.path("swapfile"), room))
                except (BenchError, OSError) as error:
                    refusal = str(error)
            if refusal:
                return ChildRun({"skipped": f"no swap file: {refusal}"}, None, 0, 0.0).as_dict()
        return run_child(__file__, argv, cgroup=own, swap=own, cold=False,
                         timeout=timeout).as_dict()  # fmt: skip


def one_round(number: int, task: Task, names: list[str], parts: list[str], timeout: float,
              fio_bytes: int) -> dict[str, Any]:  # fmt: skip
    """Let each contender take its turn, then the single accesses and the calls."""
    record: dict[str, Any] = {"round": number, "runs": {}}
    jobs = [("bulk", name) for name in rotated(names, number)] if "bulk" in parts else []
    jobs += [(part, "") for part in PARTS[1:] if part in parts]
    if jobs and jobs[0][0] == "bulk":
        best, rates = best_settings(task, number, fio_bytes)
        task = replace(task, fio=best)
        record |= {"fio_best": best, "fio": rates}
        console.print(f"  fio is best with {best}")
    for part, name in jobs:
        run = record["runs"][name or part] = run_part(part, name, task, timeout)
        result = run["result"] or {}
        if part == "bulk" and "out" in result:
            told = ", ".join(f"{way} {fmt(result[way]['gb_s'])} GB/s "
                             f"(fio {fmt(result[way].get('fio_gb_s'))}, "
                             f"pages {fmt(result[way]['pages_gb_s'])})"
                             for way in ("out", "in"))  # fmt: skip
        else:
            told = str(result.get("skipped") or result.get("ms") or result.get("ns") or result)
        console.print(f"  {name or part}: {told}{run['error'] or ''}")
    return record


def of_runs(rounds: list[dict[str, Any]], name: str, *keys: str) -> float | None:
    """Median over the rounds of one number of a contender."""
    values = []
    for round_ in rounds:
        value: Any = (round_["runs"].get(name) or {}).get("result")
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        values.append(value)
    return median(values)


def ratio(rounds: list[dict[str, Any]], name: str, over: str, *keys: str) -> float | None:
    """Median of the ratios within rounds."""
    values = []
    for round_ in rounds:
        one, other = (of_runs([round_], who, *keys) for who in (name, over))
        values.append(one / other if one and other else None)
    return median(values)


def access_ratio(rounds: list[dict[str, Any]], kind: str) -> float | None:
    """Median over rounds: an access over a plain read of the same kind in the same round."""
    pairs = [(of_runs([r], "access", "ms", "access"), of_runs([r], "access", "ms", kind))
             for r in rounds]  # fmt: skip
    return median(one / other if one and other else None for one, other in pairs)


def summarize(rounds: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Medians of everything."""
    ways = ("out", "in")
    per_way = ("gb_s", "synced_gb_s", "fio_gb_s", "pages_gb_s", "limit", "of_limit")
    bulks = {name: {way: {key: of_runs(rounds, name, way, key) for key in per_way}
                    | {"omnimem_over_this": ratio(rounds, "omnimem", name, way, "gb_s")}
                    for way in ways} for name in names}  # fmt: skip
    kinds = ("access", "one preadv", "four requests together")
    accesses = {kind: {"ms": of_runs(rounds, "access", "ms", kind),
                       "access_over_this": access_ratio(rounds, kind)}
                for kind in kinds}  # fmt: skip
    labels: dict[str, None] = {}
    for round_ in rounds:
        found = (round_["runs"].get("calls") or {}).get("result") or {}
        labels |= dict.fromkeys(found.get("ns") or {})
    ns = {label: of_runs(rounds, "calls", "ns", label) for label in labels}
    more = {key: of_runs(rounds, "registering", key) for key in
            ("register_ns", "bytes_a_block", "status_ns_1000", "status_ns_registered")}  # fmt: skip
    return {"bulk": bulks, "access": accesses, "calls_ns": ns, "registering": more}


def show(summary: dict[str, Any], task: Task, parts: list[str], count: int, markdown: bool) -> None:
    """Print the tables."""
    if "bulk" in parts:
        rows = []
        for name, ways in summary["bulk"].items():
            out, back = ways["out"], ways["in"]
            rows.append([
                name, fmt(out["gb_s"]), fmt(out["synced_gb_s"]), fmt(out["fio_gb_s"]),
                fmt(out["of_limit"]), fmt(out["omnimem_over_this"]), fmt(back["gb_s"]),
                fmt(back["fio_gb_s"]), fmt(back["pages_gb_s"]), fmt(back["of_limit"]),
                fmt(back["omnimem_over_this"]),
            ])  # fmt: skip
        show_table(f"{task.size / GB:.2f} GB in blocks of {task.block >> 10} KiB, GB/s, "
                   f"{count} rounds (target: {TARGET_BULK} of the limit)",
                   ["contender", "out", "out, on disk", "fio out", "of the limit",
                    "omnimem / this", "in", "fio in", "fresh pages", "of the limit",
                    "omnimem / this"], rows, markdown=markdown)  # fmt: skip
    if "access" in parts:
        rows = [[kind, fmt(found["ms"], 3), fmt(found["access_over_this"])]
                for kind, found in summary["access"].items()]  # fmt: skip
        show_table(f"One access to {task.block >> 10} KiB that are out, beside depth-1 reads "
                   f"(target: {TARGET_ACCESS} of one preadv)",
                   ["", "ms", "access / this"], rows, markdown=markdown)  # fmt: skip
    if "calls" in parts:
        rows = [[label, fmt(ns, 0, " ns")] for label, ns in summary["calls_ns"].items()]
        show_table(f"Calls, blocks in random order (target: a hit in {TARGET_HIT_NS} ns)",
                   ["call", "median"], rows, markdown=markdown)  # fmt: skip
    if "registering" in parts:
        found = summary["registering"]
        many = f"{task.registered:,} blocks"
        rows = [["register", fmt(found["register_ns"], 0, " ns")],
                ["memory a block", fmt(found["bytes_a_block"], 0, " bytes")],
                ["get_status(), 1,000 blocks", fmt(found["status_ns_1000"], 0, " ns")],
                [f"get_status(), {many}", fmt(found["status_ns_registered"], 0, " ns")],
                ]  # fmt: skip
        show_table(f"Registering {many} without data", ["", "median"], rows, markdown=markdown)


def chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    """Split a list of names, and check them."""
    names = text.split(",")
    if unknown := sorted(set(names) - set(known)):
        raise BenchError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def failures(rounds: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """What went wrong or was left out, once for each contender."""
    told = set()
    for round_ in rounds:
        for name, run in round_["runs"].items():
            result = run["result"] or {}
            text = run["error"] or result.get("skipped")
            if result.get("identical") is False:
                text = "came back with other bytes"
            if text and (name, text) not in told:
                told.add((name, text))
                yield name, text


def child(part: str, name: str, task: Task, cgroup: str | None) -> None:
    """Do one part and report it."""
    if part == "bulk":
        report(bulk(name, task, cgroup))
    else:
        report({"access": access, "calls": calls, "registering": registering}[part](task))


def default_directory() -> Path:
    """Return `$OMNIMEM_BENCH_DIR`'s parent, or build/bench under the repository."""
    given = os.environ.get("OMNIMEM_BENCH_DIR")
    return Path(given).parent if given else Path(__file__).parent.parent / "build" / "bench"


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--dir", "directory", type=click.Path(path_type=Path), default=default_directory)
@click.option("--size", default="4GiB", help="of all blocks")
@click.option("--block", default="4MiB", help="of one block")
@click.option("--rounds", default=3)
@click.option("--contenders", default=",".join(CONTENDERS), help="comma-separated")
@click.option("--parts", default=",".join(PARTS), help="comma-separated")
@click.option("--rest", default=6.0, help="seconds of idling before each measurement")
@click.option("--accesses", default=64, help="single accesses a round")
@click.option("--hits", default=100_000, help="blocks of which hits are timed")
@click.option("--registered", default=1_000_000, help="blocks that are registered without data")
@click.option("--fio-bytes", default="1GiB", help="moved for each setting of fio")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="write every number")
@click.option("--markdown", is_flag=True, help="print Markdown tables")
@click.option("--timeout", default=900.0, help="seconds for one child")
@click.option("--child", "part", hidden=True)
@click.option("--contender", default="", hidden=True)
@click.option("--task", "task_json", hidden=True)
@click.option("--cgroup", hidden=True)
def main(
    directory: Path,
    size: str,
    block: str,
    rounds: int,
    contenders: str,
    parts: str,
    rest: float,
    accesses: int,
    hits: int,
    registered: int,
    fio_bytes: str,
    json_path: Path | None,
    markdown: bool,
    timeout: float,
    part: str | None,
    contender: str,
    task_json: str | None,
    cgroup: str | None,
) -> None:
    """Run the rounds; exits with 1 when a run of omnimem failed or brought back other bytes."""
    if part and task_json:
        child(part, contender, Task(**json.loads(task_json)), cgroup)
        return
    names, wanted = chosen(contenders, CONTENDERS, "contenders"), chosen(parts, PARTS, "parts")
    if AdvancedMemorySwapper is None:
        console.print("[yellow]this build has no swapper: peers and limits only[/yellow]")
        names = [name for name in names if name != "omnimem"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a swap file must not stay in use
    directory.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"benchmark": "swap", "machine": machine_facts(directory),
                            "argv": sys.argv[1:], "rounds": []}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="swap-", dir=directory) as folder:
        nbytes, each = parse_size(size), parse_size(block)
        if each % (4 * 4096) or each == 0 or nbytes < each:
            raise BenchError("a block is a multiple of 16 KiB and no larger than all of them")
        task = Task(folder, nbytes // each * each, each, rest=rest, accesses=accesses, hits=hits,
                    registered=registered)  # fmt: skip
        for number in range(rounds):
            console.print(f"round {number + 1} of {rounds}")
            task = replace(task, seed=number)
            data["rounds"].append(
                one_round(number, task, names, wanted, timeout, parse_size(fio_bytes))
            )
            write_json(json_path, data)
    data["summary"] = summarize(data["rounds"], names)
    write_json(json_path, data)
    show(data["summary"], task, wanted, rounds, markdown)
    bad = False
    for name, text in failures(data["rounds"]):
        print(f"\n{name}: {text}")
        bad |= name not in PEERS
    sys.exit(int(bad))


if __name__ == "__main__":
    try:
        main()
    except BenchError as problem:
        console.print(f"[red]{problem}[/red]")
        sys.exit(1)
