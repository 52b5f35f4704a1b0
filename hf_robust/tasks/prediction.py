# SPDX-License-Identifier: Apache-2.0
"""What images show, in words: the predictions of tasks with class names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..encoders.templates import check_class_names
from ..errors import ConfigError, DataError
from .inference import check_finite
from .task import Task

if TYPE_CHECKING:
    from typing_extensions import Self

Answer = dict[str, Any]  # of a label, and its score


class NamedClassesTask(Task):
    """A task whose classes have names; the base of `ZeroShotClassifier`."""

    class_names: list[str]

    @abstractmethod
    def classes(self, class_names: Sequence[str]) -> AbstractContextManager[None]:
        """Inside the context the task answers among other classes.

        Args:
            class_names: one per class.
        """

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        base: str | Path | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        revision: str | None = None,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | str | None = None,
    ) -> Self:
        """Loads what `RobustTrainer` has saved, or makes a zero-shot classifier of any dual encoder or adapter.

        Args:
            name: as of `Task.from_pretrained`.
            base: likewise.
            dtype: likewise.
            device: likewise.
            revision: likewise.
            class_names: one per class, for a model that was saved without any, say one that nobody has fine-tuned.
            templates: of prompts, for such a model; None for `"single"`.

        Returns:
            The task in eval mode.

        Raises:
            ConfigError: as `Task.from_pretrained`, or the model has class names of its own.
            AdapterFileError: as `Task.from_pretrained`; or the model has no class names, and none are given.
            DataError: no class names, or an empty or repeated one.

        Example:
            >>> ZeroShotClassifier.from_pretrained("my-adapter").class_names
            ['tench', 'goldfish']
            >>> name = "openai/clip-vit-base-patch32"
            >>> classifier = ZeroShotClassifier.from_pretrained(name, class_names=["cat", "dog"])
        """
        from .loading import load_task  # which knows all tasks

        given = {"class_names": class_names, "templates": templates}
        words = {key: value for key, value in given.items() if value is not None}
        found: Any = load_task(cls, name, base, dtype, device, revision, words)
        return found

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        class_names: Sequence[str] | None = None,
        batch_size: int = 32,
        silent: bool = False,
        top_k: int | None = None,
    ) -> list[Any]:
        """Says what images show.

        Args:
            images: one, or a sequence of them: paths, addresses of files (`http://` or `https://`), PIL images, arrays
                `(height, width, 3)` of uint8, of any sizes; or a `datasets.Dataset` or a column of one.
            class_names: the possible answers; None for the classes that it was trained on. Those that are among them
                are answered by the rows of the head, if all are; else all by their prompts.
            batch_size: images at once.
            silent: without a progress bar, which there is for more than one batch.
            top_k: how many answers for every image; None for the best.

        Returns:
            A list with one item for an image, also for a single image: `{"label", "score"}`, the name of a class and
            its probability among the possible answers, or with `top_k` the list of the best `top_k`, best first.
            For `SeveralLabels` always a list, of the labels that an image has, which may be none: those from
            `threshold` on, or with `top_k` the best of all; the score is the label's own probability.

        Raises:
            DataError: an image or a class name cannot be used; the message says which.
            ConfigError: a number is out of range.
            NonFiniteError: a logit is NaN or infinite.

        Example:
            >>> classifier.predict(["a.jpg", picture])
            [{'label': 'tench', 'score': 0.93}, {'label': 'goldfish', 'score': 0.88}]
            >>> classifier.predict("a.jpg", class_names=["lynx", "otter"], top_k=2)
            [[{'label': 'otter', 'score': 0.71}, {'label': 'lynx', 'score': 0.29}]]
        """
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ConfigError("no number of answers", where="top_k", got=top_k, allowed="1 or more, or None")
        names = self.class_names if class_names is None else plain_names(class_names)

        def answer(batch: dict[str, Tensor]) -> list[Any]:
            logits = self(**batch).logits[:, : len(names)].float().cpu()  # (batch, classes); others come after them
            check_finite(logits, "logits", "predict")
            return self._answers(logits, names, top_k)

        with nullcontext() if class_names is None else self.classes(names):
            parts = self._of_batches(answer, images, batch_size, silent)
        return [one for answers in parts for one in answers]

    def _answers(self, logits: Tensor, names: Sequence[str], top_k: int | None) -> list[Any]:
        ranked = best_first(logits, logits.softmax(dim=1), names, top_k or 1)
        return [answers[0] for answers in ranked] if top_k is None else ranked


def plain_names(class_names: Sequence[str]) -> list[str]:
    """Returns class names as a list of plain strings, which those of an array of NumPy's are not, after checking them.

    Args:
        class_names: one per class.

    Raises:
        DataError: what `check_class_names` raises, or it is no sequence.

    Example:
        >>> plain_names(np.array(["cat", "dog"]))
        ['cat', 'dog']
    """
    try:
        return [str(name) for name in check_class_names(class_names)]
    except TypeError as error:  # it has no length
        got, allowed = type(class_names).__name__, "a list with one name per class"
        raise DataError("no list of class names", got=got, allowed=allowed) from error


def best_first(logits: Tensor, scores: Tensor, names: Sequence[str], most: int) -> list[list[Answer]]:
    """Returns for every image its classes of the largest logits, of equal ones the first.

    Args:
        logits: `(images, classes)`.
        scores: `(images, classes)`.
        names: one per class.
        most: how many.

    Example:
        >>> best_first(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.25, 0.75]]), ["cat", "dog"], 1)
        [[{'label': 'dog', 'score': 0.75}]]
    """
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :most]  # (images, most)
    places, values = order.tolist(), scores.gather(1, order).tolist()
    return [
        [{"label": names[place], "score": value} for place, value in zip(*of_image, strict=True)]
        for of_image in zip(places, values, strict=True)
    ]
