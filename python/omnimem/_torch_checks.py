"""What the torch face refuses before it changes anything, and why.

Weights are used in place, so a checkpoint must hold the very parameters of the model: the same
names, shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from omnimem import checkpoint
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


def check_fit(
    params: dict[str, nn.Parameter],
    buffers: dict[str, torch.Tensor],
    files: checkpoint.Checkpoint,
    folder: Path,
) -> None:
    lacking = [name for name in params if name not in files]
    if lacking:
        raise FormatError(
            f"{folder}: the checkpoint lacks {len(lacking)} parameters of the model: "
            f"{', '.join(lacking[:5])}"
        )
    for name, param in params.items():
        info = files.info(name)
        if tuple(info.shape) != tuple(param.shape):
            raise FormatError(
                f"{folder}: {name} has shape {tuple(info.shape)} in the checkpoint and "
                f"{tuple(param.shape)} in the model"
            )
        if torch_dtype(info.dtype) != param.dtype:
            raise ValueError(
                f"{folder}: {name} is {info.dtype} in the checkpoint and {param.dtype} in the "
                "model; weights are used in place, without a cast: build the model in the "
                "checkpoint's dtype"
            )
        if param.device.type not in ("cpu", "meta"):
            raise ValueError(f"{name} is on {param.device}; only models on the CPU can stream")
    for name, buffer in buffers.items():
        if buffer.device.type != "cpu":
            raise ValueError(
                f"{folder}: the buffer {name} is on {buffer.device}; buffers are the model's own: "
                "fill it on the CPU, or let omnimem.torch.load build the model"
            )
