"""Units of a model in use: their blocks, and when their windows come and go.

A unit's first user makes its windows, its last one takes them away. Parameters keep their identity;
what changes is `param.data`. Ctrl-C may strike before any bytecode: what it leaves loaded is let go
by the thread's next hook, or by the next pass of any thread.

Which units there are, and what is kept of them, say `_torch_planned` (a plan that is made once) and
`_torch_managed_units` (units that are told to stay or to go).
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from omnimem import _core
from omnimem._torch_guards import Uncopied
from omnimem._torch_hooks import Hook
from omnimem.store import Store


class Units(Uncopied):
    """A model's blocks in a store, the stream of them, and the parameters that show them."""

    stays = False
    """May all units be in place at once, so that it counts what their hooks cost by themselves?"""

    def __init__(self, group: str, store: Store, timeout: float) -> None:
        self.group = group
        self.modules: list[str] = []
        """Name of each unit, which is that of its module."""
        self.names: list[list[str]] = []
        """Blocks of each unit."""
        self.params: list[tuple[list[nn.Parameter], list[nn.Parameter]]] = []
        """Parameters of each unit, resident and streamed, in the order of their windows."""
        self.stream: _core.Stream
        self._store = store
        self._timeout = timeout
        self._threads: list[_Entered] = []
        self._mine = _Mine(self._threads)
        self._outer: list[set[int]] = []

    def hook(self, model: nn.Module, handles: list[Any]) -> None:
        """Hook the modules that use a streamed unit; add to `handles` as they come."""
        modules = self._modules(model)
        inside = {id(wide): set(map(id, wide.modules())) for group in modules for wide in group}
        self._outer = [set() for _ in modules]
        for unit, group in enumerate(modules):
            for other, others in enumerate(modules):
                if unit != other and any(
                    id(module) in inside[id(wide)] for module in group for wide in others
                ):
                    self._outer[unit].add(other)
        for unit, group in enumerate(modules):
            if not self.params[unit][1]:
                continue
            for module in group:
                hook = Hook(self.stream, unit, self._outer[unit], self._mine, module)
                hook.put(self, handles, short=self.stays)

    def _modules(self, model: nn.Module) -> list[list[nn.Module]]:
        """The modules that use each unit: its own, and those that share a tied parameter of it."""
        owner = {
            id(p): unit for unit, pair in enumerate(self.params) for part in pair for p in part
        }
        modules = [[model.get_submodule(name)] for name in self.modules]
        known = [set(map(id, group[0].modules())) for group in modules]
        for module in model.modules():
            for param in module.parameters(recurse=False):
                unit = owner.get(id(param))
                if unit is not None and id(module) not in known[unit]:
                    modules[unit].append(module)
                    known[unit].add(id(module))
        return modules

    # -- use

    def enter(self, unit: int, leave: int, module: nn.Module) -> None:
        """Before a module that uses a unit, whose hook `leave` is to be the last one."""
        hooks: Any = module._forward_hooks
        if next(reversed(hooks)) != leave:  # those that came after attach see the weights, too
            hooks.move_to_end(leave)
        held = self._mine.held
        while held and held[-1] not in self._outer[unit] and held[-1] != unit:
            self._let_go()  # left loaded by an interrupt
        self._settle()
        self._take(unit, self._timeout)

    def _take(self, unit: int, timeout: float) -> None:
        """Enter a unit, as one more user of it."""
        held = self._mine.held
        before = len(held)
        try:
            if self._get(unit, held, timeout):
                self._bind(unit)
                self.stream.bound(unit)
        except BaseException:
            while len(held) > before:
                self._let_go()
            raise

    def _get(self, unit: int, held: list[int], timeout: float) -> bool:
        """Have a unit's bytes in memory, and the unit noted as held; are its windows to be made?"""
        return self.stream.enter(unit, held, timeout)

    def leave(self, unit: int) -> None:
        """After a module that uses a unit."""
        held = self._mine.held
        while unit in held:
            last = held[-1]
            self._let_go()
            if last == unit:
                break

    def _let_go(self) -> None:
        """Leave the unit that this thread entered last."""
        mine = self._mine
        unit = mine.held[-1]
        # Taken off, left and noted in one call, inside of which no signal handler runs.
        left = map(self.stream.leave, map(mine.held.pop, (-1,)))
        mine.ended.extend(itertools.compress((unit,), left))
        self._settle()

    def _settle(self) -> None:
        """Take away the windows of units that nobody uses any more."""
        ended = self._mine.ended
        while ended:
            self._unbind(ended[-1])
            collections.deque(map(self.stream.unbound, map(ended.pop, (-1,))), maxlen=0)

    def reclaim(self) -> None:
        """Leave what an interrupt left loaded, in this thread or in one that is no more."""
        mine = self._mine
        for entered in list(self._threads):
            thread, held, ended, passes = entered
            if held is mine.held:
                continue
            if not thread.is_alive() and entered in self._threads:
                self._threads.remove(entered)
                mine.held.extend(held)
                mine.ended.extend(ended)
                mine.passes.extend(passes)
        while mine.held:
            self._let_go()
        self._settle()

    def _bind(self, unit: int) -> None:
        """Show what streams of a unit."""
        self._show(unit, resident=False)

    def _unbind(self, unit: int) -> None:
        """Take away what streams of a unit."""
        with torch.inference_mode(False):
            for param in self.params[unit][1]:
                param.data = unset(param.shape, param.dtype)

    def _show(self, unit: int, *, resident: bool) -> None:
        with torch.inference_mode(False):
            capsules = self.stream.windows(unit, resident)
            for param, capsule in zip(self.params[unit][not resident], capsules, strict=True):
                param.data = from_dlpack(capsule)

    # -- ways out

    def unset_all(self) -> None:
        """Unset every parameter, resident ones too."""
        with torch.inference_mode(False):
            for param in itertools.chain.from_iterable(itertools.chain(*self.params)):
                param.data = unset(param.shape, param.dtype)

    def close(self) -> None:
        """Let the blocks go; windows keep their bytes."""
        if hasattr(self, "stream"):
            self.stream.close()


