"""Units: the tensors of a checkpoint grouped by the modules that are loaded as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Tensors that are needed together: one module of the model."""

    name: str
    """Dotted name of the module; empty for parameters of the model itself."""
    tensors: tuple[str, ...]
    """Full tensor names in file order."""


def unit_names(names: Iterable[str]) -> dict[str, str]:
    """Give each parameter name the name of its unit.

    A name is cut at its first component made of digits ("model.layers.3"). A name without one
    loses its last component, the parameter's own name, and then climbs to the parent module as
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
        cut = next((at for at, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
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
