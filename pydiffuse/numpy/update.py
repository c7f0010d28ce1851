"""One step of a selective scan on arrays: see pydiffuse.scan."""

from __future__ import annotations

from typing import Any

import numpy as np

from pydiffuse import _host
from pydiffuse._core.limits import MAX_STATES
from pydiffuse.numpy.arrays import Array, Outputs, array_of, flag, laid_out, shaped

OP = "selective_state_update"


def selective_state_update(
    state: Array,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    *,
    out: Array | None = None,
) -> Array:
    """One step of `selective_scan`, for inference token by token; `state` becomes the new state. Returns y like x.

    See pydiffuse.selective_state_update, heads of Mamba-2 included.
    """
    x = array_of(OP, "x", x)
    heads = x.ndim == 3
    names = "H, D" if heads else "D"
    x = laid_out(shaped(OP, "x", x, (None,) * (3 if heads else 2), f"(B, {names})"))
    batch, *channels = x.shape
    A = shaped(OP, "A", A, (*channels, None), f"({names}, N)")
    N, width = A.shape[-1], int(np.prod(channels))
    if not 1 <= N <= MAX_STATES:
        raise ValueError(f"{OP}: A has {N} states; accepted: 1 to {MAX_STATES}")
    softplus = flag(OP, "dt_softplus", dt_softplus)
    if not isinstance(state, np.ndarray) or not state.flags.writeable:
        raise TypeError(
            f"{OP}: state is a {type(state).__name__}; accepted: an array that can be written"
        )
    held = shaped(OP, "state", state, (batch, *channels, N), f"(B, {names}, N)")
    # [B, S, K, D, N], with one sequence and one path: where the step begins, and where it ends.
    new = np.array(held, np.float32, order="C").reshape(batch, 1, 1, width, N)

    def row(name: str, a: Any) -> Array:  # [B, 1, D]
        return laid_out(shaped(OP, name, a, x.shape, f"(B, {names})")).reshape(batch, 1, width)

    def parameter(name: str, a: Any) -> Array | None:  # [1, D]
        if a is None:
            return None
        given = shaped(OP, name, a, channels, f"({names})" if heads else "(D,)")
        return laid_out(given.astype(np.float32, copy=False)).reshape(1, width)

    def weights(name: str, a: Any) -> Array:  # [B, 1, G, 1, N]
        given = array_of(OP, name, a)
        grouped = given.ndim == 3
        sizes = (batch, None, N) if grouped else (batch, N)
        given = laid_out(shaped(OP, name, given, sizes, "(B, N) or (B, G, N)"))
        groups = given.shape[1] if grouped else 1
        if groups == 0 or channels[0] % groups:
            raise ValueError(
                f"{OP}: {name} has {groups} groups; they must divide the {channels[0]}"
                f" {'heads' if heads else 'channels'}"
            )
        return given.reshape(batch, 1, groups, 1, N)

    B, C = weights("B", B), weights("C", C)
    if B.shape != C.shape:
        raise ValueError(f"{OP}: B has {B.shape[2]} groups and C has {C.shape[2]}; they must be equal")
    step, gate = row("dt", dt), None if z is None else row("z", z)
    A = laid_out(A.astype(np.float32, copy=False)).reshape(1, width, N)
    outs = Outputs(OP, out, [(x.shape, x.dtype)], read=(x, step, gate, B, C, held))
    _host.selective_scan(
        outs.arrays[0].reshape(batch, 1, width), new, x.reshape(batch, 1, width), step[:, None], A, B, C,
        parameter("D", D), gate, parameter("dt_bias", dt_bias), new, None, None, softplus,
    )  # fmt: skip
    state[...] = new.reshape(state.shape)
    return outs.results()
