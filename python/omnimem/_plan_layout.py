"""From a checkpoint's headers to the plan of a stream: what `load` does, and `omnimem plan` tells.

A layout says which tensors a model uses, in which order, and how often in one pass. The model
itself knows best (`omnimem.torch.layout`); where none can be built, names tell as much for models
that are named as transformers names them. From a layout on there is one way to a plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omnimem import checkpoint
from omnimem._rates import measure
from omnimem._safetensors import parse_json
from omnimem._units import execution_order, unit_names
from omnimem.errors import FormatError
from omnimem.plan import CODINGS, VISION, Plan, Rates, Tensor, make_plan
from omnimem.store import Store

Compute = Callable[[Store, Sequence[str], str], float]
"""Bytes of weights that a token goes through in a second (`omnimem._rates.measure`)."""

_LITTLE = 32 << 20
_EXPERTS = re.compile(r"\.experts\.|\.block_sparse_moe\.")
_EMBEDDING = re.compile(r"(^|[._])(embed|embeddings?|embed_tokens|shared|wte|wpe)($|[._])")
_FLOATS = re.compile(r"(bfloat16|float(16|32|64))$")
_GENERATES = re.compile(r"For(CausalLM|ConditionalGeneration)$|LMHeadModel$")


@dataclass(frozen=True)
class Layout:
    """What a model uses of its checkpoint."""

    units: dict[str, list[Tensor]]
    """Tensors of each unit, in the order of execution."""
    repeats: dict[str, int]
    """Uses of each unit in one pass: more than one where modules share its weights."""
    files: checkpoint.Checkpoint
    """Has the tensors, under the names that they have here."""


def lay_out(files: checkpoint.Checkpoint, uses: Mapping[str, int], config: object) -> Layout:
    """Group parameters by unit.

    Parameters
    ----------
    files : Checkpoint
        Holds all of them.
    uses : mapping of str to int
        Parameters in the order of the modules, and in how many modules each is.
    config : object
        The model's config (`execution_order`).
    """
    names = unit_names(uses)
    units: dict[str, list[Tensor]] = {u: [] for u in execution_order(names.values(), config)}
    for name, unit in names.items():
        info = files.info(name)
        units[unit].append(Tensor(name, info.file, info.offset, info.nbytes, info.encoded_nbytes))
    return Layout(units, repeats(names, uses), files)


def repeats(units: Mapping[str, str], uses: Mapping[str, int]) -> dict[str, int]:
    """Uses of each unit in one pass, by the unit and the uses of each parameter."""
    found: dict[str, int] = {}
    for name, unit in units.items():
        found[unit] = max(found.get(unit, 1), uses[name])
    return found


def plan_layout(
    layout: Layout, budget: int, compression: str | None, rates_for: Callable[[Plan], Rates]
) -> Plan:
    """The plan for a budget.

    Parameters
    ----------
    layout : Layout
    budget : int
        Bytes for weights, the ring included.
    compression : str or None
        "auto", "fast", "balanced", or None (`make_plan`).
    rates_for : callable
        Measures for a plan that keeps nothing encoded; called where that is worth it.

    Raises
    ------
    LimitError
        The budget is below the least that this model needs.
    """
    plan = make_plan(layout.units.items(), budget, layout.repeats)
    if compression is None or plan.stream_bytes <= (_LITTLE if compression == "auto" else 0):
        return plan  # a token reads nothing, or too little to be worth the measuring
    rates = rates_for(plan)
    return make_plan(layout.units.items(), budget, layout.repeats, compression, rates)


def measure_plan(
    plan: Plan,
    files: checkpoint.Checkpoint,
    compression: str | None,
    compute: Compute,
    io_backend: str,
) -> Rates:
    """Rates of this machine on what the plan streams, or on the whole where it streams nothing."""
    used = [unit for unit in plan.units if unit.decodes] or list(plan.units)
    mine = [unit for unit in used if unit.streamed_bytes] or used
    tensors = [tensor for unit in mine for tensor in unit.tensors if tensor.nbytes]
    codings = CODINGS if compression == "auto" else (compression,) if compression else ()
    return measure(
        tensors,
        [files.info(tensor.name).dtype for tensor in tensors],
        codings,
        compute,
        memory_bytes=plan.budget_bytes,
        io_backend=io_backend,
    )


# -- folders ---------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says."""
    path = folder / "config.json"
    return parse_json(path.read_bytes(), path, "config")


