"""What does a lease of a block that is already in memory cost from Python?

Nanoseconds for a lease and its release, for the same in a `with` statement and for a lease with a
view of its bytes, beside a dict lookup and a call of an lru_cache for scale. Medians over rounds,
loop overhead included. Needs neither root nor a model.
"""

from __future__ import annotations

import argparse
import functools
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import BenchError, console, fmt, machine_facts, median, rotated, show_table, write_json


def cases(store: Any, name: str) -> dict[str, Callable[[], object]]:
    """Return the calls to time, by their label."""
    table = {f"block-{i}": i for i in range(1000)}
    table[name] = 1

    @functools.lru_cache(maxsize=4096)
    def cached(key: str) -> int:
        return len(key)

    def lease_release() -> None:
        store.lease(name).release()

    def lease_with() -> None:
        with store.lease(name):
            pass

    def lease_view() -> None:
        with store.lease(name) as lease, memoryview(lease):
            pass

    return {
        "lease and release": lease_release,
        "with lease": lease_with,
        "with lease, memoryview": lease_view,
        "dict lookup": lambda: table[name],
        "lru_cache call": lambda: cached(name),
        "empty call": lambda: None,
    }


def main() -> int:
    """Time the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--number", type=int, default=200_000, help="calls a round")
    parser.add_argument("--json", type=Path, help="write every number and the machine's facts")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args()
    try:
        import omnimem

        config = omnimem.StoreConfig(host_limit="64MiB", disk_limit="64MiB")
        make = omnimem.Store
    except (ImportError, AttributeError) as error:
        raise BenchError(f"omnimem is not built: {error}") from error
    times: dict[str, list[float]] = {}
    with make(config) as store:
        for i in range(64):
            store.add(f"block-{i}", bytes(4096))
        store.add("layer", bytes(4 << 20))
        calls = cases(store, "layer")
        for call in calls.values():
            call()
        for number in range(args.rounds):
            for label in rotated(list(calls), number):
                seconds = timeit.timeit(calls[label], number=args.number)
                times.setdefault(label, []).append(seconds / args.number * 1e9)
    rows = [[label, fmt(median(times[label]), 0), fmt(min(times[label]), 0)] for label in calls]
    write_json(args.json, {"benchmark": "lease", "machine": machine_facts(), "ns": times,
                           "number": args.number})  # fmt: skip
    show_table(f"A lease of a resident block ({args.rounds} rounds of {args.number} calls)",
               ["call", "median ns", "best ns"], rows, markdown=args.markdown)  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as problem:
        console.print(f"[red]{problem}[/red]")
        sys.exit(1)
