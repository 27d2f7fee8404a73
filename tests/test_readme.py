"""The README's code runs: its console lines that make files, then its Python blocks, in order.

Blocks share a directory, not names: each must work on its own, as a reader would paste it.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(match[1], match[2]) for match in FENCE.finditer(README)]
PYTHON_BLOCKS = [text for language, text in BLOCKS if language == "python"]
CONSOLE_LINES = [
    line
    for language, text in BLOCKS
    if language == "console"
    for line in text.splitlines()
    if line.strip()
]
TIMEOUT_S = 240.0


def run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def made(directory: Path) -> Path:
    """The directory after the console lines, which write the checkpoint that blocks read."""
    for line in CONSOLE_LINES:
        program, *arguments = shlex.split(line)
        assert program == "omnimem", f"a console line of the README runs {program!r}"
        code = "import sys; from omnimem.cli import main; sys.exit(main())"
        run([sys.executable, "-c", code, *arguments], directory)
    return directory


def test_readme_has_blocks() -> None:
    assert len(PYTHON_BLOCKS) >= 3
    assert CONSOLE_LINES


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=[str(i) for i in range(len(PYTHON_BLOCKS))])
def test_python_block_runs(block: str, directory: Path, request: pytest.FixtureRequest) -> None:
    needs_torch = "torch" in block or "transformers" in block
    if needs_torch and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    if "tiny-qwen3vl" in block:
        request.getfixturevalue("made")
    run([sys.executable, "-c", block], directory)


def test_commands_named_in_the_readme_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    named = set(re.findall(r"`?make ([a-z]+)", README))
    assert named <= set(phony[1].split())


def test_configuration_table_tells_the_defaults() -> None:
    from omnimem import StoreConfig
    from omnimem.config import parse_size

    section = README.partition("\n## Configuration\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE)
    assert rows
    defaults = StoreConfig()
    for field, text in rows:
        value = getattr(defaults, field)
        shown = None if text == "None" else text.strip('"')
        if isinstance(value, int):
            assert shown is not None
            assert value == parse_size(shown), field
        else:
            assert value == shown, field
