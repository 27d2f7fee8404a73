"""What does it cost to hand a block to a framework by DLPack, and to take an array in?

Nanoseconds for a capsule (made and dropped), for a tensor or an array made of a lease, and
milliseconds for an array that comes in, contiguous and transposed, beside what NumPy and torch
take for the same with their own. Medians over rounds, loop overhead included; ratios are taken
within a round. Needs neither root nor a model; jax and tvm-ffi are taken along where they are
installed.
"""

from __future__ import annotations

import argparse
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import BenchError, console, fmt, machine_facts, median, rotated, show_table, write_json

Call = Callable[[], object]
VERSION = (1, 0)


def export_cases(lease: Any, window: Any, array: Any, tensor: Any) -> dict[str, Call]:
    """Return the calls that make a capsule and drop it, by label."""
    ours, part = lease.__dlpack__, window.__dlpack__
    numpys, torchs = array.__dlpack__, tensor.__dlpack__
    return {
        "numpy: capsule": lambda: numpys(max_version=VERSION),
        "torch: capsule": lambda: torchs(max_version=VERSION),
        "lease: capsule": lambda: ours(max_version=VERSION),
        "lease: all keywords": lambda: ours(
            stream=None, max_version=VERSION, dl_device=None, copy=None
        ),
        "lease: before DLPack 1.0": lambda: ours(),
        "window: capsule": lambda: part(max_version=VERSION),
        "empty call": lambda: None,
    }


def view_cases(lease: Any, array: Any, tensor: Any) -> dict[str, Call]:
    """Return the calls that make a view of the bytes and drop it, by label."""
    import numpy as np
    import torch

    make = torch._C._from_dlpack
    cases: dict[str, Call] = {
        "torch.from_dlpack(ndarray)": lambda: torch.from_dlpack(array),
        "torch.from_dlpack(lease)": lambda: torch.from_dlpack(lease),
        "torch.from_dlpack(tensor)": lambda: torch.from_dlpack(tensor),
        "torch.from_numpy(ndarray)": lambda: torch.from_numpy(array),
        "torch._C._from_dlpack(lease's capsule)": lambda: make(
            lease.__dlpack__(max_version=VERSION)
        ),
        "numpy.from_dlpack(ndarray)": lambda: np.from_dlpack(array),
        "numpy.from_dlpack(lease)": lambda: np.from_dlpack(lease),
        "numpy.from_dlpack(tensor)": lambda: np.from_dlpack(tensor),
        "numpy.frombuffer(lease)": lambda: np.frombuffer(lease, np.float32),
    }
    try:
        import tvm_ffi

        cases["tvm_ffi.from_dlpack(ndarray)"] = lambda: tvm_ffi.from_dlpack(array)
        cases["tvm_ffi.from_dlpack(lease)"] = lambda: tvm_ffi.from_dlpack(lease)
    except ImportError:
        pass
    try:
        import jax

        cases["jax.numpy.from_dlpack(ndarray)"] = lambda: jax.numpy.from_dlpack(array)
        cases["jax.numpy.from_dlpack(lease)"] = lambda: jax.numpy.from_dlpack(lease)
    except ImportError:
        pass
    return cases


def intake_cases(store: Any, side: int) -> dict[str, Call]:
    """Return the calls that bring a float32 array of `side` squared in, by label."""
    import numpy as np
    import torch

    array = np.arange(side * side, dtype=np.float32).reshape(side, side)
    tensor = torch.from_numpy(array)

    def bring(method: Callable[[str, Any], None], data: Any) -> Call:
        def call() -> None:
            method("in", data)
            store.remove("in")

        return call

    return {
        "numpy: copy": lambda: array.copy(),
        "torch: clone": lambda: tensor.clone(),
        "add, contiguous": bring(store.add, array),
        "take": bring(store.take, array),
        "numpy: transposed, made contiguous": lambda: np.ascontiguousarray(array.T),
        "torch: transposed, made contiguous": lambda: tensor.t().contiguous(),
        "add, transposed": bring(store.add, array.T),
        "numpy: every second row and column": lambda: np.ascontiguousarray(array[::2, ::2]),
        "add, every second row and column": bring(store.add, array[::2, ::2]),
    }


