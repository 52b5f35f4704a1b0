# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT of a live model, in place and reversible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.dual_encoder import base_model, tower_modules
from ..encoders.pretrained import pretrained_weights
from ..errors import ConfigError, MergeError
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.task import Task
from ..tuners.saft.edits import show_values
from .arithmetic import check_alpha, check_finite
from .files import some
from .linear import (
    LinearTensor,
    adapter_layers,
    adapter_tensors,
    check_buffers,
    check_linear,
    equal_bits,
    owned_parameters,
)


@torch.no_grad()
def wise_ft(model: nn.Module, alpha: float, zero_shot: Mapping[str, Tensor] | None = None) -> None:
    """Sets a fine-tuned model, in place, to weights on the way from its zero-shot weights: θ₀ + α Δ.

    It changes the active adapters with their `modules_to_save`, a trainable head, and parameters named in `zero_shot`.
    The fine-tuned values are kept with the model, so that it can be called again with any α: α = 0 is the zero-shot
    model and α = 1 the fine-tuned one, bit for bit. If a tensor has been changed since the last call (trained on,
    loaded, cast to fewer bits and back), the model as it stands now is the fine-tuned one.

    Saving the model saves it at this α: an adapter in PEFT's format that loads at α everywhere.

    WiSE-FT (Wortsman et al., CVPR 2022, https://huggingface.co/papers/2109.01903) interpolates all weights of two
    models, (1 - α) θ₀ + α θ₁. For the supported adapters this is the same.

    Args:
        model: a `PeftModel`, a transformers model with `load_adapter`, a `ZeroShotClassifier` around one of them, or a
            model that was trained whole.
        alpha: the share of the way, a fraction in [0, 1].
        zero_shot: θ₀ of parameters trained without an adapter, by their names in `model.named_parameters()`: copies
            taken before the training. Other names in it are ignored.

    Raises:
        ConfigError: alpha is out of range, Δ is not linear in the parameters of an active method, adapters are merged,
            θ₀ of a trained parameter is not known, or nothing is tuned.
        SelectionError: a SAFT adapter has no entries yet.
        MergeError: `zero_shot` lacks a trained parameter, or has it with another shape or dtype.
        NonFiniteError: a value is NaN or infinite.

    Example:
        >>> model = PeftModel.from_pretrained(clip, "my-adapter")
        >>> wise_ft(model, 0.5)
        >>> model.save_pretrained("my-adapter-half-way")
    """
    alpha = check_alpha(alpha)
    tensors = linear_tensors(model, zero_shot)
    if not tensors:
        remedy = "Pass zero_shot=, copies of the weights from before the training: RobustTrainer.zero_shot."
        raise ConfigError("the model has no active adapter, and its zero-shot weights are not known", remedy=remedy)
    tuned = _tuned_values(tensors)
    for tensor, value in zip(tensors, tuned, strict=True):
        check_finite(value, tensor.name)
        check_finite(tensor.start, f"{tensor.name} in the zero-shot model")
    _check_frozen_heads(model, tensors, tuned)
    for tensor, value in zip(tensors, tuned, strict=True):
        tensor.write(value, alpha)
    show_values(model)


def linear_tensors(model: nn.Module, zero_shot: Mapping[str, Tensor] | None = None) -> list[LinearTensor]:
    """Returns the tensors that `wise_ft` interpolates: those in which Δ is linear, each with its value in θ₀.

    Args:
        model: as for `wise_ft`.
        zero_shot: likewise.

    Raises:
        ConfigError, SelectionError, MergeError: as `wise_ft`.
    """
    check_linear(model)
    return adapter_tensors(model) + _other_tensors(model, zero_shot)


def _tuned_values(tensors: Sequence[LinearTensor]) -> list[Tensor]:
    if all(tensor.is_as_written() for tensor in tensors):
        records = [tensor.record for tensor in tensors]
        return [tensor.parameter if r is None else r.tuned for tensor, r in zip(tensors, records, strict=True)]
    return [tensor.parameter for tensor in tensors]  # the model has been trained on, maybe not all of it


