"""Which policy misses least, on real traces and on the kinds of access that models make?

Every cell is one trace at one capacity; numbers are bytes missed / bytes requested. The regret of
ADAPTIVE is its number less that of the best of LRU, CLOCK and S3-FIFO, in points. Belady's knows
the future: for equal sizes nobody does better.

What a request costs is told in nanoseconds, and, where valgrind is installed, in instructions,
which no other process and no cache of the machine changes: callgrind counts those of om_simulate
in a child. A run without capacity stops after numbering the ids; what it took is told apart.

Real traces are read from --traces (a folder of oracleGeneral files) where it exists.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import omnimem
from common import BenchError, console, fmt, machine_facts, median, show_table, write_json

ROOT = Path(__file__).resolve().parent.parent
CLASSIC = ("lru", "clock", "s3fifo")
POLICIES = (*CLASSIC, "sieve", "adaptive", "belady")
COUNTED = """
import array, sys
import omnimem
ids = array.array("Q")
with open(sys.argv[1], "rb") as file:
    ids.frombytes(file.read())
try:
    omnimem.simulate(ids, int(sys.argv[2]), sys.argv[3])
except ValueError:
    if int(sys.argv[2]) != 0:
        raise
"""
RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])

Trace = tuple[np.ndarray, np.ndarray]
"""Ids and sizes, one of each a request."""


def units(ids: np.ndarray) -> Trace:
    """Give every object one byte."""
    return ids.astype(np.uint64), np.ones(len(ids), dtype=np.uint64)


def sized(ids: np.ndarray, of: np.ndarray) -> Trace:
    """Give object i of[i] bytes."""
    return ids.astype(np.uint64), of[ids].astype(np.uint64)


def span(first: int, count: int) -> np.ndarray:
    """Return `count` ids from `first` on."""
    return np.arange(first, first + count)


def phases(*, interleaved: bool, rng: np.random.Generator) -> np.ndarray:
    """A vision tower, then a thinker's and a talker's layers per token, then a codec; 12 times."""
    parts = []
    for _ in range(12):
        parts.append(span(0, 27))
        thinker, talker = rng.integers(32, 97), rng.integers(64, 193)
        if interleaved:
            parts += [span(27, 36) if turn % 3 == 0 else span(63, 20)
                      for turn in range(3 * thinker)]  # fmt: skip
        else:
            parts += [np.tile(span(27, 36), thinker), np.tile(span(63, 20), talker)]
        parts.append(np.tile(span(83, 8), 16))
    return np.concatenate(parts)


def diffusion() -> np.ndarray:
    """A text encoder, 30 steps through a transformer, a decoder; 12 times."""
    one = [span(0, 32), np.tile(span(32, 60), 30), span(92, 6)]
    return np.concatenate(one * 12)


def experts(rng: np.random.Generator) -> np.ndarray:
    """48 layers of 128 experts, 6 a token: popular ones by Zipf, 40 % those of the last token."""
    weight = 1 / np.arange(1, 129) ** 0.9
    weight /= weight.sum()
    names = [rng.permutation(128) for _ in range(48)]
    last = [rng.choice(128, 6, replace=False, p=weight) for _ in range(48)]
    out = []
    for _ in range(150):
        for layer in range(48):
            fresh = rng.choice(128, 6, replace=False, p=weight)
            last[layer] = np.where(rng.random(6) < 0.4, last[layer], fresh)
            out.append(layer * 128 + names[layer][np.unique(last[layer])])
    return np.concatenate(out)


def scans(rng: np.random.Generator) -> np.ndarray:
    """A loop over 2000, uses of its most popular in between, and scans that never come again."""
    parts, fresh = [], 2000
    for _ in range(20):
        parts += [np.tile(span(0, 2000), 2), rng.zipf(1.3, 2000) % 2000, span(fresh, 400)]
        fresh += 400
    return np.concatenate(parts)


def families(seed: int) -> Iterator[tuple[str, Trace]]:
    """The synthetic kinds."""
    rng = np.random.default_rng(seed)
    yield "cycle of 36", units(np.tile(np.arange(36), 200))
    yield "cycle of 1000", units(np.tile(np.arange(1000), 40))
    layer_mib = rng.integers(8, 120, size=64)
    yield "cycle of 64, sized", sized(np.tile(np.arange(64), 150), layer_mib)
    mib = rng.integers(8, 120, size=100)
    yield "phases", sized(phases(interleaved=False, rng=rng), mib)
    yield "phases, interleaved", sized(phases(interleaved=True, rng=rng), mib)
    yield "diffusion", sized(diffusion(), mib)
    skewed = rng.zipf(1.1, size=200_000)
    yield "Zipf 1.1", units(skewed[skewed < 20_000])
    yield "Zipf 0.8, sized", sized(zipf(rng, 5000, 0.8, 150_000), rng.integers(1, 64, size=5000))
    yield "scan and loop", units(scans(rng))
    yield "experts", units(experts(rng))


def zipf(rng: np.random.Generator, count: int, slope: float, requests: int) -> np.ndarray:
    """Independent draws of `count` objects, the i-th with weight 1 / i ** slope."""
    weight = 1 / np.arange(1, count + 1) ** slope
    return rng.permutation(count)[rng.choice(count, requests, p=weight / weight.sum())]


def real(folder: Path) -> Iterator[tuple[str, Trace]]:
    """The traces that are there."""
    for file in sorted(folder.glob("*.oracleGeneral.bin")):
        records = np.fromfile(file, dtype=RECORD)
        yield file.name.split(".")[0], (records["id"].astype(np.uint64),
                                        records["size"].astype(np.uint64))  # fmt: skip


def capacities(trace: Trace, shares: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """Shares of all distinct bytes, where the largest object fits."""
    ids, sizes = trace
    first = np.unique(ids, return_index=True)[1]
    total = int(sizes[first].sum())
    for percent in shares:
        if (room := total * percent // 100) >= int(sizes.max()):
            yield f"{percent} %", room


def cell(trace: Trace, room: int) -> dict[str, float]:
    """Byte miss ratio of every policy, in percent."""
    ids, sizes = trace
    return {p: 100 * omnimem.simulate(ids, room, p, sizes).byte_miss_ratio for p in POLICIES}


def cost_trace(blocks: int) -> np.ndarray:
    """Return a million requests of a Zipf trace."""
    return zipf(np.random.default_rng(3), blocks, 0.9, 1_000_000).astype(np.uint64)


def cost(blocks: int) -> dict[str, float]:
    """Nanoseconds a request of a Zipf trace, half of the blocks held, numbering included."""
    ids = cost_trace(blocks)
    times: dict[str, list[float]] = {policy: [] for policy in POLICIES[:-1]}
    for _ in range(3):
        for policy, taken in times.items():
            started = time.perf_counter()
            omnimem.simulate(ids, blocks // 2, policy)
            taken.append((time.perf_counter() - started) / len(ids) * 1e9)
    return {policy: median(taken) or 0.0 for policy, taken in times.items()}


def instructions(blocks: int) -> dict[str, float] | None:
    """Instructions a request of the same trace, numbering apart; None without valgrind."""
    if shutil.which("valgrind") is None:
        return None
    ids = cost_trace(blocks)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "ids"
        ids.tofile(trace)

        def count(capacity: int, policy: str) -> float:
            out = Path(folder) / "callgrind"
            command = ["valgrind", "--tool=callgrind", "--toggle-collect=om_simulate",
                       f"--callgrind-out-file={out}", sys.executable, "-c", COUNTED,
                       str(trace), str(capacity), policy]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise BenchError(f"no count of instructions: {done.stderr.strip()[-300:]}")
            return int(out.read_text().rpartition("totals:")[2]) / len(ids)

        numbering = count(0, "lru")
        counts = {policy: count(blocks // 2, policy) - numbering for policy in POLICIES[:-1]}
    return {"numbering": numbering, **counts}


def main() -> int:
    """Run all cells; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--seed", type=int, default=7, help="of the synthetic traces")
    parser.add_argument("--shares", default="5,10,20,40,60,80", help="capacities, percent")
    parser.add_argument("--json", type=Path, help="write every number and the machine's facts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    args = parser.parse_args()
    rows, cells = [], []
    shares = tuple(int(share) for share in args.shares.split(","))
    for name, trace in [*real(args.traces), *families(args.seed)]:
        for share, room in capacities(trace, shares):
            found = cell(trace, room)
            regret = found["adaptive"] - min(found[p] for p in CLASSIC)
            cells.append({"trace": name, "capacity": share, **found, "regret": regret})
            rows.append([name, share, *(fmt(found[p], 1) for p in POLICIES), f"{regret:+.1f}"])
        console.print(f"{name}: done")
    show_table("Bytes missed, percent", ["trace", "capacity", *POLICIES, "regret, points"], rows,
               markdown=args.markdown)  # fmt: skip
    regrets = np.array([c["regret"] for c in cells])
    cycles = [c["adaptive"] - c["belady"] for c in cells if c["trace"].startswith("cycle")]
    summary = {
        "cells": len(cells),
        "median regret": float(np.median(regrets)),
        "cells at +2 points or less, percent": float((regrets <= 2).mean() * 100),
        "worst regret": float(regrets.max()),
        "mean of LRU - ADAPTIVE": float(np.mean([c["lru"] - c["adaptive"] for c in cells])),
        "worst of cycles over Belady": max(cycles),
    }
    show_table("ADAPTIVE against the best of LRU, CLOCK and S3-FIFO", ["", "points"],
               [[key, fmt(value)] for key, value in summary.items()],
               markdown=args.markdown)  # fmt: skip
    sizes = (1000, 100_000)
    costs = {f"{blocks:,} blocks": cost(blocks) for blocks in sizes}
    show_table("Nanoseconds a request", ["", *POLICIES[:-1]],
               [[label, *(fmt(found[p], 0) for p in POLICIES[:-1])] for label, found in
                costs.items()], markdown=args.markdown)  # fmt: skip
    counts = {f"{blocks:,} blocks": instructions(blocks) for blocks in sizes}
    if None in counts.values():
        console.print("[yellow]no instructions are counted: valgrind is not installed[/yellow]")
    else:
        show_table("Instructions a request", ["", *POLICIES[:-1], "numbering the ids"],
                   [[label, *(fmt((found or {}).get(p), 0) for p in (*POLICIES[:-1], "numbering"))]
                    for label, found in counts.items()], markdown=args.markdown)  # fmt: skip
    write_json(args.json, {"benchmark": "policies", "machine": machine_facts(), "cells": cells,
                           "summary": summary, "cost_ns": costs,
                           "cost_instructions": counts})  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as problem:
        console.print(f"[red]{problem}[/red]")
        sys.exit(1)
