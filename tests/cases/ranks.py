"""What every rank does in tests/test_distributed.py: its part, compared with what one process computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import pydiffuse
from pydiffuse import distributed
from pydiffuse.distributed import comm
from tests.cases import guidance
from tests.helpers import leaves
from tests.ranks import spare
from tests.table import Case

Cut = Callable[[Tensor], Tensor | None]
"""A tensor's part on a rank; None where every rank holds all of it."""


def lengths(total: int, ranks: int, uneven: int = 0) -> list[int]:
    """Parts of a length, the last ones longer; uneven: the first rank's part."""
    if ranks == 1:
        return [total]
    rest, more = divmod(total - uneven, ranks - 1)
    return [uneven, *([rest] * (ranks - 1 - more)), *([rest + 1] * more)]


def compare(
    group: dist.ProcessGroup,
    whole: Callable[..., Any],
    part: Callable[..., Any],
    arguments: Any,
    cut: Cut,
    tolerance: float,
    exact: bool = False,
) -> None:
    """part(its part of the arguments) is this rank's part of whole(arguments), values and gradients. Gradients
    of what every rank holds add up over the ranks."""
    ranks = dist.get_world_size(group)

    def learned(t: Any) -> Any:
        return t.detach().clone().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t

    def own(t: Any) -> Any:
        return t if not isinstance(t, Tensor) or (mine := cut(t)) is None else mine

    full = tree_map(learned, arguments)
    mine = tree_map(lambda t: learned(own(t)), arguments)
    expected, found = leaves(whole(*full)), leaves(part(*mine))
    loss = theirs = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    for want, have in zip(expected, found, strict=True):
        weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
        here = cut(weight)
        close(have, own(want), tolerance, exact)
        loss = loss + (weight * want.double()).sum()
        theirs = theirs + ((weight / ranks if here is None else here) * have.double()).sum()
    inputs, parts = wanting(full), wanting(mine)
    slopes = torch.autograd.grad(loss, inputs, allow_unused=True)
    gradients = torch.autograd.grad(theirs, parts, allow_unused=True)
    for t, want, p, have in zip(inputs, slopes, parts, gradients, strict=True):
        want = torch.zeros_like(t) if want is None else want
        have = torch.zeros_like(p) if have is None else have
        if cut(t) is None:
            have = have.clone()
            dist.all_reduce(have, group=group)
        close(have, own(want), 10 * tolerance, exact and cut(t) is not None)


def wanting(arguments: Any) -> list[Tensor]:
    return [t for t in tree_flatten(arguments)[0] if isinstance(t, Tensor) and t.requires_grad]


def close(have: Tensor, want: Tensor, tolerance: float, exact: bool) -> None:
    if exact:
        torch.testing.assert_close(have, want, rtol=0, atol=0)
    elif want.numel():
        error = (have.double() - want.double()).norm() / max(want.double().norm().item(), 1e-2)
        assert error <= tolerance, f"{error:.2e} > {tolerance:.0e}"


def bounds(parts: Sequence[int], rank: int) -> tuple[int, int]:
    first = sum(parts[:rank])
    return first, first + parts[rank]


def guidance_case(group: dist.ProcessGroup, case: Case, dtype: torch.dtype, uneven: int) -> int:
    """Returns the bytes that the forward and the backward sent."""
    n, ranks = 61, dist.get_world_size(group)
    first, last = bounds(lengths(n, ranks, uneven), dist.get_rank(group))
    arguments = case.make(guidance.Maker((3, n), dtype))

    def cut(t: Tensor) -> Tensor | None:
        return t[:, first:last].contiguous() if t.shape == (3, n) else None

    op = getattr(distributed, case.op)
    whole = getattr(pydiffuse, case.op)
    tolerance = 4 * guidance.TOLERANCE[dtype].value
    with distributed.count_bytes() as sent:
        compare(
            group, lambda a, k: whole(*a, **k), lambda a, k: op(*a, **k, group=group), arguments, cut, tolerance
        )  # fmt: skip
    return sent[case.op]


def every_guidance_case(group: dist.ProcessGroup) -> None:
    for case in guidance.CASES:
        for dtype, uneven in ((torch.float32, 7), (torch.bfloat16, 0))[
            : 2 if case.name == "number" else 1
        ]:
            try:
                guidance_case(group, case, dtype, uneven)
            except Exception as error:
                raise AssertionError(f"{case.id}, {dtype}, {uneven}") from error


