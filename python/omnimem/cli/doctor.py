"""``omnimem doctor``: what keeps this machine from running well, with the fix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from omnimem.cli._common import out_console
from omnimem.doctor import Diagnosis, State, diagnose

SCHEMA = 1
"""Of `--json`; it grows when a key changes its meaning or goes."""

_STYLES: dict[State, str] = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}


@click.command("doctor")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    help="Where a swap file would lie; by default where a store puts it.",
)
@click.option("--json", "as_json", is_flag=True, help="All of it, in bytes and seconds.")
def doctor_command(directory: Path | None, as_json: bool) -> int:
    """Check this machine: I/O, memory, limits. Each problem comes with its fix.

    The exit status is 1 when a check fails, else 0.
    """
    with Console(stderr=True).status("checking"):
        found = diagnose(directory)
    if as_json:
        checks = [dataclasses.asdict(check) for check in found.checks]
        told = {"schema": SCHEMA, "directory": found.directory, "state": found.state}
        click.echo(json.dumps({**told, "checks": checks}, indent=2))
    else:
        _show(found, out_console())
    return int(found.state == "FAIL")


def _show(found: Diagnosis, console: Console) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found.checks:
        state = Text(check.state, style=_STYLES[check.state])
        table.add_row(state, check.name, Text(check.fact))
        if check.fix:
            table.add_row("", "", Text.assemble(("fix: ", "bold"), check.fix))
    console.print(table, highlight=False)
    counts = ", ".join(f"{found.count(state)} {state}" for state in _STYLES)
    console.print(f"\n{counts}", highlight=False)
