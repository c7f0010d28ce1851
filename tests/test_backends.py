"""The table of ops against what is there: files, functions, kernels, messages."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pydiffuse
from pydiffuse._core import dispatch
from tests.cases import CASES

ROOT = Path(__file__).parent.parent
PUBLIC = pydiffuse.OPS


@pytest.mark.parametrize("op", PUBLIC.values(), ids=PUBLIC)
def test_every_declared_backend_has_its_room(op):
    """One stem, one name, in every layer."""
    assert getattr(pydiffuse, op.name) is getattr(
        importlib.import_module(f"pydiffuse.{op.stem}"), op.name
    )
    reference = getattr(importlib.import_module(f"pydiffuse.reference.{op.stem}"), op.name)
    mine, its = (inspect.signature(f).parameters for f in (getattr(pydiffuse, op.name), reference))
    ignored = {"original", "rescale"} if op.name == "guide" else set()
    assert [p for p in mine if p not in ignored] == [p for p in its if p not in ignored]
    assert getattr(pydiffuse, op.name).__doc__ and reference.__doc__
    rooms = {
        "reference": f"pydiffuse/{op.stem}/reference.py",
        "cpu": f"csrc/cpu/{op.stem}.cpp",
        "cuda": f"csrc/cuda/{op.stem}.cu",
        "triton": f"kernels/{op.stem}.py",
    }
    for backend in op.backends:
        assert (ROOT / rooms[backend]).exists(), f"{op.name} declares {backend}"
    for kernel in op.kernels:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key
        assert registered(f"pydiffuse::{kernel}", "CPU")
        assert registered(f"pydiffuse_triton::{kernel}", "CUDA")
        assert callable(getattr(importlib.import_module(f"pydiffuse.kernels.{op.stem}"), kernel))
        for binding in ("csrc/torch", "csrc/cuda") if "cuda" in op.backends else ("csrc/torch",):
            sources = "".join(p.read_text() for p in sorted((ROOT / binding).glob(f"{op.stem}*")))
            assert f'm.impl("{kernel}"' in sources, f"{binding} registers no {kernel}"
    assert any(case.op == op.name for case in CASES), f"no case of {op.name} in the table"


def test_both_languages_have_the_same_limits_and_codes():
    from pydiffuse._core import grids, rules, structs
    from pydiffuse.adaln.arguments import NORMS

    methods = (*grids.METHODS, "noise", "convert", "residual")
    expected = {name: getattr(structs, name) for name in ("MAX_STATES", "CHUNK", "MAX_WIDTH", "BLOCK")}
    expected |= {"MAX_HEAD_DIM": structs.MAX_HEAD_DIM, "MAX_PREDS": rules.MAX_PREDS}
    expected |= {f"EMIT_{n}": getattr(rules, f"EMIT_{n}") for n in ("UPDATE", "PREDICT", "STATE")}
    expected |= {f"Rule.{r.name}": r.code for r in rules.RULES.values()}
    for enum, names in (
        ("Path", grids.PATHS), ("Kind", grids.KINDS), ("Method", methods),
        ("Norm", [n or "none" for n in NORMS]),
    ):  # fmt: skip
        expected |= {f"{enum}.{name}": code for code, name in enumerate(names)}
        expected[f"{enum}.count"] = len(names)
    expected["Rule.count"] = len(rules.RULES)
    for name, place in (
        ("x", grids.X), ("pred", grids.PRED), ("uncond", grids.UNCOND), ("history", grids.HISTORY),
        ("noise", grids.NOISY),
    ):  # fmt: skip
        expected[f"Term.{name}"] = place
    assert tuple(range(len(grids.METHODS), len(methods))) == (grids.NOISE, grids.CONVERT, grids.RESIDUAL)
    assert importlib.import_module("pydiffuse._C").constants == expected


def test_kernels_import_the_core_alone():
    """They are linked into the package, where import-linter does not look."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = [n for n in names if n.startswith("pydiffuse")]
            assert all(n.startswith(("pydiffuse._core.", "pydiffuse.kernels.")) for n in ours), path


def test_lazy_names_are_all_there():
    """`import pydiffuse` imports neither torch nor a family; every public name is found when asked for."""
    code = """
import sys, pydiffuse
import pydiffuse.numpy
assert "torch" not in sys.modules
for name in pydiffuse.__all__: getattr(pydiffuse, name)
assert pydiffuse.nn.ZigzagMamba and pydiffuse.plans.search and pydiffuse.scan.reference
assert set(pydiffuse.__all__) <= set(dir(pydiffuse))
"""
    assert not (done := python(code)).returncode, done.stderr


def test_every_public_function_is_in_the_table():
    for stem in {op.stem for op in PUBLIC.values()}:
        module = importlib.import_module(f"pydiffuse.{stem}")
        functions = {
            name
            for name, f in inspect.getmembers(module, inspect.isfunction)
            if f.__module__ == module.__name__ and not name.startswith("_")
        }
        assert functions == {op.name for op in PUBLIC.values() if op.stem == stem}


