# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT of two whole models in memory."""

from __future__ import annotations

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import MergeError
from .arithmetic import check_alpha, check_finite, interpolate_tensor
from .files import some
from .linear import equal_bits

SIDES = ("zero-shot", "fine-tuned")


@torch.no_grad()
def interpolate(zero_shot: nn.Module, fine_tuned: nn.Module, alpha: float) -> nn.Module:
    """Makes the model on the way from one model to another: (1 - α) θ₀ + α θ₁.

    Parameters and floating-point buffers are interpolated, tied ones stay tied. Integers and booleans are those of the
    fine-tuned model, for α = 0 of the zero-shot one.

    WiSE-FT (Wortsman et al., CVPR 2022, https://huggingface.co/papers/2109.01903).

    Args:
        zero_shot: θ₀; not changed.
        fine_tuned: θ₁, of the same architecture; not changed.
        alpha: the share of the way, a fraction in [0, 1].

    Returns:
        A new model in eval mode, on the device of `fine_tuned`.

    Raises:
        ConfigError: alpha is out of range.
        MergeError: names, shapes or dtypes differ; a model is quantised, on the meta device, or has adapters.
        NonFiniteError: a value is NaN or infinite.

    Example:
        >>> zero_shot = AutoModel.from_pretrained("openai/clip-vit-base-patch32")
        >>> model = interpolate(zero_shot, AutoModel.from_pretrained("runs/full"), 0.5)
    """
    alpha = check_alpha(alpha)
    for side, model in zip(SIDES, (zero_shot, fine_tuned), strict=True):
        check_model(model, side)
    starts = own_tensors(zero_shot)
    check_alike(starts, own_tensors(fine_tuned))
    result = copy.deepcopy(fine_tuned).eval()
    written: set[int] = set()
    for name, tensor in own_tensors(result).items():
        if id(tensor) not in written:
            written.add(id(tensor))
            tensor.copy_(interpolate_tensor(starts[name].to(tensor.device), tensor, alpha))
    return result


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns all parameters and buffers, also the buffers that are not saved; a tied one under each of its names.

    Args:
        model: any model.
    """
    parameters, buffers = (named(remove_duplicate=False) for named in (model.named_parameters, model.named_buffers))
    return {**dict(parameters), **dict(buffers)}


def check_model(model: nn.Module, side: str) -> None:
    """Refuses a model whose tensors cannot be averaged.

    Args:
        model: any model.
        side: which one it is, for the message.

    Raises:
        MergeError: it is quantised, on the meta device, or has adapters.
        NonFiniteError: a value is NaN or infinite.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            remedy = "Call merge_and_unload() first, or use wise_ft(model, alpha)."
            raise MergeError(f"the {side} model has adapters", where=name, remedy=remedy)
    for name, tensor in own_tensors(model).items():
        if tensor.is_meta:
            raise MergeError(f"the {side} model is not loaded: a tensor is on the meta device", where=name)
        if isinstance(tensor, nn.Parameter) and tensor.dtype.itemsize == 1:
            remedy = "Load it in float32, float16 or bfloat16."
            raise MergeError(f"the {side} model is quantised", where=name, got=tensor.dtype, remedy=remedy)
        check_finite(tensor, f"{name} of the {side} model")


def check_alike(starts: dict[str, Tensor], tensors: dict[str, Tensor], sides: tuple[str, str] = SIDES) -> None:
    """Refuses tensors of two models that cannot be averaged with each other.

    Args:
        starts: of one model, by name.
        tensors: of the other, whose tied tensors are to stay tied.
        sides: which ones they are, for the message.

    Raises:
        MergeError: names, shapes or dtypes differ, or a tied tensor has two values in the first model.
    """
    first_side, second_side = sides
    lacking = [name for name in tensors if name not in starts]
    extra = [name for name in starts if name not in tensors]
    if lacking or extra:
        counts = f"lacks {len(lacking)} tensors of the {second_side} one and has {len(extra)} others"
        got = f"lacking {some(lacking) or 'none'}; others {some(extra) or 'none'}"
        raise MergeError(f"the {first_side} model {counts}", got=got)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        start = starts[name]
        if start.shape != tensor.shape or start.dtype != tensor.dtype:
            forms = (f"{tuple(side.shape)}, {side.dtype}" for side in (start, tensor))
            raise MergeError("the models have a tensor in two forms", where=name, got=" and ".join(forms))
        twin = starts[first.setdefault(id(tensor), name)]
        if twin is not start and not equal_bits(twin, start):
            what = f"a tensor is tied in the {second_side} model and has two values in the {first_side} one"
            raise MergeError(what, where=name, got=first[id(tensor)])
