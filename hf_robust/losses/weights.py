# SPDX-License-Identifier: Apache-2.0
"""L2-SP: the weights of the encoder stay near where they started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..encoders.dual_encoder import at_least_float32, base_model, tower_modules
from ..errors import ConfigError
from ..tasks.task import Task
from .reference import BatchReference, Moved
from .term import Term

METHODS = ("SAFT", "ACLIP", "SHIRA", "LN_TUNING")  # values of PEFT's PeftType: what they train are entries of Δ
PIECE = 16_384  # numbers whose squares are summed at once: in float32 no longer sum is exact to six digits


class WeightLoss(Term):
    """How far the encoder's weights have moved: Σ (θ - θ₀)², λ times.

    L2-SP, Explicit Inductive Bias for Transfer Learning with Convolutional Networks (Li et al., ICML 2018,
    https://huggingface.co/papers/1802.01483), there with λ/2 and a plain weight decay on the head. Here as in the
    released code of LDIFS (Mukhoti et al., TMLR 2024), which compares with it: λ, 0.5 by default, over all weights of
    the towers with their projections. Heads, scale and bias are no part of the encoder and go where they like.

    It is a sum over all weights, not a mean: λ hangs on how many are trained. It is the same for every batch, and
    weight decay beside it pulls towards 0 instead of θ₀: set `weight_decay=0`.

    It is exact for whatever trains entries of Δ = θ - θ₀: full fine-tuning, SAFT, A-CLIP, SHiRA, LN tuning and
    `modules_to_save`. For other adapters it is refused: Σ over LoRA's A and B is not Σ Δ², and Δ in full would cost
    what the adapter saves.

    Args:
        weight: λ at the start of training, a finite number from 0.
        schedule: how λ goes on: `"constant"`, `"linear"` to 0, or `"cosine"` to 0.

    Raises:
        ConfigError: an argument is none of these.

    Example:
        >>> args = RobustTrainingArguments("runs/l2-sp", weight_decay=0.0)
        >>> trainer = RobustTrainer(model, args, losses=[WeightLoss()], ...)
    """

    name, needs = "weights", ("weights",)

    def __init__(self, weight: float = 0.5, schedule: Literal["constant", "linear", "cosine"] = "constant") -> None:
        super().__init__(weight, schedule)
        self.of_encoder: list[str] = []  # names in `BatchReference.weights`

    def attach(self, task: Task) -> None:
        """Refuses adapters whose trained tensors are not entries of Δ.

        Args:
            task: the task.

        Raises:
            ConfigError: it has one.
        """
        model = task.model
        configs = [model.peft_config[name] for name in model.active_adapters] if isinstance(model, PeftModel) else []
        for config in configs:
            if config.peft_type not in METHODS:
                what = (
                    "what the adapter trains are not differences of weights, so their squares are not those of θ - θ₀"
                )
                allowed = "full fine-tuning, SAFT, A-CLIP, SHiRA, LN tuning"
                got, remedy = config.peft_type.value, "Use FeatureLoss or SimilarityLoss, which hold what comes out."
                raise ConfigError(what, where="losses, weights", got=got, allowed=allowed, remedy=remedy)

    def forward(self, outputs: Any, reference: BatchReference) -> Tensor:
        """Returns the sum of squares, 0-dim.

        Args:
            outputs: what the task returned.
            reference: θ₀'s answers for the batch.

        Raises:
            ConfigError: no weight of the encoder is trained.
        """
        weights = reference.weights
        self.of_encoder = self.of_encoder or _of_encoder(weights, reference.task)
        return squared_distance([weights[name] for name in self.of_encoder])


def squared_distance(moved: Sequence[Moved]) -> Tensor:
    """Returns Σ (θ - θ₀)² over all numbers of some tensors, with the gradient 2 (θ - θ₀).

    Value and gradient come of one pass: what autograd would do over a dozen small operations for every tensor costs
    more than the step of SAFT may.

    Args:
        moved: tensors θ, with gradient, and θ₀; all on one device.

    Returns:
        0-dim, in float32 or better; exactly 0, with a gradient of 0, where all are equal.

    Example:
        >>> squared_distance([Moved(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]))])
        tensor(4.)
    """
    return _SquaredDistance.apply([pair.start for pair in moved], *(pair.tuned for pair in moved))


class _SquaredDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, starts: list[Tensor], *tuned: Tensor) -> Tensor:
        precise = [[at_least_float32(tensor) for tensor in tensors] for tensors in (tuned, starts)]
        differences = torch._foreach_sub(*precise)
        ctx.save_for_backward(*differences)
        ctx.dtypes = [tensor.dtype for tensor in tuned]
        norms = torch._foreach_norm([piece for one in differences for piece in one.reshape(-1).split(PIECE)])
        return torch.stack(norms).double().square().sum().to(differences[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        differences = list(ctx.saved_tensors)
        torch._foreach_mul_(differences, 2 * gradient)  # in place; autograd refuses a second backward
        return None, *(one.to(dtype) for one, dtype in zip(differences, ctx.dtypes, strict=True))


def _of_encoder(weights: Mapping[str, Moved], task: Task) -> list[str]:
    towers = [base_model(task.model).get_submodule(name) for name in tower_modules(task.model)]
    inside = {id(parameter) for tower in towers for parameter in tower.parameters()}
    found = [name for name, pair in weights.items() if id(pair.tuned) in inside]
    if not found:
        what, remedy = "no weight of the encoder is trained", "Train the encoder, or do without this loss."
        raise ConfigError(what, where="losses, weights", got=sorted(weights)[:3], remedy=remedy)
    return found
