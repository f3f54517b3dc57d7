"""The picture in docs/design.md is enforced: which way imports point, and how large things get."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("config", "core", "policy", "runtime", "integration", "cli")
PRODUCT = sorted([*ROOT.glob("arkvale_sglang/**/*.py"), *ROOT.glob("kernels/**/*.py")])
FOLDERS = ("patches", "benchmarks", "examples", "tests")
OURS = sorted([*PRODUCT, *(path for name in FOLDERS for path in ROOT.glob(f"{name}/**/*.py"))])
SIZES = {"file": 400, "function": 60, "parameters": 9}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports, lazily or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} uses a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_imports_point_down_the_layers(path):
    parts = path.relative_to(ROOT).parts
    for module in imported(path):
        if parts[0] == "kernels":
            assert not module.startswith("arkvale_sglang"), f"the kernels know {module}"
        elif module.startswith("arkvale_sglang.") and len(parts) > 2:
            target = module.split(".")[1]
            if target in LAYERS:
                assert LAYERS.index(target) <= LAYERS.index(parts[1]), (
                    f"{parts[1]} imports {module}"
                )


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_each_foreign_package_has_its_place(path):
    for module in imported(path):
        top = module.split(".")[0]
        if top == "sglang":
            assert path.parent.name == "integration", "SGLang is known to the integration alone"
        if top == "triton":
            assert path.name in ("kernel.py", "triton_helpers.py"), "Triton lives in kernel files"
        if path.name in ("reference.py", "kernel.py"):
            assert not module.endswith(".api"), "an implementation must not know its public face"
        if path.name == "kernel.py":
            assert not module.endswith(".reference"), "a kernel must not lean on its reference"


STEP_FILES = ("cache", "decode", "prefill")
HOST_READS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "synchronize"}


@pytest.mark.parametrize("module", STEP_FILES)
def test_step_code_does_not_read_the_device(module):
    tree = ast.parse((ROOT / f"arkvale_sglang/runtime/{module}.py").read_text())
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not called & HOST_READS


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_step_and_op_code_does_not_print(path):
    if "cli" in path.parts:
        return
    calls = [
        node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ]
    assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls)


@pytest.mark.parametrize("path", OURS, ids=name)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= SIZES["file"]
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            # A device function takes pointers and sizes one by one, and has no other way to.
            if any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list):
                assert node.end_lineno - node.body[0].lineno < SIZES["function"], node.name
                continue
            assert node.end_lineno - node.lineno < SIZES["function"], node.name
            assert count <= SIZES["parameters"] or path not in PRODUCT, node.name


def test_the_packages_import_with_torch_alone():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['sglang', 'triton', 'flashinfer']));"
        "import arkvale_kernels.digest, arkvale_kernels.attend, arkvale_kernels.residency;"
        "import arkvale_kernels.score, arkvale_kernels.select, arkvale_kernels.transfer;"
        "import arkvale_sglang.runtime.decode, arkvale_sglang.runtime.prefill;"
        "import arkvale_sglang.cli.main;"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_distribution_holds_our_two_packages_and_all_of_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(base).parts)
        for base in (ROOT, ROOT / "kernels")
        for package in ("arkvale_sglang", "arkvale_kernels")
        for path in base.glob(f"{package}/**/__init__.py")
    }
    assert listed == found
    assert {package.split(".")[0] for package in listed} == {"arkvale_sglang", "arkvale_kernels"}
