"""The handle of a streaming model: what users ask it, and the ways out."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from typing import Any

import torch
from torch import nn

from omnimem import checkpoint
from omnimem._torch_guards import Guards, Uncopied
from omnimem._torch_planned import PlannedUnits
from omnimem._torch_units import materialize, restore
from omnimem.config import format_size
from omnimem.plan import Plan
from omnimem.store import Store


def _remedy(plan: Plan) -> str:
    return (
        f"({format_size(plan.prefill_bytes)} of them on disk); call model.omnimem.detach() first, "
        "which gives the model memory of its own for all of them"
    )


_RECENT = 32
"""Passes that the mean of bytes a pass looks at."""


class Streamed(Uncopied):
    """What `model.omnimem` is: the plan, what happened, and the ways out.

    Thread safe: threads may call the model at once; a unit's windows are made by the first and
    taken away by the last.
    """

    def __init__(
        self,
        model: nn.Module,
        params: dict[str, nn.Parameter],
        files: checkpoint.Checkpoint,
        plan: Plan,
        store: Store,
        own_store: Store | None,
        timeout: float,
    ) -> None:
        self._model = model
        self._plan = plan
        self._store = store
        self._own_store = own_store
        self._units = PlannedUnits(plan, store, timeout)
        self._units.remedy = self.remedy = _remedy(plan)
        self._guards = Guards(self.remedy)
        self._handles: list[Any] = []
        self._ended = False
        self._passes = 0
        self._recent_bytes: deque[int] = deque(maxlen=_RECENT)
        self._pass_bytes = self._seen_bytes = 0
        self._pass_started = self._pass_seconds = self._pass_stall = self._seen_stall = 0.0
        before: list[tuple[nn.Parameter, torch.Tensor]] = []
        try:
            self._units.load(params, files)
            with torch.inference_mode(False):
                for param in params.values():
                    before.append((param, materialize(param)))
            self._units.bind()
            self._hook()
        except BaseException:
            self._unhook()
            for param, former in before:
                restore(param, former)
            self._release()
            raise
        model.omnimem = self  # type: ignore[assignment]

    # -- hooks

    def _hook(self) -> None:
        self._units.hook(self._model, self._handles)
        # Put before the hooks of a unit that is the model itself: a pass begins with nothing held.
        begin = self._model.register_forward_pre_hook(self._begin_pass, prepend=True)
        self._handles.append(begin)
        self._handles.append(self._model.register_forward_hook(self._end_pass, always_call=True))
        if self._plan.streams:
            streamed = {param.dtype for _, part in self._units.params for param in part}
            self._guards.put(self._model, streamed)

    def _unhook(self) -> None:
        self._guards.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin_pass(self, module: nn.Module, args: Any) -> None:
        self._units.reclaim()
        self._pass_started = time.perf_counter()

    def _end_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        seconds = time.perf_counter() - self._pass_started
        stats = self._units.stream.stats()
        self._pass_bytes = stats["read_bytes"] - self._seen_bytes
        self._seen_bytes = stats["read_bytes"]
        self._pass_stall = stats["stall_seconds"] - self._seen_stall
        self._seen_stall = stats["stall_seconds"]
        self._pass_seconds = seconds
        if self._passes:
            self._recent_bytes.append(self._pass_bytes)
        self._passes += 1

    def __repr__(self) -> str:
        plan = self._plan
        return (
            f"<omnimem.torch.Streamed: {format_size(plan.resident_bytes)} of "
            f"{format_size(plan.weight_bytes)} resident, ring {format_size(plan.ring_bytes)}>"
        )

    # -- what users ask

    def plan(self) -> Plan:
        """What stays, what streams, and the seconds that a decode pass should take.

        `seconds_per_pass` is the larger of two times: reading the bytes of a decode pass at the
        rate measured so far (loading the residents counts), and the compute time of the last pass
        (0 before the first one) with decoding at the rate measured so far. Before anything was
        measured: as it was planned.
        """
        stats = self.stats()
        rate, decoding = stats["read_bytes_per_second"], stats["decode_bytes_per_second"]
        if not rate or (self._plan.decode_bytes and not decoding):
            return self._plan
        busy = max(self._pass_seconds - self._pass_stall, 0.0)
        if self._plan.decode_bytes:
            busy += self._plan.decode_bytes / decoding
        reading = self._plan.stream_bytes / rate
        return dataclasses.replace(
            self._plan,
            seconds_per_pass=max(busy, reading),
            packed_bytes=stats["packed_bytes"],
        )

    def stats(self) -> dict[str, Any]:
        """Counters since the start.

        Keys: `passes`, `bytes_read`, `bytes_per_pass` (mean of the last passes, without the first
        one: what is fetched ahead counts in the pass before the one that uses it),
        `bytes_last_pass`, `seconds_last_pass`, `stall_seconds`,
        `stall_last_pass`, `read_bytes_per_second` (of the device while it reads), `enters`,
        `packed_bytes` (memory of what stays encoded), `bytes_decoded`, `decode_bytes_per_second`
        (without the first time of each block, when it is compared with its checksum),
        `hits` (streamed units whose bytes were there), `mispredicted`, `resident_bytes`,
        `used_bytes`, `peak_bytes`, `exported_bytes`, `io_backend`, `io_reason`.
        """
        own, store = self._units.stream.stats(), self._store.stats()
        busy = store.read_busy_seconds
        return {
            "passes": self._passes,
            "bytes_read": own["read_bytes"],
            "bytes_per_pass": (
                round(sum(self._recent_bytes) / len(self._recent_bytes))
                if self._recent_bytes
                else self._pass_bytes
            ),
            "bytes_last_pass": self._pass_bytes,
            "seconds_last_pass": self._pass_seconds,
            "stall_seconds": own["stall_seconds"],
            "stall_last_pass": self._pass_stall,
            "read_bytes_per_second": store.read_bytes / busy if busy else None,
            "packed_bytes": own["packed_bytes"],
            "bytes_decoded": own["decoded_bytes"],
            "decode_bytes_per_second": (
                own["timed_bytes"] / own["timed_seconds"] if own["timed_seconds"] else None
            ),
            "enters": own["enters"],
            "hits": own["hits"],
            "mispredicted": own["mispredicted"],
            "resident_bytes": self._plan.resident_bytes,
            "used_bytes": store.host.used_bytes,
            "peak_bytes": store.host.peak_bytes,
            "exported_bytes": store.exported_bytes,
            "io_backend": store.io_backend,
            "io_reason": store.io_reason,
        }

    # -- ways out

    def detach(self) -> nn.Module:
        """Make every parameter an ordinary tensor in memory; hooks go, an own store closes.

        What streams is copied first, a block at a time; then each resident block goes as soon as
        its copy is there. So the model takes no more memory than its weights and the ring at any
        moment. (A shared store keeps what it gets back for its other blocks.) When a weight cannot
        be read, its error is raised and the model streams on; when copying a resident one fails,
        the model has all its weights, and another call goes on.
        """
        if self._ended:
            return self._model
        with torch.inference_mode(False):
            if self._handles:
                self._units.reclaim()
                for param, tensor in list(self._units.copies()):
                    param.data = tensor
                self._unhook()
            # What is left of the store are the windows on resident blocks: a block's last one
            # takes its memory along.
            self._units.close()
            if self._own_store is not None:
                self._own_store.close()
            for names, (resident, _) in zip(self._units.names, self._units.params, strict=True):
                for param in resident:
                    param.data = param.data.clone()
                self._remove(names)
        self._release()
        return self._model

    def close(self) -> None:
        """For a model that is thrown away: hooks go, parameters are unset, an own store closes."""
        if self._ended:
            return
        self._unhook()
        self._units.unset_all()
        self._release()

    def _release(self) -> None:
        self._units.close()
        if self._own_store is not None:
            self._own_store.close()
        for names in self._units.names:
            self._remove(names)
        if getattr(self._model, "omnimem", None) is self:
            del self._model.omnimem
        self._ended = True

    def _remove(self, names: list[str]) -> None:
        """Take blocks out of a shared store; safe to repeat."""
        if self._own_store is None:
            for name in names:
                if name in self._store:
                    self._store.remove(name)
