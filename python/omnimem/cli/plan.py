"""``omnimem plan``: what a budget would keep in memory, and what that costs, without loading."""

from __future__ import annotations

import importlib.util
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from omnimem._plan_parts import Parts, parts_of, weight_bytes
from omnimem.cli._common import columns, parse_budget, quiet_libraries, show_size
from omnimem.config import CacheConfig, parse_size
from omnimem.errors import LimitError

if TYPE_CHECKING:
    from omnimem._plan_survey import Fold, Forecast, Survey

SCHEMA = 1
"""Of `--json`; it grows when a key changes its meaning or goes."""

_LABEL, _CELL, _GAP = 24, 11, 3
"""Columns of the terminal: the names of rows, a budget's cells, and what is between them."""


def _rate(context: click.Context, option: click.Parameter, text: str | None) -> float | None:
    """Bytes per second of "2GB/s"."""
    if text is None:
        return None
    try:
        rate = parse_size(text.strip().removesuffix("/s"), "read rate")
    except ValueError:
        rate = 0
    if not rate:
        raise click.BadParameter(f"{text!r} is no rate: write a number with KB/s..TB/s")
    return float(rate)


@click.command("plan", short_help="Tell what a budget of memory would keep, and the time it takes.")
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option(
    "--ram",
    "budgets",
    multiple=True,
    required=True,
    metavar="SIZE",
    help="Memory for the weights: 6GiB, or a share, 50%. Several are set side by side.",
)
@click.option(
    "--compression",
    type=click.Choice(["auto", "fast", "balanced", "off"]),
    default="auto",
    show_default=True,
    help="As in run: keep weights encoded where that is faster, as much as helps, or not.",
)
@click.option("--measure/--no-measure", default=True, help="Measure this machine; under a second.")
@click.option("--read-rate", callback=_rate, metavar="RATE", help="Of the disk, if known: 2GB/s.")
@click.option(
    "--compression-ratio",
    type=click.FloatRange(0, 1, min_open=True),
    default=CacheConfig().compression_ratio,
    show_default=True,
    help="With --no-measure: the share of their size that encoded bytes are assumed to take.",
)
@click.option("--json", "as_json", is_flag=True, help="All of it, in bytes and seconds.")
def plan_command(
    model_dir: Path,
    budgets: tuple[str, ...],
    compression: str,
    measure: bool,
    read_rate: float | None,
    compression_ratio: float,
    as_json: bool,
) -> None:
    """Tell what a budget would keep of the model in MODEL_DIR, and how long a token would take.

    It is the plan that run makes for that budget. Only headers are read, and what is measured.

    MODEL_DIR may be one of diffusers, too: a model, or a pipeline. The parts of a pipeline run one
    after another, so that each may have the whole budget: AdvancedMemoryManager.attach gives it to
    the one in use. As it keeps nothing encoded, "auto" is "off" for them.
    """
    parts = parts_of(model_dir)
    total = weight_bytes(parts)
    sizes = [parse_budget(text, total, "--ram") for text in budgets]
    unencoded = ("off", "auto") if parts.model else ("off",)
    found: dict[str, Survey] = {}
    with Console(stderr=True).status("planning"):
        if importlib.util.find_spec("transformers") is not None:
            quiet_libraries()
        from omnimem._plan_survey import survey

        for name, folder in parts.folders.items():
            try:
                found[name] = survey(
                    folder,
                    sizes,
                    compression=None if compression in unencoded else compression,
                    measure=measure,
                    read_rate=read_rate,
                    compression_ratio=compression_ratio,
                )
            except LimitError as error:
                if name:
                    error.args = (f"{name}: {error}",)
                raise
    if as_json:
        told = pipeline_json(model_dir, parts, found) if parts.model else to_json(found[""])
        click.echo(json.dumps(told, indent=2))
        return
    console = Console(width=columns())
    if parts.model:
        _show_pipeline(model_dir, parts, sizes, found, console)
    else:
        _show(found[""], console)


# -- for people ------------------------------------------------------------------------------------


def _show_pipeline(
    folder: Path,
    parts: Parts,
    budgets: Sequence[int],
    found: Mapping[str, Survey],
    console: Console,
) -> None:
    whole = sum(survey.weight_bytes for survey in found.values())
    console.print(
        f"[bold]{folder.resolve().name}[/bold]: {parts.model}, {show_size(whole)} of weights in "
        f"{', then '.join(found)}",
        highlight=False,
        soft_wrap=True,
    )
    for survey in found.values():
        console.print()
        _show(survey, console)
    console.print()
    for budget in budgets:
        stay = _together(found, budget)
        line = (
            f"{show_size(budget)}: all parts stay in memory."
            if stay
            else f"{show_size(budget)}: the part in use may have all of it; the others give way, "
            "and are read again when they are used."
        )
        click.echo(textwrap.fill(line, console.width, break_long_words=False))


