"""What the torch face refuses before it changes anything, and why.

Weights are used in place, so a checkpoint must hold the very parameters of the model: the same
shapes and dtypes, and names that `_torch_names` knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from omnimem import checkpoint
from omnimem._plan_layout import quantised
from omnimem._torch_names import parameter_names
from omnimem.errors import FormatError


def infos(files: checkpoint.Checkpoint) -> Iterator[tuple[str, checkpoint.TensorInfo]]:
    return ((name, files.info(name)) for name in files.names())


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {name}")
    return dtype


def main_dtype(files: checkpoint.Checkpoint) -> torch.dtype:
    held: dict[str, int] = {}
    for _, info in infos(files):
        held[info.dtype] = held.get(info.dtype, 0) + info.nbytes
    return torch_dtype(max(held, key=lambda name: held[name]))


def refuse_cast(dtype: torch.dtype | str | None, own: torch.dtype, folder: Path) -> None:
    wanted = torch_dtype(dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if wanted not in (None, "auto", own):
        raise ValueError(
            f"{folder}: dtype={wanted} would need a cast of every weight each time that it is "
            f"read; the checkpoint's own is {own}. Leave dtype out, or convert the checkpoint"
        )


def fit(model: nn.Module, files: checkpoint.Checkpoint, folder: Path) -> checkpoint.Checkpoint:
    """The tensors of a checkpoint that a model uses, under the model's own names.

    Raises
    ------
    FormatError
        A parameter is not there, or has another shape.
    ValueError
        It has another dtype, or would have to be computed; or the model is not on the CPU.
    """
    names = parameter_names(model, files, folder)
    mine = files.renamed(names)
    params = dict(model.named_parameters())
    lacking = [name for name in params if name not in mine]
    if lacking:
        raise FormatError(
            f"{folder}: the checkpoint lacks {len(lacking)} parameters of the model: "
            f"{', '.join(lacking[:5])}{_others(files, names)}; "
            f"{quantised(files, folder) or _remedy(model, lacking)}"
        )
    there = {name: old for old, name in names.items()}
    for name, param in params.items():
        info = mine.info(name)
        told = name if there[name] == name else f"{name} ({there[name]})"
        if tuple(info.shape) != tuple(param.shape):
            why = quantised(files, folder)
            raise FormatError(
                f"{folder}: {told} has shape {tuple(info.shape)} in the checkpoint and "
                f"{tuple(param.shape)} in the model{f'; {why}' if why else ''}"
            )
        if torch_dtype(info.dtype) != param.dtype:
            why = quantised(files, folder) or (
                "weights are used in place, without a cast: build the model in the checkpoint's "
                "dtype"
            )
            raise ValueError(
                f"{folder}: {told} is {info.dtype} in the checkpoint and {param.dtype} in the "
                f"model; {why}"
            )
        if param.device.type not in ("cpu", "meta"):
            raise ValueError(f"{name} is on {param.device}; only models on the CPU can stream")
    for name, buffer in model.named_buffers():
        if buffer.device.type != "cpu":
            raise ValueError(
                f"{folder}: the buffer {name} is on {buffer.device}; buffers are the model's own: "
                "fill it on the CPU, or let omnimem.torch.load build the model"
            )
    return mine


def _others(files: checkpoint.Checkpoint, names: dict[str, str]) -> str:
    others = [name for name in files.names() if name not in names]
    told = f"; of its tensors {len(others)} are no parameters: {', '.join(others[:3])}"
    return told if others else ""


def _remedy(model: nn.Module, lacking: list[str]) -> str:
    if set(lacking) <= set(getattr(model, "all_tied_weights_keys", None) or ()):
        return "they are tied to others: call model.tie_weights() first"
    return "give the folder that this model was saved to"