# What a call is compared with.
PEERS = {
    "lease: capsule": ("numpy: capsule", "torch: capsule"),
    "lease: all keywords": ("numpy: capsule",),
    "window: capsule": ("numpy: capsule",),
    "torch.from_dlpack(lease)": ("torch.from_dlpack(ndarray)", "torch.from_numpy(ndarray)"),
    "torch._C._from_dlpack(lease's capsule)": ("torch.from_numpy(ndarray)",),
    "numpy.from_dlpack(lease)": ("numpy.from_dlpack(ndarray)", "numpy.from_dlpack(tensor)"),
    "numpy.frombuffer(lease)": ("numpy.from_dlpack(ndarray)",),
    "tvm_ffi.from_dlpack(lease)": ("tvm_ffi.from_dlpack(ndarray)",),
    "jax.numpy.from_dlpack(lease)": ("jax.numpy.from_dlpack(ndarray)",),
    "add, contiguous": ("numpy: copy", "torch: clone"),
    "take": ("numpy: copy",),
    "add, transposed": (
        "numpy: transposed, made contiguous",
        "torch: transposed, made contiguous",
    ),
    "add, every second row and column": ("numpy: every second row and column",),
}


def time_cases(cases: dict[str, Call], rounds: int, number: int) -> dict[str, list[float]]:
    """Return seconds a call, one for each round, by label; the calls take turns."""
    times: dict[str, list[float]] = {label: [] for label in cases}
    for call in cases.values():
        call()
    for turn in range(rounds):
        for label in rotated(list(cases), turn):
            times[label].append(timeit.timeit(cases[label], number=number) / number)
    return times


def rows_of(times: dict[str, list[float]], unit: float, digits: int) -> list[list[str]]:
    """Return a row for each call: median, best, and how it compares with its peers."""
    rows = []
    for label, seconds in times.items():
        ratios = []
        for peer in PEERS.get(label, ()):
            ratio = median([a / b for a, b in zip(seconds, times[peer], strict=True)])
            ratios.append(f"{ratio:.2f} x {peer}")
        scaled = [value / unit for value in seconds]
        rows.append([label, fmt(median(scaled), digits), fmt(min(scaled), digits),
                     "; ".join(ratios)])  # fmt: skip
    return rows


def main() -> int:
    """Time the cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--number", type=int, default=50_000, help="capsules a round")
    parser.add_argument("--side", type=int, default=2048, help="of the square that comes in")
    parser.add_argument("--json", type=Path, help="write every number and the machine's facts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    args = parser.parse_args()
    try:
        import numpy as np
        import torch

        import omnimem
    except ImportError as error:
        raise BenchError(f"NumPy, torch and a built omnimem are needed: {error}") from error
    array = np.arange(256 * 256, dtype=np.float32).reshape(256, 256)
    limit = 4 * args.side**2 * 4 + (64 << 20)
    with omnimem.Store(omnimem.StoreConfig(host_limit=limit, disk_limit=limit)) as store:
        store.add("a", array)
        with store.lease("a") as lease:
            window = lease.window(0, "float32", (128, 256))
            tensor = torch.from_numpy(array)
            times = {
                "export": time_cases(
                    export_cases(lease, window, array, tensor), args.rounds, args.number
                ),
                "views": time_cases(
                    view_cases(lease, array, tensor), args.rounds, max(args.number // 10, 1)
                ),
                "intake": time_cases(intake_cases(store, args.side), args.rounds, 3),
            }
            del window
    write_json(args.json, {"benchmark": "dlpack", "machine": machine_facts(), "seconds": times,
                           "number": args.number, "side": args.side})  # fmt: skip
    shapes = {
        "export": ("A capsule, made and dropped", "ns", 1e-9, 0),
        "views": ("A tensor or an array of 256 KiB, made and dropped", "ns", 1e-9, 0),
        "intake": (f"float32 [{args.side}, {args.side}] comes in", "ms", 1e-3, 2),
    }
    for key, (title, unit, scale, digits) in shapes.items():
        show_table(f"{title} ({args.rounds} rounds)",
                   ["call", f"median {unit}", f"best {unit}", "beside"],
                   rows_of(times[key], scale, digits), markdown=args.markdown)  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as problem:
        console.print(f"[red]{problem}[/red]")
        sys.exit(1)
