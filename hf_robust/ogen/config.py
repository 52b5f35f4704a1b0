# SPDX-License-Identifier: Apache-2.0
"""The settings of OGEN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from ..encoders.templates import check_class_names
from ..errors import ConfigError


@dataclass(frozen=True)
class OGENConfig:
    """Settings of OGEN (Zang et al., ICLR 2024, arXiv 2401.15914) for an `OGENLoss`.

    Image features of classes without images are generated from their names and from the features of similar known
    classes, and the text tower learns to tell all of them apart; a mean teacher of its own last epochs steadies it.

    The values of the generator and of the loss are those of the released code. The released code holds no
    distillation: its weight, the decay of the average, the logits it compares and when it starts are not in the
    abstract or the reviews either, and the paper's text could not be read. What stands here for them is our choice.

    Args:
        new_class_names: the classes that have no images. Their names are information that CoOp or SAFT alone do not
            get, so a result should say which were given; checkpoints do, in `classifier.json`.
        neighbours: K, the known classes a feature is generated from; 3 in the released code.
        heads: attention heads of the generator; 4 in the released code.
        dropout: of the generator's attention, a fraction; 0.1 in the released code.
        layer_norm: the generator with LayerNorm, see `FeatureGenerator`; the released code has none.
        noise: `"batch"`: one uniform vector per batch moves all prototypes, as in the released code; `"sample"`: one
            per image.
        warmup: share of the epochs, rounded down, in which the generator alone is trained; 0.2 in the released code.
        generation_weight: of the squared distance between a generated feature and the real one; 1.
        base_as_unknown_weight: of the cross-entropy of features generated for the image's own class; 0.25.
        reverse_weight: of that of features generated for its neighbours, divided by `neighbours`; 0.25.
        new_weight: of that of features generated for new classes, divided by `neighbours`; 0.5.
        cross_entropy_weight: of the cross-entropy of the images; 0.25.
        distillation_weight: of each of the two distances to the teacher's probabilities, over the known classes for
            the images and over the new classes for the features generated for them. Not known; 1 is our choice.
        average: the teacher is the exponential moving average (`"ema"`) or the plain `"mean"` of the last epochs.
        decay: of the moving average. Not known; 0.9 is our choice.
        largest_window: m_max, the most epochs the teacher averages; 9.
        smallest_window: m_min, the fewest; 2.
        seed: of the generator's first weights and of the noise.

    Raises:
        ConfigError: a setting is out of range.
        DataError: no new class names, or one is blank or repeated.

    Example:
        >>> OGENConfig(new_class_names=["lynx", "otter", "heron"]).neighbours
        3
    """

    new_class_names: Sequence[str]
    neighbours: int = 3
    heads: int = 4
    dropout: float = 0.1
    layer_norm: bool = False
    noise: Literal["batch", "sample"] = "batch"
    warmup: float = 0.2
    generation_weight: float = 1.0
    base_as_unknown_weight: float = 0.25
    reverse_weight: float = 0.25
    new_weight: float = 0.5
    cross_entropy_weight: float = 0.25
    distillation_weight: float = 1.0
    average: Literal["ema", "mean"] = "ema"
    decay: float = 0.9
    largest_window: int = 9
    smallest_window: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_class_names(self.new_class_names)
        for name in ("neighbours", "heads", "smallest_window", "largest_window"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} is out of range", got=getattr(self, name), allowed="integers from 1")
        if self.largest_window < self.smallest_window:
            got = (self.smallest_window, self.largest_window)
            raise ConfigError("the largest window is smaller than the smallest", got=got)
        if not 0 <= self.warmup <= 1:
            raise ConfigError("warmup is out of range", got=self.warmup, allowed="[0, 1]")
        for name in ("dropout", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is out of range", got=getattr(self, name), allowed="[0, 1)")
        for name in (field.name for field in fields(self) if field.name.endswith("_weight")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is out of range", got=getattr(self, name), allowed="[0, inf)")
        for name, allowed in (("noise", ("batch", "sample")), ("average", ("ema", "mean"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"unknown {name}", got=getattr(self, name), allowed=" or ".join(map(repr, allowed)))

    def weights(self, epoch: int, epochs: int) -> dict[str, float]:
        """Returns the weight of every term of the loss in an epoch.

        Args:
            epoch: epochs done.
            epochs: epochs of the whole training.

        Returns:
            Weights by the names the terms are logged under. In the warm-up only those of the generation are not 0.

        Example:
            >>> OGENConfig(["lynx", "otter", "heron"]).weights(epoch=2, epochs=10)["new"]
            0.16666666666666666
        """
        warm = epoch < math.floor(round(self.warmup * epochs, 9))  # 0.29 * 100 falls short of 29
        weights = {
            "cross_entropy": self.cross_entropy_weight,
            "base_as_unknown": self.base_as_unknown_weight,
            "reverse": self.reverse_weight / self.neighbours,
            "new": self.new_weight / self.neighbours,
            "distillation_known": self.distillation_weight,
            "distillation_new": self.distillation_weight,
        }
        generation = {"generation_base": self.generation_weight, "generation_reverse": self.generation_weight}
        return generation | {name: 0.0 if warm else weight for name, weight in weights.items()}
