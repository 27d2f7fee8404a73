"""What keeps omnimem from running well on this machine, and what to do about it.

`diagnose` runs every check; each is a small function over a `World`, and one that raises is a
finding of its own. `omnimem doctor` prints what it returns.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from omnimem import _doctor_storage, _doctor_system
from omnimem._doctor_world import Check, State, World

__all__ = ["CHECKS", "Check", "Diagnosis", "State", "World", "diagnose"]

CHECKS: tuple[Callable[[World], Check], ...] = (*_doctor_storage.CHECKS, *_doctor_system.CHECKS)
"""All checks, in the order in which they are told."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What all checks found."""

    directory: str
    """Where a swap file would lie."""
    checks: tuple[Check, ...]

    @property
    def state(self) -> State:
        """The worst of all."""
        return max((check.state for check in self.checks), key=_badness, default="OK")

    def count(self, state: State) -> int:
        """Checks of that state."""
        return sum(check.state == state for check in self.checks)


def diagnose(
    directory: str | os.PathLike[str] | None = None,
    *,
    world: World | None = None,
    checks: Iterable[Callable[[World], Check]] = CHECKS,
) -> Diagnosis:
    """Check this machine. Takes a second or two, and leaves nothing behind.

    Parameters
    ----------
    directory : path, optional
        Where a swap file would lie; by default where a store puts it.
    world : World, optional
        Instead of this machine.
    checks : iterable of callable
        Those to run.

    Returns
    -------
    Diagnosis
        Never an error: a check that raises is a finding, "FAIL", with the error's text.
    """
    world = world or World(directory)
    return Diagnosis(world.directory(), tuple(_run(check, world) for check in checks))


def _run(check: Callable[[World], Check], world: World) -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # fallbacks are findings here
            return check(world)
    except Exception as error:
        name = check.__name__.removeprefix("check_")
        text = " ".join(str(error).split())
        return Check(
            name,
            "FAIL",
            f"the check itself failed: {type(error).__name__}: {text}",
            "report this with the output of: omnimem doctor --json",
        )


def _badness(state: State) -> int:
    return ("OK", "WARN", "FAIL").index(state)
