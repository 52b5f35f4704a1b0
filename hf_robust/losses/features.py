# SPDX-License-Identifier: Apache-2.0
"""LDIFS: the hidden states of images stay where the pre-trained model has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..encoders.dual_encoder import at_least_float32, base_model
from ..errors import ConfigError
from ..tasks.task import Task
from .learning import check_images_move
from .reference import BatchReference
from .term import Term, check_known

AXES = {"token": 1, "channel": 2}  # of (batch, tokens, width)
PARTS = 4  # of the depth, after each of which hidden states are taken


class FeatureLoss(Term):
    """How far hidden states of images have moved: the squared distance of normalised ones, over some layers, λ times.

    LDIFS, Fine-tuning can cripple your foundation model; preserving features may be the solution (Mukhoti et al.,
    TMLR 2024, https://huggingface.co/papers/2308.13320). n(h) = h / (‖h‖ + 1e-10); of all tokens, after each of the
    layers, n(h) of the tuned model is compared with that of the pre-trained one.

    How the paper normalises is not known to us, and its released code divides each channel by its norm over the
    tokens (`norm_axis="token"`), where one would expect each token's by its norm over the channels (`"channel"`). The
    mean of the former is up to 4 / tokens, of the latter up to 4 / width, so λ hangs on the axis, and on the
    reduction. Defaults are the code's: λ = 10 with `"token"` and `"mean"`. Our choice: layers are watched in the
    training's own forward, where the code runs the model again, and they are found by depth, where it has twelve
    blocks. Padding of SigLIP 2 counts as zero.

    Hidden states cannot be cached, and not be compared where images are embedded in chunks.

    Args:
        layers: names of modules of the vision tower that return `(batch, tokens, width)`. None: what enters the first
            block, and what leaves those at a quarter, half, three quarters and the end of the depth.
        norm_axis: the norm is over the tokens of each channel (`"token"`), or the channels of each token.
        reduction: over layers, tokens and channels; `"sum"` is the squared distance of all layers' concatenated.
        weight: λ at the start of training, a finite number from 0.
        schedule: how λ goes on: `"constant"`, `"linear"` to 0, or `"cosine"` to 0.

    Raises:
        ConfigError: an argument is none of these.

    Example:
        >>> trainer = RobustTrainer(model, args, losses=[FeatureLoss()], ...)
        >>> trainer.model.terms["features"].layers[:2]
        ('vision_model.pre_layrnorm', 'vision_model.encoder.layers.2')
    """

    name = "features"

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        norm_axis: Literal["token", "channel"] = "token",
        reduction: Literal["mean", "sum"] = "mean",
        weight: float = 10.0,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
    ) -> None:
        super().__init__(weight, schedule)
        check_known("norm_axis", norm_axis, tuple(AXES))
        check_known("reduction", reduction, ("mean", "sum"))
        several = isinstance(layers, Sequence) and not isinstance(layers, str) and len(layers) > 0
        if layers is not None and not (several and all(isinstance(layer, str) for layer in layers)):
            allowed = "a list of names of modules, or None"
            raise ConfigError("no layers to compare", where="losses, features, layers", got=layers, allowed=allowed)
        self.layers = () if layers is None else tuple(layers)  # `attach` finds some
        self.norm_axis, self.reduction = norm_axis, reduction

    def attach(self, task: Task) -> None:
        """Finds the layers by depth, if none were named.

        Args:
            task: the task.

        Raises:
            ConfigError: its vision tower is not trained, or has no blocks to be found.
        """
        check_images_move(task, self.name)
        self.layers = self.layers or layers_by_depth(task.model)

    def forward(self, outputs: Any, reference: BatchReference) -> Tensor:
        """Returns the distance, a mean over the images.

        Args:
            outputs: what the task returned.
            reference: θ₀'s answers for the batch.

        Raises:
            ConfigError: a layer returns something else than hidden states of tokens.
        """
        mask = reference.inputs.get("pixel_attention_mask")  # (batch, tokens)
        tuned, start = (
            [_of_tokens(name, states[name], mask) for name in self.layers]
            for states in (reference.tuned_hidden_states, reference.hidden_states)
        )
        how = AXES[self.norm_axis], self.reduction
        parts = torch.stack([feature_distance(one, other, *how) for one, other in zip(tuned, start, strict=True)])
        return parts.mean() if self.reduction == "mean" else parts.sum()


def feature_distance(tuned: Tensor, reference: Tensor, axis: int, reduction: Literal["mean", "sum"]) -> Tensor:
    """Returns the mean over images of ‖n(h) - n(h₀)‖², n(h) = h / (‖h‖ + 1e-10), or its mean over the numbers.

    Args:
        tuned: `(batch, tokens, width)`, h, the hidden states of a layer.
        reference: `(batch, tokens, width)`, h₀, those of the pre-trained model; gets no gradient.
        axis: that of the norm, 1 (the tokens of a channel) or 2 (the channels of a token).
        reduction: over tokens and channels.

    Returns:
        0-dim, in float32 or better; exactly 0, with a gradient of 0, where both are equal.

    Example:
        >>> feature_distance(torch.eye(2)[None], torch.zeros(1, 2, 2), 1, "sum")
        tensor(2.)
    """
    squares = (_normalised(tuned, axis) - _normalised(reference.detach(), axis)).square()  # (batch, tokens, width)
    return squares.mean() if reduction == "mean" else squares.sum(dim=(1, 2)).mean()


def layers_by_depth(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of what enters the first block of a vision tower, and of blocks at quarters of its depth.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.

    Raises:
        ConfigError: the blocks cannot be told.

    Example:
        >>> layers_by_depth(clip)[1:]  # of 12
        ('vision_model.encoder.layers.2', …, 'vision_model.encoder.layers.11')
    """
    tower, depth = base_model(model).vision_model, base_model(model).config.vision_config.num_hidden_layers
    lists = [n for n, one in tower.named_modules() if isinstance(one, nn.ModuleList) and len(one) == depth]
    if len(lists) != 1:
        what, remedy = "the blocks of the vision tower cannot be told", "Name layers."
        raise ConfigError(what, where="losses, features, layers", got=lists, remedy=remedy)
    first = "pre_layrnorm" if "pre_layrnorm" in dict(tower.named_children()) else "embeddings"  # CLIP's spelling
    blocks = dict.fromkeys(-(-depth * part // PARTS) - 1 for part in range(1, PARTS + 1))  # the last of each quarter
    return (f"vision_model.{first}", *(f"vision_model.{lists[0]}.{block}" for block in blocks))


def _normalised(states: Tensor, axis: int) -> Tensor:
    states = at_least_float32(states)
    return states / (torch.linalg.vector_norm(states, dim=axis, keepdim=True) + 1e-10)  # (batch, tokens, width)


def _of_tokens(layer: str, states: Tensor, mask: Tensor | None) -> Tensor:
    if not isinstance(states, Tensor) or states.ndim != 3:
        what, allowed = "a layer returns no hidden states of tokens", "(batch, tokens, width)"
        got = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise ConfigError(what, where=f"losses, features, {layer}", got=got, allowed=allowed)
    return states if mask is None or mask.shape != states.shape[:2] else states * mask[:, :, None]