def test_no_package_file_in_kernels():
    """kernels/__init__.py would shadow PyPI's `kernels` from the repository root."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_backends_tell_what_is_missing():
    table = pydiffuse.backends()
    assert set(table) == set(PUBLIC)
    assert table["tcfg"]["cpu"] == "ready"
    if not torch.cuda.is_available():
        assert "PYDIFFUSE_CUDA" in table["tcfg"]["cuda"] or "no CUDA device" in table["tcfg"]["cuda"]
        with pytest.raises(RuntimeError, match="cuda"), pydiffuse.use_backend("cuda"):
            pass


@pytest.mark.parametrize(
    "capability, backend",
    [((8, 0), "cuda"), ((8, 9), "cuda"), ((9, 0), "cuda"), ((7, 5), "triton"), ((10, 3), "cuda"),
     ((12, 0), "triton"), ((9, 1), "triton")],
)  # fmt: skip
def test_cuda_kernels_run_where_the_extension_has_code(monkeypatch, capability, backend):
    """Elsewhere Triton serves the op, and asking for CUDA says how to build for this GPU."""

    class OnGpu:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(dispatch, "built_cuda", True)
    monkeypatch.setattr(dispatch, "cuda_archs", lambda: ["80", "90a", "100"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    expected = {"cuda": torch.ops.pydiffuse, "triton": torch.ops.pydiffuse_triton}[backend]
    assert dispatch.ops_for("tcfg", OnGpu()) is expected
    if backend == "triton":
        with pytest.raises(RuntimeError, match="PYDIFFUSE_CUDA_ARCHS={}{}".format(*capability)):
            dispatch.check_backend("cuda")


@pytest.mark.parametrize(
    "kilobytes, states, backend", [(99, 16, "cuda"), (99, 17, "triton"), (163, 64, "cuda")]
)
def test_the_backward_of_a_scan_runs_where_it_fits(monkeypatch, kilobytes, states, backend):
    """Beyond 16 states a block of the CUDA kernel needs more than a consumer card has."""
    module = importlib.import_module("pydiffuse._C")
    if not module.cuda_archs:
        pytest.skip("this machine has no nvcc: the extension was built without CUDA")

    class OnGpu:
        device = torch.device("cuda", 0)

    class Properties:
        shared_memory_per_block_optin = kilobytes << 10

    assert 48 << 10 < module.cuda_scan_backward_few <= 99 << 10 < module.cuda_scan_backward_many
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(dispatch, "_missing", lambda backend: None)
    expected = {"cuda": torch.ops.pydiffuse, "triton": torch.ops.pydiffuse_triton}[backend]
    assert dispatch.scan_backward_ops("selective_scan", OnGpu(), states) is expected


def test_the_choice_of_a_backend_can_be_traced():
    """On a GPU, or where a backend is missing, Dynamo meets all of it."""
    asked = dispatch._missing("cuda"), dispatch._missing("triton"), dispatch._why_no_code(0)

    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        told = dispatch._missing("cuda"), dispatch._missing("triton"), dispatch._why_no_code(0)
        return x + sum(t is None for t in told), told

    y, told = step(torch.zeros(2))
    assert told == asked and y[0] == sum(t is None for t in asked)


def test_use_backend_nests_and_restores():
    seen = []
    with pydiffuse.use_backend("reference"):
        seen.append(dispatch.forced())
        with pydiffuse.use_backend(None):
            seen.append(dispatch.forced())
        seen.append(dispatch.forced())
        with pytest.raises(ZeroDivisionError), pydiffuse.use_backend("cpu"):
            raise ZeroDivisionError
        seen.append(dispatch.forced())
    assert [*seen, dispatch.forced()] == ["reference", None, "reference", "reference", None]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        cwd="/",
        text=True,
        capture_output=True,
    )


def test_environment_chooses_the_backend():
    code = "from pydiffuse._core import dispatch; print(dispatch.forced())"
    assert python(code, PYDIFFUSE_BACKEND="reference").stdout.strip() == "reference"
    wrong = python(code, PYDIFFUSE_BACKEND="fast")
    assert wrong.returncode and "'fast'" in wrong.stderr and "triton" in wrong.stderr


def test_import_without_the_extension():
    """It works, says once what is missing, and computes nothing by another way unasked."""
    code = """
import sys, warnings
sys.modules["pydiffuse._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, pydiffuse
    pydiffuse.cfg
told = [w for w in caught if "extension is missing" in str(w.message)]
assert len(told) == 1 and "pip install" in str(told[0].message), caught
c = torch.ones(1, 4)
try:
    pydiffuse.cfg(c, c, 2.0)
    raise SystemExit("ran without its extension")
except RuntimeError as error:
    assert "pip install" in str(error), error
with pydiffuse.use_backend("reference"):
    assert pydiffuse.cfg(c, c, 2.0).sum() == 4
print("ok")
"""
    done = python(code)
    assert done.stdout.strip() == "ok", done.stderr


def test_info_prints():
    done = subprocess.run(
        [sys.executable, "-m", "pydiffuse", "info"], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    for word in ("pydiffuse", "torch", "CPU capability", "CUDA kernels", "GPUs", *PUBLIC):
        assert word in done.stdout


LOWER = {  # test files, and which of their tests run the kernels of another instruction set
    "guidance adaln routing": "cpu and (values or low_precision or extreme or nan)",
    "patch": "cpu and (values or low_precision)",
    "scan": "cpu and (chunks or states or extreme or mixed)",
    "attention attention_cpu": "(cpu and (values or low_precision or layouts or nothing)) or saturated or nan_stays",
}


@pytest.mark.parametrize("capability", ["default", "avx2"])
@pytest.mark.parametrize("stems", LOWER)
def test_lower_cpu_capabilities(stems, capability):
    """The other copies of the CPU kernels, through the same value and gradient tests."""
    from pydiffuse import _host

    order = ["default", "avx2", "avx512"]
    if order.index(_host.capability()) <= order.index(capability):
        pytest.skip(f"this process runs {_host.capability()} already")
    files = [f"tests/test_{stem}.py" for stem in stems.split()]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files, "-k", LOWER[stems]]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:]
