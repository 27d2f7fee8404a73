"""How full does a memory pool get, and what does a block cost, beside other allocators?

Three questions, answered by `pool_bench.c`, which is built with the core (gcc -O3) and by this
script:

- How much of a full pool do the blocks in it use? Evicting at random until the next one fits, and
  evicting whom `suggest_victims` names.
- What do an allocation and a deallocation cost, in C and from Python?
- Do blocks of one lifetime belong together? (A best fit tree tries it; the pool does not do it.)

malloc, jemalloc and mimalloc take part where their libraries are found (Debian: libjemalloc2,
libmimalloc2.0), torch's allocator for the CPU where torch is installed.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import omnimem
from common import BenchError, console, machine_facts, median, show_table, write_json

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
Pair = Callable[[int], Any]


def build(folder: Path) -> Path:
    """Compile `pool_bench.c` with the core; returns the program."""
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        raise BenchError(f"no C compiler ({compiler}): set CC")
    program = folder / "pool_bench"
    sources = [str(path) for part in ("base", "plat", "core")
               for path in sorted((ROOT / "csrc" / part).glob("*.c"))]  # fmt: skip
    libraries = ["-luring", "-lxxhash", "-lzstd", "-ldl", "-lm", "-pthread"]
    command = [compiler, "-std=c11", "-D_GNU_SOURCE", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}",
               str(ROOT / "benchmarks" / "pool_bench.c"), *sources, "-o", str(program),
               *libraries]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"pool_bench.c does not compile:\n{done.stderr[-2000:]}")
    return program


def call(program: Path, *args: str, malloc: str = "") -> list[dict[str, Any]]:
    """Run the program; its lines of JSON."""
    env = {**os.environ, "LD_PRELOAD": malloc} if malloc else None
    done = subprocess.run([str(program), *args], capture_output=True, text=True, check=False,
                          env=env)  # fmt: skip
    if done.returncode:
        raise BenchError(f"pool_bench {' '.join(args)}: {done.stderr.strip()}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def mallocs() -> dict[str, str]:
    """Other allocators by the library that has their malloc; "": the C library's."""
    found = {"glibc malloc": ""}
    for name in ("jemalloc", "mimalloc"):
        library = ctypes.util.find_library(name)
        if library:
            found[name] = library
        else:
            console.print(f"[yellow]no lib{name}: it is left out[/yellow]")
    return found


