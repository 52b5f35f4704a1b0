# SPDX-License-Identifier: Apache-2.0
"""The settings of A-CLIP."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import ConfigError
from ...peft_types import RobustPeftType
from ..config import RobustConfig


@dataclass
class ACLIPConfig(RobustConfig):
    """Settings of A-CLIP: train the query, key and value projections of attention, and nothing else.

    A-CLIP (Niss, Vogt-Lowell and Tsiligkaridis, 2024, https://huggingface.co/papers/2402.09613) trains a subset of the
    attention weights, for a balance of generalisation to other domains and forgetting. That these are the query, key
    and value projections of both towers, with their biases, follows the only public implementation; what the paper
    does with biases, its loss and its hyper-parameters are not known. (Attentive Mask CLIP, also called A-CLIP, is
    another method.)

    Args:
        towers: which towers of a dual encoder; `both` with `target_modules` takes any model.
        train_bias: also the biases of the projections.
        train_out_proj: also the output projections of attention, which the method leaves alone.
        target_modules: names (or endings) of Linear modules or of modules around them, or one regular expression. By
            default the query, key and value projections of the model's family, which leave out the pooling head of
            SigLIP.
        others: see `RobustConfig`.

    Raises:
        ConfigError: a value is none of the allowed ones.

    Example:
        >>> from hf_robust import ACLIPConfig
        >>> from peft import get_peft_model
        >>> model = get_peft_model(clip, ACLIPConfig())  # doctest: +SKIP
    """

    train_bias: bool = field(default=True, metadata={"help": "Also train the biases of the projections."})
    train_out_proj: bool = field(default=False, metadata={"help": "Also train attention's output projections."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RobustPeftType.ACLIP
        for name in ("train_bias", "train_out_proj"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is no switch", got=getattr(self, name), allowed="True or False")
        if self.train_out_proj and self.target_modules is not None:
            remedy = "Name the output projections in target_modules."
            raise ConfigError("train_out_proj adds to the default target_modules alone", remedy=remedy)
