"""What do the monitor, and the management of models that are wholly in memory, cost?

- sample: microseconds of one look at memory; the share of a CPU, and how often a second they wake,
  of the monitor's and all other threads when nothing runs, at the default interval of 1 s.
- token: a small decoder (240 MB of float32) in one process: plain; managed by
  AdvancedMemoryManager and wholly in memory; and bare, without hooks on the same memory as the
  managed one, since where weights lie changes their products' speed. Token by token in turns, in
  blocks with the monitor off and on; ratios are taken within a round, for each number of threads.
- instructions (`--instructions`): of a token of a tiny decoder, by the thread that computes it;
  callgrind counts, so that neither other processes nor caches have a part. Garbage collection is
  off meanwhile, since it comes when it likes.

Whatever is answered has to equal plain's, bit for bit, or the exit status is 1. Needs torch and
transformers, neither root nor a model; for the instructions also valgrind.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    BenchError,
    console,
    fmt,
    machine_facts,
    median,
    rotated,
    show_table,
    write_json,
)

SIZES = {
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 14,
              "vocab_size": 8192},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,
             "vocab_size": 256},
}  # fmt: skip
SIDES = ("plain", "bare", "managed")
MONITOR = "omnimem-monitor"


class Decoders:
    """The same decoder twice, one of them managed; the monitor is off."""

    def __init__(self, size: str) -> None:
        import torch
        import transformers

        import omnimem

        self.torch = torch
        config = transformers.Qwen3Config(
            **SIZES[size], num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True
        )
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        self.models = {side: transformers.Qwen3ForCausalLM(config).eval() for side in SIDES}
        self.models["managed"].load_state_dict(self.models["plain"].state_dict())
        self.nbytes = sum(p.numel() * p.element_size() for p in self.models["plain"].parameters())
        self.manager = omnimem.AdvancedMemoryManager(
            omnimem.AdvancedMemoryConfig(budget=2 * self.nbytes + (64 << 20))
        )
        self.monitor = self.manager.memory_monitor
        self.monitor.stop_monitoring()
        self.manager.attach(self.models["managed"])
        self.ids = torch.tensor([[11]])
        self.token("managed")  # brings its weights to memory, where they stay
        managed = dict(self.models["managed"].named_parameters())
        for name, param in self.models["bare"].named_parameters():
            param.data = managed[name].data
        answers = [self.token(side) for side in SIDES]
        self.identical = all(torch.equal(answers[0], answer) for answer in answers)
        self.resident = self.models["managed"].omnimem.plan().state == "resident"

    def token(self, side: str) -> Any:
        """Logits of one token."""
        return self.models[side](input_ids=self.ids, use_cache=False).logits

    def pairs(self, tokens: int, number: int) -> dict[str, list[float]]:
        """Milliseconds of tokens of each side, in turns."""
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for turn in range(tokens):
            for side in rotated(SIDES, number + turn):
                started = time.perf_counter()
                self.token(side)
                times[side].append((time.perf_counter() - started) * 1e3)
        return times


# -- one sample, and an idle monitor ---------------------------------------------------------------


def threads_now() -> dict[str, tuple[str, int, int]]:
    """Of each thread of this process: its name, ns of CPU, and how often it went to sleep."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        cpu = int((task / "schedstat").read_text().split()[0])
        found[task.name] = status["Name"], cpu, int(status["voluntary_ctxt_switches"])
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    return {task: (names.get(task, each[0]), *each[1:]) for task, each in found.items()}


