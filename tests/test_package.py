"""The source distribution is complete, and the wheel that is built from it runs where nothing else is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

import setup as build

ROOT = Path(__file__).parent.parent
NOT_PACKED = (".ci", ".git", "pydiffuse/kernels")  # the last is a link, laid again by setup.py
PLAIN = ("PYTHONPATH", "CXXFLAGS", "LDFLAGS", "PYDIFFUSE_CUDA_EMULATED")

# An op of each family, on the compiled backend and by its definition.
USE = """
import importlib.util, sys, torch, pydiffuse
from pathlib import Path

x, ids = torch.randn(2, 16, 32), torch.tensor([[3, 1, 7]] * 2)
image, t = torch.randn(2, 3, 8, 8), torch.rand(2, 16)
q = torch.randn(1, 2, 64, 16)
plan = pydiffuse.plans.causal(64)
calls = {
    "guidance": lambda: pydiffuse.tcfg(x, x.flip(0), 3.0),
    "scan": lambda: pydiffuse.selective_scan(
        x, x.sigmoid(), -torch.ones(16, 4), torch.ones(2, 4, 32), torch.ones(2, 4, 32)
    ),
    "conv": lambda: pydiffuse.causal_conv1d(x, torch.ones(16, 4)),
    "attention": lambda: pydiffuse.tile_attention(q, q, q, plan),
    "patch": lambda: pydiffuse.noise_patches(image, t, 2, noise=image.flip(0))[0],
    "adaln": lambda: pydiffuse.modulate(x, torch.ones(2, 2, 32), torch.tensor([[0], [1]])),
    "routing": lambda: pydiffuse.gather_tokens(x, ids),
}
for family, call in calls.items():
    found = {}
    for backend in ("cpu", "reference"):
        with pydiffuse.use_backend(backend):
            found[backend] = call()
    torch.testing.assert_close(found["cpu"], found["reference"], msg=lambda m: f"{family}: {m}")
array = pydiffuse.numpy.tcfg(x.numpy(), x.flip(0).numpy(), 3.0)
torch.testing.assert_close(torch.from_numpy(array), calls["guidance"]())
assert importlib.util.find_spec("pydiffuse.kernels.guidance")
assert Path(pydiffuse.__file__).is_relative_to(sys.prefix), pydiffuse.__file__
print(*calls)
"""


def run(*command: object, cwd: Path, **more: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in PLAIN} | more
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The source distribution, in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("source distribution")
    left = shutil.ignore_patterns(
        "build", ".git", ".*env", ".*cache", "*.so", "*.egg-info"
    )  # as of a clone
    shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=left)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=folder / "copy")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.glob("pydiffuse-*") if path.is_dir())


def test_the_source_distribution_is_complete(unpacked):
    """What git has, of which a file may wait to be deleted."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, text=True, capture_output=True)
    wanted = [
        f for f in listed.stdout.splitlines() if (ROOT / f).exists() and not f.startswith(NOT_PACKED)
    ]
    assert len(wanted) > 100
    assert [f for f in wanted if not (unpacked / f).is_file()] == []
    assert not list(unpacked.rglob("*.so"))


def test_an_installed_wheel_runs(unpacked, tmp_path):
    """Built from the source distribution with the objects of this build, without CUDA, into an environment
    that has nothing but the wheel and sees the packages of this one."""
    if not build.TEMP.exists():
        pytest.skip("the extension was not built here")
    shutil.copytree(build.TEMP, unpacked / build.TEMP.relative_to(ROOT))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "-w", tmp_path]
    run(*pip, "wheel", *options, unpacked, cwd=tmp_path, PYDIFFUSE_CUDA="0")
    home = tmp_path / "env"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    here = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    Path(site, "packages.pth").write_text("\n".join(here) + "\n")
    wheel = next(tmp_path.glob("*.whl"))
    run(*pip, f"--python={python}", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert len(run(python, "-c", USE, cwd=tmp_path).split()) == 7
