"""Plans as JSON, and copies: closed forms by name and parameters, others with their tiles.

    {"format": "pydiffuse.plan", "version": 1, "plan": {"name": "frames", "parameters": {...}}}

A plan within another one's parameters (`per_head`, `union`, `joint`) is {"plan": {...}} there. A plan that
no parameters describe has "arrays": its boundaries, rows and order as zlib-compressed, base64-coded int32,
its masks as bits.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pydiffuse.plans.arguments import MAX_TILES, count
from pydiffuse.plans.rows import FULL, Tiles

if TYPE_CHECKING:
    from pydiffuse.plans.plan import TilePlan

FORMAT, VERSION = "pydiffuse.plan", 1
DAMAGED = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading raises where a file is not what was written."""


class Arrays(NamedTuple):
    """What there is to a plan that is no closed form."""

    q_bounds: np.ndarray
    k_bounds: np.ndarray
    rows: Tiles
    order: np.ndarray | None


Rebuild = Callable[[str, dict[str, Any], Arrays | None], "TilePlan"]
"""A plan from its name, its parameters and, where it is no closed form, its arrays."""


def save_plan(plan: TilePlan, path: str | PathLike[str]) -> None:
    write(path, FORMAT, VERSION, {"plan": to_json(plan)})


def load_plan(path: str | PathLike[str], rebuild: Rebuild) -> TilePlan:
    content = read(path, FORMAT, VERSION)
    try:
        return from_json(content["plan"], rebuild)
    except DAMAGED as error:
        raise ValueError(f"TilePlan.load: {path} holds no plan: {error}") from error


def write(path: str | PathLike[str], format: str, version: int, content: dict[str, Any]) -> None:
    given = {"format": format, "version": version, **content}
    text = json.dumps(given, indent=1, allow_nan=False)
    Path(path).write_text(text + "\n")


def read(path: str | PathLike[str], format: str, version: int) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; accepted: a file of {format}") from error
    given = content.get("format") if isinstance(content, dict) else None
    if given != format:
        raise ValueError(f"{path} has the format {given!r}; accepted: {format!r}")
    if content.get("version") != version:
        raise ValueError(
            f"{path} is of version {content.get('version')!r} of {format}; this pydiffuse reads {version}"
        )
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"it has {name}")


def to_json(plan: TilePlan) -> dict[str, Any]:
    if plan.is_transposed:
        return {"transposed": to_json(plan.transpose())}
    found: dict[str, Any] = {"name": plan.name, "parameters": _plain(dict(plan.parameters))}
    arrays = plan.arrays()
    if arrays is not None:
        if not plan.has_digest:
            raise ValueError(
                f"{plan!r} is neither a closed form nor known by its tiles; accepted in a file: closed forms"
                " and plans from masks"
            )
        rows = arrays.rows
        found["arrays"] = {
            "q_bounds": _packed(arrays.q_bounds),
            "k_bounds": _packed(arrays.k_bounds),
            "heads": plan.heads,
            "starts": _packed(rows.starts),
            "tiles": _packed(rows.tiles),
            "masks": _packed(rows.masks),
            "shapes": [list(b.shape) for b in rows.bits],
            "bits": _coded(b"".join(np.packbits(b).tobytes() for b in rows.bits)),
            "order": None if arrays.order is None else _packed(arrays.order),
        }
    return found


def from_json(given: dict[str, Any], rebuild: Rebuild) -> TilePlan:
    """One of DAMAGED where `given` is not what `to_json` makes."""
    if "transposed" in given:
        return from_json(given["transposed"], rebuild).transpose()
    if not isinstance(given["name"], str):
        raise ValueError(f"its name is {given['name']!r}; accepted: text")
    parameters = {k: _values(v, rebuild) for k, v in given["parameters"].items()}
    arrays = _arrays(given["arrays"]) if "arrays" in given else None
    plan = rebuild(given["name"], parameters, arrays)
    if arrays is not None and dict(plan.parameters) != parameters:
        raise ValueError(
            f"the tiles have the {dict(plan.parameters)}, not the {parameters}: it is damaged"
        )
    return plan


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | None) else {"plan": to_json(value)}