def measure_samples(decoders: Decoders, args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of a sample, wall and CPU; what an idle process does at an interval of 1 s."""
    core = decoders.monitor._core
    wall, cpu = [], []
    for _ in range(args.samples):
        started, busy = time.perf_counter(), time.thread_time()
        core.sample()
        cpu.append((time.thread_time() - busy) * 1e6)
        wall.append((time.perf_counter() - started) * 1e6)
    decoders.monitor.start_monitoring()
    time.sleep(1.5)  # the thread is there, and its first sample is taken
    started = time.perf_counter()
    before, process = threads_now(), time.process_time()
    first = core.report()["number"]
    time.sleep(args.idle)
    process = time.process_time() - process
    passed = time.perf_counter() - started
    threads = [
        {"name": name, "share": (cpu - before[task][1]) / 1e9 / passed,
         "wakeups_per_s": (sleeps - before[task][2]) / passed}
        for task, (name, cpu, sleeps) in threads_now().items()
        if task in before and sleeps > before[task][2]
    ]  # fmt: skip
    taken = core.report()["number"] - first
    decoders.monitor.stop_monitoring()
    return {"wall_us": wall, "cpu_us": cpu, "idle_s": passed, "samples": taken,
            "thread_share": sum(each["share"] for each in threads if each["name"] == MONITOR),
            "process_share": process / passed, "threads": threads}  # fmt: skip


def show_samples(found: dict[str, Any], markdown: bool) -> None:
    """Print what a sample costs."""
    rows = [
        ["a sample, wall us", fmt(median(found["wall_us"]), 1)],
        ["a sample, CPU us", fmt(median(found["cpu_us"]), 1)],
        [f"idle for {found['idle_s']:.0f} s ({found['samples']} samples): the monitor's thread",
         f"{100 * found['thread_share']:.4f} % of a CPU"],
        ["the whole process meanwhile", f"{100 * found['process_share']:.4f} % of a CPU"],
    ]  # fmt: skip
    show_table("The monitor", ["what", "cost"], rows, markdown=markdown)
    rows = [
        [each["name"], f"{100 * each['share']:.4f}", f"{each['wakeups_per_s']:.2f}"]
        for each in found["threads"]
    ]
    show_table(
        "Threads of the idle process", ["thread", "% of a CPU", "wakeups a second"], rows,
        markdown=markdown,
    )  # fmt: skip


# -- tokens ----------------------------------------------------------------------------------------


def measure_tokens(decoders: Decoders, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of tokens with the monitor off and on, in an order that changes."""
    decoders.torch.set_num_threads(threads)
    decoders.pairs(2, 0)
    rounds: list[dict[str, Any]] = []
    deadline = time.perf_counter() + args.seconds
    for number in range(args.rounds):
        if rounds and time.perf_counter() > deadline:
            break
        blocks = {}
        for watched in rotated([False, True], number):
            if watched:
                decoders.monitor.start_monitoring()
            blocks["on" if watched else "off"] = decoders.pairs(args.tokens, number)
            decoders.monitor.stop_monitoring()
        rounds.append(blocks)
    return {"threads": threads, "rounds": rounds}


def ratio(rounds: list[Any], of: tuple[str, str], to: tuple[str, str]) -> float | None:
    """Median over the rounds of what a block's median token takes beside another's."""
    return median(
        median(blocks[of[0]][of[1]]) / median(blocks[to[0]][to[1]]) for blocks in rounds
    )  # fmt: skip


def relative(rounds: list[Any], number: str) -> float | None:
    """Managed beside bare, each token beside its neighbour: median over all pairs."""
    return median(
        ours / bare
        for blocks in rounds
        for bare, ours in zip(blocks[number]["bare"], blocks[number]["managed"], strict=True)
    )


def show_tokens(decoders: Decoders, found: list[dict[str, Any]], markdown: bool) -> None:
    """Print the medians and ratios."""
    rows = []
    for each in found:
        rounds = each["rounds"]
        for state in ("off", "on"):
            plain, bare, ours = (
                median(t for blocks in rounds for t in blocks[state][side]) for side in SIDES
            )
            rows.append([
                str(each["threads"]), str(len(rounds)), state,
                fmt(plain, 2), fmt(bare, 2), fmt(ours, 2),
                fmt(ratio(rounds, (state, "managed"), (state, "plain")), 4),
                fmt(relative(rounds, state), 4),
                fmt(ratio(rounds, ("on", "plain"), ("off", "plain")), 4) if state == "on" else "",
                fmt(ratio(rounds, ("on", "managed"), ("off", "managed")), 4)
                if state == "on" else "",
            ])  # fmt: skip
    show_table(
        f"A token of a decoder, {decoders.nbytes / 1e6:.0f} MB, wholly in memory",
        ["threads", "rounds", "monitor", "plain ms", "bare ms", "managed ms", "managed / plain",
         "managed / bare",
         "plain, on / off", "managed, on / off"],
        rows, markdown=markdown,
    )  # fmt: skip


# -- instructions ----------------------------------------------------------------------------------


def control(*words: str) -> None:
    """Tell callgrind, which runs this process."""
    command = ["callgrind_control", *words, str(os.getpid())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-200:]}")


