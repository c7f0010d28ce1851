"""What every test shares: poisoned memory, and the backends this process can run."""

from __future__ import annotations

import os
import sys
import tempfile

os.environ.setdefault("TRITON_INTERPRET", "0" if os.environ.get("PYDIFFUSE_TEST_GPU") else "1")
# The on-disk cache of torch.compile does not see a changed backward: a fresh one per run.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="pydiffuse-inductor-")

import pytest
import torch

from tests import compilers
from tests.helpers import EMULATED

COMPILED = "test_triton_kernels_compile_as_launched"


def pytest_collection_modifyitems(items):
    """Tests that wait for the compiler come last; it works beside the others."""
    items.sort(key=lambda item: getattr(item, "originalname", "") == COMPILED)


def pytest_collection_finish(session):
    if not session.config.option.collectonly:
        compilers.start(
            tuple(item.callspec.params[name] for name in ("triton", "stem", "way"))
            for item in session.items
            if item.originalname == COMPILED
        )


def pytest_sessionfinish():
    compilers.stop()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def emulated_cuda():
    """PYDIFFUSE_CUDA_EMULATED=1: `use_backend("cuda")` runs the CUDA kernels on the host."""
    if not EMULATED:
        yield
        return
    from tests.cuda_host import emulator

    with emulator.running(int(os.environ.get("PYDIFFUSE_CUDA_SEED", "0"))):
        yield


def pytest_runtest_logreport(report):
    """Failures are written down as they come, so that a run that is stopped has told them."""
    if report.failed and os.environ.get("PYDIFFUSE_FAILURES") and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ["PYDIFFUSE_FAILURES"], "a") as file:
            print(f"== {report.nodeid}\n{report.longreprtext[-2500:]}", file=file)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item):
    """A CUDA error that sticks would fail every later test of this process: it ends here, and where tests
    run side by side another process takes its place."""
    yield
    if os.environ.get("PYDIFFUSE_TEST_GPU") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{item.nodeid}: {error}", file=sys.stderr, flush=True)
            os._exit(70)
