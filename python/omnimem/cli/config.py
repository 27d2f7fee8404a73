"""``omnimem config``: every setting as it is in effect, and where it comes from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from omnimem._settings import DEFAULT, Found, Settings, build, from_environment
from omnimem.advanced_config import MIRRORS, PARTS, AdvancedMemoryConfig, assemble, collect
from omnimem.cli._common import show_size
from omnimem.config import StoreConfig

_UNITS = {
    "cleanup_interval": "s",
    "max_size_gb": "GiB",
    "min_offload_interval": "s",
    "monitoring_interval": "s",
    "usage_window": "s",
}
_SIZES = ("budget", "pool_sizes", "host_limit", "disk_limit", "io_window", "io_request")


@click.command("config", short_help="Print the settings in effect, and where each comes from.")
@click.option("--file", "path", type=click.Path(path_type=Path), help="A TOML file of settings.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def config_command(path: Path | None, as_json: bool) -> None:
    """Print the settings in effect: the defaults, a file's, the environment's.

    The environment wins over the file. "store" are those of a Store of its own.
    """
    rows = list(_rows(path))
    if as_json:
        click.echo(
            json.dumps(
                {
                    name: {"value": _plain(value), "source": source, "variable": variable}
                    for name, value, source, variable in rows
                },
                indent=2,
            )
        )
        return
    lines = [(name, _shown(name, value), source) for name, value, source, _ in rows]
    names, values = (max(len(line[column]) for line in lines) for column in (0, 1))
    for name, value, source in lines:
        click.echo(f"{name:<{names}}  {value:<{values}}  {source}")


def _rows(path: Path | None) -> Iterator[tuple[str, Any, str, str]]:
    """Name, value, source and variable of each setting."""
    found = collect(path)
    config = assemble(found, AdvancedMemoryConfig)
    yield from _of(AdvancedMemoryConfig, config, "", found, {*MIRRORS, *PARTS})
    for name, part in PARTS.items():
        yield from _of(part, getattr(config, name), f"{name}.", found)
    own = from_environment(StoreConfig)
    store = build(StoreConfig, own)
    yield from _of(StoreConfig, store, "store.", {f"store.{name}": f for name, f in own.items()})


def _of(
    cls: type[Settings],
    config: Any,
    prefix: str,
    found: Mapping[str, Found],
    without: set[str] | frozenset[str] = frozenset(),
) -> Iterator[tuple[str, Any, str, str]]:
    for field in dataclasses.fields(config):
        if field.name not in without:
            name = f"{prefix}{field.name}"
            source = found[name].source if name in found else DEFAULT
            yield name, getattr(config, field.name), source, cls.variable(field.name)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _shown(name: str, value: Any) -> str:
    """A value for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_shown(name, inner)}" for key, inner in value.items())
    if isinstance(value, int) and name.rpartition(".")[2] in _SIZES:
        return show_size(value)
    unit = _UNITS.get(name.rpartition(".")[2])
    return "-" if value is None else f"{value} {unit}" if unit else str(value)
