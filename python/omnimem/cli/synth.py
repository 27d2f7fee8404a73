"""``omnimem synth``: write a synthetic checkpoint."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from omnimem.cli._common import quiet_libraries
from omnimem.synth import PRESETS


@click.command("synth", short_help="Write a checkpoint of a real architecture with random weights.")
@click.option("--preset", type=click.Choice(list(PRESETS)), required=True, help="Which model.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def synth_command(preset: str, seed: int, directory: Path) -> None:
    """Write a checkpoint of a real architecture with random weights into DIRECTORY."""
    folder = write_with_bar(preset, directory, seed)
    click.echo(f"{preset}: {folder}")


def write_with_bar(preset: str, directory: Path, seed: int = 0) -> Path:
    """Write a checkpoint and draw a progress bar on stderr."""
    from omnimem.synth import write

    quiet_libraries()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(f"writing {preset}", total=None)
        return write(
            preset,
            directory,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
