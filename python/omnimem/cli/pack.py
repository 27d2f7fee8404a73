"""``omnimem pack`` and ``omnimem unpack``: a checkpoint made smaller, and made again as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from omnimem._packed_header import CODINGS
from omnimem.cli._common import show_size

if TYPE_CHECKING:
    from omnimem.packed import Summary

_threads = click.option(
    "--threads", type=click.IntRange(min=1), help="By default as many as there are CPUs."
)


@click.command("pack", short_help="Write a smaller copy of a checkpoint, without loss.")
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--coding",
    type=click.Choice(CODINGS),
    default="balanced",
    show_default=True,
    help="The denser one, or the one that is decoded faster.",
)
@_threads
def pack_command(model_dir: Path, out: Path, coding: str, threads: int | None) -> None:
    """Write a smaller copy of the checkpoint in MODEL_DIR to OUT, without loss.

    Every command takes it like the original.
    """
    from omnimem.packed import pack

    def work(progress: Callable[[int, int], None]) -> Summary:
        return pack(model_dir, out, coding, progress, threads)

    done = _with_bar(f"packing {model_dir.name}", work)
    click.echo(
        f"{done.folder}: {show_size(done.plain_bytes)} in {show_size(done.packed_bytes)}, "
        f"{done.ratio:.2f} times smaller, {done.seconds:.1f} s"
    )


@click.command(
    "unpack", short_help="Write the original files of a packed checkpoint, byte for byte."
)
@click.argument("packed", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@_threads
def unpack_command(packed: Path, out: Path, threads: int | None) -> None:
    """Write the original files of a PACKED checkpoint to OUT, byte for byte."""
    from omnimem.packed import unpack

    def work(progress: Callable[[int, int], None]) -> Summary:
        return unpack(packed, out, progress, threads)

    done = _with_bar(f"unpacking {packed.name}", work)
    click.echo(
        f"{done.folder}: {show_size(done.plain_bytes)} from {show_size(done.packed_bytes)}, "
        f"SHA-256 as packed, {done.seconds:.1f} s"
    )


def _with_bar(text: str, work: Callable[[Callable[[int, int], None]], Summary]) -> Summary:
    """Run with a progress bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(text, total=None)
        return work(lambda done, total: bar.update(task, completed=done, total=total))
