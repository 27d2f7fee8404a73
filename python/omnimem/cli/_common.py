"""What the commands share: budgets, numbers for people, quiet libraries, memory in use."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from omnimem.config import format_size, parse_size

_NO_TERMINAL = 1000
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def parse_budget(text: str, weight_bytes: int, name: str = "--budget") -> int:
    """Bytes from a size ("2GiB", "800MB", bytes) or a share of the weights ("50%").

    `name` is the option's, for the message.

    Raises
    ------
    ValueError
        Neither of the two, or nothing at all.
    """
    share = _SHARE.fullmatch(text)
    nbytes = int(weight_bytes * float(share[1]) / 100) if share else parse_size(text, name)
    if nbytes == 0:
        raise ValueError(f"{name}={text!r} is 0 bytes; give a size such as 2GiB, or 50%")
    return nbytes


def quiet_libraries() -> None:
    """Keep transformers and diffusers from the network, and from drawing on the terminal.

    Call before import.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging: Any = import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def process_memory(field: str) -> int:
    """Return a memory field of this process in bytes: "VmHWM" (its peak) or "VmRSS" (now)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; it takes Linux to measure this")


def columns() -> int:
    """Width of standard output: the terminal's; where it is none, enough for whole sentences."""
    console = Console()
    return console.width if console.is_terminal or "COLUMNS" in os.environ else _NO_TERMINAL


def show_size(nbytes: float) -> str:
    """Bytes for a table."""
    return format_size(nbytes)


def show_seconds(seconds: float | None) -> str:
    """Seconds for a table; a dash where there are none."""
    return "-" if seconds is None else f"{seconds:.3f} s"
