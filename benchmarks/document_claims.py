"""What the architecture document expects of memory management, measured on a real pipeline.

"Memory efficiency: 20-40 % reduction in peak memory. Throughput: 15-30 % improvement for
memory-constrained workloads. Latency: minimal impact (<5 %) for cached models." The pipeline is two
multimodal models and a diffusion transformer, 3 GB of weights on a CPU (`claims_pipeline.py`):

- peak: one model is used at a time, in bursts; the budget holds the largest one. The peak beside
  that of plain torch with everything resident, and the throughput that is left.
- short: requests alternate, A B C A B C; the cgroup's limit, the same for all, is 60 % of the
  weights + what the process needs besides its weights. Throughput beside the best of the peers.
- latency: everything fits; plain and managed models in one process, in turns.

Each contender is a fresh process in its own memory cgroup on a cold page cache; rounds in turn.
Whatever a contender answers has to equal plain's, bit for bit, or the exit status is 1.

Needs root, cgroup v1 with the memory controller, fio, torch, transformers, diffusers, accelerate.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import (
    GB,
    BenchError,
    cgroup_refusal,
    console,
    drop_caches,
    fio_read,
    fmt,
    machine_facts,
    median,
    report,
    rotated,
    run_child,
    shards,
    show_table,
    swap_file,
    weights,
    write_json,
)

FOLDERS = {"A": "qwen3-vl", "B": "gemma3", "C": "pixart"}
PEERS = ("mmap", "accelerate", "swap")
OURS = ("omnimem", "omnimem-static")
CLAIMS = ("peak", "short", "latency")
SHORT = 0.6
SLACK = 0.05  # of the share above: what omnimem needs for its own, beside the weights


# -- parent: running -------------------------------------------------------------------------------


def least_read(sizes: dict[str, int], budget: int) -> float:
    """Bytes that a request must read on average when models alternate, with the best eviction.

    The model in use has to be in memory whole, since it is used many times. What is left of the
    budget holds parts of the others, and over a cycle it serves each byte of it once.
    """
    total, largest = sum(sizes.values()), max(sizes.values())
    kept = min(max((budget - largest) / (total - largest), 0.0), 1.0)
    return (1 - kept) * total / len(sizes)


def run_one(
    name: str, args: argparse.Namespace, schedule: str, budget: int, limit: int | None
) -> dict[str, Any]:
    """Run one contender and return its record."""
    if name in OURS and limit is not None:
        budget -= int(SLACK * budget)
    argv = ["--child", name, "--dir", str(args.dir), "--scale", args.scale, "--schedule", schedule,
            "--budget-bytes", str(budget), "--patience", str(args.patience)]  # fmt: skip
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=args.scratch))
        if name == "swap":
            stack.enter_context(swap_file(args.scratch, 2 * args.total + 2 * 10**9))
        done = run_child(__file__, [*argv, "--scratch", scratch], limit=limit,
                         swap=name == "swap", timeout=args.timeout)  # fmt: skip
    record = {"contender": name, "schedule": schedule, "budget_bytes": budget,
              "limit_bytes": limit, **done.as_dict()}  # fmt: skip
    if done.result is None:
        console.print(f"    {name}: [red]{done.error}[/red]")
        return record
    found = done.result
    took = " ".join(f"{kind} {fmt(median(times_of(record, kind)))}" for kind in FOLDERS)
    stopped = f", stopped at {found['stopped']}" if "stopped" in found else ""
    console.print(f"    {name}: {fmt(rate(record), 3)} requests/s ({took} s), loaded in "
                  f"{found['load_s']:.1f} s, answered {len(found['requests'])}{stopped}"
                  )  # fmt: skip
    return record


def counted(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The requests that count: all but the first to each model."""
    found = record["result"]["requests"] if record["result"] else []
    return list(found[len(FOLDERS) :])


def times_of(record: dict[str, Any], kind: str) -> list[float]:
    """Seconds of the requests to one model that count."""
    return [r["s"] for r in counted(record) if r["kind"] == kind]


