"""What `omnimem plan` knows of a checkpoint: plans for budgets, from headers and a few rates.

No weight is read but those that the measuring reads, in under a second. The plans are those that
`omnimem.torch.load` makes, by the same code.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omnimem import checkpoint
from omnimem._plan_choice import pass_seconds
from omnimem._plan_layout import (
    Compute,
    Layout,
    check_folder,
    class_name,
    generates,
    layout_of_names,
    library_of,
    measure_plan,
    plan_layout,
    read_config,
)
from omnimem._plan_units import PLAIN, UnitPlan
from omnimem.config import CacheConfig, format_share
from omnimem.errors import LimitError
from omnimem.plan import CODINGS, Plan, Rates, make_plan

__all__ = ["Fold", "Forecast", "Survey", "fold", "survey"]


@dataclass(frozen=True)
class Forecast:
    """A plan, and the time that it should take."""

    plan: Plan
    """As `load` would make it."""
    pass_bytes: int
    """Read by a pass: that of a token, or through every unit where the model generates none."""
    pass_seconds: float | None
    """Of such a pass; None: the disk's rate is not known."""
    prefill_seconds: float | None
    """Reading alone, of a pass through every unit; None: the disk's rate is not known."""


@dataclass(frozen=True)
class Survey:
    """A checkpoint, and what budgets make of it (`survey`)."""

    folder: Path
    model: str
    """Class in transformers or diffusers; "": config.json does not say."""
    generates: bool
    """Is a pass a token's?"""
    files: int
    tensors: int
    weight_bytes: int
    """Of the tensors that the model uses."""
    file_bytes: int
    """Of the same in the files: less, where they are packed."""
    dtypes: dict[str, int]
    """Bytes of each type, the most first."""
    coding: str | None
    """Of a packed checkpoint."""
    ordered_by: str
    """"model": units and their order are the model's own; "names": they are read off the names."""
    least_bytes: int
    """The least budget that any plan keeps within, with nothing encoded."""
    rates: Rates | None
    """What the plans go by; infinite: not known. None: nothing is."""
    measured: bool
    """Were they measured? Otherwise `rates` are what was said and assumed."""
    notes: tuple[str, ...]
    """What was not measured, what was assumed, and why."""
    forecasts: tuple[Forecast, ...]
    """One for each budget."""


