"""How fast does a cold model folder become tensors in RAM, beside its peers and the machine's own?

Each contender loads every tensor of the folder in a fresh process on a cold page cache, and keeps
all of them readable. Right before and after it fio reads the largest shard whole, with the best of
six settings (io_uring, O_DIRECT); right before it the rate at which fresh pages can be populated
is measured in its process. No loader of ordinary memory can beat the smaller of the two. Imports
are not timed; opening files and reading headers is.

A virtual machine gives free memory back to its host, and a page that has to come from there takes
ten times as long to populate; how many do is chance. So each child touches what memory is free
before its clock starts.

Needs root (to drop the page cache) and fio.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from pathlib import Path
from typing import Any

from common import (
    GB,
    BenchError,
    console,
    default_folder,
    drop_caches,
    ensure_model,
    fio_read,
    fmt,
    free_bytes,
    machine_facts,
    median,
    populate,
    report,
    rotated,
    run_child,
    shards,
    show_table,
    tensors,
    write_json,
)

CONTENDERS = (
    "omnimem-uring", "omnimem-threads", "safetensors", "runai-kept", "runai-streamed",
    "fastsafetensors",
)  # fmt: skip
FIO_SETTINGS = [(bs, depth) for bs in ("512k", "1M") for depth in (8, 16, 32)]
PAGE = 4096
PAUSE_S = 8.0  # what a shared disk grants fills up while it is idle, as it is while a child starts


# -- children --------------------------------------------------------------------------------------


def runs_of(checkpoint: Any, names: tuple[str, ...]) -> list[list[str]]:
    """Split a unit's tensors into runs that lie end to end in one file."""
    runs: list[list[str]] = []
    end: tuple[str, int] | None = None
    for name in sorted(names, key=lambda n: (str(checkpoint.info(n).file),
                                             checkpoint.info(n).offset)):  # fmt: skip
        info = checkpoint.info(name)
        if (str(info.file), info.offset) != end:
            runs.append([])
        runs[-1].append(name)
        end = (str(info.file), info.offset + info.nbytes)
    return runs


def load_omnimem(folder: Path, backend: str) -> dict[str, Any]:
    """Every unit a block with an origin, prefetched at once, leased, a window for each tensor."""
    import torch  # the window's other side; its import is not timed

    import omnimem
    import omnimem.checkpoint

    total = sum(t.nbytes for t in tensors(folder).values())
    started = time.perf_counter()
    limit = total + total // 50 + (256 << 20)
    with contextlib.ExitStack() as stack:
        config = omnimem.StoreConfig(host_limit=limit, io_backend=backend)
        store = stack.enter_context(omnimem.Store(config))
        checkpoint = stack.enter_context(omnimem.checkpoint.open(folder))
        blocks = []
        for unit in checkpoint.units():
            for number, names in enumerate(runs_of(checkpoint, unit.tensors)):
                infos = [checkpoint.info(name) for name in names]
                block = f"{unit.name}#{number}"
                nbytes = sum(info.nbytes for info in infos)
                store.add_file(block, [(str(infos[0].file), infos[0].offset, nbytes)])
                blocks.append((block, infos))
        store.prefetch([block for block, _ in blocks]).wait()
        kept = []
        for block, infos in blocks:
            lease = store.lease(block)
            at = 0
            for info in infos:
                kept.append(torch.from_dlpack(lease.window(at, info.dtype, info.shape)))
                at += info.nbytes
            kept.append(lease)
        seconds = time.perf_counter() - started
        stats = store.stats()
        facts = {"io_backend": getattr(stats, "io_backend", backend),
                 "io_reason": str(getattr(stats, "io_reason", ""))}  # fmt: skip
        count = len(kept) - len(blocks)
        for item in kept:
            if isinstance(item, torch.Tensor):
                continue
            item.release()
        kept.clear()
    return {"seconds": seconds, "bytes": total, "tensors": count, **facts}


def touch(tensor: Any) -> None:
    """Read one byte of each page, so that a mapped tensor really is in memory."""
    import torch

    tensor.view(-1).view(torch.uint8)[::PAGE].sum()


def load_safetensors(folder: Path) -> dict[str, Any]:
    """safetensors.torch.load_file: mapped, each page touched."""
    from safetensors.torch import load_file

    started = time.perf_counter()
    kept: dict[str, Any] = {}
    for path in shards(folder):
        kept.update(load_file(path))
    for tensor in kept.values():
        touch(tensor)
    return finish(started, kept)


def load_runai(folder: Path, *, keep: bool) -> dict[str, Any]:
    """Run:ai's streamer; its buffers are used again, so a tensor that stays has to be copied."""
    from runai_model_streamer import SafetensorsStreamer

    started = time.perf_counter()
    kept: dict[str, Any] = {}
    nbytes = 0
    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in shards(folder)])
        for name, tensor in streamer.get_tensors():
            nbytes += tensor.nbytes
            kept[name] = tensor.clone() if keep else tensor.shape
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": nbytes, "tensors": len(kept)}