def _together(found: Mapping[str, Survey], budget: int) -> bool:
    """Do all parts fit into the budget at once?"""
    return sum(survey.weight_bytes for survey in found.values()) <= budget


def _show(found: Survey, console: Console) -> None:
    console.print(_headline(found), highlight=False, soft_wrap=True)
    console.print()
    fit = max((console.width - _LABEL) // (_CELL + _GAP), 1)
    for first in range(0, len(found.forecasts), fit):
        console.print(_budgets(found, found.forecasts[first : first + fit]), highlight=False)
        console.print(end="\n" * (first + fit < len(found.forecasts)))
    if len(found.forecasts) == 1:
        console.print()
        console.print(_units(found.forecasts[0]), highlight=False)
    console.print()
    for line in _remarks(found):
        click.echo(textwrap.fill(line, console.width, break_long_words=False))


def _headline(found: Survey) -> str:
    kinds = " and ".join(found.dtypes)
    files = "1 file" if found.files == 1 else f"{found.files} files"
    packed = f", packed ({found.coding}) in {show_size(found.file_bytes)}" if found.coding else ""
    return (
        f"[bold]{found.folder.resolve().name}[/bold]: {found.model or 'a model'}, "
        f"{show_size(found.weight_bytes)} of weights ({kinds}) in {files}{packed}"
    )


def _budgets(found: Survey, forecasts: Sequence[Forecast]) -> Table:
    """One column for each budget."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("budget", no_wrap=True, min_width=_LABEL)
    for forecast in forecasts:
        table.add_column(
            show_size(forecast.plan.budget_bytes), justify="right", no_wrap=True, min_width=_CELL
        )
    plans = [forecast.plan for forecast in forecasts]
    each = "token" if found.generates else "pass"
    rows: list[tuple[str, list[str]]] = [
        ("resident, as it is", [_size(plan.resident_bytes) for plan in plans]),
        ("packed, encoded", [_size(plan.packed_bytes) for plan in plans]),
        ("ring for what streams", [_size(plan.ring_bytes) for plan in plans]),
        ("memory in all", [_size(plan.memory_bytes) for plan in plans]),
        (f"read per {each}", [_size(forecast.pass_bytes) for forecast in forecasts]),
    ]
    if found.generates:
        rows.append(("read by the prefill", [_size(plan.prefill_bytes) for plan in plans]))
    if any(forecast.plan.decode_bytes for forecast in found.forecasts):
        rows.append((f"decoded per {each}", [_size(plan.decode_bytes) for plan in plans]))
    if any(forecast.pass_seconds is not None for forecast in found.forecasts):
        least = found.rates is not None and math.isinf(found.rates.compute)
        name = f"time per {each}, at least" if least else f"time per {each}"
        rows.append((name, [_time(forecast.pass_seconds or None) for forecast in forecasts]))
        if found.generates:
            times = [_time(forecast.prefill_seconds or None) for forecast in forecasts]
            rows.append(("time the prefill reads", times))
    for name, cells in rows:
        table.add_row(name, *cells, end_section=name == "memory in all")
    return table


def _units(forecast: Forecast) -> Table:
    from omnimem._plan_survey import fold

    rows = fold(forecast.plan)
    packs = any(row.packed for row in rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("unit", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("resident", justify="right", no_wrap=True)
    if packs:
        table.add_column("packed", justify="right", no_wrap=True)
    table.add_column("streamed", overflow="fold")
    for row in rows:
        size = show_size(row.nbytes)
        size = f"{len(row.numbers)} x {size}" if len(row.numbers) > 1 else size
        packed = [_count(row, row.packed)] if packs else []
        table.add_row(
            _unit_name(row), size, _count(row, row.resident), *packed, _streamed(row) or "-"
        )
    return table


def _unit_name(row: Fold) -> str:
    name = row.name.removeprefix("model.") or "(of the model itself)"
    name += f" {_ranges(row.numbers)}" if row.numbers else ""
    return f"{name} (x{row.repeats})" if row.repeats > 1 else name


def _count(row: Fold, units: tuple[int, ...]) -> str:
    return "-" if not units else str(len(units)) if row.numbers else "yes"


def _streamed(row: Fold) -> str:
    if not row.numbers:
        return "yes" if row.streamed else "in part" if row.partly else ""
    parts = [f"{len(row.streamed)}: {_ranges(row.streamed)}"] if row.streamed else []
    parts += [f"{_ranges(row.partly)} in part"] if row.partly else []
    return "; ".join(parts)


def _ranges(numbers: tuple[int, ...]) -> str:
    """ "0-3, 7" for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _remarks(found: Survey) -> list[str]:
    lines: list[str] = []
    reasons: dict[str, list[str]] = {}
    for forecast in found.forecasts if found.measured else ():
        plan = forecast.plan
        reasons.setdefault(plan.reason, []).append(show_size(plan.budget_bytes))
    for reason, budgets in reasons.items():
        where = f"{' and '.join(budgets)}: " if len(reasons) > 1 else ""
        lines.append(_sentence(where + reason))
    if not any("measured:" in reason for reason in reasons):
        lines += _rates(found)
    lines.append(f"The least budget is {show_size(found.least_bytes)} ({found.least_bytes} bytes).")
    return lines + [_sentence(note) for note in found.notes]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _rates(found: Survey) -> list[str]:
    rates = found.rates
    if rates is None or (not found.measured and math.isinf(rates.read)):
        return []
    parts = [f"disk {rates.read / 1e9:.2f} GB/s"]
    if math.isfinite(rates.compute):
        parts.append(f"computing {rates.compute / 1e9:.1f} GB/s")
    parts += [f"decoding {coding} {rate / 1e9:.1f} GB/s" for coding, rate in rates.decode.items()]
    return [f"{'Measured' if found.measured else 'As given'}: {', '.join(parts)}."]


def _size(nbytes: int) -> str:
    return show_size(nbytes) if nbytes else "-"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f} s"


