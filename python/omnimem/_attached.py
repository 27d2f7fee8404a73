"""What `model.omnimem` is of a module whose weights an offloader, or a manager, moves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from omnimem.config import format_size

if TYPE_CHECKING:
    from omnimem._offload_models import Entry, Models

__all__ = ["Attached", "Placement"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights of a model are (`Attached.plan`)."""

    weight_bytes: int
    """Of all its weights."""
    host_bytes: int
    """Of them in memory now."""
    room_bytes: int | None
    """Memory that it has been given; None: it is idle, and gives way."""
    state: str
    """"resident", "evictable" (idle in memory), "disk" or "streams"."""


class Attached:
    """The handle of a module: where its weights are, how it is used, and the ways out."""

    def __init__(self, models: Models, entry: Entry) -> None:
        self._models = models
        self._entry = entry

    @property
    def model_id(self) -> str:
        """What the model is called."""
        return self._entry.model_id

    def plan(self) -> Placement:
        """Where the weights are."""
        movable = self._entry.movable
        return Placement(movable.nbytes, movable.host_bytes(), self._entry.room, movable.state)

    def stats(self) -> dict[str, Any]:
        """Counters since the start.

        Keys: those of `Store.group_stats`, of the model's blocks; `uses`, `recent_uses`,
        `last_use`, `next_use` (seconds of `time.monotonic`; None: unknown) and `seconds_between`.
        """
        group = self._models.store.group_stats(self._entry.movable.group)
        use = self._models.use(self._entry.model_id)
        return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)} | {
            "uses": use.uses,
            "recent_uses": use.recent,
            "last_use": use.last or None,
            "next_use": use.next or None,
            "seconds_between": use.gap or None,
        }

    def detach(self) -> Any:
        """Make every parameter an ordinary tensor in memory, and return the model. Idempotent."""
        model = self._entry.model
        if self._models.get(self._entry.model_id) is self._entry:
            self._entry.movable.release()
            self._models.remove(self._entry)
        return model

    release = detach

    def close(self) -> None:
        """For a model that is thrown away: hooks go, parameters are unset. Idempotent."""
        if self._models.get(self._entry.model_id) is self._entry:
            self._entry.movable.close()
            self._models.remove(self._entry)

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._entry.movable.__deepcopy__(memo)  # type: ignore[attr-defined]  # refuses, and says why
        raise AssertionError("a module's weights were copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._entry.movable.__reduce_ex__(protocol)  # type: ignore[arg-type]
        raise AssertionError("a module's weights were pickled")

    def __repr__(self) -> str:
        plan = self.plan()
        return (
            f"<omnimem model {self.model_id!r}: {format_size(plan.host_bytes)} of "
            f"{format_size(plan.weight_bytes)} in memory, {plan.state}>"
        )