def _check_frozen_heads(model: nn.Module, tensors: Sequence[LinearTensor], tuned: Sequence[Tensor]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, ZeroShotClassifier) and module.head == "frozen":
            base = base_model(module.model)
            towers = [base.get_submodule(tower) for tower in tower_modules(module.model, "text")]
            text = {id(tensor) for tower in towers for tensor in (*tower.parameters(), *tower.buffers())}
            pairs = [pair for pair in zip(tensors, tuned, strict=True) if id(pair[0].parameter) in text]
            if not all(equal_bits(tensor.start.to(value), value) for tensor, value in pairs):
                remedy = "Build the classifier with head='live'."
                raise ConfigError("a frozen head would not follow its tuned text tower", where=name, remedy=remedy)


# --- parameters without an adapter ---


def zero_shot_copy(model: nn.Module) -> dict[str, Tensor] | None:
    """Takes θ₀ of a model that will be trained whole, as `wise_ft` needs it afterwards.

    Args:
        model: any model, before its training.

    Returns:
        Copies of the trainable parameters in CPU memory by name; None for a model with adapters, which hold θ₀.

    Example:
        >>> zero_shot = zero_shot_copy(clip)
        >>> train(clip)
        >>> wise_ft(clip, 0.5, zero_shot)
    """
    if adapter_layers(model):
        return None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}


def _other_tensors(model: nn.Module, zero_shot: Mapping[str, Tensor] | None) -> list[LinearTensor]:
    known = {**zero_shot_heads(model, zero_shot or {}), **(zero_shot or {})}
    layers = adapter_layers(model).values()
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    adapters = {id(parameter) for layer in layers for parameter in _adapter_parameters(layer)}
    tasks = [module for module in model.modules() if isinstance(module, Task)]
    beside = {id(task.get_parameter(name)) for task in tasks for name in task.beside()}
    found, unknown = [], []
    for name, owner, key in owned_parameters(model):
        parameter: Any = owner._parameters[key]
        if id(parameter) in beside:
            continue
        if id(parameter) in inside:
            if parameter.requires_grad and id(parameter) not in adapters:
                remedy = "Freeze it, and train it with modules_to_save."
                raise ConfigError("a weight of θ₀ is trained beside its adapter", where=name, remedy=remedy)
        elif name in known:
            _check_start(name, parameter, known[name])
            found.append(LinearTensor(name, owner, key, known[name]))
        elif parameter.requires_grad:
            unknown.append(name)
    _check_known(unknown, zero_shot)
    check_buffers(dict(model.named_buffers()), known, "model")
    return found


def _adapter_parameters(layer: Any) -> Iterator[nn.Parameter]:
    for name in layer.adapter_layer_names:
        yield from getattr(layer, name).parameters()


def _check_start(name: str, parameter: Tensor, start: Tensor) -> None:
    if start.shape != parameter.shape or start.dtype != parameter.dtype:
        found, allowed = (f"{tuple(tensor.shape)}, {tensor.dtype}" for tensor in (start, parameter))
        raise MergeError("zero_shot has a parameter in another form", where=name, got=found, allowed=allowed)
    if start.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
        remedy = "Take copies before the training: {name: t.clone() for name, t in model.state_dict().items()}."
        what = "zero_shot shares the model's memory and has been trained with it"
        raise MergeError(what, where=name, remedy=remedy)


def _check_known(unknown: list[str], zero_shot: Mapping[str, Tensor] | None) -> None:
    if unknown and zero_shot is None:
        remedy = "Pass zero_shot=, copies of them from before the training (RobustTrainer.zero_shot), or freeze them."
        raise ConfigError("θ₀ of trained parameters is not known", got=some(unknown), remedy=remedy)
    if unknown:
        remedy = "Names are those of model.named_parameters(), for the very model given here."
        raise MergeError(f"zero_shot lacks {len(unknown)} trained parameters", got=some(unknown), remedy=remedy)


def zero_shot_heads(model: nn.Module, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Builds the heads that the trainable heads in a model begin with, from θ₀'s text tower.

    Args:
        model: a model that passes `check_linear`; a `ZeroShotClassifier` in it may have a trainable head.
        known: parameters of θ₀ by name; a head whose weight is among them is not built.

    Returns:
        Weights and biases by their names in `model.named_parameters()`.
    """
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}.class_head." if name else "class_head."
        if isinstance(module, ZeroShotClassifier) and module.head == "trainable" and f"{prefix}weight" not in known:
            with torch.no_grad(), pretrained_weights(module.model):
                weight, bias = module.zero_shot_head()
            found[f"{prefix}weight"] = weight.to(module.class_head.weight)
            found[f"{prefix}bias"] = bias.to(module.class_head.bias)
    return found
