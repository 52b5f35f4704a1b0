# SPDX-License-Identifier: Apache-2.0
"""Where a training is, and what is drawn there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Progress:
    """Where a training is.

    Args:
        step: optimizer steps done.
        steps: of the whole training.
        epoch: passes over the training set that have begun, less one.
        epochs: of the whole training.
        seed: of the training; what is drawn for a step hangs on it and on `step`.
    """

    step: int = 0
    steps: int = 1
    epoch: int = 0
    epochs: int = 1
    seed: int = 0

    @property
    def fraction(self) -> float:
        """What has been done of the training, in [0, 1]."""
        return self.step / self.steps

    def generator(self, what: str) -> torch.Generator:
        """Returns a generator (CPU) that draws the same for a seed and a step, on every rank and after a resume.

        Args:
            what: what the numbers are for; for something else it draws others.
        """
        key = f"{self.seed} {self.step} {what}".encode()
        return torch.Generator().manual_seed(
            int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
        )