def speed_rows(program: Path, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Nanoseconds of alloc + free, each allocator in a process of its own."""
    yield from (row for row in call(program, "speed", str(seed), str(count))
                if row["allocator"] != "malloc")  # fmt: skip
    for name, library in mallocs().items():
        for row in call(program, "malloc", str(seed), str(count), malloc=library):
            yield {**row, "allocator": name}


# -- from Python -----------------------------------------------------------------------------------


def python_pairs() -> Iterator[tuple[str, Pair]]:
    """Ways to have bytes for a moment."""
    manager = omnimem.MemoryPoolManager(omnimem.MemoryConfig(pool_sizes={"cpu": 2 << 30}))
    allocate, deallocate = manager.allocate, manager.deallocate
    yield "omnimem: allocate + deallocate", lambda n: deallocate(allocate(n, "cpu"))

    def viewed(n: int) -> None:
        block = allocate(n, "cpu")
        memoryview(block).release()
        deallocate(block)

    yield "omnimem, with a memoryview", viewed
    try:
        import torch
    except ImportError:
        console.print("[yellow]no torch: it is left out[/yellow]")
    else:
        empty, uint8 = torch.empty, torch.uint8
        yield "torch.empty", lambda n: empty(n, dtype=uint8)

        def as_tensor(n: int) -> None:
            block = allocate(n, "cpu")
            torch.from_dlpack(block)
            deallocate(block)

        yield "omnimem, with a torch tensor", as_tensor
    try:
        import numpy as np
    except ImportError:
        console.print("[yellow]no numpy: it is left out[/yellow]")
    else:
        yield "numpy.empty", lambda n: np.empty(n, dtype=np.uint8)
    yield "bytearray (zeroed)", bytearray


def time_pair(pair: Pair, nbytes: int, seconds: float) -> float:
    """Nanoseconds of one call and a turn of the loop."""
    count, spent = 1, 0.0
    while spent < seconds:
        count *= 2
        begin = time.perf_counter()
        for _ in range(count):
            pair(nbytes)
        spent = time.perf_counter() - begin
    return spent / count * 1e9


def python_rows(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Medians over rounds, contenders in turn."""
    sizes = (4096, MIB, 64 * MIB)
    pairs = list(python_pairs())
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    for round_number in range(rounds):
        order = pairs[:]
        random.Random(round_number).shuffle(order)
        for name, pair in order:
            for nbytes in sizes:
                if name.startswith("bytearray") and nbytes > MIB:
                    continue
                taken[name, nbytes].append(time_pair(pair, nbytes, seconds))
    return [{"name": name, "size": nbytes, "ns": median(taken[name, nbytes])}
            for name, _ in pairs for nbytes in sizes if taken[name, nbytes]]  # fmt: skip


# -- tables ----------------------------------------------------------------------------------------


def grouped(rows: list[dict[str, Any]], keys: tuple[str, ...], values: tuple[str, ...]) -> Any:
    """Medians of `values` over the rows that agree in `keys`, in the order of their coming."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [dict(zip(keys, key, strict=True))
            | {value: median([row[value] for row in found]) for value in values}
            for key, found in groups.items()]  # fmt: skip


def size_name(nbytes: int) -> str:
    """Return "2^20 + 17" for a size of the uniform runs."""
    return f"2^{nbytes.bit_length() - 1} + 17" if nbytes else "1 KiB to 64 MiB"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of everything; medians are shown")
    parser.add_argument("--count", type=int, default=100_000, help="allocations of a full pool")
    parser.add_argument("--pairs", type=int, default=2_000_000, help="allocations that are timed")
    parser.add_argument("--seconds", type=float, default=0.2, help="of one timing from Python")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--markdown", action="store_true", help="print tables to paste")
    return parser.parse_args()


def main() -> int:
    """Run and show."""
    args = parse()
    full, placed, speed = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for round_number in range(args.rounds):
            seed = args.seed + round_number
            console.print(f"round {round_number + 1} of {args.rounds}")
            full += call(program, "utilisation", str(seed), str(args.count))
            placed += call(program, "placement", str(seed), str(args.count))
            speed += speed_rows(program, seed, args.pairs)
    python = python_rows(args.rounds, args.seconds)
    full = grouped(full, ("allocator", "eviction", "size"),
                   ("utilisation", "ns_op", "victim_age", "victim_ns"))  # fmt: skip
    placed = grouped(placed, ("placement",), ("utilisation", "largest_free"))
    speed = grouped(speed, ("allocator", "live", "least", "most"), ("ns_pair",))
    show_table(
        "A full pool of 2 GiB: share that was asked for, and one operation of the loop",
        ["allocator", "sizes", "eviction", "used", "ns", "age of victims", "ns a decision"],
        [[row["allocator"], size_name(int(row["size"])), row["eviction"],
          f"{row['utilisation']:.4f}", "" if row["victim_ns"] else f"{row['ns_op']:.0f}",
          f"{row['victim_age']:.3f}" if row["victim_age"] else "",
          f"{row['victim_ns']:.0f}" if row["victim_ns"] else ""] for row in full],
        markdown=args.markdown,
    )  # fmt: skip
    show_table(
        "Placement by lifetime, with the tree: share used, and largest free / free",
        ["placement", "used", "largest / free"],
        [[row["placement"], f"{row['utilisation']:.4f}", f"{row['largest_free']:.4f}"]
         for row in placed],
        markdown=args.markdown,
    )  # fmt: skip
    populations = list(dict.fromkeys((row["live"], row["least"], row["most"]) for row in speed))
    names = list(dict.fromkeys(row["allocator"] for row in speed))
    times = {(row["allocator"], row["live"]): row["ns_pair"] for row in speed}
    show_table(
        "alloc + free in C, ns",
        ["allocator", *(f"{live} of {least >> 10} to {most >> 10} KiB"
                        for live, least, most in populations)],
        [[name, *(f"{times[name, live]:.0f}" for live, _, _ in populations)] for name in names],
        markdown=args.markdown,
    )  # fmt: skip
    sizes = list(dict.fromkeys(row["size"] for row in python))
    calls = {(row["name"], row["size"]): row["ns"] for row in python}
    show_table(
        "From Python, ns",
        ["", *(f"{size >> 10} KiB" for size in sizes)],
        [[name, *(f"{calls[name, size]:.0f}" if (name, size) in calls else "" for size in sizes)]
         for name in dict.fromkeys(row["name"] for row in python)],
        markdown=args.markdown,
    )  # fmt: skip
    if args.json:
        write_json(args.json, {"machine": machine_facts(), "full": full, "placement": placed,
                               "speed": speed, "python": python})  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        console.print(f"[red]{error}[/red]")
        sys.exit(2)
