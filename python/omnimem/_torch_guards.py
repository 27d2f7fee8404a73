"""Guards on a model whose weights are not there: they tell who would read or convert them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn


class Uncopied:
    """What modules of a streaming model lead to: `deepcopy` and pickling of them end here."""

    remedy = ""
    """Where the weights are, and what to do about it: the end of a sentence."""

    def _refuse(self, what: str) -> NoReturn:
        """Say that this needs the weights."""
        raise RuntimeError(f"cannot {what} a model whose weights are omnimem's {self.remedy}")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("copy")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("pickle")


class Guards(Uncopied):
    """On every module: `state_dict`, `load_state_dict`, and `_apply`, of which `.to()` is made.

    The state may be read and loaded as long as `there` says that all weights are in place.
    """

    def __init__(self, remedy: str, there: Callable[[], bool] = lambda: False) -> None:
        self.remedy = remedy
        self._there = there
        self._dtypes: set[torch.dtype] = set()
        self._device = "cpu"
        self._handles: list[Any] = []
        self._patched: list[nn.Module] = []

    def put(self, model: nn.Module, dtypes: set[torch.dtype], device: str = "cpu") -> None:
        """Guard all modules of a model that has weights of these types out of place."""
        self._dtypes = dtypes
        self._device = device
        for module in model.modules():
            self._patched.append(module)
            module._apply = partial(self._convert, module._apply)  # type: ignore[method-assign]
            for register in (
                module.register_state_dict_pre_hook,
                module.register_load_state_dict_pre_hook,
            ):
                self._handles.append(register(self._refuse_state))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take all guards away; safe to repeat."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._patched:
            module.__dict__.pop("_apply", None)
        self._patched.clear()

    def _convert(
        self, apply: Callable[..., nn.Module], fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`.to()` that changes nothing is fine, all else needs the weights."""
        if getattr(fn, "__qualname__", "") == "Module.to.<locals>.convert" and all(
            (to := fn(torch.empty(0, dtype=dtype, device=self._device))).dtype == dtype
            and to.device.type == self._device
            for dtype in self._dtypes
        ):
            return getattr(apply, "__self__", None)
        self._refuse("convert or move")

    def _refuse_state(self, *args: Any) -> None:
        if not self._there():
            self._refuse("read or load the state of")