def _values(value: Any, rebuild: Rebuild) -> Any:
    if isinstance(value, dict):
        return from_json(value["plan"], rebuild)
    return tuple(_values(v, rebuild) for v in value) if isinstance(value, list) else value


def _coded(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _packed(array: np.ndarray) -> str:
    return _coded(array.astype("<i4").tobytes())


def _decoded(text: str, most: int) -> bytes:
    """Up to `most` bytes: a short text can unpack to more than there is memory."""
    unpacking = zlib.decompressobj()
    most = min(most, 4 * MAX_TILES)
    try:
        data = unpacking.decompress(base64.b64decode(text, validate=True), most + 1)
    except zlib.error as error:
        raise ValueError(f"an array does not unpack: {error}") from error
    if len(data) > most or not unpacking.eof:
        raise ValueError(f"an array is damaged, ends early or has more than {most} bytes")
    return data


def _integers(text: str, most: int = MAX_TILES) -> np.ndarray:
    return np.frombuffer(_decoded(text, 4 * most), "<i4").astype(np.int32)


def _arrays(given: dict[str, Any]) -> Arrays:
    q_bounds, k_bounds = _integers(given["q_bounds"]), _integers(given["k_bounds"])
    heads = count("its arrays", "heads", given["heads"])
    starts = _integers(given["starts"], heads * len(q_bounds))
    starts = starts.astype(np.int64).reshape(heads, len(q_bounds))
    kept = max(0, int(starts[-1, -1]))
    tiles, masks = _integers(given["tiles"], kept), _integers(given["masks"], kept)
    shapes = [
        (count("its masks", "a length", q), count("its masks", "a length", k)) for q, k in given["shapes"]
    ]
    sizes = [-(-q * k // 8) for q, k in shapes]
    data, bits, at = np.frombuffer(_decoded(given["bits"], sum(sizes)), np.uint8), [], 0
    if len(data) < sum(sizes):
        raise ValueError(f"its masks are {sum(sizes)} bytes and {len(data)} are there")
    for (q, k), size in zip(shapes, sizes, strict=True):
        bits.append(np.unpackbits(data[at : at + size], count=q * k).astype(bool).reshape(q, k))
        at += size
    order = None if given["order"] is None else _integers(given["order"], int(q_bounds[-1]))
    found = Arrays(q_bounds, k_bounds, Tiles(starts, tiles, masks, tuple(bits)), order)
    _check(found)
    return found


def _check(given: Arrays) -> None:
    """Kernels trust a plan: what was read must be one."""
    q_bounds, k_bounds, (starts, tiles, masks, bits), order = given
    flat = starts.ravel()
    row_of = np.repeat(np.arange(starts.size), np.append(np.maximum(np.diff(flat), 0), 0))
    ends = starts[1:, 0] == starts[:-1, -1]
    shapes: np.ndarray = np.array([b.shape for b in bits] + [(0, 0)])
    facts = {
        "boundaries ascend from 0": all(
            b[0] == 0 and (np.diff(b) > 0).all() for b in (q_bounds, k_bounds)
        ),
        "rows follow each other": flat[0] == 0 and (np.diff(flat) >= 0).all() and ends.all(),
        "rows hold all tiles": flat[-1] == len(tiles) == len(masks),
        "tiles are tiles of keys": ((tiles >= 0) & (tiles < len(k_bounds) - 1)).all(),
        "masks are masks": ((masks >= FULL) & (masks < len(bits))).all(),
        "the order is a permutation": order is None
        or (q_bounds[-1] == k_bounds[-1] and np.array_equal(np.sort(order), np.arange(q_bounds[-1]))),
    }
    if all(facts.values()):
        tile_q = row_of % starts.shape[1]
        facts["tiles of a row ascend"] = ((np.diff(tiles) > 0) | (np.diff(row_of) > 0)).all()
        sizes = np.stack([np.diff(q_bounds)[tile_q], np.diff(k_bounds)[tiles]], 1)
        facts["masks are as large as their tiles"] = (
            (sizes == shapes[masks]).all(1) | (masks == FULL)
        ).all()
    for fact, holds in facts.items():
        if not holds:
            raise ValueError(f"its arrays do not fit: it is not so that {fact}")
