"""The digit model: it trains, goes on where it was stopped, samples, and both ways agree on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import pydiffuse
from tests.helpers import relative_error

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits"


@pytest.fixture(autouse=True)
def example(monkeypatch):
    """The modules of the example, as its scripts import them."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    names = {path.stem for path in EXAMPLE.glob("*.py")}
    before = {name: sys.modules.pop(name, None) for name in names}
    yield
    for name in names:
        sys.modules.pop(name, None)
        if before[name] is not None:
            sys.modules[name] = before[name]


def small_model():
    from model import ZigzagTransformer

    torch.manual_seed(0)
    net = ZigzagTransformer((8, 8), dim=32, depth=3, heads=2, window=2)
    for p in net.parameters():  # gates and the head begin at zero: nothing would be seen of the layers
        if p.dim() == 2 and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def loss_and_gradients(net, backend, keep):
    from train import loss_of

    torch.manual_seed(1)
    x1, label = torch.randn(3, 1, 8, 8), torch.tensor([0, 7, 9])
    net.zero_grad()
    with pydiffuse.use_backend(backend):
        loss = loss_of(net, x1, label, drop=0.3, keep=keep)
        loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_training_step_is_that_of_the_references(keep):
    net = small_model()
    loss, gradients = loss_and_gradients(net, None, keep)
    expected, slopes = loss_and_gradients(net, "reference", keep)
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(gradients, slopes) < 1e-4
    assert all(p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("rule", ["cfg", "tcfg", None])
@pytest.mark.parametrize("sampler", ["uniform", "dual loop", "look-ahead"])
def test_samples_are_those_of_the_references(sampler, rule):
    from sample import RULES, SAMPLERS, denoiser, watched

    net, label, noise = small_model(), torch.tensor([3, 4]), torch.randn(2, 1, 8, 8)
    found = {}
    for backend in (None, "reference"):
        seen = []
        model = watched(denoiser(net, label, RULES.get(rule), 2.0), seen, 1)
        with torch.no_grad(), pydiffuse.use_backend(backend):
            found[backend] = SAMPLERS[sampler](model, noise, 4)
        assert len(seen) == 4  # evaluations
        assert max(len(t.unique()) for _, t in seen) == (1 if sampler == "uniform" else 2)
    assert relative_error(found[None], found["reference"]) < 1e-4
    assert not torch.equal(found[None], noise)


def test_a_routed_pass_leaves_the_other_tokens_out():
    """What the tokens that are not routed hold is nothing to the middle layers."""
    from model import along, among

    net = small_model()
    ids = torch.tensor([1, 2, 5, 6, 7, 11, 12, 15])
    seen = net.plan.to_dense()[0]
    assert torch.equal(among(net.plan, ids).to_dense()[0], seen[ids][:, ids])
    for layer in net.layers[::2]:
        path = layer.branch.path
        kept = [token for token in path.order.tolist() if token in ids.tolist()]
        assert ids[along(path, ids).order.long()].tolist() == kept


def test_training_goes_on_where_it_was_stopped(tmp_path):
    from train import parser, train

    def run(name, *more):
        where = ["--out", f"{name}.pt", "--state", f"{name}-state.pt", "--curve", f"{name}.png"]
        where[1::2] = [str(tmp_path / file) for file in where[1::2]]
        train(parser().parse_args(["--steps", "3", "--batch", "4", "--keep", "0.5", *where, *more]))

    run("whole")
    run("parts", "--stop", "2")
    assert not (tmp_path / "parts.pt").exists()
    with pytest.raises(SystemExit, match="another training"):
        run("parts", "--seed", "1")
    run("parts")
    assert not (tmp_path / "parts-state.pt").exists()
    whole, parts = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "parts"))
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name
    assert (tmp_path / "parts.png").stat().st_size > 1000


def test_the_checkpoint_is_that_of_the_model():
    from model import CHECKPOINT, load_model

    assert CHECKPOINT.stat().st_size <= 4 * 2**20
    assert load_model().tokens_out.weight.any()


def test_pictures_are_drawn(tmp_path):
    import pictures
    from PIL import Image

    net, images = small_model(), torch.rand(6, 1, 8, 8) * 2 - 1
    pictures.grids([("a", "b", images), ("c", "d", images)], 3, 2, tmp_path / "out" / "grids.png")
    pictures.levels("a", [(images[0], torch.rand(16))] * 2, net.grid, tmp_path / "levels.png")
    pictures.structure([layer.branch.path for layer in net.layers[::2]], net.plan, tmp_path / "model.png")
    for name in ("out/grids.png", "levels.png", "model.png"):
        colours = Image.open(tmp_path / name).convert("RGB").getcolors()
        assert colours is not None and len(colours) > 8


def test_frechet_distance():
    from data import frechet

    a = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    assert abs(frechet(a, a)) < 1e-9
    assert frechet(a + 2, a) == pytest.approx(6 * 4)
    centred = a - a.mean(0)  # three times as wide: the trace of the covariance, times (3 - 1)^2
    assert frechet(3 * centred, centred) == pytest.approx(4 * (centred**2).sum() / 49)
