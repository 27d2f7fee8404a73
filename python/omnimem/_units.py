"""Units: the tensors of a checkpoint grouped by the modules that are loaded as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_TEXT_FIRST = frozenset({"gemma3", "llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"})
"""Types of models (config.model_type) that look their text up before they look at a picture."""


@dataclass(frozen=True)
class Unit:
    """Tensors that are needed together: one module of the model."""

    name: str
    """Dotted name of the module; empty for parameters of the model itself."""
    tensors: tuple[str, ...]
    """Full tensor names in file order."""


def unit_names(names: Iterable[str]) -> dict[str, str]:
    """Give each parameter name the name of its unit.

    A name is cut at its first component made of digits ("model.layers.3"), but for the last one,
    the parameter's own name. A name without one
    loses its last component, and then climbs to the parent module as
    long as that is no ancestor of a numbered unit ("model.visual.merger.linear_fc1" becomes
    "model.visual.merger").

    Parameters
    ----------
    names : iterable of str
        Full parameter names.

    Returns
    -------
    dict of str to str
        Unit of each name, in the order given.
    """
    split = {name: name.split(".") for name in names}
    numbered: dict[str, str] = {}
    ancestors: set[str] = set()
    for name, parts in split.items():
        owners = enumerate(parts[:-1])
        cut = next((at for at, part in owners if part.isascii() and part.isdigit()), None)
        if cut is not None:
            numbered[name] = ".".join(parts[: cut + 1])
            ancestors.update(".".join(parts[:end]) for end in range(1, cut + 1))
    units: dict[str, str] = {}
    for name, parts in split.items():
        end = len(parts) - 1
        while end > 1 and ".".join(parts[: end - 1]) not in ancestors:
            end -= 1
        units[name] = numbered.get(name, ".".join(parts[:end]))
    return units


def execution_order(units: Iterable[str], config: object) -> list[str]:
    """Sort units by when a pass through the whole model runs them.

    That is the order of the modules, but for what is known of an architecture:

    - The text embedding comes before the vision tower, which is declared first.
    - Qwen3-VL takes features out of its tower: `deepstack_merger_list.K` runs right after the block
      `deepstack_visual_indexes[K]`, not after the last one.

    Parameters
    ----------
    units : iterable of str
        Names in the order of the modules; repeated ones count once.
    config : object
        The model's config, if it has one: `model_type` and `vision_config` are looked at.

    Returns
    -------
    list of str
        Each unit once.
    """
    order = list(dict.fromkeys(units))
    if getattr(config, "model_type", None) in _TEXT_FIRST:
        order.sort(key=lambda name: not name.endswith("embed_tokens"))
    vision = getattr(config, "vision_config", config)
    for number, block in enumerate(getattr(vision, "deepstack_visual_indexes", None) or ()):
        suffix = f"deepstack_merger_list.{number}"
        merger = next((name for name in order if name.endswith(suffix)), None)
        after = merger and f"{merger.removesuffix(suffix)}blocks.{block}"
        if merger in order and after in order:
            order.remove(merger)
            order.insert(order.index(after) + 1, merger)
    return order
