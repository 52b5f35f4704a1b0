# SPDX-License-Identifier: Apache-2.0
"""Batches with several images of every identity in them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from ..data.draws import Draws
from ..errors import ConfigError, needs_extra


class IdentitySampler(Sampler[int]):
    """Orders rows so that a batch has m images of each of its identities; by seed and epoch alone.

    Every batch draws identities, and m images of each, as the `MPerClassSampler` of `pytorch-metric-learning` does: of
    an identity with fewer images it draws with replacement, and an epoch need not show every image. An epoch has as
    many batches as fit into the rows.

    Args:
        labels: `(rows,)`, integers.
        images_per_identity: m.
        batch_size: rows in a batch of one rank.
        draws: of the run, with the epoch.

    Raises:
        ConfigError: m does not divide the batch, or there are fewer identities, or rows, than a batch has.

    Example:
        >>> sampler = IdentitySampler(np.array([0, 0, 0, 1, 1, 1]), 2, batch_size=4, draws=Draws(seed=42))
        >>> len(list(sampler))
        4
    """

    def __init__(self, labels: np.ndarray, images_per_identity: int, batch_size: int, draws: Draws) -> None:
        self.labels, self.images_per_identity = labels, images_per_identity
        self.batch_size, self.draws = batch_size, draws
        where, identities = "images_per_identity", len(np.unique(labels))
        if (
            isinstance(images_per_identity, bool)
            or not isinstance(images_per_identity, int)
            or images_per_identity < 1
        ):
            raise ConfigError("no number of images", where=where, got=images_per_identity, allowed="integers from 1")
        if batch_size % images_per_identity:
            remedy = "Change it, or per_device_train_batch_size."
            what = f"a batch of {batch_size} images does not hold whole identities"
            raise ConfigError(what, where=where, got=images_per_identity, allowed="its divisors", remedy=remedy)
        if batch_size > min(images_per_identity * identities, len(labels)):
            what = f"a batch of {batch_size} images needs {batch_size // images_per_identity} identities"
            got, remedy = f"{identities} identities, {len(labels)} images", "Lower per_device_train_batch_size."
            raise ConfigError(what, where=where, got=got, remedy=remedy)

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        with needs_extra("identities"):
            from pytorch_metric_learning.samplers import MPerClassSampler
        how = self.images_per_identity, self.batch_size, len(self.labels)
        with self.draws.of(0, "order"):  # it draws from numpy's global generator, and shuffles what it shuffled before
            rows = list(MPerClassSampler(self.labels, *how))
        return iter(map(int, rows))