def survey(
    model_dir: str | os.PathLike[str],
    budgets: Sequence[int],
    *,
    compression: str | None = "auto",
    measure: bool = True,
    read_rate: float | None = None,
    compression_ratio: float | None = None,
    io_backend: str = "auto",
) -> Survey:
    """Plan for budgets.

    Parameters
    ----------
    model_dir : path
        A Hugging Face folder, of transformers or diffusers: config.json and safetensors files.
    budgets : sequence of int
        Bytes for weights, the ring included.
    compression : str, optional
        As in `omnimem.torch.load`.
    measure : bool
        Measure the disk and the codings on this checkpoint and, with torch, the arithmetic; takes
        less than a second, and memory of at most the least budget.
    read_rate : float, optional
        Bytes per second of the disk, instead of what is measured.
    compression_ratio : float, optional
        Without measuring: the share of the size that is assumed to be left of what is kept encoded.
        By default that of `CacheConfig`.
    io_backend : str
        As in `StoreConfig`.

    Raises
    ------
    LimitError
        A budget is below the least; the message says how much that is.
    FormatError, ValueError
        As `omnimem.torch.load`.
    """
    folder = Path(model_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: name the model's folder, which has config.json, not a file")
    with checkpoint.open(folder) as files:
        check_folder(files, folder)
        layout, ordered_by, compute, notes = _layout(files, folder)
        plain = [make_plan(layout.units.items(), nbytes, layout.repeats) for nbytes in budgets]
        rates: Rates | None = None
        if measure:
            tightest = min(plain, key=lambda plan: plan.budget_bytes)
            rates = measure_plan(tightest, layout.files, compression, compute, io_backend)
        elif compression in CODINGS or read_rate is not None:
            ratio = (
                CacheConfig().compression_ratio if compression_ratio is None else compression_ratio
            )
            rates, told = _assumed(files, compression, ratio)
            notes += told
        if rates is not None and read_rate is not None:
            rates = dataclasses.replace(rates, read=read_rate)
        if not measure:
            notes.append("nothing was measured; leave out --no-measure to know more")
            compression = None if compression == "auto" else compression
        plans = [
            plan_layout(layout, nbytes, compression, lambda _: _known(rates)) for nbytes in budgets
        ]
        return _describe(files, folder, layout, ordered_by, rates, measure, notes, plans)


def _known(rates: Rates | None) -> Rates:
    assert rates is not None  # compression needs them, and none is left without
    return rates


def _layout(files: checkpoint.Checkpoint, folder: Path) -> tuple[Layout, str, Compute, list[str]]:
    """The layout, where it is from, who measures arithmetic, and what is lacking."""
    if importlib.util.find_spec("torch") is None:
        notes = ["torch is not installed: units are told by their names, arithmetic is not counted"]
        return layout_of_names(files, folder), "names", _uncounted, notes
    import omnimem.torch as omnimem_torch

    library = library_of(read_config(folder))
    if importlib.util.find_spec(library) is None:
        notes = [f"{library} is not installed: units are told by their names"]
        return layout_of_names(files, folder), "names", omnimem_torch.compute_rate, notes
    return omnimem_torch.layout(files, folder), "model", omnimem_torch.compute_rate, []


def _uncounted(*_: object) -> float:
    return math.inf


def _assumed(
    files: checkpoint.Checkpoint, compression: str | None, ratio: float
) -> tuple[Rates, list[str]]:
    """Rates of which nothing is known but what is left of encoded bytes."""
    share, notes = {}, []
    if compression in CODINGS and compression is not None:
        share[compression] = ratio
        if files.coding == compression:
            infos = [files.info(name) for name in files.names()]
            lengths = sum(i.nbytes if i.encoded_nbytes is None else i.encoded_nbytes for i in infos)
            share[compression] = lengths / max(files.total_bytes, 1)
        else:
            notes.append(
                f"assumed: what is kept encoded takes {format_share(ratio, 0)} of its size "
                "(--compression-ratio); measuring would tell"
            )
    return Rates(math.inf, math.inf, {}, share, encoded_as=files.coding), notes


def _describe(
    files: checkpoint.Checkpoint,
    folder: Path,
    layout: Layout,
    ordered_by: str,
    rates: Rates | None,
    measured: bool,
    notes: list[str],
    plans: list[Plan],
) -> Survey:
    tensors = [tensor for unit in layout.units.values() for tensor in unit]
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtype = layout.files.info(tensor.name).dtype
        dtypes[dtype] = dtypes.get(dtype, 0) + tensor.nbytes
    model = class_name(read_config(folder))
    return Survey(
        folder=folder,
        model=model,
        generates=generates(model),
        files=len(files.files),
        tensors=len(tensors),
        weight_bytes=sum(tensor.nbytes for tensor in tensors),
        file_bytes=sum(tensor.length for tensor in tensors),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        coding=files.coding,
        ordered_by=ordered_by,
        least_bytes=_least(layout),
        rates=rates,
        measured=measured,
        notes=tuple(notes),
        forecasts=tuple(_forecast(plan, rates, generates(model)) for plan in plans),
    )


def _least(layout: Layout) -> int:
    whole = sum(tensor.nbytes for unit in layout.units.values() for tensor in unit)
    try:
        make_plan(layout.units.items(), 0, layout.repeats)
    except LimitError as error:
        return min(error.need, whole)
    return 0


def _forecast(plan: Plan, rates: Rates | None, tokens: bool) -> Forecast:
    read = plan.stream_bytes if tokens else plan.prefill_bytes
    if rates is None or math.isinf(rates.read):
        return Forecast(plan, read, None, None)
    return Forecast(
        plan,
        read,
        pass_seconds(plan.units, rates, decode=tokens),
        plan.prefill_bytes / rates.read,
    )


# -- units that are alike --------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """Units of one stack that have the same size, or a unit by itself."""

    name: str
    """Of the stack, without numbers; of the unit."""
    numbers: tuple[int, ...]
    """Of the units; empty for one by itself."""
    nbytes: int
    """Of each."""
    repeats: int
    """Uses in one pass."""
    decodes: bool
    """Used for every token?"""
    resident: tuple[int, ...]
    """Numbers of those that stay as they are (0 for a unit by itself); so with the others."""
    packed: tuple[int, ...]
    """That stay encoded."""
    streamed: tuple[int, ...]
    """That are read each time."""
    partly: tuple[int, ...]
    """Of which some tensors stay as they are, and others do not."""


def fold(plan: Plan) -> list[Fold]:
    """Units that are alike, in the order of the first of each."""
    groups: dict[tuple[str, int, int, bool], list[tuple[int, UnitPlan]]] = {}
    for unit in plan.units:
        stack, _, number = unit.name.rpartition(".")
        alone = not number.isdigit()
        key = (unit.name if alone else stack, unit.nbytes, unit.repeats, unit.decodes)
        groups.setdefault(key, []).append((-1 if alone else int(number), unit))
    return [_fold(*key, members) for key, members in groups.items()]


def _fold(
    name: str, nbytes: int, repeats: int, decodes: bool, members: list[tuple[int, UnitPlan]]
) -> Fold:
    found: dict[str, list[int]] = {"resident": [], "packed": [], "streamed": [], "partly": []}
    for number, unit in members:
        found[_kept(unit)].append(max(number, 0))
    return Fold(
        name=name,
        numbers=tuple(number for number, _ in members if number >= 0),
        nbytes=nbytes,
        repeats=repeats,
        decodes=decodes,
        **{kind: tuple(numbers) for kind, numbers in found.items()},
    )


def _kept(unit: UnitPlan) -> str:
    kinds = {run.keep for run in unit.runs if run.nbytes} or {PLAIN}
    if len(kinds) > 1:
        return "partly"
    kept = kinds.pop()
    return "resident" if kept == PLAIN else "streamed" if kept is None else "packed"
