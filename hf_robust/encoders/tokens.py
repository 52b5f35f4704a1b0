# SPDX-License-Identifier: Apache-2.0
"""From texts to tokens, without the model they are for: what workers and whole data sets need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError

AT_ONCE = 1024  # texts whose lengths are looked at together
REMEDY = 'Shorten it, or have long texts cut: truncate=True, for a task {"pairs": {"truncate": True}}.'


@dataclass(frozen=True)
class Tokenizer:
    """Tokenises texts the way a text tower needs them; it can be pickled. See `text_tokenizer`.

    Args:
        tokenizer: of the processor.
        padding: as of `Family`.
        max_length: tokens that the tower takes.
        vocab_size: of the tower.
        end: the token at which the tower pools; None where it needs none.
        end_is_largest: whether the tower looks for the largest token of a text in the place of `end`.
        truncate: whether texts that are too long are cut; their end token stays.

    Example:
        >>> text_tokenizer(processor, clip)(["two dogs", "a cat on a mat"])["input_ids"].shape
        torch.Size([2, 7])
    """

    tokenizer: PreTrainedTokenizerBase
    padding: Literal["longest", "max_length"]
    max_length: int
    vocab_size: int
    end: int | None
    end_is_largest: bool
    truncate: bool = False

    def __call__(self, texts: list[str], places: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Tokenises a batch of texts.

        Args:
            texts: one or more.
            places: data set and row of each, for the message; None for texts that are of no data set.

        Returns:
            `input_ids` and, where the tower uses one, `attention_mask`, each `(texts, tokens)`, on the CPU.

        Raises:
            ConfigError: the tokenizer is that of another model.
            DataError: a text has more tokens than the tower takes, and is not to be cut.
        """
        tokens = self.tokenizer(
            texts,
            padding=self.padding,
            padding_side="right",  # positions count from the left in every family
            max_length=self.max_length,
            truncation=self.truncate,
            return_attention_mask=True,
            verbose=False,  # of a length that is looked at here
        )
        too_long = [place for place, mask in enumerate(tokens["attention_mask"]) if self._exceeds(mask)]
        if too_long:
            where, remedy = (None, None) if places is None else (places[too_long[0]], REMEDY)
            what, allowed = "text is longer than the text tower", f"{self.max_length} tokens"
            raise DataError(what, where=where, got=texts[too_long[0]], allowed=allowed, remedy=remedy)
        input_ids = torch.tensor(tokens["input_ids"])  # (texts, tokens)
        self._check_fit(input_ids)
        if self.padding == "max_length":
            return {"input_ids": input_ids}
        return {"input_ids": input_ids, "attention_mask": torch.tensor(tokens["attention_mask"])}

    def check_lengths(self, texts: Sequence[str], where: str, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Refuses texts that are too long, unless they are to be cut.

        Args:
            texts: all of a data set.
            where: its name, for the message.
            rows: `(texts,)`, the row of each; None where texts are of no rows.

        Raises:
            DataError: it names the first, and says how many there are.
        """
        if self.truncate:
            return
        too_long: list[int] = []  # places in `texts`
        for start in range(0, len(texts), AT_ONCE):
            some = list(texts[start : start + AT_ONCE])
            lists = self.tokenizer(some, return_attention_mask=False, verbose=False)["input_ids"]
            too_long += [start + place for place, ids in enumerate(lists) if len(ids) > self.max_length]
        if too_long:
            what = f"{len(too_long)} of {len(texts)} texts are longer than the text tower"
            first, place = texts[too_long[0]], where if rows is None else f"{where}, first in row {rows[too_long[0]]}"
            raise DataError(what, where=place, got=first, allowed=f"{self.max_length} tokens", remedy=REMEDY)

    def _exceeds(self, mask: list[int]) -> bool:
        return len(mask) > self.max_length and sum(mask) > self.max_length

    def _check_fit(self, input_ids: Tensor) -> None:
        where = "processor.tokenizer"
        remedy = "Load it with AutoProcessor.from_pretrained(name), for the name of the model."
        largest = input_ids.amax(dim=-1)  # (texts,)
        if largest.max() >= self.vocab_size:
            what, allowed = "tokenizer has tokens that the text tower does not know", f"below {self.vocab_size}"
            raise ConfigError(what, where=where, got=int(largest.max()), allowed=allowed, remedy=remedy)
        if self.end is None:
            return
        ends = largest == self.end if self.end_is_largest else (input_ids == self.end).any(dim=-1)
        if not ends.all():
            what, got = "tokenizer ends no prompt with the token at which the text tower pools", input_ids[0].tolist()
            raise ConfigError(what, where=where, got=got, allowed=f"prompts that end with {self.end}", remedy=remedy)
