"""What is built and installed: sdist, wheel, knobs, and refusals in plain words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = ("csrc", "python", "tests", "benchmarks", "scripts")
BUILD = "import setuptools.build_meta as b, sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def run(
    *command: str, cwd: Path, env: dict[str, str] | None = None, ok: bool = True
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": ""} | (env or {}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if ok:
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
    return done


def files_of_the_tree() -> list[str]:
    """Tracked files, and new ones that git does not ignore, without those deleted on disk."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    options = ("-z", "--cached", "--others", "--exclude-standard")
    listed = run("git", "ls-files", *options, cwd=ROOT).stdout.split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as a fresh clone would have it, under a path with a space."""
    tree = tmp_path_factory.mktemp("a clean") / "tree"
    for name in files_of_the_tree():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    return tree


def build(kind: str, tree: Path, out: Path) -> Path:
    """What PEP 517 front ends call, with this environment's setuptools: needs no network."""
    out.mkdir(parents=True, exist_ok=True)
    done = run(sys.executable, "-c", BUILD, f"build_{kind}", str(out), cwd=tree)
    return out / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(clean_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", clean_tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist alone: proof that the sdist holds what a build needs."""
    place = tmp_path_factory.mktemp("from sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    (tree,) = place.iterdir()
    return build("wheel", tree, place / "out")


def test_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {name for name in files_of_the_tree() if name.split("/")[0] in SHIPPED}
    wanted |= {"setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE"}
    wanted |= {"README.md", "CHANGELOG.md", ".clang-format"}
    assert wanted - names == set()
    built = re.compile(r"\.(so|o|a|pyc|gcda|gcno)$|__pycache__")
    assert [name for name in names if built.search(name)] == []


@pytest.mark.slow
def test_wheel_is_one_for_all_pythons(wheel: Path) -> None:
    assert re.fullmatch(r"omnimem-[0-9.]+-cp311-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert {"omnimem/_core.abi3.so", "omnimem/_core.pyi", "omnimem/py.typed"} <= names
    python = {name.removeprefix("python/") for name in files_of_the_tree() if "python/" in name}
    assert {name for name in python if name.startswith("omnimem/")} <= names
    assert not [name for name in names if name.startswith(("csrc", "tests"))]
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text


@pytest.mark.slow
def test_wheel_installs_and_works(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", str(site), str(wheel), cwd=tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import omnimem\n"
        "assert omnimem.__file__.startswith(sys.argv[1]), omnimem.__file__\n"
        "with omnimem.Store() as store:\n"
        "    store.add('a', b'bytes')\n"
        "    with store.lease('a') as lease:\n"
        "        assert bytes(lease) == b'bytes'\n"
    )
    run(sys.executable, "-c", code, str(site), cwd=tmp_path)


@pytest.mark.slow
def test_extension_exports_only_its_entry(wheel: Path, tmp_path: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("omnimem/_core.abi3.so", tmp_path)
    library = tmp_path / "omnimem" / "_core.abi3.so"
    lines = run("nm", "-D", "--defined-only", str(library), cwd=tmp_path).stdout.splitlines()
    assert {line.split()[-1] for line in lines} == {"PyInit__core"}


def test_import_needs_no_framework(tmp_path: Path) -> None:
    code = (
        "import sys, omnimem\n"
        "loaded = {'torch', 'numpy', 'transformers', 'safetensors', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'import omnimem imported {loaded}' if loaded else 0)"
    )
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    run(sys.executable, "-c", code, cwd=tmp_path, env=environment)


def test_version_has_one_source() -> None:
    import omnimem

    assert "version" in PROJECT["dynamic"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == omnimem.__version__


def test_requirements() -> None:
    names = {re.split(r"[^\w-]", need)[0] for need in PROJECT["dependencies"]}
    assert names == {"click", "rich"}
    extras = PROJECT["optional-dependencies"]
    assert {"torch", "transformers", "demo", "test", "dev"} <= set(extras)
    for extra in ("demo", "test"):
        assert "torch==2.13.0" in extras[extra]
        assert set(extras["demo"]) <= set(extras["test"])
    assert extras["torch"] == ["torch>=2.9"]


def test_free_threaded_python_is_refused_in_one_sentence() -> None:
    code = (
        "import sysconfig, runpy, sys\n"
        "asked = sysconfig.get_config_var\n"
        "sysconfig.get_config_var = lambda name: 1 if name == 'Py_GIL_DISABLED' else asked(name)\n"
        "sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    done = run(sys.executable, "-c", code, cwd=ROOT, ok=False)
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith("omnimem: free-threaded Python is not supported")
    assert sentence.endswith(".")


def build_ext(tree: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    place = ("--build-lib", str(out / "lib"), "--build-temp", str(out / "temp"))
    command = (sys.executable, "setup.py", "--quiet", "build_ext", *place)
    return run(*command, cwd=tree, env=env, ok=False)


def test_a_missing_library_is_named_with_the_line_that_installs_it(
    clean_tree: Path, tmp_path: Path
) -> None:
    lacks_uring = tmp_path / "lacks_uring"
    lacks_uring.write_text('#!/bin/sh\ncase "$*" in *liburing*) exit 1 ;; esac\nexit 0\n')
    lacks_uring.chmod(0o755)
    done = build_ext(clean_tree, tmp_path, PKG_CONFIG=str(lacks_uring))
    assert done.returncode == 1
    assert "\n    apt-get install -y liburing-dev\n" in done.stderr
    assert "OMNIMEM_WITHOUT_LIBURING=1" in done.stderr

    lacks_all = tmp_path / "lacks_all"
    lacks_all.write_text("#!/bin/sh\nexit 1\n")
    lacks_all.chmod(0o755)
    done = build_ext(clean_tree, tmp_path, PKG_CONFIG=str(lacks_all))
    assert "\n    apt-get install -y libxxhash-dev libzstd-dev liburing-dev\n" in done.stderr

    done = build_ext(clean_tree, tmp_path, PKG_CONFIG=str(tmp_path / "absent"))
    assert (
        "\n    apt-get install -y pkg-config libxxhash-dev libzstd-dev liburing-dev\n"
        in done.stderr
    )


def test_an_unknown_sanitizer_is_refused(clean_tree: Path, tmp_path: Path) -> None:
    done = build_ext(clean_tree, tmp_path, OMNIMEM_SANITIZE="adress")
    assert done.returncode == 1
    assert "unknown sanitizer adress" in done.stderr


@pytest.mark.slow
def test_builds_without_liburing(clean_tree: Path, tmp_path: Path) -> None:
    done = build_ext(clean_tree, tmp_path, OMNIMEM_WITHOUT_LIBURING="1")
    assert done.returncode == 0, done.stderr[-8000:]
    (library,) = (tmp_path / "lib").rglob("_core.abi3.so")
    if shutil.which("ldd"):
        assert "liburing" not in run("ldd", str(library), cwd=tmp_path).stdout
    code = (
        "import sys, warnings; sys.path.insert(0, sys.argv[1]); warnings.simplefilter('ignore')\n"
        "import omnimem\n"
        "with omnimem.Store() as store:\n"
        "    store.add('a', b'bytes')\n"
        "    with store.lease('a') as lease:\n"
        "        assert bytes(lease) == b'bytes'\n"
    )
    shutil.copytree(clean_tree / "python" / "omnimem", library.parent, dirs_exist_ok=True)
    run(sys.executable, "-c", code, str(library.parent.parent), cwd=tmp_path)
