"""``omnimem doctor``: what keeps this machine from running well, with the fix."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from omnimem.cli._common import columns
from omnimem.doctor import Diagnosis, State, diagnose

SCHEMA = 1
"""Of `--json`; it grows when a key changes its meaning or goes."""

_STYLES: dict[State, dict[str, Any]] = {
    "OK": {"fg": "green"},
    "WARN": {"fg": "yellow"},
    "FAIL": {"fg": "red", "bold": True},
}


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
        _show(found)
    return int(found.state == "FAIL")


def _show(found: Diagnosis) -> None:
    """Facts are wrapped on a terminal; fixes never are, so that they can be copied."""
    states = max(len(check.state) for check in found.checks)
    names = max(len(check.name) for check in found.checks)
    margin = " " * (states + names + 4)
    width = columns()
    for check in found.checks:
        fact = textwrap.wrap(check.fact, width - len(margin), break_long_words=False)
        state = click.style(check.state.ljust(states), **_STYLES[check.state])
        click.echo(f"{state}  {check.name:{names}}  {fact[0]}")
        for line in fact[1:]:
            click.echo(margin + line)
        if check.fix:
            click.echo(f"{margin}{click.style('fix:', bold=True)} {check.fix}")
    counts = ", ".join(f"{found.count(state)} {state}" for state in _STYLES)
    click.echo(f"\n{counts}")
