"""Calls to the handlers of pydiffuse._jax, the CPU kernels as targets of XLA's foreign function interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

try:
    import jax
    from jax import Array
    from jax.sharding import NamedSharding, PartitionSpec
except ImportError as missing:
    raise ImportError("pydiffuse.jax needs JAX: pip install jax") from missing

try:
    from pydiffuse import _jax
except ImportError as missing:
    raise ImportError(
        "pydiffuse.jax: pydiffuse was built where JAX was not installed; with jax installed, build it again:"
        " PYDIFFUSE_JAX=1 pip install --no-build-isolation -e ."
    ) from missing

Like: TypeAlias = jax.ShapeDtypeStruct

for _name, _handler in _jax.handlers.items():
    jax.ffi.register_ffi_target(f"pydiffuse_{_name}", _handler, platform="cpu")
    for _platform in ("CUDA", "ROCM"):
        jax.ffi.register_ffi_target(f"pydiffuse_{_name}", _jax.no_kernels, platform=_platform)


def call(
    name: str,
    results: Sequence[Like],
    arrays: Sequence[Array],
    aliases: Mapping[int, int] | None = None,
    vmap: str = "expand_dims",
    **attributes: Any,
) -> list[Array]:
    """The results of a handler. aliases: inputs that give their memory to a result.

    Under vmap every array has one more dimension in front, of size 1 where it is not mapped; if `vmap` is
    "broadcast_all" it is repeated instead, and a handler takes the dimension for a part of the batch.
    """
    axes = _axes(arrays[0])
    if axes and axes.varying:
        here = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
        results = [Like(r.shape, r.dtype, sharding=here, manual_axis_type=axes) for r in results]
    found = jax.ffi.ffi_call(
        f"pydiffuse_{name}",
        tuple(results),
        vmap_method=vmap,
        input_output_aliases=dict(aliases) if aliases else None,
    )(*arrays, **{k: v for k, v in ((k, _attribute(v)) for k, v in attributes.items()) if v is not None})
    return list(found)


def _axes(a: Array) -> Any:
    """The axes of shard_map over which an array varies."""
    return getattr(jax.typeof(a), "manual_axis_type", None)


def alike(*arrays: Any) -> list[Any]:
    """Arrays, or None, that vary over the same axes of shard_map: what is shared is taken to each device.

    To be done outside of custom_vjp: its derivative sums over the devices.
    """
    types = [None if a is None else _axes(a) for a in arrays]
    every = frozenset().union(*(t.varying for t in types if t is not None))
    return [
        a if t is None or t.varying == every else jax.lax.pcast(a, tuple(every - t.varying), to="varying")
        for a, t in zip(arrays, types, strict=True)
    ]


def _attribute(value: Any) -> Any:
    """Integers as 64 bits, lists of numbers as arrays; an empty list is left out."""
    if isinstance(value, int):
        return np.int64(value)
    if isinstance(value, float):
        return np.float64(value)
    if len(value) == 0:
        return None
    return np.array(value, np.float64 if isinstance(value[0], float) else np.int64)
