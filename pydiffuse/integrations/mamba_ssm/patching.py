"""Ours in the places of mamba_ssm's and causal_conv1d's functions."""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from pydiffuse.integrations.mamba_ssm import conv, scan
from pydiffuse.integrations.places import modules, places, stand_in, stands_for

OWNER = "mamba_ssm"
PACKAGES = ("mamba_ssm", "causal_conv1d")
OURS = {
    f.__name__: f
    for f in (
        scan.selective_scan_fn,
        scan.mamba_inner_fn,
        scan.mamba_inner_fn_no_out_proj,
        scan.selective_state_update,
        conv.causal_conv1d_fn,
        conv.causal_conv1d_update,
    )
}
_lock = threading.Lock()


def patch(module: ModuleType | None = None) -> list[str]:
    """Put ours in the places of mamba_ssm's and causal_conv1d's functions: in the two packages, and in every
    loaded module that took them from there. Returns the places, as "package.module.name".

    Where a package found no kernels at its import and holds None by one of the names, ours is put, too. Calls
    may be repeated, and what is imported later takes ours from the packages.

    module: a copy of mamba_ssm instead, as `dis_mamba` in ZigMa; what the copy took from elsewhere is replaced
    in the copy alone.
    ImportError if there is nothing of the two packages to import, ValueError for a module without such functions
    or with one whose arguments are others; nothing is replaced then.
    """
    op = "mamba_ssm.patch"
    if module is None:
        missing = [error for package in PACKAGES if (error := _load(package))]
        if len(missing) == len(PACKAGES):
            raise ImportError(
                f"{op}: neither mamba_ssm nor causal_conv1d can be imported ({missing[0]}); call patch(module) for a"
                " copy of mamba_ssm, or take the functions from pydiffuse.integrations.mamba_ssm"
            ) from missing[0]
        homes = [m for package in PACKAGES for m in modules(package)]
    elif isinstance(module, ModuleType):
        homes = list({id(m): m for m in (module, *modules(module.__name__))}.values())
    else:
        raise TypeError(f"{op}: module is a {type(module).__name__}; accepted: a module or None")
    with _lock:
        held = [f for _, f in places(homes)]
        found = [f for h in held for f in (h, *stands_for(h, OWNER)) if _theirs(f)]
        new = {id(f): stand_in(_served(op, f), f, OWNER) for f in found}
        names = {m.__name__ for m in homes}
        put = [
            (place, new[id(f)])
            for place, f in places(modules())
            if id(f) in new and (f.__module__ in names or place.module.__name__ in names)
        ]
        put += [
            (place, stand_in(OURS[place.name], None, OWNER))
            for place, f in places(homes)
            if f is None and place.cell is None and place.name in OURS
        ]
        already = [str(place) for place, f in places(homes) if stands_for(f, OWNER)]
        if not put and not already:
            raise ValueError(f"{op}: {homes[0].__name__} has none of the functions {', '.join(OURS)}")
        for place, function in put:
            place.put(function)
    return sorted({str(place) for place, _ in put} | set(already))


def unpatch() -> list[str]:
    """Put everything back that `patch` replaced, also in modules that were imported since. Returns the places."""
    with _lock:
        restored = [
            (place, stands_for(f, OWNER)) for place, f in places(modules()) if stands_for(f, OWNER)
        ]
        for place, (original,) in restored:
            place.put(original)
    return sorted({str(place) for place, _ in restored})


def _load(package: str) -> ImportError | None:
    """Import it unless it is; why that failed."""
    if not modules(package):
        try:
            importlib.import_module(package)
        except ImportError as error:
            return error
    return None


def _theirs(f: Any) -> bool:
    """One of their functions. `ops.triton.selective_state_update` is a module by the name of its function."""
    return (
        type(f) is FunctionType
        and f.__name__ in OURS
        and not stands_for(f, OWNER)
        and f not in OURS.values()
    )


def _served(op: str, f: FunctionType) -> Callable[..., Any]:
    """Ours, by the order of their arguments: causal_conv1d_fn's has changed."""
    ours = OURS[f.__name__]
    accepted, given = (list(inspect.signature(each).parameters) for each in (ours, f))
    if not set(given) <= set(accepted):
        raise ValueError(
            f"{op}: {f.__module__}.{f.__name__} has the arguments {', '.join(given)}; accepted: {', '.join(accepted)}"
        )
    if given == accepted[: len(given)]:
        return ours

    @functools.wraps(ours)
    def by_name(*args: Any, **kwargs: Any) -> Any:
        return ours(**dict(zip(given, args)), **kwargs)

    return by_name
