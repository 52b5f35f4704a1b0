# SPDX-License-Identifier: Apache-2.0
"""OGEN's adaptive local mean teacher: an average of the last epochs, over a window that grows with training."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.dual_encoder import at_least_float32


def window_size(epoch: int, epochs: int, largest: int = 9, smallest: int = 2) -> int:
    """Returns m_t = ⌊(1 + cos((T + t) / T · π)) · ½ (m_max − m_min) + m_min⌋ (OGEN, arXiv 2401.15914).

    Args:
        epoch: t, epochs done.
        epochs: T, epochs of the whole training.
        largest: m_max.
        smallest: m_min.

    Example:
        >>> [window_size(epoch, epochs=10) for epoch in range(11)]
        [2, 2, 2, 3, 4, 5, 6, 7, 8, 8, 9]
    """
    grown = (1 + math.cos((epochs + epoch) / epochs * math.pi)) / 2 * (largest - smallest)
    return math.floor(round(grown, 9)) + smallest  # rounded: cos(2π) must not fall short of 1


class LocalMeanTeacher:
    """Keeps the trained tensors of the last epochs, and averages as many of them as the window holds.

    Only tensors that are trained are kept, so a learned context of 4 tokens costs 9 times 4 vectors.

    Args:
        largest: most epochs in the window, and kept.
        smallest: fewest epochs in the window.
        average: `"ema"`, the moving average that starts at the window's oldest epoch, or `"mean"`.
        decay: of the moving average.

    Example:
        >>> teacher = LocalMeanTeacher(average="mean")
        >>> for value in (0.0, 1.0, 3.0):
        ...     teacher.keep({"context": torch.tensor([value])})
        >>> teacher.average(epoch=3, epochs=100)
        {'context': tensor([2.])}
    """

    def __init__(
        self, largest: int = 9, smallest: int = 2, average: Literal["ema", "mean"] = "ema", decay: float = 0.9
    ) -> None:
        self.largest, self.smallest, self.decay = largest, smallest, decay
        self.fold = _moving_average if average == "ema" else _mean
        self.kept: deque[dict[str, Tensor]] = deque(maxlen=largest)

    def __len__(self) -> int:
        return len(self.kept)

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Keeps copies of the tensors of an epoch that has ended; the oldest go when there are `largest`.

        Args:
            tensors: the trained tensors by name.
        """
        self.kept.append({name: tensor.detach().clone() for name, tensor in tensors.items()})

    def average(self, epoch: int, epochs: int) -> dict[str, Tensor]:
        """Returns the teacher's tensors by name.

        Args:
            epoch: epochs done.
            epochs: epochs of the whole training.
        """
        window = list(self.kept)[-window_size(epoch, epochs, self.largest, self.smallest) :]
        return {name: self.fold([tensors[name] for tensors in window], self.decay) for name in window[0]}

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what is kept, by `<position>.<name>`, the oldest first."""
        return {f"{index}.{name}": tensor for index, kept in enumerate(self.kept) for name, tensor in kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Keeps what another teacher's `state_dict` returned, and nothing else.

        Args:
            state: tensors by `<position>.<name>`.
        """
        kept: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            index, _, name = key.partition(".")
            kept.setdefault(int(index), {})[name] = tensor
        self.kept.clear()
        self.kept.extend(kept[index] for index in sorted(kept))


def _moving_average(tensors: list[Tensor], decay: float) -> Tensor:
    average = at_least_float32(tensors[0])
    for tensor in tensors[1:]:
        average = decay * average + (1 - decay) * at_least_float32(tensor)
    return average.to(tensors[0].dtype)


def _mean(tensors: list[Tensor], decay: float) -> Tensor:
    return torch.stack([at_least_float32(tensor) for tensor in tensors]).mean(0).to(tensors[0].dtype)


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Returns the mean squared difference of two sets of probabilities, 0-dim.

    Args:
        student_logits: `(..., classes)`.
        teacher_logits: `(..., classes)`.
    """
    return F.mse_loss(student_logits.softmax(-1), teacher_logits.softmax(-1))