def class_name(config: Mapping[str, Any]) -> str:
    """The model's class, as diffusers or transformers write it; "": the config does not say."""
    return str(config.get("_class_name") or (config.get("architectures") or [""])[0])


def library_of(config: Mapping[str, Any]) -> str:
    """Which library has the model's class: "diffusers" or "transformers"."""
    return "diffusers" if "_class_name" in config else "transformers"


def generates(model: str) -> bool:
    """Does a model of this class generate tokens, one a pass?"""
    return bool(_GENERATES.search(model))


def check_folder(files: checkpoint.Checkpoint, folder: Path) -> None:
    """Refuse what no model can be built from.

    Raises
    ------
    FormatError
        There is no config.json, or there are no tensors.
    ValueError
        A mixture of experts, or quantised weights.
    """
    if not (folder / "config.json").is_file():
        raise FormatError(
            f"{folder}: has no config.json, which says what model the weights are of; name the "
            "model's folder, or fetch the file"
        )
    if not len(files):
        raise FormatError(f"{folder}: holds no tensors; fetch the checkpoint again")
    refuse_experts(files, folder)
    if why := quantised(files, folder):
        raise ValueError(f"{folder}: {why}")


def quantised(files: checkpoint.Checkpoint, folder: Path) -> str:
    """What to say of a checkpoint whose weights were quantised; empty for others."""
    if not (folder / "config.json").is_file():
        return ""
    scheme = read_config(folder).get("quantization_config")
    coded = (name for name in files.names() if not _FLOATS.match(files.info(name).dtype))
    if not isinstance(scheme, dict) or (name := next(coded, None)) is None:
        return ""
    return (
        f"the checkpoint is quantised ({scheme.get('quant_method', 'by a scheme of its own')}): "
        f"{name} is {files.info(name).dtype}, and would have to be dequantised; take the "
        "checkpoint that it was made from, or have transformers load it dequantised, once, and "
        "write it with model.save_pretrained(NEW_FOLDER, save_original_format=False)"
    )


def refuse_experts(files: checkpoint.Checkpoint, folder: Path) -> None:
    """Raise ValueError for a mixture of experts."""
    expert = next((name for name in files.names() if _EXPERTS.search(name)), None)
    if expert is not None:
        raise ValueError(
            f"{folder}: a mixture of experts ({expert}) is not supported; only dense models are"
        )


def layout_of_names(files: checkpoint.Checkpoint, folder: Path) -> Layout:
    """The layout as names and config.json tell it: no torch, no model.

    Embeddings come first, then the numbered layers, then norms; a vision tower before the text
    model, the head last. A head that is the embedding, by the config or because there is no other,
    is used with it.

    Raises
    ------
    FormatError
        config.json is no JSON object.
    """
    config = read_config(folder)
    names = {name: _place(unit) for name, unit in unit_names(files.names()).items()}
    ordered = sorted(names, key=lambda name: names[name])
    heads = [name for name in ordered if name.rpartition(".")[0].endswith("lm_head")]
    tied = _tied(config, has_head=bool(heads))
    uses = {name: 1 for name in ordered if not (tied and name in heads)}
    for name in uses:
        owner = name.rpartition(".")[0]
        if tied and owner.rpartition(".")[2] in ("embed_tokens", "wte"):
            uses[name] = 2
    return lay_out(files, uses, _object(config))


def _place(unit: str) -> tuple[bool, bool, int, list[tuple[int, str]]]:
    """Sorts units as transformers' modules are declared."""
    parts = unit.split(".")
    kind = 0 if _EMBEDDING.search(unit) else 1 if parts[-1].isdigit() else 2
    natural = [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
    return len(parts) == 1 and kind == 2, not VISION.search(unit), kind, natural


def _tied(config: Mapping[str, Any], *, has_head: bool) -> bool:
    """Is the embedding the head as well?"""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return not has_head and generates(class_name(config))


def _object(config: Mapping[str, Any]) -> Any:
    """Keys as attributes, as a config of transformers has them."""
    return json.loads(json.dumps(config), object_hook=lambda part: SimpleNamespace(**part))
