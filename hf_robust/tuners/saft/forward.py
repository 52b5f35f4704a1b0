# SPDX-License-Identifier: Apache-2.0
"""The forward of one unit with its tuned entries, whether these stand in its weights already or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .kernels import Entries, ResidentAlias, SampledEmbedding, SampledLinear
from .plan import Plan


def forward_tuned(
    base_layer: nn.Module, plan: Plan, delta: Tensor, in_place: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls a unit's base with θ₀ + delta, so that `delta` gets its gradient.

    Args:
        base_layer: the unit's base.
        plan: its entries.
        delta: what is added there, `(entries,)`.
        in_place: whether the base holds the sum already.
        args: of the call.
        kwargs: of the call.
    """
    if in_place and not kwargs and _is_plain(base_layer, nn.Linear):
        return _linear(base_layer, plan, delta, *args)
    if in_place and not kwargs and _is_plain(base_layer, nn.Embedding):
        weight, padding_idx = base_layer.weight, base_layer.padding_idx
        return SampledEmbedding.apply(delta, *args, weight, padding_idx, plan.tensors[0].entries)
    return torch.func.functional_call(base_layer, tuned_tensors(base_layer, plan, delta, in_place), args, kwargs)


def tuned_tensors(base_layer: nn.Module, plan: Plan, delta: Tensor, in_place: bool) -> dict[str, Tensor]:
    """The parameters with entries as θ₀ + delta, with delta's gradient, by name; for the arguments see above."""
    if in_place:
        return {t.name: ResidentAlias.apply(t.parameter, delta[t.part], t.entries.positions) for t in plan.tensors}
    weights = {}
    for tensor, values in zip(plan.tensors, plan.effective(delta), strict=True):
        weight = base_layer.get_parameter(tensor.name)
        weights[tensor.name] = weight.flatten().scatter(0, tensor.entries.positions, values).view_as(weight)
    return weights


def _linear(base_layer: Any, plan: Plan, delta: Tensor, inputs: Tensor) -> Tensor:
    weight, bias = base_layer.weight, base_layer.bias
    entries = {tensor.name: tensor.entries for tensor in plan.tensors}
    nothing = torch.empty(0, dtype=torch.int64, device=weight.device)
    biases = entries["bias"].positions if "bias" in entries else nothing
    device = inputs.device.type
    if torch.is_autocast_enabled(device) and inputs.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        inputs, weight = inputs.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    weights = entries.get("weight") or Entries.of(nothing, weight.shape)
    return SampledLinear.apply(inputs, delta, weight, bias, weights, biases)


def _is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling the kernel instead of the module loses nothing: no subclass, no hooks, no patched forward."""
    if type(module) is not kind or "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return False
    special = isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq)
    return not special and not any(parameter.requires_grad for parameter in module.parameters())
