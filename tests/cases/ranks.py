"""What every rank does in tests/test_distributed.py: its part, compared with what one process computes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._pytree import tree_flatten, tree_map

import pydiffuse
from pydiffuse import distributed
from pydiffuse.distributed import comm, scale, slices
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
        close(have, own(want), 10 * tolerance, False)


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
        distributed.set_timeout(20)
        dist.barrier(group)


def conv_cases(group: dist.ProcessGroup) -> None:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for L, W, uneven, layout, reverse in (
        (37, 4, 5, "bld", False), (37, 4, 0, "bdl", True), (9, 4, 1, "bld", True), (5, 8, 1, "bdl", False),
        (12, 1, 2, "bld", False),
    ):  # fmt: skip
        first, last = bounds(lengths(L, ranks, uneven), rank)
        dim = 1 if layout == "bld" else 2
        t = torch.randn(2, L, 6, generator=torch.Generator().manual_seed(1))
        x = t if layout == "bld" else t.mT.contiguous()
        w, b = torch.randn(6, W), torch.randn(6)
        torch.manual_seed(0)

        def cut(t: Tensor, x=x, dim=dim, first=first, last=last) -> Tensor | None:
            return t.narrow(dim, first, last - first) if t.shape == x.shape else None

        def call(op: Any, *a: Any, layout=layout, reverse=reverse, **more: Any) -> Tensor:
            return op(*a, activation="silu", layout=layout, reverse=reverse, **more)

        with distributed.count_bytes() as sent:
            compare(
                group, lambda *a: call(pydiffuse.causal_conv1d, *a),
                lambda *a: call(distributed.causal_conv1d, *a, group=group), (x, w, b), cut, 1e-6,
            )  # fmt: skip
            assert torch.equal(
                call(distributed.causal_conv1d, cut(x), w, b, group=group), cut(call(pydiffuse.causal_conv1d, x, w, b))
            )  # fmt: skip
        ends = {"before": int(rank > 0), "after": int(rank < ranks - 1)}
        if reverse:
            ends = {"before": ends["after"], "after": ends["before"]}
        assert sent["causal_conv1d"] == (2 * ends["after"] + ends["before"]) * 2 * (W - 1) * 6 * 4


def scan_arguments(
    B: int, D: int, L: int, N: int, groups: int, dtype: torch.dtype, layout: str
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def tokens(*channels: int) -> Tensor:
        t = draw(B, *channels, L).to(dtype)
        return t if layout == "bdl" else t.movedim(-1, 1).contiguous()

    C = tokens(groups, N) if groups else draw(D, N)
    return {
        "u": tokens(D), "delta": tokens(D) * 0.3 - 1, "A": -draw(D, N).exp(), "B": tokens(max(groups, 1), N),
        "C": C, "D": draw(D), "z": tokens(D), "delta_bias": draw(D) * 0.1, "initial_state": draw(B, D, N),
    }  # fmt: skip


def scan_cases(group: dist.ProcessGroup) -> None:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    f32, bf16 = torch.float32, torch.bfloat16
    for B, D, L, N, groups, uneven, layout, dtype, method, options in (
        (2, 144, 133, 16, 1, 20, "bld", f32, "pipeline", {}),
        (2, 144, 133, 16, 1, 20, "bld", f32, "gather", {"return_last_state": True}),
        (1, 260, 70, 5, 2, 0, "bdl", f32, "pipeline", {"return_last_state": True, "reverse": True}),
        (1, 24, 70, 5, 2, 0, "bdl", f32, "gather", {"reverse": True}),
        (1, 130, 40, 4, 0, 3, "bld", bf16, "pipeline", {"path": True}),
        (0, 8, 40, 4, 1, 3, "bld", f32, "pipeline", {}),
    ):  # fmt: skip
        options = dict(options)
        given = scan_arguments(B, D, L, N, groups, dtype, layout)
        if options.get("path"):
            del given["initial_state"], given["z"]
        first, last = bounds(lengths(L, ranks, uneven), rank)
        dim = 1 if layout == "bld" else -1
        path = mine = None
        if options.pop("path", False):  # within each rank's tokens
            here = [
                torch.randperm(b - a, generator=torch.Generator().manual_seed(a)) + a
                for a, b in (bounds(lengths(L, ranks, uneven), r) for r in range(ranks))
            ]
            path, mine = pydiffuse.paths.from_order(torch.cat(here)), here[rank] - first

        def cut(t: Tensor, dim=dim, first=first, last=last, L=L) -> Tensor | None:
            return t.narrow(dim, first, last - first) if t.dim() > 2 and t.shape[dim] == L else None

        whole = functools.partial(
            pydiffuse.selective_scan, delta_softplus=True, layout=layout, path=path, **options
        )
        part = functools.partial(
            distributed.selective_scan, delta_softplus=True, layout=layout, path=mine, method=method,
            group=group, **options
        )  # fmt: skip
        tolerance = 5e-3 if dtype is bf16 else 1e-6
        with distributed.count_bytes() as sent:
            compare(group, lambda a, f=whole: f(**a), lambda a, f=part: f(**a), (given,), cut, tolerance)
        have, want = (
            leaves(part(**{n: t if cut(t) is None else cut(t) for n, t in given.items()})),
            leaves(whole(**given)),
        )
        close(have[0], cut(want[0]), tolerance, method == "pipeline")  # the bits of one process
        reverse = options.get("reverse", False)
        ends = (rank > 0, rank < ranks - 1)
        before, after = ends[::-1] if reverse else ends
        with_last = options.get("return_last_state", False)
        state = 4 * B * D * N
        formula = 4 * state if method == "gather" else (before + after) * state
        if with_last:
            formula += state  # the last state's gradient
            formula += state * (not after) if method == "pipeline" else 0
        assert sent["selective_scan"] == formula, (sent, formula)


def inner_case(group: dist.ProcessGroup) -> None:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    D, N, R, L = 64, 8, 4, 50
    torch.manual_seed(5)
    weights = (
        torch.randn(D, 4), torch.randn(D), torch.randn(R + 2 * N, D) / 8, torch.randn(D, R), torch.randn(16, D) / 8,
        None, -torch.rand(D, N),
    )  # fmt: skip
    xz = torch.randn(2, L, 2 * D)
    first, last = bounds(lengths(L, ranks, 9), rank)

    def cut(t: Tensor) -> Tensor | None:
        return t[:, first:last] if t.dim() == 3 and t.shape[1] == L else None

    compare(
        group, lambda *a: pydiffuse.zigzag_mamba_inner(*a, layout="bld"),
        lambda *a: distributed.zigzag_mamba_inner(*a, layout="bld", group=group), (xz, *weights), cut, 2e-6,
    )  # fmt: skip


def attention_cases(group: dist.ProcessGroup) -> None:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    P = pydiffuse.plans
    heads = P.per_head([P.local(60, 9), P.causal(60), P.dense(60), P.local(60, 20)])
    blind = P.from_mask(
        torch.arange(60)[:, None] > torch.arange(60)[None] + 3
    )  # some queries see nothing
    f32 = torch.float32
    for plan, H, Hk, method, dtype, sizes in (
        (P.frames(5, 12, 2), 4, 4, "ulysses", f32, None),
        (heads, 4, 4, "auto", f32, lengths(60, ranks, 7)),
        (heads, 4, 4, "ring", f32, lengths(60, ranks, 0)),
        (P.causal(60), 4, 2, "ring", f32, distributed.split(P.causal(60), ranks)),
        (P.frames(5, 12, 1), 2, 1, "auto", f32, None),
        (P.sliding_tile((6, 10), (2, 5), (2, 5)), 4, 4, "ring", f32, lengths(60, ranks, 11)),
        (P.sliding_tile((6, 10), (2, 5), (2, 5)), 4, 4, "ulysses", torch.bfloat16, None),
        (blind, 2, 2, "ring", f32, None),
    ):  # fmt: skip
        g = torch.Generator().manual_seed(4)
        q, k, v = (torch.randn(2, h, 60, 16, generator=g).to(dtype) for h in (H, Hk, Hk))
        each = [len(c) for c in torch.arange(60).tensor_split(ranks)] if sizes is None else sizes
        first, last = bounds(each, rank)

        def cut(t: Tensor, first=first, last=last) -> Tensor:
            return t[:, :, first:last]

        options: dict[str, Any] = {"lengths": sizes, "method": method, "group": group, "return_lse": True}
        exact = method == "ulysses" or (method == "auto" and Hk >= ranks)
        tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-6

        def whole(*a: Tensor, plan=plan) -> Any:
            out, lse = pydiffuse.tile_attention(*a, plan, return_lse=True)
            return out, lse.masked_fill(lse == -torch.inf, 0)

        def part(*a: Tensor, plan=plan, options=options) -> Any:
            out, lse = distributed.tile_attention(*a, plan, **options)
            return out, lse.masked_fill(lse == -torch.inf, 0)

        with distributed.count_bytes() as sent:
            compare(group, whole, part, (q, k, v), cut, tolerance, exact)
        ends = [bounds(each, r) for r in range(ranks)]
        seen = slices.without_order(plan).to_dense().any(0)
        item, own = q.element_size(), last - first
        if (
            method == "ring"
        ):  # keys that another rank's queries see, and what this rank's see, once more back
            need = [[int(seen[a:b, c:d].any(0).sum()) for c, d in ends] for a, b in ends]
            out_ = sum(need[r][rank] for r in range(ranks) if r != rank)
            back = sum(need[rank][r] for r in range(ranks) if r != rank)
            assert sent["tile_attention"] == 2 * 2 * Hk * 16 * item * (2 * out_ + back)
        elif method == "ulysses":
            tokens = 2 * item * 16  # batch 2
            share = H // ranks
            mine = (ranks - 1) * 3 * share * own * tokens + share * (60 - own) * tokens
            mine += 2 * 4 * share * (60 - own)  # lse
            theirs = 3 * share * (60 - own) * tokens + (ranks - 1) * share * own * (tokens + 8)
            assert sent["tile_attention"] == mine + theirs


def reorder_case(group: dist.ProcessGroup) -> None:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    source, target = pydiffuse.paths.zigzag((6, 10), 1), pydiffuse.paths.hilbert((6, 10))
    x = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(2))
    each = lengths(60, ranks, 5)
    first, last = bounds(each, rank)
    for a, b in ((None, target), (source, None), (source, target)):
        ordered = x if a is None else x[:, a.order]
        want = x if b is None else x[:, b.order]
        mine = ordered[:, first:last].clone().requires_grad_()
        have = distributed.reorder(mine, a, b, each, group=group)
        assert torch.equal(have, want[:, first:last])
        (have * want[:, first:last]).sum().backward()
        assert torch.equal(mine.grad, ordered[:, first:last])
    assert (
        distributed.reorder(x, source, source, [60] if ranks == 1 else each, group=group) is x
        if ranks == 1
        else True
    )


def token_errors(group: dist.ProcessGroup) -> None:
    """Errors of one rank's arguments, of all of them, and what only some ranks were given."""
    d, x, rank = distributed, torch.randn(1, 8, 6), dist.get_rank(group)
    q, plan = torch.randn(1, 2, 8, 16), pydiffuse.plans.causal(16)

    def conv(x: Tensor, **more: Any) -> Tensor:
        return d.causal_conv1d(x, torch.ones(x.shape[-1], 4), layout="bld", group=group, **more)

    refused(group, lambda r: conv(x[..., : 6 - r]), "causal_conv1d", "channels is")
    refused(group, lambda r: conv(x.double() if r else x), "causal_conv1d", "float64")
    refused(group, lambda r: conv(x.requires_grad_(bool(r))), "causal_conv1d", "gradient is")
    refused(group, lambda r: conv(x, cu_seqlens=[0, 8]), "causal_conv1d", "cu_seqlens")
    t = x.detach()

    def scan(**more: Any) -> Any:
        return d.selective_scan(
            t, t, -torch.ones(6, 4), t[..., :4], t[..., :4], layout="bld", group=group, **more
        )

    refused(group, lambda r: scan(method=("pipeline", "gather")[r]), "selective_scan", "method is")
    refused(group, lambda r: scan(method="tree"), "selective_scan", "'tree'", "'gather'")
    refused(group, lambda r: scan(path=[pydiffuse.paths.sweep((2, 4))]), "selective_scan", "one path")
    with pydiffuse.use_backend("reference"):
        refused(group, lambda r: scan(), "selective_scan", "reference")

    def attend(q: Tensor, **more: Any) -> Any:
        return d.tile_attention(q, q, q, plan, group=group, **more)

    refused(group, lambda r: attend(q[:, :, : 8 - r]), "tile_attention", "accepted: 8", "lengths=")
    refused(
        group, lambda r: attend(q, lengths=[8, 7]), "tile_attention", "lengths is [8, 7]", "16 in all"
    )
    refused(group, lambda r: attend(q[:, :1], method="ulysses"), "tile_attention", "1 key heads over 2")
    refused(group, lambda r: attend(q, method=("ulysses", "ring")[r]), "tile_attention", "method is")
    path = pydiffuse.paths.sweep((4, 4))
    refused(group, lambda r: d.reorder(t, None, path, [8], group=group), "reorder", "2 ints")
    refused(
        group,
        lambda r: d.reorder(t[:, r:], None, path, [8, 8], group=group),
        "reorder",
        "rank 1" if rank == 0 else "8",
    )
    assert conv(t).shape == t.shape and attend(q).shape == q.shape, rank


