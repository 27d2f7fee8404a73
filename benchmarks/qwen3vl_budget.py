"""How fast is Qwen3-VL in less memory than its weights need, and is the output still the same?

Each contender runs in a fresh process inside a memory cgroup whose limit is the budget + 1.0 GB,
page cache included, on a cold cache: one 448 x 448 image and a prompt, then tokens greedily. The
resident baseline (plain transformers, weights copied to anonymous memory) has no limit. Contenders
take turns within a round; fio reads the same shard before and after. Numbers are medians over the
rounds; a round whose resident baseline is over twice its median is reported and left out.

`omnimem-off` keeps nothing encoded, `omnimem` what it finds faster (compression="auto"),
`omnimem-fast` as much as saves reading; `omnimem-packed` is `omnimem` from a folder that
`omnimem pack` made.

Needs root, cgroup v1 with the memory controller, fio, torch, transformers, accelerate.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import (
    GB,
    BenchError,
    cgroup_refusal,
    console,
    default_folder,
    drop_caches,
    ensure_model,
    fio_read,
    fmt,
    machine_facts,
    median,
    report,
    reset_peak,
    rotated,
    run_child,
    shards,
    show_table,
    swap_file,
    tensors,
    write_json,
)

HEADROOM = 1_000_000_000
CONTENDERS = (
    "resident", "plain", "accelerate", "prototype", "omnimem-off", "omnimem", "omnimem-fast",
    "omnimem-packed", "omnimem-first",
)  # fmt: skip
COMPRESSION = {"omnimem-off": None, "omnimem-first": None, "omnimem-fast": "fast"}
PEERS = ("plain", "accelerate", "swap")


# -- children: one contender, one process ----------------------------------------------------------


def make_inputs(folder: Path, out: Path) -> None:
    """Process a drawn 448 x 448 picture once and save the model's inputs."""
    import numpy as np
    from PIL import Image
    from transformers import AutoConfig, Qwen2VLImageProcessorPil

    config = AutoConfig.from_pretrained(folder)
    vision = config.vision_config
    across = np.linspace(0, 255, 448)
    picture = np.stack([np.tile(across, (448, 1)), np.tile(across[:, None], (1, 448)),
                        np.add.outer(across, across) / 2], axis=-1).astype("uint8")  # fmt: skip
    processor = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 65536, "longest_edge": 16777216},
    )  # fmt: skip
    image = processor(images=[Image.fromarray(picture)], return_tensors="np")
    grid = image["image_grid_thw"]
    count = int(grid[0].prod()) // vision.spatial_merge_size**2
    words = np.random.default_rng(0).integers(10, 1000, size=24).tolist()
    ids = [*words[:8], config.vision_start_token_id, *([config.image_token_id] * count),
           config.vision_end_token_id, *words[8:]]  # fmt: skip
    input_ids = np.asarray([ids], dtype=np.int64)
    np.savez(out, input_ids=input_ids, pixel_values=image["pixel_values"], image_grid_thw=grid,
             mm_token_type_ids=(input_ids == config.image_token_id).astype(np.int64))  # fmt: skip


def request(model: Any, inputs_file: Path, tokens: int, bytes_read: Any) -> dict[str, Any]:
    """Prefill and decode greedily; times, bytes and the hash of every logit's bits."""
    import numpy as np
    import torch
    from transformers import DynamicCache

    with np.load(inputs_file) as saved:
        inputs = {name: torch.from_numpy(saved[name]) for name in saved.files}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    cache = DynamicCache(config=model.config)
    ids, hashes, times, read = [], [], [], []
    with torch.no_grad():
        for _ in range(tokens + 1):
            before = bytes_read() if bytes_read else None
            started = time.perf_counter()
            out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1)
            ids.append(int(token))
            times.append(time.perf_counter() - started)
            bits = out.logits[:, -1].contiguous().view(torch.uint8).numpy().tobytes()
            hashes.append(hashlib.sha256(bits).hexdigest())
            read.append(None if before is None else bytes_read() - before)
            inputs = {
                "input_ids": token.view(1, 1),
                "mm_token_type_ids": torch.zeros(1, 1, dtype=torch.int64),
            }
    return {
        "tokens": ids,
        "logits_sha256": hashes,
        "ttft_s": times[0],
        "decode_s": times[1:],
        "bytes_prefill": read[0],
        "bytes_decode": read[1:],
    }


