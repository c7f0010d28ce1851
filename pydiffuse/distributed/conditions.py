"""Ranks that each run the model for one condition: predictions change hands once, by parts.

mine = model(x, conditions[rank])                        # every rank the whole sample
cond, uncond = exchange_predictions(mine)                # its part of every prediction
part = guide([cond, uncond], "tcfg", x=part, scale=7.5)  # over the ranks: each steps its part
x = gather_parts(part, size=x.shape[1])                  # the whole sample for the next step
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydiffuse._core.checks import check_tensors, describe
from pydiffuse.distributed.comm import Exchange, Group, Ranks


def exchange_predictions(pred: Tensor, *, dim: int = 1, group: Group = None) -> list[Tensor]:
    """This rank's part of what every rank predicts, the first rank's first.

    pred: [B, ...], this rank's prediction, alike in shape and dtype on every rank. dim: the dimension that is cut,
    as torch.tensor_split cuts it. One all-to-all, in which all but this rank's part of pred leave it. Differentiable.
    """
    ranks = Ranks("exchange_predictions", group)
    with ranks.checking():
        check_tensors(ranks.op, "pred", (pred,))
        _check_dim(ranks.op, dim, pred)
    ranks.agree(pred=pred, dim=dim, gradient=torch.is_grad_enabled() and pred.requires_grad)
    parts = pred.tensor_split(ranks.size, dim)
    return list(Exchange.apply(ranks, [parts[ranks.rank].shape] * ranks.size, *parts))


def gather_parts(part: Tensor, size: int, *, dim: int = 1, group: Group = None) -> Tensor:
    """The parts of all ranks as one tensor, on every rank.

    part: this rank's, as exchange_predictions cuts a dimension of `size` elements. It goes to every other rank.
    Differentiable: every rank's gradient of the whole counts, so that a loss that all ranks have is divided by
    their number.
    """
    ranks = Ranks("gather_parts", group)
    with ranks.checking():
        _check_dim(ranks.op, dim, part)
        lengths = [len(c) for c in torch.empty(size, device="meta").tensor_split(ranks.size)]
        if part.shape[dim] != lengths[ranks.rank]:
            raise ValueError(
                f"{ranks.op}: part is {describe(part)}; accepted: {lengths[ranks.rank]} of {size} along {dim}"
            )
    shapes = [(*part.shape[:dim], n, *part.shape[dim + 1 :]) for n in lengths]
    dtype = str(part.dtype).removeprefix("torch.")
    due = torch.is_grad_enabled() and part.requires_grad
    ranks.agree(
        rest=(*part.shape[:dim], size, *part.shape[dim + 1 :]), dtype=dtype, dim=dim, gradient=due
    )
    return torch.cat(Exchange.apply(ranks, shapes, *[part] * ranks.size), dim)


def _check_dim(op: str, dim: int, t: Tensor) -> None:
    if not 1 <= dim < t.dim():
        raise ValueError(f"{op}: dim is {dim}; accepted: 1 to {t.dim() - 1}, a dimension of a sample")