def train(group: dist.ProcessGroup, steps: int, fsdp: bool = False) -> list[float]:
    """The losses of the example."""
    from examples.distributed.train import train

    return train(steps, group=group, fsdp=fsdp)


def conditions(group: dist.ProcessGroup) -> None:
    """Every rank predicts for its condition, all guide and step their part."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    g = torch.Generator().manual_seed(0)
    preds, x = torch.randn(ranks, 2, 7, 5, generator=g), torch.randn(2, 7, 5, generator=g)
    weights = [1.0 + r for r in range(ranks - 1)]
    options = {"a": 0.9, "b": 0.1, "weights": weights, "rescale": 0.5}
    whole = [p.clone().requires_grad_() for p in preds]
    want = pydiffuse.guide(whole, "compose", x=x, **options)
    mine = preds[rank].clone().requires_grad_()
    with distributed.count_bytes() as sent:
        parts = distributed.exchange_predictions(mine, group=group)
    own = x.tensor_split(ranks, 1)[rank]
    assert sent["exchange_predictions"] == 4 * (x.numel() - own.numel())
    step = distributed.guide(parts, "compose", x=own, group=group, **options)
    have = distributed.gather_parts(step, 7, group=group)
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    want.square().sum().backward()
    (have.square().sum() / ranks).backward()
    torch.testing.assert_close(mine.grad, whole[rank].grad, rtol=1e-4, atol=1e-5)
    refused(group, lambda r: distributed.exchange_predictions(x, dim=3, group=group), "dim is 3")
    refused(group, lambda r: distributed.gather_parts(own, 9 + r, group=group), "gather_parts")


def dtensors(group: dist.ProcessGroup) -> None:
    """What is spread over a mesh goes into pydiffuse's own functions: values and gradients of one process."""
    size = dist.get_world_size(group)
    meshes = [(DeviceMesh.from_group(group, "cpu"), ([Shard(0)], [Shard(2)], [Replicate()]))]
    if size == 4:
        mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2))
        meshes.append((mesh, ([Shard(0), Shard(1)], [Replicate(), Shard(1)], [Shard(0), Shard(0)])))
    weight = torch.randn(5, 4, 7)
    w = torch.rand(5) + 2
    calls: list[Callable[..., Any]] = [
        lambda c, u: pydiffuse.tcfg(c, u, 3.0),
        lambda c, u: pydiffuse.cfg(c, u, w, rescale=0.7),
        lambda c, u: pydiffuse.apg(c, u, w, momentum=0.5, norm_threshold=2.0)[0],
        lambda c, u: pydiffuse.guide([c, u], "cfg_zero", x=u, a=0.9, b=w, scale=2.0, predict=(0.5, 2.0))[
            1
        ],
        lambda c, u: pydiffuse.combine([c, u], torch.tensor([2.0, -1.0])),
        lambda c, u: pydiffuse.compose([c, c], u, [1.0, w]),
        lambda c, u: pydiffuse.tcfg([c, 0.5 * u], u, [2.0, w], rescale=0.3),
        lambda c, u: pydiffuse.superpose([c, u], torch.zeros(5, 2), w, kind="and", noise=u - c)[0],
    ]
    for mesh, each in meshes:
        for placements in each:
            for call in calls:
                c, u = torch.randn(2, 5, 4, 7, generator=torch.Generator().manual_seed(0))
                plain = [t.clone().requires_grad_() for t in (c, u)]
                spread = [distribute_tensor(t, mesh, placements).requires_grad_() for t in (c, u)]
                want, have = call(*plain), call(*spread)
                assert isinstance(have, DTensor) and list(have.placements) == list(placements)
                torch.testing.assert_close(have.full_tensor(), want, rtol=1e-5, atol=1e-5)
                (want * weight).sum().backward()
                (have * distribute_tensor(weight, mesh, placements)).sum().backward()
                for p, s in zip(plain, spread, strict=True):
                    torch.testing.assert_close(s.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-4)
            c = distribute_tensor(c, mesh, placements)
            G = pydiffuse.gram([c, c]).full_tensor()
            torch.testing.assert_close(G, pydiffuse.gram([c.full_tensor()] * 2))
            out = torch.empty_like(c)
            assert pydiffuse.tcfg(c, c, 3.0, out=out) is out
            torch.testing.assert_close(out.full_tensor(), c.full_tensor(), rtol=1e-4, atol=1e-4)
            refused(
                group, lambda r, c=c: pydiffuse.tcfg(c, c.full_tensor(), 3.0), "tcfg", "beside a DTensor"
            )


