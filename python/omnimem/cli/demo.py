"""``omnimem demo``: one answer from plain transformers and in half the memory, side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from omnimem import checkpoint
from omnimem.cli._common import parse_budget, show_seconds, show_size
from omnimem.cli.synth import write_with_bar
from omnimem.errors import Error
from omnimem.synth import PRESETS, is_complete

PROMPT = "What is in this picture? Answer in one sentence."
TOKENS = 8
_TIME_LIMIT = 1800.0
_PICTURE_MODELS = [name for name, preset in PRESETS.items() if preset.vision is not None]


@click.command("demo", short_help="Compare plain transformers with omnimem on one picture.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the checkpoint lies or goes.  [default: the user's cache folder]",
)
@click.option("--preset", type=click.Choice(_PICTURE_MODELS), default="1gb", show_default=True)
@click.option("--budget", default="50%", show_default=True, help="Memory for the weights.")
@click.option("--keep", is_flag=True, help="Keep picture, logits and figures beside the model.")
def demo_command(directory: Path | None, preset: str, budget: str, keep: bool) -> int:
    """Compare plain transformers with omnimem on one picture: bits, memory, time.

    Makes a synthetic checkpoint once. Exit code 1 when tokens or logits differ.
    """
    folder = directory if directory is not None else _cache_folder() / f"demo-{preset}"
    parse_budget(budget, 1 << 40)
    if not is_complete(folder, preset):
        write_with_bar(preset, folder)
    with checkpoint.open(folder) as opened:
        weight_bytes, files = opened.total_bytes, opened.files
    budget_bytes = parse_budget(budget, weight_bytes)
    with tempfile.TemporaryDirectory(prefix="omnimem-demo-") as scratch:
        place = folder / "demo" if keep else Path(scratch)
        place.mkdir(exist_ok=True)
        picture = place / "picture.png"
        draw_picture(picture)
        results = {}
        for contender in ("plain", "omnimem"):
            _drop_from_cache(files)
            results[contender] = run_worker(contender, folder, picture, budget_bytes, place)
        same_tokens = results["plain"]["tokens"] == results["omnimem"]["tokens"]
        same_logits = same_bits(place, results)
    _print_table(results, weight_bytes, budget, budget_bytes, same_tokens, same_logits)
    return 0 if same_tokens and same_logits else 1


def draw_picture(path: Path) -> None:
    """Draw a house under the sun, 448 x 448 pixels."""
    from PIL import Image, ImageDraw

    image = Image.linear_gradient("L").resize((448, 448))
    image = Image.merge("RGB", (image.point(lambda v: v // 2 + 60), image, image.rotate(180)))
    pen = ImageDraw.Draw(image)
    pen.ellipse((320, 40, 410, 130), fill=(250, 210, 60))
    pen.rectangle((0, 340, 448, 448), fill=(70, 130, 60))
    pen.rectangle((110, 210, 290, 370), fill=(190, 90, 70))
    pen.polygon([(90, 210), (200, 120), (310, 210)], fill=(110, 50, 50))
    pen.rectangle((180, 290, 225, 370), fill=(60, 40, 30))
    image.save(path)


def run_worker(
    contender: str, folder: Path, picture: Path, budget_bytes: int, place: Path
) -> dict[str, Any]:
    """Run one contender in a fresh process and return its figures.

    Raises
    ------
    Error
        The process failed, was killed or took too long.
    """
    job: dict[str, Any] = {
        "contender": contender,
        "model_dir": os.fspath(folder),
        "image": os.fspath(picture),
        "prompt": PROMPT,
        "tokens": TOKENS,
        "budget": budget_bytes,
        "result": os.fspath(place / f"{contender}.json"),
        "logits": os.fspath(place / f"{contender}.npy"),
    }
    job_file = place / f"{contender}-job.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "omnimem.cli._worker", os.fspath(job_file)]
    with Console(stderr=True).status(f"running {contender} ..."):
        try:
            done = subprocess.run(
                command, stderr=subprocess.PIPE, text=True, timeout=_TIME_LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            raise Error(
                f"the {contender} run took over {_TIME_LIMIT:.0f} s; it was ended"
            ) from None
    if done.returncode < 0:
        raise Error(
            f"the {contender} run was killed by signal {-done.returncode}; with 9 the system was "
            "probably short of memory: take a smaller --preset"
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise Error(f"the {contender} run failed: {lines[-1]}")
    sys.stderr.write(done.stderr)
    result: dict[str, Any] = json.loads(Path(job["result"]).read_text(encoding="utf-8"))
    return result


def same_bits(place: Path, results: dict[str, dict[str, Any]]) -> bool:
    """Tell whether both runs' logits have the same type, shape and bytes."""
    kinds = [(run["logits_dtype"], run["logits_shape"]) for run in results.values()]
    raw = [(place / f"{contender}.npy").read_bytes() for contender in results]
    return kinds[0] == kinds[1] and raw[0] == raw[1]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "omnimem"


def _drop_from_cache(files: list[str]) -> None:
    """Ask the system to forget the files' pages, so that both runs start from the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _print_table(
    results: dict[str, dict[str, Any]],
    weight_bytes: int,
    budget: str,
    budget_bytes: int,
    same_tokens: bool,
    same_logits: bool,
) -> None:
    plain, ours = results["plain"], results["omnimem"]
    steps = plain["logits_shape"][0]
    table = Table(title="omnimem demo", title_justify="left")
    table.add_column("")
    table.add_column("transformers")
    table.add_column(f"omnimem, budget {budget}")
    yes = {True: "yes", False: "NO"}
    rows = [
        ("identical tokens", "", yes[same_tokens]),
        (f"identical logits ({steps} steps, bit by bit)", "", yes[same_logits]),
        ("bytes of weights", show_size(weight_bytes), show_size(weight_bytes)),
        (
            "of them in memory at a time",
            show_size(weight_bytes),
            show_size(min(budget_bytes, weight_bytes)),
        ),
        ("peak memory *", show_size(plain["peak_bytes"]), show_size(ours["peak_bytes"])),
        (
            "  above the process without a model",
            show_size(plain["peak_bytes"] - plain["idle_bytes"]),
            show_size(ours["peak_bytes"] - ours["idle_bytes"]),
        ),
        (
            "bytes read per pass",
            "mapped: what the system drops",
            f"{show_size(ours['bytes_per_pass'])} "
            f"(planned {show_size(ours['planned_bytes_per_pass'])})",
        ),
    ]
    rows += [
        (text, show_seconds(plain[key]), show_seconds(ours[key]))
        for text, key in (
            ("time to load", "load_seconds"),
            ("time to first token", "first_seconds"),
            ("time per token", "token_seconds"),
        )
    ]
    rows.append(("I/O back end", "page cache", f"{ours['io_backend']}: {ours['io_reason']}"))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    click.echo(
        "* The process's VmHWM: anonymous memory and the pages of mapped files, which is where\n"
        "  plain transformers keeps its weights. Both started with the files out of the page cache."
    )
