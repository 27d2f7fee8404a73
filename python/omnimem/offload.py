"""AutomaticOffloader: models that give their memory up when it is short, and come back in time."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from omnimem import _core
from omnimem._offload_choice import (
    Memory,
    OffloadDecision,
    comes_back,
    plan_offloads,
    plan_restores,
    presses,
    restore,
    wanted,
)
from omnimem._offload_models import Entry, Models, group_of, memory_of
from omnimem._storage import open_store
from omnimem.config import OffloadConfig, _one_of, format_size
from omnimem.errors import ClosedError, Error, LimitError
from omnimem.store import Store

if TYPE_CHECKING:
    from omnimem._managed import Movable, Moved
    from omnimem.monitor import MemoryMonitor

__all__ = ["AutomaticOffloader", "OffloadDecision"]

log = logging.getLogger("omnimem.offload")

_KEPT = 256
"""Decisions that `decisions` remembers."""


class AutomaticOffloader:
    """Moves models out of memory when it is short, and back before they are used.

    A model is a `torch.nn.Module`, a mapping of names to DLPack tensors, or its id. Ids need no
    registration: usage is recorded for any, and decided on; only moving needs the model itself.

    Parameters
    ----------
    memory_monitor : MemoryMonitor
        Says how short memory is.
    config : OffloadConfig, optional
    store : Store, optional
        Where weights go; by default one of its own, which writes to the user's cache directory.

    Attributes
    ----------
    monitor : MemoryMonitor
    config : OffloadConfig
    offload_threshold, restore_threshold : float
        Of the configuration.
    decisions : deque of OffloadDecision
        What was done of late, by itself or by a call, the last one last.

    Notes
    -----
    Thread safe. A context manager: leaving it is `close`. `start` lets it act by itself, on a
    thread that waits for the monitor's samples.
    """

    def __init__(
        self,
        memory_monitor: MemoryMonitor,
        config: OffloadConfig | None = None,
        *,
        store: Store | None = None,
    ) -> None:
        self.config = OffloadConfig() if config is None else config
        if not isinstance(self.config, OffloadConfig):
            raise TypeError(f"config must be an OffloadConfig, not {type(config).__name__}")
        if not hasattr(memory_monitor, "_core"):
            raise TypeError(
                f"memory_monitor must be a MemoryMonitor, not {type(memory_monitor).__name__}"
            )
        self.monitor = memory_monitor
        self.offload_threshold = self.config.offload_threshold
        self.restore_threshold = self.config.restore_threshold
        self.decisions: deque[OffloadDecision] = deque(maxlen=_KEPT)
        self._core = memory_monitor._core
        self._interval = float(memory_monitor.config.monitoring_interval)
        self._pressed: dict[str, bool] = {}
        """By home of models: is its memory short?"""
        self._closed = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._owns = store is None
        self._store = open_store(max(_core.memory()[0], 1 << 20)) if store is None else store
        self._models = Models(self._store, self.config.usage_window)
        _open_offloaders.add(self)

    # -- models ----------------------------------------------------------------------------------

    def register(
        self,
        model: Any,
        model_id: str | None = None,
        *,
        model_dir: str | os.PathLike[str] | None = None,
    ) -> str:
        """Make a model known, so that it can be moved.

        Parameters
        ----------
        model : torch.nn.Module or mapping of str to DLPack tensor
        model_id : str, optional
            What it is called; by default its class and a number.
        model_dir : path, optional
            The checkpoint that its weights come from: they are read from there, and never written.

        Returns
        -------
        str
            Its id.

        Raises
        ------
        ValueError
            Another model has this id, or the model has another one.
        TypeError
            It is neither a module nor a mapping.
        """
        self._alive()
        known = self._models.known(model)
        if known is None:
            try:
                return self._models.add(model, model_id, model_dir).model_id
            except LimitError:  # it comes to memory as it is used
                entry = self._models.add(model, model_id, model_dir, resident=False)
                _stir(self._core)
                return entry.model_id
        if model_id not in (None, known.model_id):
            raise ValueError(f"this model is registered as {known.model_id!r}, not {model_id!r}")
        return known.model_id

    def unregister(self, model: Any) -> None:
        """Make a model an ordinary one again: all its weights in memory, nothing of it here.

        Raises
        ------
        KeyError
            It is not registered.
        """
        entry = self._find(model)
        entry.movable.release()
        self._models.remove(entry)

    def _attach(
        self,
        model: Any,
        model_id: str | None,
        model_dir: str | os.PathLike[str] | None,
        cap: int | None,
        on_use: Callable[[Movable], None],
    ) -> None:
        """Register a model that gets its memory when it is used."""
        self._alive()
        if self._models.known(model) is not None:
            raise ValueError(f"this model is attached already, as {self._id_of(model)!r}")
        entry = self._models.add(model, model_id, model_dir, resident=False)
        _stir(self._core)
        entry.cap = cap
        if entry.movable.home == "cpu":  # the budget is one of RAM
            entry.movable.on_use = on_use

    def record_usage(self, model: Any) -> None:
        """Say that a model is used now. A registered module says so itself when it is called."""
        group = group_of(self._id_of(model))
        self._store.use_begin(group)
        self._store.use_end(group)

    # -- decisions -------------------------------------------------------------------------------

    def should_offload(self, model: Any) -> OffloadDecision:
        """Say whether a model should give its memory up now, and why.

        Returns
        -------
        OffloadDecision
            True for "offload". `reason` says what speaks for it, or against.
        """
        name = self._id_of(model)
        home = self._models.home(name)
        memory, now = self._memory(home), time.monotonic()
        names = {name, *(entry.model_id for entry in self._models if entry.movable.home == home)}
        models = [self._models.describe(each, now) for each in names]
        pressed = presses(memory, self.config, self._pressed.get(home, False))
        return plan_offloads(memory, models, self.config, now, pressed)[name]

    def offload_model(
        self, model: Any, target_device: str = "cpu", timeout: float = 30.0
    ) -> OffloadDecision:
        """Let a model's memory go; called or read, it comes back by itself.

        Parameters
        ----------
        model : model or id
            A model that is not registered yet is.
        target_device : str
            "cpu": weights on a GPU move to RAM; those in RAM stay until their memory is needed.
            "disk": the memory is back with the system when this returns. What came from a
            checkpoint goes for nothing; else it is written first.
        timeout : float
            Seconds.

        Returns
        -------
        OffloadDecision
            "offload", with the bytes, and who holds some of them still; or "none" where it cannot
            be done or failed: then the model is as it was.

        Raises
        ------
        KeyError
            An id that is not registered.
        ValueError
            Another target.
        """
        _one_of("target_device", target_device, ("cpu", "disk"))
        return self._offload(self._find(model), target_device, timeout, "asked for")

    def restore_model(
        self, model: Any, target_device: str | None = None, timeout: float = 30.0
    ) -> OffloadDecision:
        """Bring a model back to memory, or let it stream what there is no room for.

        Returns
        -------
        OffloadDecision
            "restore"; or "stream" where memory in use would reach `offload_threshold`, or the
            store's limit does not allow it: then the model takes what room there is, and reads the
            rest whenever it is called. "none": all of it was in memory.

        Raises
        ------
        KeyError
            An id that is not registered.
        CorruptError, IOFailure
            Its weights cannot be read, or their file is not what it was.
        """
        entry = self._find(model)
        now = time.monotonic()
        known = self._models.describe(entry.model_id, now)
        if not known.missing_bytes and entry.movable.state == "resident":
            return self._note(
                OffloadDecision(
                    action="none",
                    model_id=known.model_id,
                    reason=f"all of {known.model_id!r} is in memory",
                    usage=self._memory(entry.movable.home).usage,
                    at=now,
                )
            )
        memory, at_home = self._memory(entry.movable.home), entry.movable.home == "cpu"
        with self._models.sharing:
            room, idle = None, 0
            if at_home and known.missing_bytes > self._models.spare():
                self._models.rest(entry)
            if at_home:
                room, idle = self._room(entry), self._models.idle(entry)
            decision = restore(known, memory, self.config, now, room, idle)
            trouble = self._give(entry, decision)
        if trouble:
            return self._note(replace(decision, nbytes=0, reason=trouble))
        return self._bring(entry, decision, target_device, timeout)

    # -- by itself -------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Does it act by itself?"""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Act by itself from now on; nothing happens with `enable_auto_offload=False`."""
        self._alive()
        if self.running or not self.config.enable_auto_offload:
            return
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=_watch,
            args=(
                weakref.ref(self, partial(_stir, self._core)),
                self._core,
                self._stopping,
                self._interval,
                self.offload_threshold,
            ),
            name="omnimem-offload",
            daemon=True,
        )
        self._thread.start()

    def stop(self) -> None:
        """Act no more by itself; what is under way is finished. Idempotent."""
        thread, self._thread = self._thread, None
        self._stopping.set()
        if thread is None or thread is threading.current_thread():
            return
        with suppress(ClosedError):
            self._core.sample()  # one that is asked for wakes who waits
        thread.join()

    def close(self) -> None:
        """Stop, and let all models go. Idempotent.

        A model without a checkpoint gets its weights back as ordinary tensors, since they are
        nowhere else. One with a checkpoint is left without weights: `unregister` it before if it
        is to be used on.
        """
        if self._closed:
            return
        self.stop()
        self._closed = True
        failed: BaseException | None = None
        for entry in self._models:
            try:
                entry.let_go()
                self._models.remove(entry)
            except ClosedError:
                continue  # of a fork, or the store was closed first
            except (Error, OSError, MemoryError) as error:
                failed = error
        if self._owns:
            self._store.close()
        if failed is not None:
            raise failed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "running" if self.running else "stopped"
        return f"<omnimem.AutomaticOffloader, {state}, {len(self._models)} models>"

    def _step(self, report: Mapping[str, Any]) -> float:
        """Act on one sample; seconds that it needs no other one, unless memory gets short."""
        homes = {"cpu", *(entry.movable.home for entry in self._models)}
        return min(self._step_at(home, memory_of(report, home)) for home in homes)

    def _step_at(self, home: str, memory: Memory) -> float:
        """Act on what a sample says of the memory where models are at home; see `_step`."""
        pressed = presses(memory, self.config, self._pressed.get(home, False))
        self._pressed[home] = pressed
        mine = [entry for entry in self._models if entry.movable.home == home]
        quiet = not wanted(memory, self.config, pressed)[0]
        if quiet:  # none has to go: may one come back?
            mine = [entry for entry in mine if entry.movable.missing_bytes()]
        if not mine:
            return math.inf if quiet else 0.0
        if quiet and memory.usage >= self.config.restore_threshold:
            return 0.0
        now = time.monotonic()
        models = [self._models.describe(entry.model_id, now) for entry in mine]
        for decision in plan_offloads(memory, models, self.config, now, pressed).values():
            entry = self._models.get(decision.model_id)
            if decision and entry is not None:
                self._offload(entry, entry.target, 30.0, decision.reason)
        if pressed:
            return 0.0
        spare = max(self._models.spare(), 0) if home == "cpu" else None
        for decision in plan_restores(memory, models, self.config, now, spare).values():
            entry = self._models.get(decision.model_id)
            # What would only stream does so when it is called.
            if decision.action == "restore" and entry is not None:
                self._fetch(entry, decision)
        return min(comes_back(model, now) for model in models) if quiet else 0.0

    def _fetch(self, entry: Entry, decision: OffloadDecision) -> None:
        """Bring a model back ahead of its use.

        Unless another one took the room meanwhile, or somebody let the model go.
        """
        with self._models.sharing:
            if entry.moved_since(decision.at):
                return
            if entry.movable.home == "cpu":
                entry.room = entry.movable.nbytes
                if self._models.spare() < 0:
                    entry.room = None
                    return
            self._give(entry, decision)
        with suppress(Error, OSError, MemoryError):  # told already, and counted
            self._bring(entry, decision, None, 30.0)

    def _offload(self, entry: Entry, target: str, timeout: float, why: str) -> OffloadDecision:
        usage, now = self._memory(entry.movable.home).usage, time.monotonic()
        stays = self._models.stays(entry) if target == "disk" else ""
        moved = stays or entry.offload(target, timeout)
        if isinstance(moved, str):
            failed = OffloadDecision(
                action="none", model_id=entry.model_id, reason=moved, usage=usage, at=now
            )
            return self._note(failed)
        return self._note(
            OffloadDecision(
                action="offload",
                model_id=entry.model_id,
                reason=f"{why}{_holders(moved)}",
                nbytes=moved.nbytes,
                usage=usage,
                held=moved.held,
                at=now,
            )
        )

    @staticmethod
    def _give(entry: Entry, decision: OffloadDecision) -> str:
        """Give a model what was decided; what keeps it from streaming in that, as text."""
        streams = decision.action == "stream"
        movable = entry.movable
        here = movable.host_bytes() if movable.home == "cpu" else movable.home_bytes()
        room = here + decision.nbytes if streams else movable.nbytes
        try:
            entry.give(room)
        except LimitError as error:
            if not streams:
                raise
            return f"{decision.reason} as the store has room, a unit at a time: {error}"
        return ""

    def _bring(
        self, entry: Entry, decision: OffloadDecision, target: str | None, timeout: float
    ) -> OffloadDecision:
        moved = entry.fetch(target, timeout)
        action = "stream" if moved.streams else "restore"
        return self._note(replace(decision, action=action, nbytes=moved.nbytes, held=moved.held))

    def _note(self, decision: OffloadDecision, level: int = logging.INFO) -> OffloadDecision:
        self.decisions.append(decision)
        if decision:
            _stir(self._core)
            log.log(level, "%s %r: %s", decision.action, decision.model_id, decision.reason)
        return decision

    def _note_quietly(self, decision: OffloadDecision) -> None:
        self._note(decision, logging.DEBUG)

    # -- what is known ---------------------------------------------------------------------------

    def _alive(self) -> None:
        if self._closed:
            raise ClosedError("this offloader is closed")

    def _id_of(self, model: Any) -> str:
        self._alive()
        return model if isinstance(model, str) else self.register(model)

    def _find(self, model: Any) -> Entry:
        return self._models.find(self._id_of(model))

    def _memory(self, home: str = "cpu") -> Memory:
        """Of the monitor's last sample while it looks by itself; else of one taken now."""
        report = self._core.report() if self._core.running else self._core.sample()
        return memory_of(report, home)

    def _room(self, entry: Entry) -> int:
        """What the store's limit leaves for what is missing of a model."""
        return max(self._models.room(entry) - entry.movable.host_bytes(), 0)

    def _most(self, entry: Entry) -> int:
        """Memory that a model may have until `offload_threshold` is reached."""
        free = self._memory().room(self.config.offload_threshold)
        return entry.movable.host_bytes() + free + self._models.idle(entry)