def rate(record: dict[str, Any] | None) -> float | None:
    """Requests per second; for one that was stopped, the most that it can have been."""
    if record is None or not record["result"]:
        return None
    found = counted(record)
    seconds = sum(r["s"] for r in found)
    stopped = record["result"].get("stopped")
    if stopped:
        return (len(found) + 1) / (seconds + stopped["after_s"])
    return len(found) / seconds if found else None


def identical(record: dict[str, Any], base: dict[str, Any]) -> bool | None:
    """Whether all that was answered equals plain's, as far as both got."""
    if not record["result"] or not base["result"]:
        return None
    pairs = zip(record["result"]["requests"], base["result"]["requests"], strict=False)
    return all(a["digest"] == b["digest"] for a, b in pairs)


def peaks(record: dict[str, Any]) -> dict[str, int]:
    """Peaks while serving: of the cgroup without the page cache it held at the end; of RSS."""
    found = record["result"]["serving"]
    return {"cgroup": found["cgroup_peak"] - found["cgroup_cache"], "rss": found["VmHWM"]}


# -- parent: the three claims ----------------------------------------------------------------------


def claim_rounds(
    claim: str, args: argparse.Namespace, names: list[str], schedule: str, budget: int,
    limit: int | None, data: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Run plain without a limit and each contender under it, in an order that moves each round."""
    shard = max((s for f in args.folders.values() for s in shards(f)),
                key=lambda path: path.stat().st_size)  # fmt: skip
    groups = []
    for number in range(args.rounds):
        under = "no limit" if limit is None else f"limit {limit / GB:.2f} GB"
        console.print(f"{claim}: round {number + 1} of {args.rounds}, budget {budget / GB:.2f} GB, "
                      f"{under}, {schedule}")  # fmt: skip
        disk = [fio_read(shard, 10**9)]
        records = {
            name: run_one(name, args, schedule, budget, None if name == "plain" else limit)
            for name in rotated(["plain", *names], number)
        }
        disk.append(fio_read(shard, 10**9))
        known = [speed for speed in disk if speed]
        groups.append({"claim": claim, "round": number, "records": records, "fio": disk,
                       "fio_gb_s": sum(known) / len(known) if known else None})  # fmt: skip
        data["rounds"].append(groups[-1])
        write_json(args.json, data)
    return groups


def summarise(groups: list[dict[str, Any]], names: list[str], least: float) -> list[dict[str, Any]]:
    """Medians for each contender over the rounds; ratios are taken within a round."""
    rows = []
    for name in names:
        pairs = [(g["records"][name], g) for g in groups]
        good = [(r, g) for r, g in pairs if r["result"]]
        same = [identical(r, g["records"]["plain"]) for r, g in good]
        of_plain, bounds = [], []
        for record, group in good:
            own, base = rate(record), rate(group["records"]["plain"])
            if own and base:
                of_plain.append(own / base)
            if base and group["fio_gb_s"]:
                bounds.append(1 / max(1 / base, least / GB / group["fio_gb_s"]))
        reads = [r["read"] for record, _ in good for r in counted(record)]
        rows.append({
            "contender": name,
            "runs": len(good),
            "error": next((r["error"] for r, _ in pairs if r["error"]), None),
            "stopped": next((r["result"]["stopped"] for r, _ in good if "stopped" in r["result"]),
                            None),
            "requests_per_s": median(rate(r) for r, _ in good),
            "of_plain": median(of_plain),
            "at_best_per_s": median(bounds),
            "seconds": {kind: median(median(times_of(r, kind)) for r, _ in good)
                        for kind in FOLDERS},
            "load_s": median(r["result"]["load_s"] for r, _ in good),
            "read_per_request": sum(reads) / len(reads) if reads else None,
            "peak_cgroup": max((peaks(r)["cgroup"] for r, _ in good if "serving" in r["result"]),
                               default=None),
            "peak_rss": max((peaks(r)["rss"] for r, _ in good if "serving" in r["result"]),
                            default=None),
            "identical": all(same) if same and None not in same else None,
        })  # fmt: skip
    return rows


def show_details(title: str, rows: list[dict[str, Any]], markdown: bool) -> None:
    """Print one claim's table of contenders."""
    head = ["contender", "requests/s", "of plain", "at best", "A s", "B s", "C s", "load",
            "GB read per request", "peak GB", "VmHWM GB", "identical"]  # fmt: skip
    cells = []
    for row in rows:
        if not row["runs"]:
            cells.append([row["contender"], "failed", *["-"] * (len(head) - 2)])
            continue
        most = "< " if row["stopped"] else ""
        read, cgroup, rss = row["read_per_request"], row["peak_cgroup"], row["peak_rss"]
        cells.append([
            row["contender"], most + fmt(row["requests_per_s"], 3), most + fmt(row["of_plain"]),
            fmt(row["at_best_per_s"], 3), *(fmt(row["seconds"][kind]) for kind in FOLDERS),
            fmt(row["load_s"], 1, " s"), "-" if read is None else f"{read / GB:.3f}",
            fmt(cgroup / GB if cgroup else None), fmt(rss / GB if rss else None),
            {True: "yes", False: "NO", None: "-"}[row["identical"]],
        ])  # fmt: skip
    show_table(title, head, cells, markdown=markdown)
    for row in rows:
        if row["error"]:
            print(f"\n{row['contender']} failed in a round: {row['error']}")
        if row["stopped"]:
            print(f"\n{row['contender']} was stopped: a request to {row['stopped']['kind']} took "
                  f"> {row['stopped']['after_s']:.0f} s")  # fmt: skip


def row_of(rows: Iterable[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of one contender."""
    return next(row for row in rows if row["contender"] == name)


def claim_peak(args: argparse.Namespace, data: dict[str, Any]) -> tuple[list[str], bool]:
    """One model at a time: how much lower is the peak, and what throughput is left?"""
    burst = "".join(kind * args.burst for kind in FOLDERS)
    budget = int(max(args.sizes.values()) * 1.02)
    groups = claim_rounds("peak", args, [args.ours], "ABC" + burst, budget, None, data)
    names = ["plain", args.ours]
    rows = summarise(groups, names, sum(args.sizes.values()) / (len(FOLDERS) * args.burst))
    data["summary"]["peak"] = rows
    show_details(f"One model at a time, {args.burst} requests each; budget {budget / GB:.2f} GB of "
                 f"{args.total / GB:.2f} GB", rows, args.markdown)  # fmt: skip
    plain, ours = row_of(rows, "plain"), row_of(rows, args.ours)
    cells = ["20 to 40 % less peak memory", "-", "-"]
    if ours["peak_rss"] and plain["peak_rss"]:
        # The worse of both ways to count.
        share = max(ours[key] / plain[key] for key in ("peak_cgroup", "peak_rss"))
        key = max(("peak_cgroup", "peak_rss"), key=lambda k: ours[k] / plain[k])
        cells[1] = (f"{ours[key] / GB:.2f} GB beside {plain[key] / GB:.2f} GB, at "
                    f"{fmt(ours['of_plain'])} of the throughput")  # fmt: skip
        cells[2] = f"{100 * (1 - share):.0f} % less"
    return cells, failed(rows)


def claim_short(args: argparse.Namespace, data: dict[str, Any]) -> tuple[list[str], bool]:
    """Memory is short and the models alternate: throughput beside the best peer."""
    budget = int(SHORT * args.total)
    first = run_one("plain", args, "ABC" * 2, 0, None)
    if not first["result"]:
        raise BenchError(f"plain failed, so no limit can be set: {first['error']}")
    serving = first["result"]["serving"]
    base = serving["VmHWM"] - args.total  # anonymous memory and the libraries that it maps
    limit = base + budget
    data["baseline"], data["short_limit"] = base, limit
    schedule = "ABC" * (args.cycles + 1)
    others = list(dict.fromkeys([*args.contenders, args.ours]))
    groups = claim_rounds("short", args, others, schedule, budget, limit, data)
    least = least_read(args.sizes, budget)
    rows = summarise(groups, ["plain", *others], least)
    data["summary"]["short"] = rows
    show_details(f"Alternating; limit {limit / GB:.2f} GB = {base / GB:.2f} GB + "
                 f"{100 * SHORT:.0f} % of {args.total / GB:.2f} GB "
                 f"(a request must read {least / GB:.2f} GB)", rows, args.markdown)  # fmt: skip
    own = row_of(rows, args.ours)["requests_per_s"]
    rates = {row["contender"]: row["requests_per_s"] for row in rows
             if row["contender"] in PEERS and row["requests_per_s"]}  # fmt: skip
    cells = ["15 to 30 % more throughput when memory is short", "-", "-"]
    if own and rates:
        best = max(rates, key=lambda name: rates[name])
        ratios = [rate(g["records"][args.ours]) / max(rate(g["records"][n]) or 0 for n in rates)
                  for g in groups if rate(g["records"][args.ours])]  # fmt: skip
        cells[1] = f"{own:.3f} requests/s beside {rates[best]:.3f} of {best}"
        cells[2] = f"{median(ratios):.2f} x"
    return cells, failed(rows)


def claim_latency(args: argparse.Namespace, data: dict[str, Any]) -> tuple[list[str], bool]:
    """Everything fits: seconds per step beside plain."""
    argv = ["--child", "latency", "--contender", args.ours, "--dir", str(args.dir), "--scale",
            args.scale, "--budget-bytes", str(int(args.total * 1.05)), "--repeats",
            str(args.repeats), "--scratch", str(args.scratch)]  # fmt: skip
    runs = []
    for number in range(args.rounds):
        console.print(f"latency: round {number + 1} of {args.rounds}")
        done = run_child(__file__, argv, cgroup=False, timeout=args.timeout)
        runs.append(done.as_dict())
        if done.result is None:
            console.print(f"    [red]{done.error}[/red]")
    data["latency"] = runs
    good = [run["result"] for run in runs if run["result"]]
    rows, ratios = [], []
    for kind in FOLDERS:
        # The first step of a request to A and B is the prefill; decode steps count.
        pick = slice(None) if kind == "C" else slice(1, None)
        times = {side: [s for run in good for steps in run["steps"][side][kind]
                        for s in steps[pick]] for side in ("plain", "ours")}  # fmt: skip
        pairs = [median(b[pick]) / median(a[pick]) for run in good
                 for a, b in zip(run["steps"]["plain"][kind], run["steps"]["ours"][kind],
                                 strict=True)]  # fmt: skip
        plain, ours = median(times["plain"]), median(times["ours"])
        rows.append([FOLDERS[kind], fmt(plain, 4), fmt(ours, 4),
                     fmt(ours / plain if ours and plain else None, 4), fmt(median(pairs), 4),
                     str(len(pairs))])  # fmt: skip
        ratios.append(median(pairs))
    show_table("Everything fits: seconds per step", ["model", "plain", args.ours, "ratio",
               "ratio within a turn", "turns"], rows, markdown=args.markdown)  # fmt: skip
    worst = max((r for r in ratios if r), default=None)
    data["summary"]["latency"] = {"rows": rows, "worst": worst}
    cells = ["< 5 % latency for cached models", "-", "-"]
    if worst:
        cells[1] = f"at worst {100 * (worst - 1):+.2f} % per step"
        cells[2] = f"{worst:.4f}"
    bad = any(run["result"] is None or not run["result"]["identical"] for run in runs)
    return cells, bad


def failed(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether an output differed, or one of ours did not get to its end."""
    return any(row["identical"] is False or (row["contender"] in ("plain", *OURS)
               and (row["error"] or row["stopped"])) for row in rows)  # fmt: skip


# -- the command line ------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    place = Path(__file__).parent.parent / "build" / "bench" / "claims"
    parser.add_argument("--dir", type=Path, default=place, help="the checkpoints, made once")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="smaller models, one round")
    parser.add_argument("--claims", default=",".join(CLAIMS), help="comma-separated")
    parser.add_argument("--contenders", default=",".join((*PEERS, "omnimem-static")),
                        help="of the second claim, besides plain and ours")  # fmt: skip
    parser.add_argument("--ours", choices=OURS, help="what stands for omnimem")
    parser.add_argument("--cycles", type=int, default=4, help="A B C of the second claim")
    parser.add_argument("--burst", type=int, default=8, help="requests in a row of the first")
    parser.add_argument("--repeats", type=int, default=10, help="turns of the third")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for one request")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one child")
    parser.add_argument("--json", type=Path, help="write every number and the machine's facts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--cgroup", help=argparse.SUPPRESS)
    parser.add_argument("--scale", default="full", help=argparse.SUPPRESS)
    parser.add_argument("--schedule", help=argparse.SUPPRESS)
    parser.add_argument("--budget-bytes", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.scale, args.cycles, args.burst, args.repeats = "quick", 2, 4, 3
    args.rounds = args.rounds or (1 if args.quick else 3)
    return args


def prepare(args: argparse.Namespace) -> None:
    """Check the words and the machine, and make the checkpoints."""
    if refusal := cgroup_refusal():
        raise BenchError(f"{refusal}; every contender has to run under one limit")
    drop_caches()
    args.contenders = [name for name in args.contenders.split(",") if name]
    args.claims = args.claims.split(",")
    for words, known in ((args.contenders, (*PEERS, *OURS)), (args.claims, CLAIMS)):
        if unknown := sorted(set(words) - set(known)):
            raise BenchError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if "swap" in args.contenders and shutil.which("mkswap") is None:
        raise BenchError("mkswap is missing; leave swap out of --contenders")
    args.dir = args.dir / args.scale
    args.dir.mkdir(parents=True, exist_ok=True)
    made = run_child(__file__, ["--child", "make", "--dir", str(args.dir), "--scale", args.scale],
                     cgroup=False)  # fmt: skip
    if made.result is None:
        raise BenchError(f"could not make the checkpoints: {made.error}")
    args.ours = args.ours or made.result["ours"]
    args.folders = {kind: args.dir / name for kind, name in FOLDERS.items()}
    args.sizes = {kind: weights(folder) for kind, folder in args.folders.items()}
    args.total = sum(args.sizes.values())


def child(args: argparse.Namespace) -> None:
    """Run in the child."""
    import claims_pipeline as pipeline

    if args.child == "make":
        import omnimem

        pipeline.make(args.dir, pipeline.SCALES[args.scale])
        managed = hasattr(omnimem, "AdvancedMemoryManager")
        report({"ours": "omnimem" if managed else "omnimem-static"})
    elif args.child == "latency":
        pipeline.latency(args)
    else:
        pipeline.serve(args)


def main() -> int:
    """Run the claims; returns 1 when an output differs or one of our runs failed."""
    args = parse()
    if args.child:
        child(args)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a swap file goes, too
    prepare(args)
    data: dict[str, Any] = {
        "benchmark": "document_claims", "machine": machine_facts(args.dir), "argv": sys.argv[1:],
        "weights": args.sizes, "rounds": [], "summary": {},
    }  # fmt: skip
    measure = {"peak": claim_peak, "short": claim_short, "latency": claim_latency}
    promises, bad = [], False
    for claim in args.claims:
        cells, broken = measure[claim](args, data)
        promises.append(cells)
        bad |= broken
        write_json(args.json, data)
    data["promises"] = promises
    show_table("What the document expects", ["the document's promise", f"ours ({args.ours})",
               "ratio"], promises, markdown=args.markdown)  # fmt: skip
    write_json(args.json, data)
    return int(bad)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as problem:
        console.print(f"[red]{problem}[/red]")
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("[red]interrupted[/red]")
        sys.exit(130)
