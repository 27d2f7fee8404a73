"""What torch calls before and after a module that uses a unit, and, where it can, instead of it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from omnimem import _core
from omnimem._torch_guards import Uncopied

_OWN = {"_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks"}
_OF_ALL = {f"_global{name}" for name in _OWN}
_MODULE: Any = nn.modules.module
_KNOWN = {
    name for name in nn.Module._call_impl.__code__.co_names if name.endswith("_hooks")
} == _OWN | _OF_ALL
"""Are these all the hooks that torch looks at, before it calls `forward` without more ado?"""


class _Users(Protocol):
    """What has the units."""

    remedy: str

    def enter(self, unit: int, leave: int, module: nn.Module) -> None: ...

    def leave(self, unit: int) -> None: ...


class Hook(_core.Hook, Uncopied):
    """Of one module and the unit that it uses; the core counts users as long as all units stay."""

    def __new__(
        cls, stream: _core.Stream, unit: int, outer: set[int], mine: object, module: nn.Module
    ) -> Hook:
        """Have the core count users."""
        others = [vars(_MODULE)[name] for name in sorted(_OF_ALL)] if _KNOWN else []
        tracing = torch._C._get_tracing_state
        return super().__new__(cls, stream, unit, outer, mine, module, tracing, others)

    def __init__(
        self, stream: _core.Stream, unit: int, outer: set[int], mine: object, module: nn.Module
    ) -> None:
        self._unit = unit
        self._module = module

    def put(self, users: _Users, handles: list[Any], *, short: bool) -> None:
        """Hook the module; `short`: and stand in for its `_call_impl`, unless it has its own."""
        self.remedy = users.remedy
        self._users = users
        leave = self._module.register_forward_hook(self.leave, always_call=True)
        handles.append(leave)
        self._last = leave.id
        handles.append(self._module.register_forward_pre_hook(self.enter, prepend=True))
        own = "_call_impl" in self._module.__dict__
        if short and _KNOWN and not own and type(self._module)._call_impl is nn.Module._call_impl:
            handles.append(self)
            self._module._call_impl = self.call  # type: ignore[method-assign]

    def remove(self) -> None:
        """Stand in for `_call_impl` no longer."""
        if self._module.__dict__.get("_call_impl") == self.call:
            del self._module._call_impl

    def come(self, module: nn.Module) -> None:
        """Enter the unit, with all that may take."""
        self._users.enter(self._unit, self._last, module)

    def go(self) -> None:
        """Leave the unit, with all that may take."""
        self._users.leave(self._unit)