_Entered = tuple[threading.Thread, list[int], list[int], list[Any]]


class _Mine(threading.local):
    """What one thread entered, the innermost last, what it has yet to take away, and its passes.

    All are right at any moment that Ctrl-C can strike: the next hook of the thread goes on there,
    or, when the thread is no more, the next pass of any other.
    """

    def __init__(self, threads: list[_Entered]) -> None:
        self.held: list[int] = []
        self.ended: list[int] = []
        self.passes: list[Any] = []
        self.entered = (threading.current_thread(), self.held, self.ended, self.passes)
        threads.append(self.entered)


def unset(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """One NaN (the least value where there is none) expanded to a shape, on the CPU by default."""
    least = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    # Expanded where it lies: to move what is expanded would fill the shape.
    return torch.full((), least, dtype=dtype, device=device).expand(shape)


def uses_of(model: nn.Module, params: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """In how many modules each parameter is: a tied head is used as often in one pass."""
    shared = Counter(id(param) for _, param in model.named_parameters(remove_duplicate=False))
    return {name: shared[id(param)] for name, param in params.items()}


def materialize(param: nn.Parameter) -> torch.Tensor:
    """Return what `restore` needs; a parameter of the meta device gets a place in memory."""
    if not param.is_meta:
        return param.data
    former = nn.Parameter(unset(param.shape, param.dtype), requires_grad=param.requires_grad)
    torch.utils.swap_tensors(param, former)  # type: ignore[no-untyped-call]
    return former


def restore(param: nn.Parameter, former: torch.Tensor) -> None:
    """Give a parameter what it was before `materialize`."""
    if former.is_meta:
        torch.utils.swap_tensors(param, former)  # type: ignore[no-untyped-call]
    else:
        param.data = former
