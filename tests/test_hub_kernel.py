"""The kernel of the Hugging Face Hub: build.toml and torch-ext.

Its Python runs here on the ops of the installed extension. Where PyPI's `kernels` is installed it is also built
as build.toml says, checked by that package's validators and loaded by its `get_local_kernel`.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch

from pydiffuse._core import schemas
from pydiffuse._core.rules import RULES
from pydiffuse.adaln.arguments import NORMS
from pydiffuse.reference import adaln as adaln_reference
from pydiffuse.reference import guidance as guidance_reference
from tests.helpers import leaves, relative_error

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "torch-ext" / "pydiffuse"
tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
SETTINGS = tomllib.loads((ROOT / "build.toml").read_text())
SECTIONS = {"torch": SETTINGS["torch"], **SETTINGS["kernel"]}
OPS = ("guide", "guide_backward", "mix", "gram", "modulate", "modulate_backward")


def load(path, name):
    """A module or package by its path, as `kernels` loads it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Files


def test_build_toml_has_every_file_that_is_included():
    """The builder copies listed files only, and compiles each .cpp once, by one set of flags."""
    assert SETTINGS["general"]["edition"] == 5 and SETTINGS["torch"]["stable-abi"] == {"cpu": "2.11"}
    listed = [file for section in SECTIONS.values() for file in section["src"]]
    assert len(set(listed)) == len(listed)
    for file in listed:
        for included in re.findall(r'#include "(.*)"', (ROOT / file).read_text()):
            found = (ROOT / file).parent / included
            if included != "registration.h":  # of the builder's making
                assert str(found.resolve().relative_to(ROOT.resolve())) in listed, (file, included)


