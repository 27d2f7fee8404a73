"""Counters of stores, added up: for `omnimem.track` and `omnimem.metrics`.

All of them are whole numbers, times in ns: sums of seconds would depend on their order, and a
counter that falls by a rounding looks as if it had begun anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from omnimem import _core
from omnimem.errors import ClosedError
from omnimem.store import Store, _open_stores

_TRIES = 100
_ADDING = 2**64 - 1


def _add(total: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, list):
            total[key] = [a + b for a, b in zip(total[key], value, strict=True)]
        else:
            total[key] += value


def totals(stores: Iterable[Store] | None = None) -> dict[str, Any]:
    """Counters of stores; None: of all that this process ever had, so that none ever falls."""
    closed, total = _core._totals_closed()
    if stores is not None:
        empty = {k: [0] * len(v) if isinstance(v, list) else 0 for k, v in total.items()}
        for store in stores:
            _add(empty, store._totals()[0])
        return empty
    for _ in range(_TRIES):
        for store in list(_open_stores):
            try:
                counters, _, is_closed = store._totals()
            except ClosedError:  # of the process that forked this one
                continue
            if not is_closed:
                _add(total, counters)
        now, next_total = _core._totals_closed()
        if closed == now != _ADDING:
            break
        closed, total = now, next_total  # a store was closed meanwhile: it counts once
    return total