def count_here(passes: int) -> None:
    """Under callgrind: have it dump, for each case, a block of one call and one of more."""
    decoders = Decoders("tiny")
    decoders.torch.set_num_threads(1)
    managed = decoders.models["managed"]
    core = decoders.monitor._core
    cases: list[tuple[Callable[[], Any], bool]] = [
        (lambda: decoders.token("plain"), False),
        (lambda: decoders.token("managed"), False),
        (lambda: decoders.token("managed"), True),
        (core.sample, False),
    ]
    gc.collect()
    gc.disable()
    for call, watched in cases:
        if watched:
            decoders.monitor.start_monitoring()
        call()
        for calls in (1, 1 + passes):
            control("-z")
            control("-i", "on")
            for _ in range(calls):
                call()
            control("-i", "off")
            control("-d")
        decoders.monitor.stop_monitoring()
    print(len(managed.omnimem._entry.movable._units.modules), flush=True)
    os._exit(0)


def measure_instructions(args: argparse.Namespace) -> dict[str, Any]:
    """Instructions of a token, and of a sample, of the thread that asks for it."""
    if shutil.which("valgrind") is None:
        raise BenchError("valgrind counts the instructions, and is not installed")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--separate-threads=yes",
                   f"--callgrind-out-file={out}", sys.executable, __file__, "--count",
                   str(args.passes)]  # fmt: skip
        # With io_uring it hung, it seems in the ring's blocking wait, during which valgrind lets no
        # other thread run: inferred, not traced.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "OMNIMEM_IO": "threads"}
        done = subprocess.run(command, capture_output=True, text=True, env=env,
                              timeout=args.timeout)  # fmt: skip
        if done.returncode:
            raise BenchError(f"callgrind: {done.stderr.strip()[-300:]}")
        # Dumps are numbered from 1; -01 is of the main thread.
        counts = [total_of(Path(f"{out}.{number}-01")) for number in range(1, 9)]
    names = ("plain", "managed", "managed, monitor on", "a sample")
    found = {
        name: (counts[2 * at + 1] - counts[2 * at]) / args.passes for at, name in enumerate(names)
    }
    return {"instructions": found, "units": int(done.stdout.split()[-1])}


def total_of(dump: Path) -> int:
    """Instructions of a thread in one of callgrind's dumps."""
    for line in dump.read_text().splitlines():
        if line.startswith(("summary:", "totals:")) and int(line.split()[1]):
            return int(line.split()[1])
    raise BenchError(f"callgrind counted nothing in {dump.name}")


def show_instructions(found: dict[str, Any], markdown: bool) -> None:
    """Print what was counted."""
    counts = found["instructions"]
    plain = counts["plain"]
    rows = [[name, f"{count:,.0f}", f"{count - plain:+,.0f}" if name.startswith("managed") else "",
             f"{(count - plain) / found['units']:+,.0f}" if name.startswith("managed") else ""]
            for name, count in counts.items()]  # fmt: skip
    show_table(f"Instructions of a token, tiny decoder of {found['units']} units (callgrind)",
               ["case", "instructions", "beside plain", "a unit"],
               rows, markdown=markdown)  # fmt: skip


# -- the command line ------------------------------------------------------------------------------


def main() -> int:
    """Measure, and print the tables; returns 1 when an output differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--seconds", type=float, default=25.0, help="a number of threads begins no round after"
    )
    parser.add_argument("--tokens", type=int, default=5, help="of each side, in a block")
    parser.add_argument("--threads", default="1,2", help="comma-separated")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--idle", type=float, default=10.0, help="seconds")
    parser.add_argument("--instructions", action="store_true", help="also count instructions")
    parser.add_argument("--passes", type=int, default=10, help="tokens under callgrind")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds under callgrind")
    parser.add_argument("--json", type=Path, help="write every number and the machine's facts")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        count_here(args.count)
    try:
        decoders = Decoders("small")
    except (ImportError, AttributeError) as error:
        raise BenchError(f"this needs omnimem, torch and transformers: {error}") from error
    data: dict[str, Any] = {"benchmark": "monitor", "machine": machine_facts(),
                            "argv": sys.argv[1:], "identical": decoders.identical}  # fmt: skip
    data["samples"] = measure_samples(decoders, args)
    show_samples(data["samples"], args.markdown)
    data["tokens"] = []
    for threads in map(int, args.threads.split(",")):
        data["tokens"].append(measure_tokens(decoders, threads, args))
    show_tokens(decoders, data["tokens"], args.markdown)
    if not (decoders.identical and decoders.resident):
        console.print("[red]the managed model's answer differs, or it is not in memory[/red]")
    decoders.manager.cleanup()
    if args.instructions:
        data["instructions"] = measure_instructions(args)
        show_instructions(data["instructions"], args.markdown)
    write_json(args.json, data)
    return int(not (decoders.identical and decoders.resident))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as problem:
        console.print(f"[red]{problem}[/red]")
        sys.exit(1)
