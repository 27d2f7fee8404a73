"""The layers of the C code: reads the #include lines and fails on any edge not allowed.

    bind -> omnimem.h <- core -> plat -> base

bind sees omnimem.h, Python.h and its own headers; omnimem.h sees base; nobody but bind sees
Python.h. In Python, only the faces that take tensors may import a framework.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)

# layer -> layers whose headers it may include; "api" is csrc/omnimem.h
ALLOWED = {
    "api": {"base"},
    "base": {"base", "api"},
    "plat": {"plat", "base", "api"},
    "core": {"core", "plat", "base", "api"},
    "bind": {"bind", "api"},
}
# Libraries and the only layer that may know them.
LIBRARY_LAYER = {
    "liburing.h": "plat",
    "zstd.h": "core",
    "Python.h": "bind",
    "structmember.h": "bind",
}
FRAMEWORKS = {"torch", "transformers", "safetensors", "numpy", "PIL", "accelerate"}


def layer_of(path: Path) -> str:
    relative = path.relative_to(CSRC)
    if relative == Path("omnimem.h"):
        return "api"
    return relative.parts[0]


def sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*.[ch]") if path.is_file())


def includes(path: Path) -> Iterator[tuple[str | None, str | None]]:
    """Pairs (quoted, angled) of one file's #include lines, one of the two None."""
    for match in INCLUDE.finditer(path.read_text()):
        yield match[1], match[2]


def wrong_edges(path: Path) -> list[str]:
    layer = layer_of(path)
    if layer not in ALLOWED:
        return [f"{path.relative_to(ROOT)}: {layer!r} is no layer of DESIGN"]
    wrong = []
    for quoted, angled in includes(path):
        if angled is not None:
            owner = LIBRARY_LAYER.get(angled)
            if owner is not None and owner != layer:
                wrong.append(f"{path.relative_to(ROOT)} ({layer}) includes <{angled}> ({owner}'s)")
            elif (CSRC / angled).exists():
                wrong.append(f"{path.relative_to(ROOT)}: write our own {angled} in quotes")
            continue
        assert quoted is not None
        target = next(
            (found for found in (path.parent / quoted, CSRC / quoted) if found.exists()), None
        )
        if target is None:
            wrong.append(f"{path.relative_to(ROOT)} includes {quoted!r}, which is no file of csrc")
        elif layer_of(target.resolve()) not in ALLOWED[layer]:
            wrong.append(
                f"{path.relative_to(ROOT)} ({layer}) includes {quoted} "
                f"({layer_of(target.resolve())})"
            )
    return wrong


def test_every_include_follows_the_layers() -> None:
    assert sources(), f"no C sources under {CSRC}"
    assert [edge for path in sources() for edge in wrong_edges(path)] == []


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("core", "#include <Python.h>"),
        ("base", '#include "plat/om_io.h"'),
        ("plat", '#include "core/om_pool.h"'),
        ("bind", '#include "core/om_pool.h"'),
        ("bind", '#  include "base/om_base.h"'),
        ("core", "#include <liburing.h>"),
        ("core", '#include "no_such_header.h"'),
    ],
)
def test_a_wrong_edge_is_seen(
    layer: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csrc = tmp_path / "csrc"
    for header in ("base/om_base.h", "plat/om_io.h", "core/om_pool.h", "omnimem.h"):
        (csrc / header).parent.mkdir(parents=True, exist_ok=True)
        (csrc / header).touch()
    source = csrc / layer / "wrong.c"
    source.parent.mkdir(exist_ok=True)
    source.write_text(f'/* a comment */\n#include <stdint.h>\n#include "omnimem.h"\n{line}\n')
    monkeypatch.setitem(globals(), "CSRC", csrc)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(wrong_edges(source)) == 1


def module_level_imports(tree: ast.Module) -> Iterator[str]:
    """Top-level names imported when the module is, those under TYPE_CHECKING left out."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.dump(node.test):
                waiting += [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            waiting += [*node.body, *node.orelse, *node.finalbody]
            waiting += [line for handler in node.handlers for line in handler.body]
        elif isinstance(node, ast.With | ast.ClassDef):
            waiting += node.body


def test_import_omnimem_reaches_no_framework() -> None:
    """Follows module-level imports from omnimem/__init__.py and from the command line."""
    package = ROOT / "python" / "omnimem"
    for entry in (package / "__init__.py", package / "cli" / "__init__.py"):
        waiting, seen = [entry], set()
        while waiting:
            path = waiting.pop()
            if path in seen or not path.exists():
                continue
            seen.add(path)
            tree = ast.parse(path.read_text(), str(path))
            frameworks = set(module_level_imports(tree)) & FRAMEWORKS
            assert not frameworks, f"{path.relative_to(ROOT)} imports {frameworks} when imported"
            waiting += imported_modules_of_ours(tree, path, package)


def imported_modules_of_ours(tree: ast.Module, path: Path, package: Path) -> list[Path]:
    """Files of omnimem that may be imported with the module `path`; some of them do not exist."""
    found: list[Path] = []

    def add(base: Path) -> None:
        found.extend([base.with_suffix(".py"), base / "__init__.py"])

    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == "omnimem":
                    add(package.joinpath(*rest))
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level:
                base = path.parents[node.level - 1]
            elif parts and parts[0] == "omnimem":
                base, parts = package, parts[1:]
            else:
                continue
            base = base.joinpath(*parts)
            add(base)
            for alias in node.names:
                add(base / alias.name)
    return found