def test_flags_are_those_of_the_extension(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    setup = load(ROOT / "setup.py", "pydiffuse_setup")
    for isa, flags in setup.SIMD.items():
        name = "adaln_guidance" + ("" if isa == "default" else f"_{isa}")
        mine = SECTIONS[name]["cxx-flags"]
        assert {f for f in mine if f.startswith("-m")} == set(flags.split())
        assert {f for f in mine if not f.startswith(("-m", "-D"))} <= set(setup.CXX.split())


def test_schemas_and_codes_are_those_of_the_package():
    text = re.sub(r'"\s+"', "", (ROOT / "torch-ext" / "torch_binding.cpp").read_text())
    defined = set(re.findall(r'm\.def\(\s*"(.*?)"\s*\)', text))
    everything = schemas.SCHEMAS | schemas.DIRECT
    assert defined == {n + s for n, s in everything.items() if n.split(".")[0] in OPS}
    guidance, adaln = (module.body for module in map(parsed, ("guidance.py", "adaln.py")))
    names = next(n for n in guidance if isinstance(n, ast.Assign))
    names = [name.id.lower() for name in names.targets[0].elts]
    assert [RULES[name].code for name in names] == list(range(1, 7))
    norms = next(n for n in adaln if isinstance(n, ast.Assign))
    assert ast.literal_eval(norms.value) == NORMS


def parsed(name):
    return ast.parse((PACKAGE / name).read_text())


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_python_keeps_to_the_hubs_rules(file):
    """Only torch and relative imports; names of ops through add_op_namespace_prefix; pure layers."""
    tree = ast.parse(file.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert [a.name for a in node.names] == ["torch"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level or node.module in ("torch", "__future__")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("register_"):
            assert node.args[0].func.id == "add_op_namespace_prefix"
    if file.parent.name == "layers":
        layers = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        assert layers
        for layer in layers:
            names = [n.name if isinstance(n, ast.FunctionDef) else n.targets[0].id for n in layer.body]
            assert names == ["has_backward", "can_torch_compile", "forward"]


# Values


@pytest.fixture(scope="module")
def installed():
    """The package on the installed extension's ops, which have their fakes already."""
    library = torch.library.Library("pydiffuse_hub_test", "DEF")
    for name in OPS:
        library.define(name + schemas.SCHEMAS[name])
    name = "pydiffuse_hub_test"
    ops = types.ModuleType(f"{name}._ops")
    ops.ops, ops.add_op_namespace_prefix = torch.ops.pydiffuse, lambda op: f"{name}::{op}"
    sys.modules[ops.__name__] = ops
    return load(PACKAGE / "__init__.py", name)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """By the compiler; some 20 seconds."""
    kernels = pytest.importorskip("kernels", "0.17", reason="PyPI's kernels is not installed")
    folder = tmp_path_factory.mktemp("hub")
    variant = load(ROOT / "torch-ext" / "build.py", "pydiffuse_hub_build").build(folder)
    return kernels.get_local_kernel(folder), variant


@pytest.fixture(params=["installed", "built"])
def kernel(request):
    found = request.getfixturevalue(request.param)
    return found if request.param == "installed" else found[0]


RULE_CALLS = {
    "cfg": {"original": True},
    "tcfg": {"rescale": 0.5},
    "cfg_zero": {},
    "apg": {"eta": 0.3, "norm_threshold": 4.0},
    "magnitude_aware": {"alpha": 2.0},
}


def rule_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    base, *moves = torch.randn(4, 2, 3, 5, 7, generator=generator).unbind()
    return [(base + 0.5 * move).to(dtype) for move in moves]


def both(function, reference, given, **options):
    """Relative errors of the values and of every gradient."""
    given = [t.detach().clone().requires_grad_() for t in given]
    out = function(*given, **options)
    wide = [t.detach().double().requires_grad_() for t in given]
    expected = reference(*wide, **options)
    outs, wanted = ((o,) if isinstance(o, torch.Tensor) else o for o in (out, expected))
    weights = [torch.randn(o.shape, dtype=torch.float64) for o in wanted]
    for results, inputs in ((outs, given), (wanted, wide)):
        sum((w * r.double()).sum() for w, r in zip(weights, results, strict=True)).backward(inputs=inputs)
    pairs = [
        *zip(outs, wanted, strict=True),
        *((a.grad, b.grad) for a, b in zip(given, wide, strict=True)),
    ]
    return max(relative_error(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", RULE_CALLS)
def test_guidance(kernel, name):
    c, u, _ = rule_inputs()
    scale = torch.tensor([3.0, 7.0])
    error = both(
        getattr(kernel, name), getattr(guidance_reference, name), (c, u, scale), **RULE_CALLS[name]
    )
    assert error < 1e-5
    c, u, _ = rule_inputs(torch.bfloat16)
    found = getattr(kernel, name)(c, u, 3.0, **RULE_CALLS[name])
    expected = getattr(guidance_reference, name)(c.double(), u.double(), 3.0, **RULE_CALLS[name])
    assert found.dtype is torch.bfloat16 and relative_error(found, expected) < 2**-8


def test_perp_neg(kernel):
    c, u, n = rule_inputs()
    assert both(
        lambda c, u, n: kernel.perp_neg(c, u, [n], 4.0, [0.6]),
        lambda c, u, n: guidance_reference.perp_neg(c, u, [n], 4.0, [0.6]),
        (c.transpose(1, 3), u.transpose(1, 3), n.transpose(1, 3)),
    ) < 1e-5  # fmt: skip
    with pytest.raises(ValueError, match="1 negatives and 2 weights"):
        kernel.perp_neg(c, u, [n], 4.0, [0.6, 1.0])
    with pytest.raises(ValueError, match="must be alike"):
        kernel.cfg(c, u[:1], 2.0)
    assert kernel.tcfg(c[:0], u[:0], 2.0).shape == c[:0].shape


@pytest.mark.parametrize("norm", ["layer", "rms", None])
@pytest.mark.parametrize("affine", [False, True])
def test_modulate(kernel, norm, affine):
    generator = torch.Generator().manual_seed(1)
    x, branch = torch.randn(2, 2, 5, 24, generator=generator)
    table, rows = torch.randn(3, 3, 24, generator=generator), torch.tensor([[0], [2]])
    more = torch.randn(2, 24, generator=generator).unbind() if affine else ()
    names = ("weight", "bias")

    def call(module, op):
        function = getattr(module, op)
        if op == "modulate":
            return lambda x, branch, table, *more: function(
                x + 0 * branch, table[:, :2], rows, norm=norm, eps=1e-5, **dict(zip(names, more, strict=False))
            )  # fmt: skip
        return lambda x, branch, table, *more: function(
            x, branch, table, rows, norm=norm, eps=1e-5, **dict(zip(names, more, strict=False))
        )

    for op in ("modulate", "gate_residual_modulate"):
        given = (x, branch, table, *more)
        assert both(call(kernel, op), call(adaln_reference, op), given) < 1e-5
        none = call(kernel, op)(x[:, :0], branch[:, :0], table, *more)
        assert (none if op == "modulate" else none[0]).shape == (2, 0, 24)
    with pytest.raises(ValueError, match=r"table has shape \(3, 3, 24\); accepted: \(K, 2, 24\)"):
        kernel.modulate(x, table, rows)
    with pytest.raises(RuntimeError, match="rows holds 3; accepted: 0 to 2"):
        kernel.modulate(x, table[:, :2], rows + 1)
    with pytest.raises(ValueError, match="norm is 'batch'"):
        kernel.modulate(x, table[:, :2], rows, norm="batch")


def test_compiles(kernel):
    c, u, _ = rule_inputs()

    def both_ops(c, u, table):
        guided = kernel.tcfg(c, u, 3.0).flatten(1, 2)
        return kernel.modulate(guided, table, torch.zeros(1, 1, dtype=torch.int32))

    table = torch.randn(1, 2, 7)
    compiled = torch.compile(both_ops, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(c, u, table), both_ops(c, u, table))
    for inputs in (c, u, table):
        inputs.requires_grad_()
    compiled(c, u, table).sum().backward()
    found, c.grad = c.grad, None
    both_ops(c, u, table).sum().backward()
    assert relative_error(found, c.grad) < 1e-6


# Layers


def norms():
    module = pytest.importorskip("diffusers.models.normalization", reason="diffusers is not installed")
    torch.manual_seed(2)
    x, emb = torch.randn(2, 5, 16), torch.randn(2, 16)
    return module, {
        "AdaLayerNormZero": [(module.AdaLayerNormZero(16), (x, None, None, None, emb))],
        "AdaLayerNormZeroSingle": [(module.AdaLayerNormZeroSingle(16), (x, emb))],
        "AdaLayerNormContinuous": [
            (module.AdaLayerNormContinuous(16, 16, **options), (x, emb))
            for options in ({}, {"elementwise_affine": False, "eps": 1e-6}, {"norm_type": "rms_norm"})
        ],
        "LuminaRMSNormZero": [(module.LuminaRMSNormZero(16, 1e-5, True), (x, emb))],
        "SD35AdaLayerNormZeroX": [(module.SD35AdaLayerNormZeroX(16), (x, emb))],
    }


def test_layers_do_what_diffusers_do(kernel):
    module, cases = norms()
    assert sorted(cases) == kernel.layers.__all__
    for name, examples in cases.items():
        layer = getattr(kernel.layers, name)
        mine, theirs = (
            [p.kind for p in inspect.signature(c.forward).parameters.values()]
            for c in (layer, getattr(module, name))
        )
        assert mine == theirs
        for model, inputs in examples:
            found, expected = layer.forward(model, *inputs), model(*inputs)
            pairs = (
                [(found, expected)]
                if isinstance(found, torch.Tensor)
                else zip(found, expected, strict=True)
            )
            assert all(relative_error(a.detach(), b.detach()) < 1e-6 for a, b in pairs)
            mine, theirs = (
                torch.autograd.grad(sum(o.square().sum() for o in leaves(out)), list(model.parameters()))
                for out in (found, expected)
            )
            assert max(map(relative_error, mine, theirs)) < 1e-5
    with pytest.raises(TypeError, match="accepted: LayerNorm or RMSNorm of tokens"):
        layer.forward(examples[0][0], inputs[0][:, None], inputs[1])


# Where `kernels` is installed


def test_kernels_own_validators(built):
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
    from kernels.validate import default_metadata_validators

    import kernels

    module, variant = built
    assert [str(b) for b in Build.open(ROOT).general.backends] == ["cpu"]
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert metadata.id == module.__name__ and metadata.version == SETTINGS["general"]["version"]
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    for validator in default_metadata_validators():
        validator.validate_metadata(metadata=metadata, variant=variant.name)
    assert Path(kernels.__file__).parent != ROOT / "kernels"  # our Triton kernels shadow nothing


def test_kernelize(built):
    """A model of diffusers' layers, in training and under torch.compile, with no fallback."""
    import kernels

    module, cases = norms()
    folder = built[1].parent
    for name, examples in cases.items():
        kernels.replace_kernel_forward_from_hub(getattr(module, name), name)
        repository = kernels.LocalLayerRepository(folder, layer_name=name)
        for model, inputs in examples:
            expected = model(*inputs)
            mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
            with kernels.use_kernel_mapping({name: {"cpu": repository}}, inherit_mapping=False):
                kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
            assert model.forward.__module__ == built[0].layers.__name__
            found = model(*inputs)
            first = [o if isinstance(o, torch.Tensor) else o[0] for o in (found, expected)]
            assert relative_error(first[0].detach(), first[1].detach()) < 1e-6
            first[0].sum().backward()
            assert model.linear.weight.grad.any()


def test_the_example(built, capsys):
    script = runpy.run_path(str(ROOT / "examples" / "hub_kernel.py"))
    script["main"](["--tokens", "8", "--width", "64", "--runs", "1", "--kernel", str(built[1].parent)])
    told = capsys.readouterr().out
    assert told.count("ms before") == 2 and float(re.search("apart by (.*) at most", told)[1]) < 1e-5
