"""What does the weight cache cost, beside a dict of tensors and a safetensors file?

Microseconds of a `get` to a torch tensor: of plain entries, of encoded ones (decoded each time,
and while the plain copy is still there), of rows in memory and in a checkpoint; beside a dict of
tensors and safetensors' `get_tensor` and `get_slice`. GB/s of `put`, plain and encoded, beside
`clone`. All in turn, in one run; medians over rounds. safetensors reads files through the page
cache, omnimem past it. Needs neither root nor a model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import BenchError, console, fmt, machine_facts, median, rotated, show_table, write_json

GIB = 1 << 30


class Case:
    """A call to time, and what its ratio is taken to."""

    def __init__(
        self,
        call: Callable[[], object],
        number: int,
        peer: str | None = None,
        setup: Callable[[], object] | None = None,
    ) -> None:
        self.call = call
        self.number = number
        self.peer = peer
        self.setup = setup

    def run(self) -> float:
        """Seconds of one call."""
        if self.setup is not None:
            self.setup()
        return timeit.timeit(self.call, number=self.number) / self.number


def get_cases(omnimem: Any, torch: Any, weights: Any, folder: Path) -> dict[str, Case]:
    """Return the calls that bring weights out."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    save_file({"layer": weights}, path)
    nbytes = weights.numel() * weights.element_size()
    table = {("model", f"layer.{i}"): weights for i in range(100)}
    cache = omnimem.ModelWeightCache(8 * nbytes / GIB)
    cache.put("model", "layer.7", weights)
    coded = omnimem.ModelWeightCache(8 * nbytes / GIB, omnimem.CacheConfig(compression="fast"))
    coded.put("model", "layer.7", weights)
    files = omnimem.ModelWeightCache(8 * nbytes / GIB)
    files.attach_checkpoint("model", folder)
    handle = safe_open(path, framework="pt")
    rows = list(range(5, 500, 50))
    least = 4096  # of a plain copy beside its encoded form: enough for it to make way

    return {
        "dict of tensors": Case(lambda: table["model", "layer.7"], 20_000),
        "get, plain": Case(lambda: cache.get("model", "layer.7"), 20_000, "dict of tensors"),
        "get, encoded, plain copy there": Case(
            lambda: coded.get("model", "layer.7"),
            20_000,
            "dict of tensors",
            lambda: coded.get("model", "layer.7"),
        ),
        "clone": Case(weights.clone, 1),
        "get, encoded": Case(
            lambda: coded.get("model", "layer.7"), 1, "clone", lambda: coded.evict(least)
        ),
        "get_tensor (mapped, page cache)": Case(lambda: handle.get_tensor("layer").sum(), 1),
        "get of a checkpoint's layer (disk)": Case(
            lambda: files.get("model", "layer").sum(),
            1,
            "get_tensor (mapped, page cache)",
            lambda: files.clear(),
        ),
        "get_slice, 10 rows (page cache)": Case(lambda: handle.get_slice("layer")[5:500:50], 20),
        "get, a slice of plain": Case(
            lambda: cache.get("model", "layer.7", slice(8, 16)), 20_000, "dict of tensors"
        ),
        "get, 10 rows of plain": Case(
            lambda: cache.get("model", "layer.7", rows), 2_000, "get_slice, 10 rows (page cache)"
        ),
        "get, 10 rows of a checkpoint (disk)": Case(
            lambda: files.get("model", "layer", rows),
            20,
            "get_slice, 10 rows (page cache)",
            lambda: files.clear(),
        ),
    }


def put_cases(omnimem: Any, weights: Any) -> dict[str, Case]:
    """Return the calls that bring weights in."""
    nbytes = weights.numel() * weights.element_size()
    target = weights.clone()
    caches = {
        name: omnimem.ModelWeightCache(4 * nbytes / GIB, omnimem.CacheConfig(**fields))
        for name, fields in {
            "plain": {},
            "fast": {"compression": "fast"},
            "balanced": {"compression": "balanced"},
        }.items()
    }
    count = [0]

    def put(name: str) -> None:
        count[0] += 1
        caches[name].put("model", f"layer.{count[0] % 8}", weights)

    cases = {
        "copy_ to memory that is there": Case(lambda: target.copy_(weights), 4),
        "clone": Case(weights.clone, 4),
        "put of the same name, plain": Case(
            lambda: caches["plain"].put("model", "same", weights), 4, "clone"
        ),
    }
    for name in caches:
        cases[f"put with victims, {name}"] = Case(lambda name=name: put(name), 4, "clone")
    return cases


def measure(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, in turn."""
    times: dict[str, list[float]] = {label: [] for label in cases}
    for case in cases.values():
        case.run()
    for number in range(rounds):
        for label in rotated(list(cases), number):
            times[label].append(cases[label].run())
    return times


def ratio(label: str, cases: dict[str, Case], times: dict[str, list[float]]) -> str:
    """How much longer than its peer, or "-"."""
    peer = cases[label].peer
    if peer is None:
        return "-"
    return f"{(median(times[label]) or 0) / (median(times[peer]) or 1):.2f} x {peer}"


def main() -> int:
    """Time the cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mib", type=int, default=32, help="size of the weights, bfloat16")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--json", type=Path, help="write every number and the machine's facts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    args = parser.parse_args()
    try:
        import safetensors  # noqa: F401
        import torch

        import omnimem
    except ImportError as error:
        raise BenchError(f"a module is missing: {error}") from error
    generator = torch.Generator().manual_seed(5)
    rows = args.mib * (1 << 20) // (2 * 2048)
    scales = torch.rand(rows, 1, generator=generator) * 0.03 + 0.01
    weights = (torch.randn(rows, 2048, generator=generator) * scales).to(torch.bfloat16)
    nbytes = weights.numel() * 2
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        gets = get_cases(omnimem, torch, weights, Path(folder))
        got = measure(gets, args.rounds)
        puts = put_cases(omnimem, weights)
        put = measure(puts, args.rounds)
        facts = machine_facts(Path(folder))
    write_json(
        args.json,
        {"benchmark": "cache", "machine": facts, "nbytes": nbytes, "get_s": got, "put_s": put},
    )
    show_table(
        f"get of {args.mib} MiB of bfloat16 ({args.rounds} rounds)",
        ["call", "median us", "best us", "ratio"],
        [
            [label, fmt((median(got[label]) or 0) * 1e6, 2), fmt(min(got[label]) * 1e6, 2),
             ratio(label, gets, got)]
            for label in gets
        ],
        markdown=args.markdown,
    )  # fmt: skip
    show_table(
        f"put of {args.mib} MiB of bfloat16 ({args.rounds} rounds)",
        ["call", "median GB/s", "best GB/s", "time"],
        [
            [
                label,
                fmt(nbytes / (median(put[label]) or 1) / 1e9),
                fmt(nbytes / min(put[label]) / 1e9),
                ratio(label, puts, put),
            ]
            for label in puts
        ],
        markdown=args.markdown,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as problem:
        console.print(f"[red]{problem}[/red]")
        sys.exit(1)
