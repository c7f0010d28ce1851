"""The Python snippets of README.md, each by itself, and of docs/*.md, each page from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {
    "diffusers": ("diffusers", "0.42"),
    "huggingface_kernels": ("diffusers", "0.42"),
    "jax": ("jax", "0.10"),
    "transformers": ("transformers", "5.24"),
}
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)


def snippets(page):
    """Snippets whose tracebacks have the lines of the page."""
    text = page.read_text()
    for found in SNIPPET.finditer(text):
        yield compile("\n" * text.count("\n", 0, found.start(1)) + found[1], str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    if page.stem in NEEDS:
        name, version = NEEDS[page.stem]
        pytest.importorskip(name, version, reason=f"{name} {version} is not installed (extra: test)")
    if page.stem == "jax":
        pytest.importorskip("pydiffuse._jax", reason="pydiffuse was built without jax")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    alone = page.name == "README.md"
    namespace = {"__name__": page.stem}
    for snippet in snippets(page):
        exec(snippet, {"__name__": page.stem} if alone else namespace)


def test_every_family_has_a_snippet():
    text = "".join(SNIPPET.findall((ROOT / "README.md").read_text()))
    for op in ("tcfg", "selective_scan", "tile_attention", "patch_step", "modulate", "scatter_tokens"):
        assert f"pydiffuse.{op}(" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
