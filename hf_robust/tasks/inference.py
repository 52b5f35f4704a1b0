# SPDX-License-Identifier: Apache-2.0
"""What every task does after its training: it is loaded, and embeds images and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ProcessorMixin

from ..data.collator import ImageCollator, batches_in_order
from ..data.given_images import given_images
from ..encoders.class_embeds import evaluating
from ..encoders.dual_encoder import base_model, image_embeds, text_tokenizer
from ..errors import ConfigError, DataError, NonFiniteError
from .retrieval import embed_all

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
BLANK = Image.new("RGB", (32, 32))  # embedded where there is no image, as embeddings of none have a width, too


class InferenceModule(nn.Module):
    """A dual encoder and its processor in use; the base of `Task`.

    Args:
        model: a dual encoder, plain or a `PeftModel` around one.
        processor: its processor.
    """

    truncates = False  # whether texts that are too long are cut

    def __init__(self, model: nn.Module, processor: ProcessorMixin) -> None:
        super().__init__()
        self.model, self.processor = model, processor

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        base: str | Path | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        revision: str | None = None,
    ) -> Self:
        """Loads what `RobustTrainer` has saved: base, adapter or whole model, head, settings and processor.

        It is for use, with nothing to be trained in an adapter; `PeftModel.from_pretrained(..., is_trainable=True)` is
        where another training starts.

        Args:
            name: a folder, or an id on the Hub.
            base: folder or id on the Hub of an adapter's base; None for the one that the adapter names.
            dtype: of the weights of base or whole model: `"float32"`, in which models are trained, `"bfloat16"`,
                `"float16"`, or `"auto"` for that of the file.
            device: where to; None for the accelerator, the CPU where there is none.
            revision: branch, tag or commit of the Hub.

        Returns:
            The task in eval mode. `Task.from_pretrained` gives the class that was trained, whichever it is.

        Raises:
            ConfigError: there is no such model or base, or another task was trained: the message names its class.
            AdapterFileError: files are missing, or are not as they were saved.

        Example:
            >>> classifier = ZeroShotClassifier.from_pretrained("my-adapter")
            >>> classifier.predict("tench.jpg")
            [{'label': 'tench', 'score': 0.93}]
        """
        from .loading import load_task  # which knows all tasks

        found: Any = load_task(cls, name, base, dtype, device, revision, {})  # type: ignore[arg-type]
        return found

    @torch.no_grad()
    def embed_images(self, images: Any, batch_size: int = 32, silent: bool = False) -> Tensor:
        """Embeds images.

        Args:
            images: one, or a sequence of them: paths, addresses of files (`http://` or `https://`), PIL images, arrays
                `(height, width, 3)` of uint8, of any sizes; or a `datasets.Dataset` or a column of one.
            batch_size: images at once.
            silent: without a progress bar.

        Returns:
            `(images, dim)`, L2-normalised, float32, on the CPU; also of a single image.

        Raises:
            DataError: an image cannot be used; the message says which.
            ConfigError: `batch_size` is below 1, or no integer.
            NonFiniteError: an embedding is NaN or infinite.

        Example:
            >>> classifier.embed_images(["a.jpg", picture]).shape
            torch.Size([2, 512])
        """
        parts = self._of_batches(self._embeds, images, batch_size, silent)
        embeds = torch.cat(parts or self._of_batches(self._embeds, BLANK, 1, True))
        return embeds if parts else embeds[:0]

    @torch.no_grad()
    def embed_texts(self, texts: str | Sequence[str]) -> Tensor:
        """Embeds texts, as they are: without a template.

        Args:
            texts: one, or a sequence of them.

        Returns:
            `(texts, dim)`, L2-normalised, float32, on the CPU; also of a single text.

        Raises:
            DataError: a text is no string, or longer than the text tower; `ImageTextPairs(truncate=True)` cuts it.
            NonFiniteError: an embedding is NaN or infinite.

        Example:
            >>> classifier.embed_images("a.jpg") @ classifier.embed_texts(["a photo of a cat", "a dog"]).T
            tensor([[0.31, 0.22]])
        """
        if not isinstance(texts, Iterable):
            raise DataError("no texts", where="texts", got=type(texts).__name__, allowed="a string, or several")
        given = [texts] if isinstance(texts, str) else [*texts]
        wrong = next((place for place, text in enumerate(given) if not isinstance(text, str)), None)
        if wrong is not None:
            raise DataError("no text", where=f"texts, {wrong}", got=type(given[wrong]).__name__, allowed="strings")
        tokenizer = text_tokenizer(self.processor, self.model, self.truncates)
        tokenizer.check_lengths(given, "texts", range(len(given)))
        with self._in_use():
            embeds = embed_all(self.model, tokenizer, given or [""])[: len(given)].float().cpu()
        check_finite(embeds, "embeddings", "embed_texts")
        return embeds

    # --- their parts ---

    def _embeds(self, batch: dict[str, Tensor]) -> Tensor:
        embeds = image_embeds(self.model, **batch).float().cpu()  # (batch, dim)
        check_finite(embeds, "embeddings", "embed_images")
        return embeds

    def _of_batches(
        self, function: Callable[[dict[str, Tensor]], T], images: Any, batch_size: int, silent: bool
    ) -> list[T]:
        """What a function returns of each batch of images."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError("no number of images", where="batch_size", got=str(batch_size), allowed="1 or more")
        rows = given_images(images)
        title = None if silent or len(rows) <= batch_size else "Looking at images"
        how = batch_size, 0, base_model(self.model).device, title
        with self._in_use():
            batches = batches_in_order(rows, ImageCollator(self.processor).inputs, *how)
            return [function(batch) for batch in batches]

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Eval mode, in which a model that has it already stays as it is, with the class embeddings that it keeps."""
        if any(module.training for module in self.modules()):
            with evaluating(self):
                yield
        else:
            yield


def check_finite(found: Tensor, what: str, where: str) -> None:
    """Refuses what a model has found with weights that are not finite, or too large for their precision.

    Args:
        found: logits or embeddings.
        what: which.
        where: the method that was called.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    if not found.isfinite().all():
        remedy = "Look for weights that are NaN, or take dtype='float32'."
        raise NonFiniteError(f"{what} are not finite", where=where, remedy=remedy)
