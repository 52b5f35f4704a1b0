# SPDX-License-Identifier: Apache-2.0
"""From dataset rows to model inputs, where they have something else than one label: texts, labels, identities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..encoders.tokens import Tokenizer
from ..errors import DataError
from .collator import ImageCollator, index_of, row_place, value_of
from .columns import IDENTITY, LABELS, ROW, TEXT
from .draws import DRAW, drawing
from .labels import NO_LABEL


@dataclass(frozen=True)
class TargetCollator:
    """Makes batches of images and what is beside them; base of the collators of this file.

    Args:
        images: makes the images' part of a batch.
    """

    images: ImageCollator

    def without_transform(self) -> TargetCollator:
        """Returns a collator that shows rows as they are, for evaluation and everything that is computed once."""
        return replace(self, images=self.images.without_transform())


@dataclass(frozen=True)
class TextCollator(TargetCollator):
    """Batches images and their texts.

    Args:
        images: makes the images' part of a batch.
        tokenizer: of the model, see `text_tokenizer`.
        texts: which of a row's texts are in the batch. `"one"`: one that is drawn, in `RobustTrainer` by seed, epoch
            and row; the first where nothing says what a row draws. `"all"`: all. `"first"`: the first.

    Example:
        >>> collate = TextCollator(ImageCollator(processor), text_tokenizer(processor, clip), texts="all")
        >>> batch = collate([{"image": dogs, "text": ["two dogs", "dogs at play"]}, {"image": cat, "text": ["a cat"]}])
        >>> batch["input_ids"].shape, batch["image_of_text"]
        (torch.Size([3, 5]), tensor([0, 0, 1]))
    """

    tokenizer: Tokenizer
    texts: Literal["one", "all", "first"] = "one"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batches rows.

        Args:
            rows: of `image` and `text`, a list of strings.

        Returns:
            What `ImageCollator.inputs` returns; `input_ids` and, where the tower uses one, `attention_mask`, each
            `(texts, tokens)`; `image_of_text` `(texts,)`, the place in the batch of each text's image; `rows`
            `(batch,)`, the place of each row in its set, where rows know it.

        Raises:
            DataError: a row has no image or no text, or a text is too long.
        """
        batch = self.images.inputs(rows)
        texts = [self._texts(row) for row in rows]
        places = [row_place(rows[number], number) for number, of_row in enumerate(texts) for _ in of_row]
        batch |= self.tokenizer([text for of_row in texts for text in of_row], places)
        counts = torch.tensor([len(of_row) for of_row in texts])  # (batch,)
        batch["image_of_text"] = torch.arange(len(rows)).repeat_interleave(counts)  # (texts,)
        if all(ROW in row for row in rows):
            batch["rows"] = torch.tensor([row[ROW] for row in rows])  # (batch,)
        return batch

    def without_transform(self) -> TextCollator:
        """Returns a collator that shows rows as they are, with their first text where one would be drawn."""
        return replace(self, images=self.images.without_transform(), texts="all" if self.texts == "all" else "first")

    def _texts(self, row: Mapping[str, Any]) -> list[str]:
        texts = value_of(row, TEXT)
        if self.texts == "all":
            return list(texts)
        if self.texts == "first" or len(texts) == 1 or row.get(DRAW) is None:
            return [texts[0]]
        with drawing(row, "text"):
            return [texts[int(torch.randint(len(texts), ()))]]


@dataclass(frozen=True)
class LabelsCollator(TargetCollator):
    """Batches images and their several labels.

    Args:
        images: makes the images' part of a batch.

    Example:
        >>> LabelsCollator(ImageCollator(processor))([{"image": picture, "labels": [1, 0, -1]}])["labels"]
        tensor([[1., 0., nan]])
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batches rows.

        Args:
            rows: of `image` and `labels`, 1, 0 or -1 for every class.

        Returns:
            What `ImageCollator.inputs` returns, and `labels` `(batch, classes)` float32, NaN for what is not known,
            unless no row has them.

        Raises:
            DataError: some rows have no image or no labels, or labels for other numbers of classes.
        """
        batch = self.images.inputs(rows)
        if any(LABELS in row for row in rows):
            labels = [value_of(row, LABELS) for row in rows]
            if len({len(of_row) for of_row in labels}) > 1:
                raise DataError("rows have labels for different numbers of classes", got=[len(one) for one in labels])
            found = torch.tensor(labels, dtype=torch.float32)  # (batch, classes)
            batch["labels"] = found.masked_fill(found == NO_LABEL, float("nan"))
        return batch


@dataclass(frozen=True)
class IdentityCollator(TargetCollator):
    """Batches images and their identities.

    Args:
        images: makes the images' part of a batch.

    Example:
        >>> IdentityCollator(ImageCollator(processor))([{"image": picture, "identity": 7}])["labels"]
        tensor([7])
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Batches rows.

        Args:
            rows: of `image` and `identity`, integers from 0.

        Returns:
            What `ImageCollator.inputs` returns, and `labels` `(batch,)` unless no row has an identity.

        Raises:
            DataError: some rows have no image or no identity, or one that is no integer from 0.
        """
        batch = self.images.inputs(rows)
        if any(IDENTITY in row for row in rows):
            batch["labels"] = torch.tensor([index_of(row, IDENTITY) for row in rows])  # (batch,)
        return batch
