# SPDX-License-Identifier: Apache-2.0
"""The settings of R-Adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ...errors import ConfigError
from ...peft_types import RobustPeftType
from ..config import RobustConfig

DropUnit = Literal["sample", "token"]


@dataclass
class RAdapterConfig(RobustConfig):
    """Settings of R-Adapter: a linear residual adapter behind the attention and the MLP of every block.

    R-Adapter (Kim et al., ECCV 2024, https://huggingface.co/papers/2408.05749) trains y + σ D(F y) in the place of
    what attention or MLP give to the residual stream, y, with D dropping the adapter at random. What is evaluated,
    merged and published are averages of F (in low rank of U and of D) and σ over the steps of training. They are saved
    beside F and σ, with which training goes on.

    The released code re-scales the adapters by α = 0.5 when it merges them; that is `wise_ft(model, 0.5)`, with any α
    at any time, so that there is no setting for it here. (Its 0.8 of retrieval never takes effect.)
    Its loss on class names, MPM-NCE, is `task={"flyp": {"positives": "positive", "label_smoothing": 0.02, "margin":
    0.05}}`; it leaves `logit_scale` as it is, as every adapter does. Its recipe for ImageNet is AdamW with a learning
    rate of 5e-4 and no weight decay, 10 epochs of batches of 512, and gradients clipped at 1.0.

    Differences to the released code: `r` is the rank (there every documented `--adapter` trains full rank, by an
    inverted comparison), and samples are dropped (there token positions, of all samples alike).

    Args:
        r: rank of F = U D; None, or what is not below the width of a module: F of full rank, as in the paper's results
            on ImageNet. Few-shot scripts of the release ask for 4.
        scale: what σ starts with, a scalar for every adapter that is trained, too. It is in the released code alone.
        drop_path: probability of dropping an adapter for a sample in training; the others are scaled up for it.
        drop_unit: what is dropped, each `"sample"`, or as in the released code each `"token"` position of all samples.
        average_decay: m in F̃ ← m F̃ + (1 - m) F after every step of an optimizer of PyTorch, from the untrained adapter
            on and without correction, as in the released code: after t steps a constant F has come to (1 - mᵗ) F, so
            that a short run needs a smaller m (base-to-new of the release: 0.9). None for no average.
        seed: for the first values of D in low rank.
        target_modules: names (or endings) of Linear modules or of modules around them, or one regular expression. By
            default the output projection of attention and the last one of the MLP in every block of both towers.
        others: see `RobustConfig`.

    Raises:
        ConfigError: a value is none of the allowed ones.

    Example:
        >>> from hf_robust import RAdapterConfig
        >>> from peft import get_peft_model
        >>> model = get_peft_model(clip, RAdapterConfig(r=4))  # doctest: +SKIP
    """

    r: int | None = field(default=None, metadata={"help": "Rank of the adapters, by default full."})
    scale: float = field(default=0.1, metadata={"help": "First value of every adapter's own factor (σ)."})
    drop_path: float = field(default=0.2, metadata={"help": "Probability of dropping an adapter in training."})
    drop_unit: DropUnit = field(default="sample", metadata={"help": "What an adapter is dropped for."})
    average_decay: float | None = field(default=0.999, metadata={"help": "Decay of the average over steps (m)."})
    seed: int = field(default=0, metadata={"help": "Seed of the first values in low rank."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RobustPeftType.RADAPTER
        self._check_choice("drop_unit", DropUnit)
        for name, least in (("r", 1), ("seed", 0)):
            number = getattr(self, name)
            if type(number) is not int and (name, number) != ("r", None) or type(number) is int and number < least:
                raise ConfigError(f"{name} is out of range", got=number, allowed=f"whole numbers from {least}")
        self._check_number("scale", 0.0, math.inf, "numbers above 0", above=True)
        self._check_number("drop_path", 0.0, 1.0, "[0, 1)")
        if self.average_decay is not None:
            self._check_number("average_decay", 0.0, 1.0, "[0, 1), or None")

    def _check_number(self, name: str, least: float, end: float, allowed: str, above: bool = False) -> None:
        number = getattr(self, name)
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not least <= number < end or (above and number == least):
            raise ConfigError(f"{name} is out of range", got=number, allowed=allowed)