def guidance_bytes(group: dist.ProcessGroup) -> None:
    """What the module's docstring says: k(k+1)/2 float64 numbers per sample and direction, k more and one
    with `rescale`, nothing where the coefficients do not depend on the predictions."""
    B, n = 3, 40
    preds = [torch.randn(B, n, requires_grad=True) for _ in range(3)]
    c, u, _ = preds

    def sent(call: Callable[[], Any]) -> int:
        with distributed.count_bytes() as found:
            leaves(call())[0].sum().backward()
        return sum(found.values())

    each = 2 * 8  # forward and backward, float64
    d = distributed
    assert sent(lambda: d.tcfg(c, u, 3.0, group=group)) == each * 3 * B
    assert sent(lambda: d.tcfg(c, u, 3.0, rescale=0.5, group=group)) == each * ((3 + 2) * B + 1)
    assert sent(lambda: d.cfg(c, u, 3.0, group=group)) == 0
    assert sent(lambda: d.cfg(c, u, 3.0, rescale=0.5, group=group)) == each * ((3 + 2) * B + 1)
    assert sent(lambda: d.gram(preds, sums=True, group=group)) == each * (6 + 3) * B
    assert sent(lambda: d.tcfg([c, preds[2]], u, 3.0, group=group)) == each * 6 * B
    assert sent(lambda: d.guide([c, u], "cfg_zero", x=c, scale=3.0, group=group)) == each * 3 * B


def one_element_on_one_rank(group: dist.ProcessGroup) -> None:
    """A rank without elements takes part."""
    rank = dist.get_rank(group)
    t = torch.randn(2, 1, generator=torch.Generator().manual_seed(0))
    mine = t if rank == 0 else t[:, :0]
    found = distributed.tcfg(mine, mine, 3.0, rescale=0.5, group=group)
    assert torch.equal(found, pydiffuse.tcfg(t, t, 3.0, rescale=0.5) if rank == 0 else mine)


def with_out(group: dist.ProcessGroup) -> None:
    c, u = torch.randn(2, 2, 12)
    want = distributed.apg(c, u, 3.0, momentum=0.5, group=group)
    outs = [c.clone(), torch.empty_like(c)]
    assert distributed.apg(outs[0], u, 3.0, momentum=0.5, out=outs, group=group) is outs
    for a, b in zip(outs, want, strict=True):
        assert torch.equal(a, b)


def refused(group: dist.ProcessGroup, call: Callable[[int], Any], *words: str) -> None:
    """call(rank) raises on every rank an error with the words."""
    rank = dist.get_rank(group)
    try:
        call(rank)
    except (RuntimeError, ValueError, TypeError) as error:
        for word in words:
            assert word in str(error), f"rank {rank}: {word!r} is not in: {error}"
        return
    raise AssertionError(f"rank {rank}: nothing was raised")


def faults(group: dist.ProcessGroup) -> None:
    t = torch.randn(2, 8)
    last = dist.get_world_size(group) - 1

    def tcfg(p: Tensor) -> Tensor:
        return distributed.tcfg(p, p, 3.0, group=group)

    refused(
        group,
        lambda r: tcfg(t.bfloat16() if r == last else t),
        "tcfg",
        f"rank {last}",
        "bfloat16",
        "float32",
    )
    refused(group, lambda r: tcfg(t[:1] if r == last else t), "tcfg", f"rank {last}", "batch is")
    refused(group, lambda r: tcfg(t.double() if r == last else t), "tcfg", "float64 runs inside")
    refused(
        group,
        lambda r: distributed.gram([t], group=group) if r == last else tcfg(t.half()),
        f"rank {last if dist.get_rank(group) != last else 0} calls",
    )
    before = comm._states[group].compared
    for _ in range(3):
        tcfg(t[:, :5])  # the ranks still know each other, and compare once
    assert comm._states[group].compared - before <= 1


def missing(group: dist.ProcessGroup) -> None:
    """The last rank does not come: to the comparison of a new shape, and to the exchange of a known one."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    t = torch.randn(2, 8)
    for known, fresh in zip((False, True), spare[size], strict=True):
        if known:
            distributed.tcfg(t, t, 3.0, group=fresh)
        distributed.set_timeout(0.5)
        if rank < size - 1:
            refused(
                group,
                lambda r, fresh=fresh: distributed.tcfg(t, t, 3.0, group=fresh),
                "tcfg",
                f"rank {size - 1} did not come",
            )
        distributed.set_timeout(600)
        dist.barrier(group)
