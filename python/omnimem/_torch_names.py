"""Which tensor of a checkpoint is which parameter of a module.

The names are the same, but for a model of transformers: that also loads what an earlier version
named otherwise, and what was saved without a head, or with one that it has not. Names follow its
own rules here, the ones it registers for the model (`transformers.conversion_mapping`), so that a
tensor is where its loader would put it. What the loader would compute a parameter from is refused.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from omnimem import checkpoint


def parameter_names(model: nn.Module, files: checkpoint.Checkpoint, folder: Path) -> dict[str, str]:
    """Give tensors of a checkpoint the names that a module has for them.

    Returns
    -------
    dict of str to str
        Names in the checkpoint to those of `named_parameters`, and of buffers that are saved, one
        to one. A tied parameter may be in the checkpoint under any of its names; its own one wins.
        Tensors that are none of the module's are left out.

    Raises
    ------
    ValueError
        transformers would compute a parameter when it loads the checkpoint: there is no tensor to
        use in place.
    """
    shared = dict(model.named_parameters(remove_duplicate=False))
    first = {id(param): name for name, param in model.named_parameters()}
    own = {name: first[id(param)] for name, param in shared.items()}
    for name in model.state_dict():
        own.setdefault(name, name)
    if _is_of_transformers(model):
        found = _renamed(model, own, files, folder)
    else:
        found = {name: name for name in files.names() if name in own}
    tensors = {key: name for key, name in found.items() if own[key] == key}
    for key, name in found.items():
        tensors.setdefault(own[key], name)
    return {name: key for key, name in tensors.items()}


def _is_of_transformers(model: nn.Module) -> bool:
    modeling: Any = sys.modules.get("transformers.modeling_utils")  # a model of it has imported it
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _renamed(
    model: Any, own: dict[str, str], files: checkpoint.Checkpoint, folder: Path
) -> dict[str, str]:
    """Where transformers' loader puts each tensor; the first one, where it has two for a place."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model, hf_quantizer=getattr(model, "hf_quantizer", None))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    found: dict[str, str] = {}
    for name in sorted(files.names(), key=dot_natural_key):
        key, computed = rename_source_key(name, renamings, converters, prefix, own)
        if key not in own and name in own:
            key, computed = rename_source_key(name, [], [], prefix, own)
        if key in own and computed is not None:
            rule = next(each for each in converters if computed in each.source_patterns)
            raise ValueError(_of_computed(model, name, key, rule, folder))
        if key in own:
            found.setdefault(key, name)
    return found


def _of_computed(model: nn.Module, name: str, key: str, rule: Any, folder: Path) -> str:
    kind = type(model).__name__
    steps = ", ".join(map(str, rule.operations))
    return (
        f"{folder}: {name} is no parameter of {kind}; transformers computes {key} of it when it "
        f"loads the checkpoint ({steps}), and weights are used in place. Have them computed once: "
        f"{kind}.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained(NEW_FOLDER, "
        "save_original_format=False), and use that folder"
    )