# -- for programs ----------------------------------------------------------------------------------


def pipeline_json(folder: Path, parts: Parts, found: Mapping[str, Survey]) -> dict[str, Any]:
    """Of the whole, and `to_json` of each part, in the order of use."""
    return {
        "schema": SCHEMA,
        "model_dir": str(folder),
        "model": parts.model,
        "weight_bytes": sum(survey.weight_bytes for survey in found.values()),
        "least_bytes": max(survey.least_bytes for survey in found.values()),
        "parts": {name: to_json(survey) for name, survey in found.items()},
    }


def to_json(found: Survey) -> dict[str, Any]:
    """Bytes, seconds, bytes per second; None where something is not known."""
    rates = found.rates
    return {
        "schema": SCHEMA,
        "model_dir": str(found.folder),
        "model": found.model,
        "generates": found.generates,
        "files": found.files,
        "tensors": found.tensors,
        "weight_bytes": found.weight_bytes,
        "file_bytes": found.file_bytes,
        "dtypes": found.dtypes,
        "coding": found.coding,
        "ordered_by": found.ordered_by,
        "least_bytes": found.least_bytes,
        "measured": found.measured,
        "rates": None
        if rates is None
        else {
            "read": _finite(rates.read),
            "compute": _finite(rates.compute),
            "proof": _finite(rates.proof),
            "decode": {coding: _finite(rate) for coding, rate in rates.decode.items()},
            "share": rates.share,
        },
        "notes": list(found.notes),
        "plans": [_plan_json(forecast) for forecast in found.forecasts],
    }


def _plan_json(forecast: Forecast) -> dict[str, Any]:
    plan = forecast.plan
    return {
        "budget_bytes": plan.budget_bytes,
        "resident_bytes": plan.resident_bytes,
        "packed_bytes": plan.packed_bytes,
        "ring_bytes": plan.ring_bytes,
        "memory_bytes": plan.memory_bytes,
        "stream_bytes": plan.stream_bytes,
        "pass_bytes": forecast.pass_bytes,
        "prefill_bytes": plan.prefill_bytes,
        "decode_bytes": plan.decode_bytes,
        "compression": plan.compression,
        "reason": plan.reason,
        "seconds_per_pass": forecast.pass_seconds,
        "prefill_read_seconds": forecast.prefill_seconds,
        "units": [
            {
                "name": unit.name,
                "nbytes": unit.nbytes,
                "repeats": unit.repeats,
                "every_token": unit.decodes,
                "resident_bytes": unit.resident_bytes,
                "packed_bytes": unit.packed_bytes,
                "streamed_bytes": unit.streamed_bytes,
            }
            for unit in plan.units
        ],
    }


def _finite(rate: float) -> float | None:
    return rate if math.isfinite(rate) else None
