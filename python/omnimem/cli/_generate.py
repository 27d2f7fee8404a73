"""Greedy generation with the time of every token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Generation:
    """What came out and how long it took."""

    tokens: list[int]
    """Ids of the new tokens."""
    first_seconds: float
    """From the call to the first token: the prefill."""
    token_seconds: float | None
    """Mean of the later ones; None where there was one only."""
    logits: torch.Tensor | None
    """Of every step, (steps, vocabulary), where they were asked for."""


def generate(
    model: Any,
    inputs: dict[str, torch.Tensor],
    count: int,
    *,
    exactly: bool = False,
    keep_logits: bool = False,
    on_tokens: Callable[[list[int]], None] | None = None,
) -> Generation:
    """Generate greedily.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.
    inputs : dict of str to torch.Tensor
        What ``omnimem.processor.prepare`` made.
    count : int
        Most new tokens.
    exactly : bool
        Go on past an end token until there are `count`.
    keep_logits : bool
        Keep the logits of every step.
    on_tokens : callable, optional
        Called with all new ids so far after each token.
    """
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.prompt_seen = False
            self.times: list[float] = []
            self.ids: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            if not self.prompt_seen:
                self.prompt_seen = True
                return
            self.times.append(time.perf_counter())
            self.ids.extend(value.reshape(-1).tolist())
            if on_tokens is not None:
                on_tokens(self.ids)

        def end(self) -> None:
            pass

    clock = Clock()
    started = time.perf_counter()
    made = model.generate(
        **inputs,
        max_new_tokens=count,
        min_new_tokens=count if exactly else None,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        streamer=clock,
        return_dict_in_generate=True,
        output_logits=keep_logits,
    )
    later = clock.times[-1] - clock.times[0]
    return Generation(
        tokens=clock.ids,
        first_seconds=clock.times[0] - started,
        token_seconds=later / (len(clock.times) - 1) if len(clock.times) > 1 else None,
        logits=torch.cat(made.logits) if keep_logits else None,
    )
