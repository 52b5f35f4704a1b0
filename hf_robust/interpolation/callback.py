# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT as the last step of a training."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .adapters import wise_ft, zero_shot_copy
from .arithmetic import check_alpha


class WiSEFTCallback(TrainerCallback):
    """Sets the trained model to θ₀ + α Δ when training ends, with any `Trainer`.

    It comes after the best checkpoint is loaded. The checkpoints themselves are the fine-tuned model; what is saved
    after training is the model at α. `wise_ft(model, 1)` gives the fine-tuned adapter back.

    For a model without adapters it keeps θ₀ of the trainable parameters in CPU memory, taken when the trainer is made,
    because a checkpoint to resume from replaces it; after the training, `zero_shot` is what `wise_ft` needs.

    WiSE-FT (Wortsman et al., CVPR 2022, https://huggingface.co/papers/2109.01903).

    Args:
        alpha: the share of the way from the zero-shot to the fine-tuned weights, a fraction in [0, 1].

    Raises:
        ConfigError: alpha is out of range; when training begins, as `wise_ft`.

    Example:
        >>> trainer = RobustTrainer(model, args, train_dataset=train, callbacks=[WiSEFTCallback(0.5)], ...)
        >>> trainer.train()
        >>> trainer.save_model()
    """

    zero_shot: dict[str, Tensor] | None = None

    def __init__(self, alpha: float) -> None:
        self.alpha = check_alpha(alpha)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Keeps θ₀ of a model that is trained whole."""
        self.zero_shot = zero_shot_copy(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Refuses before the training what would be refused after it."""
        wise_ft(model, 1.0, self.zero_shot)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Sets the model to α."""
        wise_ft(model, self.alpha, self.zero_shot)
