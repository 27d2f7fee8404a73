"""The parts of a folder that hold weights: a model by itself, or those of a diffusers pipeline.

A pipeline's folder has a model_index.json, which names its parts, and a folder for each. Its parts
run one after another, and each is a model like any other: a group of blocks of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from omnimem import checkpoint
from omnimem._safetensors import parse_json
from omnimem.errors import FormatError

_INDEX = "model_index.json"


@dataclass(frozen=True)
class Parts:
    """What a folder holds."""

    model: str
    """Class of the pipeline; "": a model by itself."""
    folders: dict[str, Path]
    """Of each part with weights, in the order of use; a model by itself has no name."""


def parts_of(folder: str | os.PathLike[str]) -> Parts:
    """Tell the parts of a folder; of a pipeline's, those that have a config.json are models.

    Raises
    ------
    FormatError
        model_index.json is no JSON object, or no part of it is a model.
    """
    place = Path(folder)
    index = place / _INDEX
    if not index.is_file():
        return Parts("", {"": place})
    named = parse_json(index.read_bytes(), index, "index")
    found = [
        child.name
        for child in place.iterdir()
        if isinstance(named.get(child.name), list) and (child / "config.json").is_file()
    ]
    if not found:
        raise FormatError(f"{index}: names no part that has a config.json; fetch the folder again")
    return Parts(
        str(named.get("_class_name", "")), {name: place / name for name in sorted(found, key=_turn)}
    )


def weight_bytes(parts: Parts) -> int:
    """Bytes of all tensors, decoded."""
    total = 0
    for folder in parts.folders.values():
        with checkpoint.open(folder) as files:
            total += files.total_bytes
    return total


def _turn(name: str) -> tuple[int, str]:
    """When a pipeline uses a part: what encodes text, or pictures, what denoises, what decodes."""
    if "encoder" in name:
        return 0 if "text" in name else 1, name
    if any(word in name for word in ("vae", "movq", "vq")):
        return 3, name
    return 4 if name in ("safety_checker", "vocoder") else 2, name