def load_fastsafetensors(folder: Path) -> dict[str, Any]:
    """fastsafetensors on the CPU."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    started = time.perf_counter()
    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: [str(path) for path in shards(folder)]})
    buffers = loader.copy_files_to_device()
    kept = {name: buffers.get_tensor(name) for name in loader.get_keys()}
    for tensor in kept.values():
        touch(tensor)
    result = finish(started, kept)
    kept.clear()
    buffers.close()
    loader.close()
    return result


def finish(started: float, kept: dict[str, Any]) -> dict[str, Any]:
    """Stop the clock over tensors that are all in memory."""
    seconds = time.perf_counter() - started
    nbytes = sum(tensor.nbytes for tensor in kept.values())
    return {"seconds": seconds, "bytes": nbytes, "tensors": len(kept)}


def child(name: str, folder: Path) -> None:
    """Run one contender and report it."""
    import torch  # noqa: F401  not timed

    populate(free_bytes())
    pages = populate(sum(path.stat().st_size for path in shards(folder)))
    gc.collect()  # what the imports left is not the loader's
    if name.startswith("omnimem-"):
        result = load_omnimem(folder, name.removeprefix("omnimem-"))
    elif name == "safetensors":
        result = load_safetensors(folder)
    elif name == "fastsafetensors":
        result = load_fastsafetensors(folder)
    else:
        result = load_runai(folder, keep=name == "runai-kept")
    report({**result, "populate_gb_s": pages["bytes"] / GB / pages["seconds"]})


# -- parent ----------------------------------------------------------------------------------------


def one_round(number: int, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Find fio's best setting, then run each contender once, fio before and after it."""
    shard = max(shards(args.dir), key=lambda path: path.stat().st_size)
    drop_caches()
    settings = {setting: fio_read(shard, args.fio_bytes, bs=setting[0], depth=setting[1])
                for setting in rotated(FIO_SETTINGS, number)}  # fmt: skip
    bs, depth = max(settings, key=lambda setting: settings[setting] or 0.0)
    record: dict[str, Any] = {"round": number, "runs": {}, "fio_best": f"bs {bs}, depth {depth}",
                              "fio": {f"bs {b}, depth {d}": speed
                                      for (b, d), speed in settings.items()}}  # fmt: skip
    console.print(f"round {number + 1} of {args.rounds}: fio is best with {record['fio_best']}")

    def disk() -> float | None:
        time.sleep(PAUSE_S)
        return fio_read(shard, shard.stat().st_size, bs=bs, depth=depth)

    before = disk()
    for name in rotated(names, number):
        argv = ["--child", name, "--dir", str(args.dir)]
        done = run_child(__file__, argv, cgroup=False, timeout=args.timeout)
        after = disk()
        entry = done.as_dict()
        if done.result:
            fio = (before + after) / 2 if before and after else None
            limits = [speed for speed in (fio, done.result["populate_gb_s"]) if speed]
            entry |= {"gb_s": done.result["bytes"] / GB / done.result["seconds"],
                      "fio_gb_s": fio, "populate_gb_s": done.result["populate_gb_s"],
                      "bound": min(limits)}  # fmt: skip
            entry["over_bound"] = entry["gb_s"] / entry["bound"]
        record["runs"][name] = entry
        console.print(f"    {name}: {fmt(entry.get('gb_s'))} GB/s, fio {fmt(before)} and "
                      f"{fmt(after)}, pages {fmt(entry.get('populate_gb_s'))} "
                      f"{done.error or ''}")  # fmt: skip
        before = after
    return record


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=default_folder(), help="model folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated")
    parser.add_argument("--fio-bytes", type=int, default=1_000_000_000, help="read per setting")
    parser.add_argument("--json", type=Path, help="write every number and the machine's facts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one child")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the rounds; returns 1 when a run of omnimem failed."""
    args = parse()
    if args.child:
        child(args.child, args.dir)
        return 0
    drop_caches()
    names = args.contenders.split(",")
    if unknown := sorted(set(names) - set(CONTENDERS)):
        raise BenchError(f"unknown contenders {', '.join(unknown)}; known: {', '.join(CONTENDERS)}")
    ensure_model(args.dir)
    data: dict[str, Any] = {"benchmark": "load_folder", "machine": machine_facts(args.dir),
                            "argv": sys.argv[1:], "rounds": []}  # fmt: skip
    for number in range(args.rounds):
        data["rounds"].append(one_round(number, names, args))
        write_json(args.json, data)
    rows, summary, errors = [], [], []
    for name in names:
        runs = [round_["runs"][name] for round_ in data["rounds"]]
        middle = {key: median(run.get(key) for run in runs)
                  for key in ("gb_s", "over_bound", "fio_gb_s", "populate_gb_s")}  # fmt: skip
        seconds = median(run["result"]["seconds"] for run in runs if run["result"])
        errors += [(name, run["error"]) for run in runs if run["error"]][:1]
        summary.append({"contender": name, "seconds": seconds, **middle})
        rows.append([name, fmt(middle["gb_s"]), fmt(seconds, 2, " s"), fmt(middle["over_bound"]),
                     fmt(middle["fio_gb_s"]), fmt(middle["populate_gb_s"])])  # fmt: skip
    data["summary"] = summary
    write_json(args.json, data)
    total = sum(path.stat().st_size for path in shards(args.dir)) / GB
    show_table(f"Model folder to RAM, cold: {total:.2f} GB, {args.rounds} rounds",
               ["contender", "GB/s", "time", "of the bound", "fio beside it, GB/s",
                "fresh pages, GB/s"], rows, markdown=args.markdown)  # fmt: skip
    for name, error in errors:
        print(f"\n{name} failed in a round: {error}")
    return int(any(name.startswith("omnimem") for name, _ in errors))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as problem:
        console.print(f"[red]{problem}[/red]")
        sys.exit(1)
