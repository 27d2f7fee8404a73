"""Where should a layer be decoded that is kept encoded in memory?

One decoder layer of Qwen3-VL-2B's shape (100 MB of bf16) is decoded and goes through the products
of one token, with torch on all cores. By whom it is decoded decides, since every product waits for
its slowest thread:

- `alone`: by the thread that waits for the layer.
- `worker`: by that thread and the store's worker, as a lease has it.
- `team`: by the threads that the model computes with, as a stream has it.
- `ahead`: by another thread, during the products of the layer before.

`plain` is the same layer in memory as it is. Cases take turns within a round; medians.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import BenchError, console, fmt, machine_facts, median, rotated, show_table, write_json

HIDDEN, WIDE = 2048, 6144
SHAPES = [(2048, HIDDEN), (1024, HIDDEN), (1024, HIDDEN), (HIDDEN, 2048), (WIDE, HIDDEN),
          (WIDE, HIDDEN), (HIDDEN, WIDE)]  # fmt: skip
LAYERS = 4


class Cases:
    """The layers, in every form, and what runs a round of each case."""

    def __init__(self, coding: str) -> None:
        import numpy as np
        import torch
        from torch.utils.dlpack import from_dlpack

        import omnimem
        from omnimem import _core

        self.torch, self.from_dlpack, self.core, self.np = torch, from_dlpack, _core, np
        torch.manual_seed(0)
        rows = [torch.randn(shape) * 0.02 * torch.exp(0.35 * torch.randn(shape[0], 1))
                for shape in SHAPES]  # fmt: skip
        blob = torch.cat([row.to(torch.bfloat16).reshape(-1) for row in rows]).view(torch.uint8)
        self.nbytes = blob.numel()
        self.store = omnimem.Store(omnimem.StoreConfig(host_limit="3GiB", disk_limit="1GiB"))
        keep = {"fast": 2, "balanced": 3}[coding]
        for number in range(LAYERS):
            self.store.add(f"plain-{number}", blob)
            self.store.add(f"worker-{number}", blob)
            self.store.encode(f"worker-{number}", coding)
            self.store.evict(f"worker-{number}")
            self.store.add(f"team-{number}", blob, group="team")
        self.stream = _core.Stream(self.store, "team", [
            (f"unit-{number}", [(f"team-{number}", keep)]) for number in range(LAYERS)
        ])  # fmt: skip
        self.stream.load()
        at = 0
        windows = []
        for shape in SHAPES:
            windows.append((0, at, "bfloat16", shape))
            at += shape[0] * shape[1] * 2
        for number in range(LAYERS):
            self.stream.set_windows(number, windows)
        self.starts = [window[1] for window in windows]
        self.form = _core.encode(blob, "bfloat16", coding)
        self.buffers = [torch.zeros(self.nbytes, dtype=torch.uint8) for _ in range(2)]
        self.narrow = torch.randn(1, HIDDEN).to(torch.bfloat16)
        self.wide = torch.randn(1, WIDE).to(torch.bfloat16)

    def products(self, weights: list[Any]) -> None:
        """One token through the layer."""
        for weight in weights:
            token = self.narrow if weight.shape[1] == HIDDEN else self.wide
            self.torch.nn.functional.linear(token, weight)

    def _leased(self, lease: Any) -> list[Any]:
        return [self.from_dlpack(lease.window(at, "bfloat16", shape))
                for at, shape in zip(self.starts, SHAPES, strict=True)]  # fmt: skip

    def _of(self, buffer: Any) -> list[Any]:
        return [
            buffer[at : at + shape[0] * shape[1] * 2].view(self.torch.bfloat16).view(shape)
            for at, shape in zip(self.starts, SHAPES, strict=True)
        ]

    def _decode(self, buffer: Any) -> None:
        self.core.decode_into(self.form, buffer.numpy(), check=False)

    def plain(self, number: int) -> None:
        """Nothing to decode."""
        with self.store.lease(f"plain-{number}") as lease:
            self.products(self._leased(lease))

    def alone(self, number: int) -> None:
        """The waiting thread decodes."""
        self._decode(self.buffers[0])
        self.products(self._of(self.buffers[0]))

    def worker(self, number: int) -> None:
        """The waiting thread and the store's worker decode."""
        with self.store.lease(f"worker-{number}") as lease:
            self.products(self._leased(lease))
        self.store.evict(f"worker-{number}")

    def team(self, number: int) -> None:
        """The model's threads decode."""
        self.stream.enter(number, [])
        weights = [self.from_dlpack(capsule) for capsule in self.stream.windows(number, False)]
        self.stream.bound(number)
        self.products(weights)
        del weights
        if self.stream.leave(number):
            self.stream.unbound(number)

    def ahead(self, number: int) -> None:
        """Another thread decodes the next layer meanwhile."""
        other = threading.Thread(target=self._decode, args=(self.buffers[(number + 1) % 2],))
        other.start()
        self.products(self._of(self.buffers[number % 2]))
        other.join()

    def all(self) -> dict[str, Callable[[int], None]]:
        """Every case by its name."""
        return {"plain": self.plain, "alone": self.alone, "worker": self.worker,
                "team": self.team, "ahead": self.ahead}  # fmt: skip


def main() -> int:
    """Time the cases and print a table for each coding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write every number and the machine's facts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    args = parser.parse_args()
    data: dict[str, Any] = {"benchmark": "decode_place", "machine": machine_facts(), "ms": {}}
    for coding in ("fast", "balanced"):
        made = Cases(coding)
        cases = made.all()
        times: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(args.rounds + 1):
            for name in rotated(list(cases), number):
                started = time.perf_counter()
                for layer in range(LAYERS):
                    cases[name](layer)
                if number:  # the first round touches memory
                    times[name].append((time.perf_counter() - started) / LAYERS * 1e3)
        data["ms"][coding] = times
        plain = median(times["plain"]) or 0.0
        rows = []
        for name in cases:
            own = median(times[name]) or 0.0
            extra = own - plain
            rate = made.nbytes / 1e6 / extra if extra > 0 and name != "plain" else None
            rows.append([name, fmt(own, 1), fmt(own / plain), fmt(rate, 1)])
        show_table(
            f"A layer of {made.nbytes / 1e6:.0f} MB kept {coding} ({args.rounds} rounds)",
            ["decoded by", "ms a layer", "x plain", "GB/s, on top of the products"],
            rows, markdown=args.markdown,
        )  # fmt: skip
        made.stream.close()
        made.store.close()
    write_json(args.json, data)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as problem:
        console.print(f"[red]{problem}[/red]")
        sys.exit(1)
