"""Models of diffusers without their bytes: modules and parameters, for a plan."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from omnimem import checkpoint
from omnimem._plan_layout import class_name, read_config
from omnimem._torch_checks import torch_dtype


def outline(files: checkpoint.Checkpoint, folder: Path) -> nn.Module:
    """Build the model of a folder with parameters of the meta device; it is not to be run.

    They have the types that they have in the checkpoint. Buffers are left out: they are computed,
    and no part of a plan.

    Raises
    ------
    ValueError
        diffusers has no class of this name.
    """
    import diffusers

    config = read_config(folder)
    name = class_name(config)
    model_class = getattr(diffusers, name, None)
    if model_class is None:
        raise ValueError(
            f"{folder}/config.json: diffusers {diffusers.__version__} has no class {name!r}"
        )
    with torch.device("meta"):
        model: nn.Module = model_class.from_config(config)
    for module in model.modules():
        module._buffers.clear()
    for name, param in model.named_parameters():
        if name in files:
            param.data = param.data.to(torch_dtype(files.info(name).dtype))
    return model
