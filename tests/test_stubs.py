"""The type stub says what the C module has: names, arguments, docstrings, and mypy agrees."""

from __future__ import annotations

import ast
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import omnimem
from omnimem import _core

STUB = Path(omnimem.__file__).with_name("_core.pyi")
ROOT = Path(__file__).resolve().parent.parent
# Slots and methods that Python gives to every class of their kind.
IMPLIED = {"__buffer__", "__release_buffer__", "__init__", "__new__", "__contains__"}


def stub_classes() -> dict[str, ast.ClassDef]:
    tree = ast.parse(STUB.read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: node for node in nodes if not node.name.startswith("_")}


def members(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def test_module_names() -> None:
    tree = ast.parse(STUB.read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    real = {name for name in vars(_core) if not name.startswith("__")}
    assert real == functions | set(stub_classes())


@pytest.mark.parametrize("name", sorted(stub_classes()))
def test_class_members(name: str) -> None:
    real = {
        key
        for key, value in vars(getattr(_core, name)).items()
        if not key.startswith("__") or inspect.ismethoddescriptor(value)
    }
    plain = set(vars(object))
    declared = set(members(stub_classes()[name]))
    assert real - plain - IMPLIED == declared - IMPLIED


@pytest.mark.parametrize("name", sorted(stub_classes()))
def test_arguments(name: str) -> None:
    for method, node in members(stub_classes()[name]).items():
        real = getattr(_core, name).__dict__.get(method)
        if method.startswith("__") and method != "__dlpack__":
            continue
        if not inspect.ismethoddescriptor(real):
            continue
        signature = inspect.signature(real)
        named = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        rest = filter(None, (node.args.vararg, node.args.kwarg))
        want = [arg.arg for arg in (*named, *rest)]
        assert list(signature.parameters) == want, f"{name}.{method}"
        defaults = [ast.literal_eval(value) for value in node.args.defaults]
        defaults += [ast.literal_eval(value) for value in node.args.kw_defaults if value]
        given = [p.default for p in signature.parameters.values() if p.default is not p.empty]
        assert given == defaults, f"{name}.{method}"


def test_everything_public_has_a_docstring() -> None:
    for name in omnimem.__all__:
        assert getattr(omnimem, name).__doc__, name
    for name in stub_classes():
        cls = getattr(_core, name)
        for key, value in vars(cls).items():
            if not key.startswith("_"):
                assert value.__doc__, f"{name}.{key}"


@pytest.mark.slow
def test_mypy_agrees(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    if shutil.which(sys.executable) is None:
        pytest.skip("no interpreter to run mypy with")
    code = """
import omnimem
from typing import assert_type
with omnimem.Store(omnimem.StoreConfig(host_limit="1MiB")) as store:
    store.add("a", b"x")
    with store.lease("a") as lease:
        assert_type(lease.nbytes, int)
        assert_type(lease.shape, tuple[int, ...])
        memoryview(lease.window(0, "uint8", (1,)))
    assert_type(store.info("a").dtype, str | None)
    assert_type(store.stats().host.used_bytes, int)
    assert_type(store.prefetch(["a"]).wait(), bool)
"""
    (tmp_path / "use.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path}/cache", "use.py"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"MYPYPATH": str(STUB.parent.parent), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
