"""``omnimem run``: answer a prompt with a model that streams its weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from omnimem import checkpoint
from omnimem.cli._common import (
    parse_budget,
    process_memory,
    quiet_libraries,
    show_seconds,
    show_size,
)


@click.command("run", short_help="Answer a prompt with a model, within a budget of memory.")
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("--budget", required=True, help="Memory for the weights: 2GiB, or a share, 50%.")
@click.option("--prompt", required=True, help="What to ask.")
@click.option("--image", type=click.Path(path_type=Path), help="A picture to ask about.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--compression",
    type=click.Choice(["auto", "fast", "balanced", "off"]),
    default="auto",
    show_default=True,
    help="Keep weights encoded, without loss: where that is faster, as much as helps, or not.",
)
@click.option(
    "--verify",
    type=click.Choice(["always", "first"]),
    default="always",
    show_default=True,
    help="Compare the checksum at every read of a block, or at its second one only.",
)
@click.option(
    "--io-backend",
    type=click.Choice(["auto", "uring", "threads"]),
    default="auto",
    show_default=True,
)
def run_command(
    model_dir: Path,
    budget: str,
    prompt: str,
    image: Path | None,
    max_new_tokens: int,
    compression: str,
    verify: str,
    io_backend: str,
) -> None:
    """Answer a prompt with the model in MODEL_DIR, within a budget of memory for its weights."""
    with checkpoint.open(model_dir) as opened:
        budget_bytes = parse_budget(budget, opened.total_bytes)
    if image is not None and not image.is_file():
        raise FileNotFoundError(f"{image}: no such picture")
    quiet_libraries()
    import omnimem.torch as omnimem_torch
    from omnimem.cli._generate import generate
    from omnimem.processor import load_tokenizer, prepare

    tokenizer = load_tokenizer(model_dir)
    inputs = prepare(model_dir, prompt, image, tokenizer=tokenizer)
    model: Any = omnimem_torch.load(
        model_dir,
        budget_bytes,
        compression=None if compression == "off" else compression,
        verify=verify,
        io_backend=io_backend,
    )
    try:
        writer = _TextWriter(tokenizer)
        made = generate(model, inputs, max_new_tokens, on_tokens=writer.update)
        writer.finish()
        plan, stats = model.omnimem.plan(), model.omnimem.stats()
    finally:
        model.omnimem.close()
    table = Table(show_header=False, title="omnimem run", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in {
        "peak memory of the process": show_size(process_memory("VmHWM")),
        "bytes of weights": show_size(plan.weight_bytes),
        "budget": show_size(plan.budget_bytes),
        "kept as it is": show_size(plan.resident_bytes),
        "kept encoded": f"{show_size(stats['packed_bytes'])} ({plan.reason})",
        "bytes read per pass": (
            f"{show_size(stats['bytes_per_pass'])} (planned {show_size(plan.stream_bytes)})"
        ),
        "time to first token": show_seconds(made.first_seconds),
        "time per token": show_seconds(made.token_seconds),
        "tokens": str(len(made.tokens)),
        "I/O back end": f"{stats['io_backend']}: {stats['io_reason']}",
    }.items():
        table.add_row(name, value)
    Console(stderr=True).print(table)


class _TextWriter:
    """Write text to stdout as soon as later tokens cannot change it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._shown = ""
        self._text = ""

    def update(self, ids: list[int]) -> None:
        """Show what the ids so far say, up to a character that is not whole yet."""
        self._text = self._tokenizer.decode(ids, skip_special_tokens=True)
        self._show(self._text.rstrip("\ufffd"))

    def finish(self) -> None:
        """Show the rest and end the line."""
        self._show(self._text)
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _show(self, text: str) -> None:
        if text.startswith(self._shown):
            sys.stdout.write(text[len(self._shown) :])
            sys.stdout.flush()
            self._shown = text