def formulas(group: dist.ProcessGroup) -> None:
    """The cost model's bytes are those that are counted."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    last, f, d = rank == ranks - 1, scale, distributed

    def sent(call: Callable[[], Any]) -> int:
        with d.count_bytes() as found:
            call()
        return sum(found.values())

    x = torch.randn(2, 12, 64)
    assert sent(lambda: d.tcfg(x, x, 3.0, group=group)) == f.guidance_bytes(2, 2)
    assert sent(lambda: d.tcfg(x, x, 3.0, rescale=0.3, group=group)) == f.guidance_bytes(2, 2, True)
    conv = sent(lambda: d.causal_conv1d(x, torch.ones(64, 4), layout="bld", group=group))
    assert conv == (0 if last else f.conv_bytes(2, 64, 4, 4))
    for method in ("pipeline", "gather"):
        scan = sent(
            lambda m=method: d.selective_scan(
                x, x, -torch.ones(64, 4), x[..., :4], x[..., :4], layout="bld", method=m, group=group
            )
        )
        assert scan == (0 if last and method == "pipeline" else f.scan_bytes(2, 64, 4, method))
    each = lengths(60, ranks, 9)
    q, k = torch.randn(2, 4, each[rank], 16), torch.randn(2, 4, each[rank], 16)
    plan = pydiffuse.plans.frames(5, 12, 1)
    for method, formula in (
        ("ulysses", f.ulysses_bytes(2, 4, 4, each, rank, 16, 4)),
        ("ring", f.ring_bytes(2, 4, plan, each, rank, 16, 4)),
    ):
        found = sent(
            lambda m=method: d.tile_attention(q, k, k, plan, lengths=each, method=m, group=group)
        )
        assert found == formula
    path = pydiffuse.paths.from_order(torch.randperm(6000, generator=torch.Generator().manual_seed(0)))
    each = lengths(6000, ranks, 500)
    tokens = torch.randn(1, each[rank], 3)
    found = sent(lambda: d.reorder(tokens, None, path, each, group=group))
    assert abs(found / f.reorder_bytes(1, each, rank, 3, 4) - 1) < 0.1


def arrival(group: dist.ProcessGroup) -> None:
    """Whoever comes late: the same bits."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    plan = pydiffuse.plans.dense(48)
    q = torch.randn(1, 2, 48, 16, generator=torch.Generator().manual_seed(rank))[:, :, : 48 // ranks]
    results = []
    for late in (0, ranks - 1):
        time.sleep(0.2 * (rank == late))
        t = q.clone().requires_grad_()
        out = distributed.tile_attention(t, t, t, plan, group=group, method="ring")
        time.sleep(0.2 * (rank == late))
        out.square().sum().backward()
        c = distributed.apg(q, q.flip(2), 3.0, norm_threshold=1.0, group=group)
        results.append((out, t.grad, c))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def attention_over_a_mesh(group: dist.ProcessGroup) -> None:
    """Heads along one dimension of 2 x 2 ranks, rings along the other."""
    rank, P = dist.get_rank(group), pydiffuse.plans
    mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2))
    heads = P.per_head([P.local(60, 9), P.causal(60)])
    ordered = P.sliding_tile((6, 10), (2, 5), (2, 5))
    for plan, H, Hk, each, by in (
        (P.frames(5, 12, 1), 4, 2, [15] * 4, None),
        (heads, 2, 2, distributed.split(heads, 4), torch.tensor([0.2, 0.3])),
        (ordered, 3, 3, [7, 20, 13, 20], 0.3),
    ):
        g = torch.Generator().manual_seed(4)
        q, k, v = (torch.randn(2, h, 60, 16, generator=g) for h in (H, Hk, Hk))
        first, last = bounds(each, rank)
        options = {"scale": by, "return_lse": True}
        compare(
            group, functools.partial(pydiffuse.tile_attention, plan=plan, **options),
            functools.partial(distributed.tile_attention, plan=plan, lengths=each, group=mesh, **options),
            (q, k, v), lambda t, first=first, last=last: t[:, :, first:last], 1e-6,
        )  # fmt: skip
    refused(
        group,
        lambda r: distributed.tile_attention(q, k, v, ordered, group=mesh, method="ring"),
        "two dimensions",
    )