def _holders(moved: Moved) -> str:
    if not moved.held:
        return ""
    names = ", ".join(f"{name} ({format_size(nbytes)})" for name, nbytes in moved.held)
    return f"; held by others, and gone with their last holder: {names}"


def _stir(core: Any, _: object = None) -> None:
    """Have an offloader's thread look: models are elsewhere now, or it is gone."""
    with suppress(ClosedError):
        core.stir()


def _watch(
    owner: weakref.ref[AutomaticOffloader],
    core: Any,
    stopping: threading.Event,
    interval: float,
    least: float,
) -> None:
    """The thread: acts on samples, and takes one itself where the monitor does not."""
    number = stirs = 0
    pause = 0.0
    while not stopping.is_set():
        try:
            seen = number
            if pause and core.running:
                limit = None if pause == math.inf else pause
                stirs = max(core.follow(stirs, least, limit), 0)
            else:
                seen = core.wait(number, timeout=interval)
            if stopping.is_set():
                return
            report = core.report() if core.running or seen > number else core.sample()
            offloader = owner()
            if offloader is None:
                return
            if report["number"] > number:
                number = report["number"]
                pause = offloader._step(report)
            else:  # something happened that no sample knows of yet
                pause = 0.0
            del offloader
        except ClosedError:
            return
        except Exception:
            log.exception("the offloader goes on after an error")
            stopping.wait(interval)


_open_offloaders: weakref.WeakSet[AutomaticOffloader] = weakref.WeakSet()


def _stop_all(owner: int = os.getpid()) -> None:
    """At exit, before stores close: no thread is in the middle of moving a model."""
    if os.getpid() != owner:
        return
    for offloader in list(_open_offloaders):
        offloader.stop()


atexit.register(_stop_all)
