# SPDX-License-Identifier: Apache-2.0
"""TPGM: how far to go, tensor by tensor, learned on validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..encoders.class_embeds import evaluating
from ..encoders.dual_encoder import at_least_float32
from ..errors import ConfigError, DataError
from ..tuners.saft.edits import show_values
from .adapters import linear_tensors, wise_ft
from .arithmetic import check_finite

FLOOR = 1e-8  # of a radius, and added to a norm, as in the official code


@dataclass(frozen=True)
class ProjectionTable:
    """What `tpgm` found, printed as a table.

    Args:
        ratios: ρ, the share of its way that a tensor has gone, by its name in the model.
        losses: on the validation batches, by step.
    """

    ratios: dict[str, float]
    losses: list[float]

    def __str__(self) -> str:
        width = max(map(len, ["tensor", *self.ratios]))
        lines = [f"{name:<{width}}  {ratio:>16.4f}" for name, ratio in self.ratios.items()]
        return "\n".join([f"{'tensor':<{width}}  share of the way", *lines])


def tpgm(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    zero_shot: Mapping[str, Tensor] | None = None,
    steps: int = 200,
    learning_rate: float = 1e-2,
) -> ProjectionTable:
    """Sets every tensor of a fine-tuned model to θ₀ + ρ Δ, with a ρ of its own that is learned on validation data.

    Δ of a tensor is projected onto a ball around θ₀, whose radius γ = ρ |Δ| Adam learns, from ρ = 1/2 on. Tensors are
    those that `wise_ft` interpolates; of an adapter |Δ| is the norm of the values that its change is linear in. The
    fine-tuned values are kept: `wise_ft(model, 1)` sets them again.

    TPGM (Tian et al., CVPR 2023, https://huggingface.co/papers/2303.10720), in its form for CLIP: Euclidean norms, 200
    steps after the training, learning rate 1e-2. The released code fits γ on images that it also reports on.

    Args:
        model: as in `wise_ft`.
        batches: of validation data, on the model's device; gone through again and again.
        loss_fn: returns the loss, 0-dim, of the model (in eval mode) on a batch.
        zero_shot: as in `wise_ft`.
        steps: of Adam, one batch each.
        learning_rate: of Adam, about how far γ moves in a step: small beside |Δ|, which for an adapter may be small.

    Returns:
        ρ of every tensor that has changed, and the losses.

    Raises:
        ConfigError: a setting is out of range, the loss does not depend on what was trained, or as `wise_ft`.
        DataError: there are no batches, or they can be gone through once alone.
        SelectionError, MergeError: as `wise_ft`.
        NonFiniteError: a loss, or a value, is NaN or infinite. After an error the model is the fine-tuned one.

    Example:
        >>> table = tpgm(model, validation_loader, lambda model, batch: model(**batch).loss)
        >>> table.ratios["visual_projection.weight"]
        0.25
    """
    if type(steps) is not int or steps < 0 or not isinstance(learning_rate, int | float) or not learning_rate > 0:
        got = f"steps={steps}, learning_rate={learning_rate}"
        raise ConfigError("training of the radii is out of range", got=got, allowed="steps from 0, a rate above 0")
    wise_ft(model, 1.0, zero_shot)  # refuses before anything is computed
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    moved = {names[id(one.parameter)]: one for one in linear_tensors(model, zero_shot)}
    starts = {name: at_least_float32(one.start.detach()) for name, one in moved.items()}
    deltas = {name: one.parameter.detach() - starts[name] for name, one in moved.items()}
    deltas = {name: delta for name, delta in deltas.items() if delta.norm() > 0}
    if not deltas:
        raise ConfigError("nothing has changed in training")
    device = next(iter(deltas.values())).device
    norms = torch.stack([delta.norm().to(device) for delta in deltas.values()])  # (tensors,)
    radii = (norms / 2).requires_grad_()  # γ
    adam, losses, problem = torch.optim.Adam([radii], lr=learning_rate), [], _Problem(model, loss_fn)
    try:
        with evaluating(model), torch.enable_grad():
            for batch in islice(_endless(batches), steps):
                shares = _ratios(radii, norms)
                projected = {
                    f"model.{name}": (starts[name] + share.to(delta) * delta).to(moved[name].parameter.dtype)
                    for (name, delta), share in zip(deltas.items(), shares, strict=True)
                }
                loss = functional_call(problem, projected, (batch,))
                radii.grad = _gradient(loss, radii)
                adam.step()
                losses.append(loss.item())
        ratios = _ratios(radii, norms).detach().where(radii.detach() < norms, 1.0).tolist()
        with torch.no_grad():
            for name, ratio in zip(deltas, ratios, strict=True):
                moved[name].write(moved[name].parameter, ratio)
    finally:
        show_values(model)
    return ProjectionTable(dict(zip(deltas, ratios, strict=True)), losses)


class _Problem(nn.Module):
    """The loss as a module, whose tensors `functional_call` can replace."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


def _ratios(radii: Tensor, norms: Tensor) -> Tensor:
    with torch.no_grad():
        radii.copy_(radii.clamp(min=FLOOR).minimum(norms))
    return (radii / (norms + FLOOR)).clamp(0, 1)  # ρ, (tensors,)


def _gradient(loss: Any, radii: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim > 0:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError("this is no loss", where="loss_fn", got=got, allowed="a 0-dim tensor")
    check_finite(loss, "loss on validation data")
    if not loss.requires_grad:
        raise ConfigError("the loss does not depend on what was trained", where="loss_fn")
    return torch.autograd.grad(loss, radii)[0]


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        once = iter(batches)
        first = next(once, None)
        if first is None:
            remedy = "Give a list or a DataLoader."
            raise DataError("there are no batches, or they can be gone through once alone", remedy=remedy)
        yield first
        yield from once