def plain_model(folder: Path, **options: Any) -> Any:
    """Plain transformers, in the checkpoint's dtype."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **options).eval()


def copy_to_memory(model: Any, folder: Path) -> None:
    """Copy each weight to anonymous memory and let the files' page cache go."""
    import gc

    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    gc.collect()
    for path in shards(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def contender(args: argparse.Namespace) -> Iterator[tuple[Any, Any, dict[str, Any], Any]]:
    """Load the model the way of one contender.

    Yields the model, a function for bytes read so far (or None), facts known after loading, and a
    function for facts known after the request (or None).
    """
    name, folder, budget = args.child, args.dir, args.budget_bytes
    facts: dict[str, Any] = {}
    if name in ("resident", "swap"):
        model = plain_model(folder)
        copy_to_memory(model, folder)
        if name == "resident":
            facts["peak_while_loading_bytes"] = reset_peak(args.cgroup)
        yield model, None, facts, None
    elif name == "plain":
        yield plain_model(folder), None, facts, None
    elif name == "accelerate":
        with tempfile.TemporaryDirectory(dir=args.scratch) as offload:
            model = plain_model(folder, device_map="auto", max_memory={"cpu": budget},
                                offload_folder=offload)  # fmt: skip
            places = getattr(model, "hf_device_map", {})
            facts["on_disk"] = sum(str(place) == "disk" for place in places.values())
            facts["in_memory"] = len(places) - facts["on_disk"]
            yield model, None, facts, None
    elif name == "prototype":
        from prototype_stream import Stream

        stream = Stream(folder, budget)
        facts["ring_bytes"] = stream.ring_bytes
        yield stream.model, lambda: stream.bytes_read, facts, None
    else:
        import omnimem.torch

        verify = "first" if name == "omnimem-first" else "always"
        folder = packed_folder(folder) if name == "omnimem-packed" else folder
        compression = COMPRESSION.get(name, "auto")
        model = omnimem.torch.load(folder, budget=budget, compression=compression, verify=verify)
        handle = model.omnimem
        plan = handle.plan()
        for field in ("weight_bytes", "resident_bytes", "packed_bytes", "ring_bytes",
                      "stream_bytes", "decode_bytes", "prefill_bytes", "seconds_per_pass",
                      "compression", "reason"):  # fmt: skip
            facts[f"plan_{field}"] = getattr(plan, field, None)

        def bytes_read() -> int:
            return int(handle.stats()["bytes_read"])

        def after() -> dict[str, Any]:
            return {"stats": {k: v for k, v in handle.stats().items()
                              if isinstance(v, (int, float, str, bool))}}  # fmt: skip

        yield model, bytes_read, facts, after
        handle.close()


def child(args: argparse.Namespace) -> None:
    """Run in the child: load, one request, report."""
    if args.child == "inputs":
        make_inputs(args.dir, args.inputs)
        report({})
        return
    import torch  # noqa: F401  the import is no part of the time to load
    import transformers  # noqa: F401

    started = time.perf_counter()
    with contender(args) as (model, bytes_read, facts, after):
        facts["load_s"] = time.perf_counter() - started
        result = request(model, args.inputs, args.tokens, bytes_read)
        report({**facts, **result, **(after() if after else {})})


# -- parent ----------------------------------------------------------------------------------------


class Shape:
    """What the checkpoint's headers say: all bytes, those that decoding uses, a decoder layer."""

    def __init__(self, folder: Path) -> None:
        found = tensors(folder)
        self.weights = sum(t.nbytes for t in found.values())
        self.decode = sum(t.nbytes for n, t in found.items() if ".visual." not in f".{n}")
        layers: dict[str, int] = {}
        for name, t in found.items():
            if ".layers." in name and ".visual." not in f".{name}":
                number = name.split(".layers.")[1].split(".")[0]
                layers[number] = layers.get(number, 0) + t.nbytes
        self.layer = max(layers.values(), default=0)

    def least_read(self, budget: int) -> int:
        """Bytes that one decode pass must read: what it uses - budget + a ring of two layers."""
        if budget >= self.weights:
            return 0
        return max(self.decode - budget + 2 * self.layer, 0)


def run_one(name: str, budget: int, args: argparse.Namespace, inputs: Path) -> dict[str, Any]:
    """Run one contender and return its record."""
    limit = None if name == "resident" else budget + int(args.headroom * 1e9)
    argv = ["--child", name, "--dir", str(args.dir), "--inputs", str(inputs), "--tokens",
            str(args.tokens), "--budget-bytes", str(budget), "--scratch",
            str(args.scratch)]  # fmt: skip
    with contextlib.ExitStack() as stack:
        if name == "swap":
            stack.enter_context(swap_file(args.scratch, 8 * HEADROOM))
        done = run_child(__file__, argv, limit=limit, swap=name == "swap", timeout=args.timeout)
    record = {"contender": name, "budget_bytes": budget, "limit_bytes": limit, **done.as_dict()}
    if done.result is None:
        console.print(f"    {name}: [red]{done.error}[/red]")
    else:
        per_token = median(done.result["decode_s"])
        console.print(f"    {name}: {fmt(per_token, 3)} s per token, first "
                      f"{done.result['ttft_s']:.2f} s, loaded in {done.result['load_s']:.1f} s, "
                      f"peak {(done.peak_bytes or 0) / GB:.2f} GB")  # fmt: skip
    return record


def keep_rounds(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mark and leave out the rounds whose resident baseline is over twice its median."""
    usual = median(resident_time(group) for group in groups)
    kept = []
    for group in groups:
        own = resident_time(group)
        group["left_out"] = own is not None and usual is not None and own > 2 * usual
        if not group["left_out"]:
            kept.append(group)
    return kept


def record_of(group: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the record of one contender in a round, whether it failed or not."""
    return next((r for r in group["records"] if r["contender"] == name), None)


def time_of(record: dict[str, Any] | None) -> float | None:
    """Median of a record's decode steps in seconds."""
    return median(record["result"]["decode_s"]) if record and record["result"] else None


def resident_time(group: dict[str, Any]) -> float | None:
    """Seconds per token of the round's resident baseline."""
    return time_of(record_of(group, "resident"))


def same_output(record: dict[str, Any], group: dict[str, Any]) -> bool | None:
    """Whether tokens and every logit equal the resident baseline's of the same round."""
    base = record_of(group, "resident")
    if not base or not base["result"] or not record["result"]:
        return None
    return all(record["result"][k] == base["result"][k] for k in ("tokens", "logits_sha256"))


def read_per_pass(steps: list[int | None]) -> float | None:
    """Mean bytes of a decode pass, without the first one, which may still learn the order.

    A mean, since what is fetched ahead may count in the step before the one that uses it.
    """
    known = [count for count in (steps[1:] or steps) if count is not None]
    return sum(known) / len(known) if known else None


def bound(record: dict[str, Any], group: dict[str, Any], least: int) -> float | None:
    """Seconds that a token takes at best: computing and decoding, or reading at fio's rate.

    Computing takes what the resident baseline of the round took. What has to be read and decoded is
    what omnimem planned; `least` for the others.
    """
    resident, fio, result = resident_time(group), group["fio_gb_s"], record["result"]
    planned = result.get("plan_stream_bytes")
    read = least if planned is None else planned
    if not resident or (read and not fio):
        return None
    rate = result.get("stats", {}).get("decode_bytes_per_second")
    decoding = result.get("plan_decode_bytes", 0) / rate if rate else 0.0
    return float(max(resident + decoding, read / GB / fio if fio else 0.0))


def packed_folder(folder: Path) -> Path:
    """Where the packed form of a checkpoint lies."""
    return folder.with_name(f"{folder.name}-packed")


def ensure_packed(folder: Path) -> None:
    """Pack the checkpoint, once."""
    out = packed_folder(folder)
    if not out.is_dir():
        console.print(f"packing {folder} to {out}")
        subprocess.run([sys.executable, "-m", "omnimem.cli", "pack", str(folder), str(out)],
                       check=True)  # fmt: skip


def summarise(groups: list[dict[str, Any]], names: list[str], shape: Shape) -> list[dict[str, Any]]:
    """Medians for each contender of one budget, over the rounds that count."""
    budget = groups[0]["budget_bytes"]
    least = shape.least_read(budget)
    kept = keep_rounds(groups)
    base_peak = median(r["peak_bytes"] for g in kept if (r := record_of(g, "resident")))
    allowed = None if base_peak is None else base_peak - shape.weights + 1.05 * budget
    times = {n: median(time_of(record_of(g, n)) for g in kept) for n in names}
    peers = [t for n, t in times.items() if n in PEERS and t is not None]
    rows = []
    for name in names:
        pairs = [(r, g) for g in kept if (r := record_of(g, name))]
        good = [(r, g) for r, g in pairs if r["result"]]
        own = times[name]
        ratios, gains = [], []
        for record, group in good:
            at_best, mine = bound(record, group, least), time_of(record)
            if at_best and mine:
                ratios.append(mine / at_best)
            off = time_of(record_of(group, "omnimem-off"))
            if off and mine:
                gains.append(off / mine)
        reads = [read_per_pass(r["result"]["bytes_decode"]) for r, _ in good]
        same = [same_output(r, g) for r, g in good]
        rows.append({
            "contender": name,
            "runs": len(good),
            "error": next((r["error"] for r, _ in pairs if r["error"]), None),
            "seconds_per_token": own,
            "ttft_s": median(r["result"]["ttft_s"] for r, _ in good),
            "load_s": median(r["result"]["load_s"] for r, _ in good),
            "best_peer_over_this": min(peers) / own if peers and own else None,
            "over_bound": median(ratios),
            "off_over_this": median(gains),
            "packed_bytes": median(r["result"].get("plan_packed_bytes") for r, _ in good),
            "decode_bytes": median(r["result"].get("plan_decode_bytes") for r, _ in good),
            "over_resident": own / times["resident"] if own and times.get("resident") else None,
            "identical": None if not same or None in same else all(same),
            "bytes_per_decode_pass": median(reads),
            "bytes_least": least,
            "peak_bytes": max((r["peak_bytes"] or 0 for r, _ in good), default=None),
            "peak_allowed_bytes": None if name == "resident" else allowed,
        })  # fmt: skip
    return rows


def show(share: float, groups: list[dict[str, Any]], rows: list[dict[str, Any]],
         shape: Shape, markdown: bool) -> None:  # fmt: skip
    """Print the table of one budget."""
    fio = median(g["fio_gb_s"] for g in groups if not g["left_out"])
    budget = groups[0]["budget_bytes"]
    out = sum(g["left_out"] for g in groups)
    title = (f"Budget {share:g} % of the weights: {budget / GB:.2f} GB "
             f"({len(groups) - out} rounds{f', {out} left out' if out else ''}; fio "
             f"{fmt(fio)} GB/s; a pass must read {shape.least_read(budget) / GB:.2f} GB)"
             )  # fmt: skip
    head = [
        "contender",
        "s/token",
        "first token",
        "load",
        "best peer / this",
        "off / this",
        "this / bound",
        "this / resident",
        "identical",
        "GB read per pass",
        "GB decoded",
        "peak GB (allowed)",
    ]
    cells = []
    for row in rows:
        if not row["runs"]:
            cells.append([row["contender"], "failed", *["-"] * (len(head) - 2)])
            continue
        read, peak, decoded = row["bytes_per_decode_pass"], row["peak_bytes"], row["decode_bytes"]
        allowed = row["peak_allowed_bytes"]
        same = {True: "yes", False: "NO", None: "-"}[row["identical"]]
        cells.append([
            row["contender"], fmt(row["seconds_per_token"], 3), fmt(row["ttft_s"], 2, " s"),
            fmt(row["load_s"], 1, " s"), fmt(row["best_peer_over_this"]),
            fmt(row["off_over_this"]), fmt(row["over_bound"]), fmt(row["over_resident"], 3), same,
            "-" if read is None else f"{read / GB:.3f}",
            "-" if decoded is None else f"{decoded / GB:.2f}",
            fmt(peak / GB if peak else None) + (f" ({allowed / GB:.2f})" if allowed else ""),
        ])  # fmt: skip
    show_table(title, head, cells, markdown=markdown)
    for row in rows:
        if row["error"]:
            print(f"\n{row['contender']} failed in a round: {row['error']}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=default_folder(), help="model folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budgets", default="75,50,25,100", help="per cent of the weights")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated")
    parser.add_argument(
        "--headroom", type=float, default=HEADROOM / 1e9, help="GB of the limit above the budget"
    )
    parser.add_argument("--with-swap", action="store_true", help="also the kernel's swap file")
    parser.add_argument("--tokens", type=int, default=8, help="decode steps after the first token")
    parser.add_argument("--json", type=Path, help="write every number and the machine's facts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one child")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cgroup", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--budget-bytes", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    """Run the rounds; returns 1 when some output of omnimem differs or one of its runs failed."""
    args = parse()
    if args.child:
        child(args)
        return 0
    if refusal := cgroup_refusal():
        raise BenchError(f"{refusal}; every contender has to run under one limit")
    drop_caches()
    names = args.contenders.split(",")
    names += ["swap"] if args.with_swap and "swap" not in names else []
    if unknown := sorted(set(names) - {*CONTENDERS, "swap"}):
        raise BenchError(f"unknown contenders {', '.join(unknown)}; known: {', '.join(CONTENDERS)}")
    ensure_model(args.dir)
    if "omnimem-packed" in names:
        ensure_packed(args.dir)
    shape = Shape(args.dir)
    shard = max(shards(args.dir), key=lambda path: path.stat().st_size)
    shares = [float(part) for part in args.budgets.split(",")]
    groups: dict[float, list[dict[str, Any]]] = {share: [] for share in shares}
    data: dict[str, Any] = {
        "benchmark": "qwen3vl_budget", "machine": machine_facts(args.dir), "weights": shape.weights,
        "decode_bytes": shape.decode, "layer_bytes": shape.layer, "tokens": args.tokens,
        "argv": sys.argv[1:], "rounds": [], "summary": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.npz"
        made = run_child(__file__, ["--child", "inputs", "--dir", str(args.dir), "--inputs",
                                    str(inputs)], cgroup=False)  # fmt: skip
        if made.result is None:
            raise BenchError(f"could not make the inputs: {made.error}")
        for number in range(args.rounds):
            for share in shares:
                budget = int(shape.weights * share / 100)
                console.print(f"round {number + 1} of {args.rounds}, budget {share:g} %")
                fio = [fio_read(shard, 2 * HEADROOM)]
                records = [run_one(n, budget, args, inputs) for n in rotated(names, number)]
                fio.append(fio_read(shard, 2 * HEADROOM))
                known = [speed for speed in fio if speed]
                group = {"round": number, "share": share, "budget_bytes": budget, "fio": fio,
                         "fio_gb_s": sum(known) / len(known) if known else None,
                         "records": records}  # fmt: skip
                console.print(f"    fio: {', '.join(fmt(speed) for speed in fio)} GB/s")
                groups[share].append(group)
                data["rounds"].append(group)
                write_json(args.json, data)
    failed = False
    for share in shares:
        rows = summarise(groups[share], names, shape)
        data["summary"][f"{share:g}"] = rows
        show(share, groups[share], rows, shape, args.markdown)
        ours = [row for row in rows if row["contender"].startswith("omnimem")]
        failed |= any(row["error"] or row["identical"] is False for row in ours)
    write_json(args.json, data)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as problem:
        console.print(f"[red]{problem}[/red]")
        sys.exit(1)
