"""The tables of the docs, made from the JSON results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def write(results: Path) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->` in the docs."""
    texts: dict[str, str] = {}
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text())
        if "rows" not in record:
            continue
        texts[f"{path.stem}-table"] = full(record)
        texts[f"{path.stem}-bars"] = bars(record)
        texts[f"{path.stem}-short"] = short(record)
        texts[f"{path.stem}-five"] = short(record, FIVE)
    for doc in (ROOT / "README.md", ROOT / "docs/performance.md"):
        text = doc.read_text()
        for name, table in texts.items():
            marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
            text = re.sub(marks, lambda m, t=table: m[1] + t + m[2], text, flags=re.S)
        doc.write_text(text)


def machine(record: dict[str, Any]) -> str:
    m = record["machine"]
    where = m.get("gpu") or f"{m['cpu']}, {m['threads']} threads, {m['capability']}"
    return f"\nMeasured {m['date']} on {where}; torch {m['torch']}.\n"


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def full(record: dict[str, Any]) -> str:
    text = line(
        ["op", "what", "shape", "dtype", "ms", "GB/s", "of the floor", "error", "rivals, times ours"]
    )
    text += line(["---"] * 4 + ["---:"] * 4 + ["---"])
    for r in record["rows"]:
        if r["ms"] is None:
            continue
        rivals = ", ".join(f"{x['name']} {x['ratio']:.2f}" for x in r["rivals"])
        text += line([
            f"`{r['op']}`", r["what"], "x".join(map(str, r["shape"])), r["dtype"], number(r["ms"], ".3f"),
            number(r["gb_per_s"], ".1f"), number(r["share_of_floor"], ".2f"), number(r["error"], ".1e"),
            rivals,
        ])  # fmt: skip
    return text + machine(record)


def bars(record: dict[str, Any]) -> str:
    text = line(["op", "what", "shape", "dtype", "bar", "measured", ""])
    text += line(["---"] * 5 + ["---:", "---"])
    for r in record["rows"]:
        for b in r["bars"]:
            sign = "at most" if b["at_most"] else "at least"
            text += line([
                f"`{r['op']}`", r["what"], "x".join(map(str, r["shape"])), r["dtype"],
                f"{sign} {b['bound']:g} {b['what']}", f"{b['value']:.3g}", "held" if b["held"] else "**missed**",
            ])  # fmt: skip
    return text + machine(record)


# Rivals by the first words of their names.
PLAIN, LIBRARIES = ("eager", "loop", "reference", "dense SDPA"), ("diffusers", "mamba.py", "transformers")
COMPILED = ("torch.compile", "FlexAttention")


FIVE = {
    ("tcfg", "beside its rivals, from memory"),
    ("selective_scan", "forward, zigzag along rows, bld, in cache"),
    ("tile_attention", "16 frames of 256, 2 references"),
    ("modulate", "5 rows of the table"),
    ("patch_step", "guidance, Euler, mask and levels, 50 in a row"),
}


def short(record: dict[str, Any], only: set[tuple[str, str]] | None = None) -> str:
    """The headline rows beside their rivals; the README shows five."""
    text = line(["", "shape", "pydiffuse", "plain PyTorch", "torch.compile", "a library"])
    text += line(["---", "---", "---:", "---:", "---:", "---:"])
    for r in record["rows"]:
        if not r.get("headline") or (only and (r["op"], r["what"]) not in only):
            continue
        rivals = {x["name"]: x for x in r["rivals"]}

        def cell(names: tuple[str, ...], rivals: dict[str, Any] = rivals) -> str:
            x = next((x for n in names for name, x in rivals.items() if name.startswith(n)), None)
            if x is None:
                return ""
            told = names is LIBRARIES or x["name"] not in ("eager", "loop", "reference", "torch.compile")
            named = f"{x['name']}: " if told else ""
            return f"{named}{x['ms']:.3g} ms ({x['ratio']:.3g}x)"

        text += line([
            f"`{r['op']}`, {r['what']}", "x".join(map(str, r["shape"])), f"**{r['ms']:.3g} ms**",
            cell(PLAIN), cell(COMPILED), cell(LIBRARIES),
        ])  # fmt: skip
    return text + machine(record)
