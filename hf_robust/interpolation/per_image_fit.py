# SPDX-License-Identifier: Apache-2.0
"""What VRF finds in data: training images at which the zero-shot model alone fails, and two temperatures."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.collator import ImageCollator, batches_in_order
from ..data.draws import Draws
from ..data.embeds_cache import pretrained_image_embeds
from ..data.rows import labelled_images
from ..encoders.dual_encoder import base_model, family, logit_scale
from ..encoders.pretrained import pretrained_weights
from ..errors import ConfigError, DataError, NonFiniteError
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.task import Rows, Task
from .adapters import linear_tensors
from .linear import adapter_layers
from .temperature import Temperature, fit_temperature

logger = logging.getLogger(__name__)
ZeroShot = nn.Module | Mapping[str, Tensor] | None
Head = tuple[Tensor, Tensor | None]  # weight `(classes, dim)` and bias `(classes,)`


@dataclass(frozen=True)
class Fitted:
    """What `PerImageEnsemble.fit` finds.

    Args:
        failures: `(failures, dim)`, float16: the fine-tuned model's embeddings of training images that it classifies
            correctly and the zero-shot model does not.
        images: how many training images were looked at.
        neighbour: an image's distance is that to its `neighbour`-th nearest failure; 0 where there are none.
        fine_tuned_temperature: of the fine-tuned model's logits.
        zero_shot_temperature: of the zero-shot model's.
    """

    failures: Tensor
    images: int
    neighbour: int
    fine_tuned_temperature: Temperature
    zero_shot_temperature: Temperature


def zero_shot_encoder(classifier: ZeroShotClassifier, zero_shot: ZeroShot) -> nn.Module:
    """Returns the dual encoder that is the zero-shot model inside `pretrained_weights`.

    Args:
        classifier: the fine-tuned model.
        zero_shot: as for `PerImageEnsemble`.

    Raises:
        ConfigError, MergeError: as `PerImageEnsemble`.
    """
    encoder = classifier.model
    if isinstance(zero_shot, nn.Module):
        zero_shot = zero_shot.model if isinstance(zero_shot, Task) else zero_shot
        family(zero_shot)  # refuses what is no dual encoder
        if type(base_model(zero_shot)) is not type(base_model(encoder)):
            got, allowed = type(base_model(zero_shot)).__name__, type(base_model(encoder)).__name__
            raise ConfigError("zero-shot model is of another family", where="zero_shot", got=got, allowed=allowed)
    elif not isinstance(zero_shot, Mapping | None):
        allowed = "a dual encoder, or copies of weights by name, as zero_shot_copy makes them"
        raise ConfigError("no zero-shot model", where="zero_shot", got=type(zero_shot).__name__, allowed=allowed)
    given: Any = encoder if zero_shot is None else zero_shot
    if given is encoder and not adapter_layers(encoder):
        remedy = "Pass zero_shot=, a second model or copies of the weights from before the training."
        raise ConfigError("the model has no adapter, and its zero-shot model is not known", remedy=remedy)
    if isinstance(given, nn.Module):
        return given
    starts = {tensor.name: tensor.start for tensor in linear_tensors(classifier, given) if tensor.name in given}
    twin = copy.deepcopy(encoder)
    for name, start in starts.items():
        if name.startswith("model."):  # a trained head is no part of the encoder
            twin.get_parameter(name.removeprefix("model.")).data.copy_(start)
    return twin


def own_heads(classifier: ZeroShotClassifier, zero_shot: nn.Module) -> tuple[Head, Head]:
    """Returns the fine-tuned and the zero-shot model's linear layer for the classifier's classes and templates.

    Args:
        classifier: the fine-tuned model.
        zero_shot: what `zero_shot_encoder` returned.
    """
    trained = classifier.head == "trainable"
    fine_tuned = classifier.trained_head() if trained else classifier.zero_shot_head()
    with pretrained_weights(zero_shot):  # SigLIP's bias is the same for all classes and changes no probability
        return fine_tuned, (logit_scale(zero_shot) * classifier.prompts.encode(zero_shot), None)


def head_logits(embeds: Tensor, head: Head) -> Tensor:
    """Returns the logits of images, `(batch, classes)`, in the precision of their embeddings under autocast, too.

    Args:
        embeds: `(batch, dim)`, L2-normalised.
        head: of `own_heads`.
    """
    with torch.autocast(embeds.device.type, enabled=False):
        return F.linear(embeds, *head)


def labelled_rows(classifier: ZeroShotClassifier, dataset: Any, name: str) -> Rows:
    """Returns the rows of a set whose classes are among the classifier's.

    Args:
        classifier: the fine-tuned model.
        dataset: the user's.
        name: of the set, for messages.

    Raises:
        DataError: they are not, or a label is no class.
    """
    rows = labelled_images(dataset, name, target="label")
    classifier.check_rows(rows)
    if not classifier.knows(rows):
        got, allowed = rows.class_names, ", ".join(map(repr, classifier.class_names))
        raise DataError("classes are not the classifier's", where=name, got=got, allowed=allowed)
    return replace(rows, draws=Draws(seed=0))  # a transform would draw from the global generators


@dataclass(frozen=True)
class _Answers:
    """What both models say of a batch: `(batch, dim)`, `(batch, classes)` twice, and the right classes `(batch,)`."""

    embeds: Tensor
    fine_tuned: Tensor
    zero_shot: Tensor
    labels: Tensor


def answers(
    classifier: ZeroShotClassifier,
    zero_shot: nn.Module,
    heads: tuple[Head, Head],
    rows: Rows,
    batch_size: int,
    workers: int,
    silent: bool,
) -> Iterator[_Answers]:
    """Yields what both models, in eval mode, say of the images of a set.

    Args:
        classifier: the fine-tuned model.
        zero_shot: what `zero_shot_encoder` returned.
        heads: what `own_heads` returned.
        rows: what `labelled_rows` returned.
        batch_size: images encoded at once.
        workers: processes that open images.
        silent: without a progress bar.

    Raises:
        DataError: an image cannot be used, or there are no labels.
        NonFiniteError: a model gives NaN or infinite values.
    """
    order = None if rows.class_names is None else classifier.class_space.relate(rows.class_names).order
    collator, device = ImageCollator(classifier.processor), base_model(classifier.model).device
    title = None if silent else f"Embedding {rows.name}"
    for batch in batches_in_order(rows, collator, batch_size, workers, device, title):
        if "labels" not in batch:
            raise DataError("images without labels", where=rows.name, allowed="a label for every image")
        labels = batch.pop("labels")  # (batch,), as the set counts them
        embeds = classifier.embed(batch)  # (batch, dim)
        fine_tuned = head_logits(embeds, heads[0])  # (batch, classes)
        logits = head_logits(pretrained_image_embeds(zero_shot, batch), heads[1])  # (batch, classes)
        if not (fine_tuned.isfinite().all() and logits.isfinite().all()):
            raise NonFiniteError("logits are NaN or infinite", where=rows.name)
        yield _Answers(embeds, fine_tuned, logits, labels if order is None else labels.new_tensor(order)[labels])


def find_failures(batches: Iterator[_Answers]) -> tuple[Tensor, int]:
    """Returns V, `(failures, dim)` in float16 on the CPU, and the number of images.

    Args:
        batches: of the training set.
    """
    found, images = [], 0
    for one in batches:
        right, wrong = one.fine_tuned.argmax(dim=1) == one.labels, one.zero_shot.argmax(dim=1) != one.labels
        found.append(one.embeds[right & wrong].half().cpu())
        images += len(one.labels)
    return torch.cat(found), images


def fit_temperatures(batches: Iterator[_Answers]) -> tuple[Temperature, Temperature]:
    """Returns the fine-tuned and the zero-shot model's temperature; all logits of the set are kept in memory.

    Args:
        batches: of the validation set.
    """
    kept = [(one.fine_tuned.cpu(), one.zero_shot.cpu(), one.labels.cpu()) for one in batches]
    fine_tuned, zero_shot, labels = map(torch.cat, zip(*kept, strict=True))
    return fit_temperature(fine_tuned, labels), fit_temperature(zero_shot, labels)


def choose_neighbour(failures: int, images: int, given: int | None) -> int:
    """Returns K, within 1 and the number of failures; 0 where there are none.

    Args:
        failures: |V|.
        images: N, of the training set.
        given: the user's; None for the released code's rule, round(1000 |V| / N).

    Example:
        >>> choose_neighbour(256_000, 1_280_000, None), choose_neighbour(20, 80, None), choose_neighbour(20, 80, 1)
        (200, 20, 1)
    """
    k = round(1000 * failures / images) if given is None else given
    return min(max(k, 1), failures)


def report(fitted: Fitted) -> None:
    """Logs what would surprise: that the zero-shot model answers alone, or that a temperature could not be found.

    Args:
        fitted: what was found.
    """
    if fitted.neighbour == 0:
        what = "None of %d training images is classified correctly by the fine-tuned model alone: "
        logger.warning(what + "the ensemble is the zero-shot model", fitted.images)
    temperatures = {"fine-tuned": fitted.fine_tuned_temperature, "zero-shot": fitted.zero_shot_temperature}
    for name, temperature in temperatures.items():
        if not temperature.is_root:
            what = "The %s temperature is the end %g of its bracket; mean confidence minus accuracy is %.3f there"
            logger.warning(what, name, temperature.value, temperature.gap)
