# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over some of very many classes: those of the batch, and others that are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class SampledClasses:
    """The classes of a training step.

    Args:
        classes: `(sampled,)`, on the CPU, in ascending order.
        correction: `(sampled,)`, on the CPU, float64: -log of the probability that a class is there, given the classes
            of the batch, whose own is 1.
        n_classes: of how many they are.
    """

    classes: Tensor
    correction: Tensor
    n_classes: int

    def spread(self, logits: Tensor) -> Tensor:
        """Returns corrected logits over all classes, so that labels and weights of classes mean what they always do.

        With s the logits, B the classes of the batch and m of the n others drawn, all subsets of m being equally
        likely, the exponentials of the corrected logits sum to

            Ẑ = Σ_{c in B} exp(s_c) + (n / m) Σ_{c drawn} exp(s_c),

        whose mean over the draws is the partition function Z of the softmax over all classes: without bias. Its
        logarithm, and so the cross-entropy log Ẑ - s_label, is too small on average (Jensen): by Var(Ẑ) / (2 Z²) to
        first order, Var(Ẑ) = (n² / m) (1 - m / n) S², where S² is the variance of exp(s) over the classes not in B. It
        vanishes as 1 / m, and is 0 with all classes. Sampled softmax (Jean et al. 2014, arXiv 1412.2007) with the
        classes of the batch always there.

        Args:
            logits: `(batch, sampled)`.

        Returns:
            `(batch, classes)`; minus infinity, the logit of probability 0, for classes that were not drawn.
        """
        full = logits.new_full((len(logits), self.n_classes), -math.inf)  # (batch, classes)
        return full.index_copy(1, self.classes.to(logits.device), logits + self.correction.to(logits))


def sample_classes(
    labels: Tensor, n_classes: int, size: int, generator: torch.Generator, shared: bool = False
) -> SampledClasses:
    """Draws the classes of a training step: those of the batch, and others, with equal probability.

    Args:
        labels: `(batch,)`.
        n_classes: of how many.
        size: how many classes to return; more where the batch has as many, so that one at least is drawn.
        generator: on the CPU.
        shared: whether the batch is that of all processes together, so that all must call this at the same time.

    Example:
        >>> sample_classes(torch.tensor([7, 7, 2]), 10_000, 100, progress.generator("classes")).classes.shape
        torch.Size([100])
    """
    seen = torch.zeros(n_classes, dtype=torch.uint8, device=labels.device)
    seen[labels] = 1
    if shared:
        dist.all_reduce(seen, dist.ReduceOp.MAX)
    kept = seen.cpu().bool()  # (classes,)
    order = torch.randperm(n_classes, generator=generator)
    others = order[~kept[order]]  # in uniform order, whatever the batch
    drawn = others[: max(size - int(kept.sum()), 1)]
    classes = torch.cat([kept.nonzero().squeeze(1), drawn]).sort().values
    rarity = math.log(len(others) / len(drawn)) if len(drawn) else 0.0
    return SampledClasses(classes, (~kept[classes]).double() * rarity, n_classes)


def check_classes_per_step(size: int | None, n_classes: int) -> None:
    """Refuses a number of classes that cannot be drawn.

    Args:
        size: the setting; None for all classes.
        n_classes: of how many.

    Raises:
        ConfigError: it is no number of classes.
    """
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= n_classes:
        allowed = f"2 to {n_classes}, the number of classes, or None"
        raise ConfigError("this many classes cannot be drawn", where="classes_per_step", got=size, allowed=allowed)


def check_sampled_loss(size: int | None, images: int, label_smoothing: float) -> None:
    """Refuses a training in which some of the classes cannot stand for all.

    Args:
        size: classes of a step; None for all.
        images: of a batch, on all processes together.
        label_smoothing: a fraction.

    Raises:
        ConfigError: there may be no room beside the classes of the batch, or labels are smoothed over all classes.
    """
    if size is None:
        return
    if size <= images:
        what, allowed = "a batch may have as many classes as a step", f"more than {images}, the images of a batch"
        raise ConfigError(what, where="classes_per_step", got=size, allowed=allowed)
    if label_smoothing > 0:
        what = "labels are smoothed over all classes, of which a step has some"
        remedy = "Train without label smoothing, or without classes_per_step."
        raise ConfigError(what, where="label_smoothing_factor", got=label_smoothing, remedy=remedy)
