# SPDX-License-Identifier: Apache-2.0
"""The terms of the loss between two logs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


class LossLog:
    """Adds up the terms of a loss over micro-batches, until their means are taken.

    Example:
        >>> log = LossLog()
        >>> log.add({"cross_entropy": torch.tensor(2.0)}, share=0.5)
        >>> log.add({"cross_entropy": torch.tensor(4.0)}, share=0.5)
        >>> dict(log.pop_means())
        {'cross_entropy': tensor(3.)}
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0.0

    def add(self, terms: dict[str, Tensor], share: float) -> None:
        """Adds the terms of a micro-batch.

        Args:
            terms: 0-dim tensors by name, each a mean over the images.
            share: how much of an optimizer step's images they are of, a fraction.
        """
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + share * term.detach()
        self.steps += share

    def pop_means(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the mean of each term over the steps since the last call."""
        sums, steps = self.sums, self.steps
        self.sums, self.steps = {}, 0.0
        return ((name, total / steps) for name, total in sums.items())
