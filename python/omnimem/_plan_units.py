"""What a plan is made of: tensors, runs of them (a block each), units (a module each)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

PAGE = 4096
ALIGN = 64
"""A block that stays plain begins on a cache line, where kernels are fastest (`om_block.h`)."""
PLAIN = "plain"
"""What is kept of a run's bytes: `PLAIN`, a coding ("fast", "balanced"), or None: nothing."""


def pages(nbytes: float) -> int:
    """Round up to whole pages, one at least."""
    return max(-(-int(nbytes) // PAGE) * PAGE, PAGE)


@dataclass(frozen=True)
class Tensor:
    """Where one tensor's bytes are."""

    name: str
    file: str
    offset: int
    nbytes: int
    encoded_nbytes: int | None = None
    """Length in the file, where they are encoded there; None: they are there as they are."""

    @property
    def length(self) -> int:
        """Bytes in the file."""
        return self.nbytes if self.encoded_nbytes is None else self.encoded_nbytes


@dataclass(frozen=True)
class Run:
    """Tensors that lie end to end in a file: one block of a store."""

    tensors: tuple[Tensor, ...]
    keep: str | None
    """What is in memory all the time: "plain", "fast", "balanced", or nothing."""
    form_bytes: int = 0
    """Memory that a form of it takes which is kept; as it is expected, before it was made."""

    @property
    def resident(self) -> bool:
        """Are its bytes in memory all the time, as they are?"""
        return self.keep == PLAIN

    @property
    def encoded(self) -> bool:
        """Are its bytes encoded in the file?"""
        return self.tensors[0].encoded_nbytes is not None

    @property
    def offset(self) -> int:
        """First byte in the file."""
        return self.tensors[0].offset

    @property
    def length(self) -> int:
        """Bytes in the file."""
        return self.tensors[-1].offset + self.tensors[-1].length - self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def starts(self) -> list[int]:
        """Where each tensor begins in the block."""
        ends = itertools.accumulate((tensor.nbytes for tensor in self.tensors), initial=0)
        return list(ends)[:-1]

    @property
    def file_bytes(self) -> int:
        """I/O of the run: whole pages around it in the file."""
        first = self.offset // PAGE * PAGE
        return pages(self.offset + self.length - first)

    @property
    def host_bytes(self) -> int:
        """Memory of its bytes as they are: where they are read to, else whole pages."""
        return pages(self.nbytes) if self.encoded else self.file_bytes


@dataclass(frozen=True)
class UnitPlan:
    """One unit: a decoder layer, a vision block, an embedding, ..."""

    name: str
    uses: float
    """Expected uses per request."""
    runs: tuple[Run, ...]
    repeats: int = 1
    """Uses in one pass: more than one where modules share its weights (a tied head)."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(run.nbytes for run in self.runs)

    @property
    def host_bytes(self) -> int:
        """Memory of all its blocks as they are."""
        return sum(run.host_bytes for run in self.runs)

    @property
    def resident_bytes(self) -> int:
        """Memory of the blocks that are kept plain."""
        return sum(run.host_bytes for run in self.runs if run.keep == PLAIN)

    @property
    def packed_bytes(self) -> int:
        """Memory of the forms that are kept."""
        return sum(run.form_bytes for run in self.runs if run.keep not in (None, PLAIN))

    @property
    def streamed_bytes(self) -> int:
        """Bytes read each time that it is used."""
        return sum(run.file_bytes for run in self.runs if run.keep is None)

    @property
    def passing_bytes(self) -> int:
        """Memory, in the ring, of what is not kept plain."""
        return sum(run.host_bytes for run in self.runs if run.keep != PLAIN)

    @property
    def ahead_bytes(self) -> int:
        """Memory, in the ring, of its encoded forms that are read ahead."""
        return sum(run.file_bytes for run in self.runs if run.keep is None and run.encoded)

    @property
    def pass_bytes(self) -> int:
        """Bytes read in one pass that uses it."""
        return self.streamed_bytes * self.repeats

    @property
    def decodes(self) -> bool:
        """Is it used for every token?"""
        return self.uses > self.repeats

    def decoded_bytes(self, coding: str) -> int:
        """Plain bytes that are decoded from one coding each time that it is used."""
        return sum(run.nbytes for run in self.runs if run.keep == coding)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of all runs."""
        return tuple(itertools.chain.from_iterable(run.tensors for run in self.runs))


def runs_of(
    tensors: Sequence[Tensor],
    keep: Callable[[Tensor], str | None],
    share: Mapping[str, float] | None = None,
) -> tuple[Run, ...]:
    """Join tensors that lie end to end and share their fate.

    Where one that stays plain would not begin on a cache line, a new run does.

    Parameters
    ----------
    tensors : sequence of Tensor
    keep : callable
        What is kept of a tensor: "plain", a coding, or None.
    share : mapping of str to float, optional
        For each coding, the part of the size that is expected to be left.
    """
    runs: list[tuple[list[Tensor], str | None]] = []
    for tensor in sorted(tensors, key=lambda t: (t.file, t.offset)):
        fate = keep(tensor)
        if runs and _joins(runs[-1], tensor, fate):
            runs[-1][0].append(tensor)
        else:
            runs.append(([tensor], fate))
    shares = share or {}
    return tuple(
        Run(
            tuple(members),
            fate,
            pages(sum(t.nbytes for t in members) * shares[fate])
            if fate is not None and fate in shares
            else 0,
        )
        for members, fate in runs
    )


def _joins(run: tuple[list[Tensor], str | None], tensor: Tensor, fate: str | None) -> bool:
    members, kept = run
    last = members[-1]
    return (
        kept == fate
        and last.file == tensor.file
        and last.offset + last.length == tensor.offset
        and (last.encoded_nbytes is None) == (tensor.encoded_nbytes is None)
        and (fate != PLAIN or sum(t.nbytes for t in members) % ALIGN == 0)
    )


def recut(
    unit: UnitPlan,
    keep: Callable[[Tensor], str | None] | str | None,
    share: Mapping[str, float] | None = None,
) -> UnitPlan:
    """The unit with other bytes kept; the same of all tensors where `keep` is no function."""
    of = keep if callable(keep) else lambda _: keep
    return replace(unit, runs=runs_of(unit.tensors, of, share))
