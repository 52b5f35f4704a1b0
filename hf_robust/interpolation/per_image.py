# SPDX-License-Identifier: Apache-2.0
"""VRF: the fine-tuned and the zero-shot model's probabilities, weighted anew for every image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel, PeftType
from torch import Tensor

from ..data.embeds_cache import pretrained_image_embeds
from ..encoders.class_embeds import evaluating
from ..errors import AdapterFileError, ConfigError
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.ensemble import Ensemble, EnsembleEmbeds
from ..tasks.task import Inputs
from .nearest import kth_squared_distance
from .per_image_files import check_models, describe_models, read_ensemble, write_ensemble
from .per_image_fit import (
    Fitted,
    Head,
    ZeroShot,
    answers,
    choose_neighbour,
    find_failures,
    fit_temperatures,
    head_logits,
    labelled_rows,
    own_heads,
    report,
    zero_shot_encoder,
)
from .temperature import Temperature

Metric = Literal["sq_l2", "l2"]
METRICS: tuple[Metric, ...] = get_args(Metric)
MIDPOINT, SCALE = 1.5, 0.6  # the paper's a and b


class PerImageEnsemble(Ensemble):
    """A fine-tuned and a zero-shot model whose probabilities are mixed, with a weight of its own for every image.

    An image near training images at which the zero-shot model fails and the fine-tuned one does not gets more of the
    fine-tuned model, one far from them more of the zero-shot model:

    - d = squared L2 distance of its fine-tuned embedding to the K-th nearest of those training images,
    - w = sigmoid(-(d - `midpoint`) / `scale`),
    - p = w softmax(fine-tuned logits / T₁) + (1 - w) softmax(zero-shot logits / T₀).

    Nothing is trained. Every image is encoded by both models, so an answer costs twice as much; with adapters both are
    one model, with the adapters on and off. Neither may change after `fit`, as `wise_ft` would change it:
    `check_unchanged` tells, which `save` and `evaluate_suite` call.
    `evaluate_suite` takes the ensemble as any model, for sets of classification: where a set restricts or merges
    answers, each model's logits are restricted and merged before its softmax.

    Variance Reduction Fine-tuning (Zhu, Cui, Zhang, NeurIPS 2024, https://huggingface.co/papers/2411.06966). What is
    clear from the released code alone: d is the square of the distance. Under `metric="l2"` the paper's midpoint, 1.5,
    would be a cosine of -0.125, which images next to never have, so that no image got more of the zero-shot model.

    Args:
        classifier: the fine-tuned model, which classifies by class names, with or without adapters.
        fitted: what `fit` found.
        zero_shot: None for a model with adapters; else the zero-shot model, a second dual encoder or a `Task` around
            one, or copies of its parameters by their names in `classifier.named_parameters()`, as `zero_shot_copy`
            and `RobustTrainer.zero_shot` have them, from which a second model is made. Adapters of it are off.
        midpoint: the distance at which both models weigh the same.
        scale: the larger, the less a distance matters; above 0.
        metric: `"sq_l2"`, or `"l2"` for the distance itself.

    Raises:
        ConfigError: the classifier is no `ZeroShotClassifier` of one label, or has a learned context; the zero-shot
            model is not known, or a setting is out of range.
        MergeError: `zero_shot` lacks a trained parameter, or has it with another shape or dtype.

    Example:
        >>> trainer.train()
        >>> ensemble = PerImageEnsemble.fit(trainer.model, train, validation, trainer.zero_shot)
        >>> evaluate_suite(ensemble, processor, suite).means
        {'id': 0.81, 'ood': 0.62}
        >>> ensemble.save("my-ensemble")
    """

    def __init__(
        self,
        classifier: ZeroShotClassifier,
        fitted: Fitted,
        zero_shot: ZeroShot = None,
        midpoint: float = MIDPOINT,
        scale: float = SCALE,
        metric: Metric = "sq_l2",
    ) -> None:
        _check_settings(classifier, midpoint, scale, metric)
        super().__init__(classifier, zero_shot_encoder(classifier, zero_shot))
        self.fitted, self.midpoint, self.scale, self.metric = fitted, midpoint, scale, metric
        self._heads: tuple[Head, Head] | None = None  # of the classifier's own classes
        self._models = describe_models(classifier, self.zero_shot)

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        classifier: ZeroShotClassifier,
        train: Any,
        validation: Any,
        zero_shot: ZeroShot = None,
        neighbour: int | None = None,
        midpoint: float = MIDPOINT,
        scale: float = SCALE,
        metric: Metric = "sq_l2",
        batch_size: int = 64,
        workers: int = 0,
        silent: bool = False,
    ) -> PerImageEnsemble:
        """Finds the training images at which the zero-shot model alone fails, and the temperature of each model.

        Both models encode every image of both sets once, as it is, without the augmentation of the training.

        K, the neighbour that the distance is taken to, is by default the released code's round(1000 |V| / N), for |V|
        failures among N training images; the paper has 0.1 % of |V|. For the million images of ImageNet both are about
        the same. For few images, 80 of 8 shots say, they are not: below N = 1,000 the code's rule gives more than |V|,
        K is clamped to |V|, and the distance is that to the farthest failure. `neighbour=1` is then the paper's rule.
        Where the zero-shot model fails nowhere alone, w = 0 and it answers by itself; a warning is logged.

        Args:
            classifier: as for the class; so are `zero_shot`, `midpoint`, `scale` and `metric`.
            train: the images it was trained on, with labels, see `labelled_images`.
            validation: labelled images from the same distribution for the temperatures, that it was not trained on
                and that are not what results are reported for. (The paper's code takes the test set.)
            zero_shot: see the class.
            neighbour: K, from 1, clamped to |V|; None for the released code's rule.
            midpoint: see the class.
            scale: see the class.
            metric: see the class.
            batch_size: images encoded at once.
            workers: processes that open images.
            silent: without a progress bar.

        Raises:
            ConfigError, MergeError: as the class.
            DataError: a set has no labels, or other classes than the classifier, or an image cannot be used.
            NonFiniteError: a model gives NaN or infinite values.
        """
        if neighbour is not None and (type(neighbour) is not int or neighbour < 1):
            raise ConfigError(
                "no such neighbour", where="neighbour", got=neighbour, allowed="whole numbers from 1, or None"
            )
        _check_settings(classifier, midpoint, scale, metric)
        encoder = zero_shot_encoder(classifier, zero_shot)
        given, held_out = (labelled_rows(classifier, *one) for one in ((train, "train"), (validation, "validation")))
        how = batch_size, workers, silent
        with evaluating(classifier), evaluating(encoder):
            heads = own_heads(classifier, encoder)
            failures, images = find_failures(answers(classifier, encoder, heads, given, *how))
            temperatures = fit_temperatures(answers(classifier, encoder, heads, held_out, *how))
        fitted = Fitted(failures, images, choose_neighbour(len(failures), images, neighbour), *temperatures)
        report(fitted)
        return cls(classifier, fitted, encoder, midpoint, scale, metric)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> Tensor:
        """Classifies images among the classifier's own classes.

        Args:
            pixel_values: `(batch, channels, height, width)`, for SigLIP 2 `(batch, patches, patch pixels)`.
            pixel_attention_mask: `(batch, patches)`, SigLIP 2 only.
            spatial_shapes: `(batch, 2)`, SigLIP 2 only.

        Returns:
            `(batch, classes)`, logarithms of probabilities, which serve as logits.
        """
        masks = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        with torch.no_grad(), evaluating(self):
            embeds = self.embed({"pixel_values": pixel_values, **masks})
            if self._heads is None:
                self._heads = own_heads(self.classifier, self.zero_shot)
            of_models = zip((embeds.fine_tuned, embeds.zero_shot), self._heads, strict=True)
            return self.mix(embeds, *(head_logits(one, head) for one, head in of_models))

    @torch.no_grad()
    def embed(self, inputs: Inputs) -> EnsembleEmbeds:
        """Returns what both models give for the images of a batch, and the weight of each image.

        Args:
            inputs: the batch; None for what it does not have.
        """
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        fine_tuned = self.classifier.embed(given)  # (batch, dim)
        zero_shot = pretrained_image_embeds(self.zero_shot, given)  # (batch, dim)
        return EnsembleEmbeds(fine_tuned, zero_shot, self.weights(fine_tuned))

    def weights(self, embeds: Tensor) -> Tensor:
        """Returns the fine-tuned model's share in the probabilities of images, `(batch,)`, fractions.

        Args:
            embeds: `(batch, dim)`, L2-normalised, the fine-tuned model's.
        """
        squared = kth_squared_distance(embeds, self.fitted.failures, self.fitted.neighbour)  # (batch,)
        distances = squared if self.metric == "sq_l2" else squared.sqrt()  # (batch,), d
        return torch.sigmoid(-(distances - self.midpoint) / self.scale)  # (batch,), w

    def mix(self, embeds: EnsembleEmbeds, fine_tuned_logits: Tensor, zero_shot_logits: Tensor) -> Tensor:
        """Returns log(w softmax(z₁ / T₁) + (1 - w) softmax(z₀ / T₀)), `(batch, answers)`.

        Args:
            embeds: of the images.
            fine_tuned_logits: `(batch, answers)`.
            zero_shot_logits: `(batch, answers)`, of the same answers.
        """
        weight = embeds.weight[:, None]  # (batch, 1)
        fine_tuned = (fine_tuned_logits / self.fitted.fine_tuned_temperature.value).log_softmax(dim=1)
        zero_shot = (zero_shot_logits / self.fitted.zero_shot_temperature.value).log_softmax(dim=1)
        return torch.logaddexp(weight.log() + fine_tuned, (-weight).log1p() + zero_shot)  # (batch, answers)

    def check_unchanged(self) -> None:  # noqa: D102
        try:
            check_models(self._models, self.classifier, self.zero_shot, "classifier, zero_shot")
        except AdapterFileError as error:
            what, remedy = (
                "a model has changed since the ensemble was fitted",
                "Set it back, or fit the ensemble anew.",
            )
            raise ConfigError(what, where=error.what, got=error.got, remedy=remedy) from error

    def settings(self) -> dict[str, Any]:
        """Returns what was found and chosen, without the embeddings."""
        fitted = self.fitted
        return {
            "method": "vrf",
            "failures": len(fitted.failures),
            "images": fitted.images,
            "neighbour": fitted.neighbour,
            "fine_tuned_temperature": [fitted.fine_tuned_temperature.value, fitted.fine_tuned_temperature.gap],
            "zero_shot_temperature": [fitted.zero_shot_temperature.value, fitted.zero_shot_temperature.gap],
            "midpoint": self.midpoint,
            "scale": self.scale,
            "metric": self.metric,
        }

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Writes what `fit` found to a folder, which is there whole or not at all; the models are not in it.

        The embeddings are kept in float16, as in memory: half of float32's size, and a distance moves by less than
        0.001, a weight by less than 0.0005.

        Args:
            folder: the folder.
            overwrite: whether it may hold something, which is deleted.

        Raises:
            ConfigError: a model has changed since `fit`.
            MergeError: the folder is in use, or the disk is full or fails.
        """
        self.check_unchanged()
        saved = {**self.settings(), "models": self._models}
        write_ensemble(Path(folder), saved, self.fitted.failures, overwrite)

    @classmethod
    def load(cls, folder: str | Path, classifier: ZeroShotClassifier, zero_shot: ZeroShot = None) -> PerImageEnsemble:
        """Reads back what `save` wrote; the embeddings stay on the disk and are mapped from there.

        Args:
            folder: the folder.
            classifier: the fine-tuned model that the ensemble was fitted with, in any floating-point format.
            zero_shot: its zero-shot model, as for the class.

        Raises:
            AdapterFileError: the ensemble was fitted with other models, or its files are damaged.
            ConfigError, MergeError: as the class.

        Example:
            >>> ensemble = PerImageEnsemble.load("my-ensemble", classifier)
            >>> ensemble(pixel_values).exp()
            tensor([[0.9210, 0.0790]])
        """
        saved, failures = read_ensemble(Path(folder))
        temperatures = (Temperature(*saved[f"{name}_temperature"]) for name in ("fine_tuned", "zero_shot"))
        fitted = Fitted(failures, saved["images"], saved["neighbour"], *temperatures)
        ensemble = cls(classifier, fitted, zero_shot, saved["midpoint"], saved["scale"], saved["metric"])
        check_models(saved["models"], classifier, ensemble.zero_shot, str(folder))
        return ensemble


def _check_settings(classifier: ZeroShotClassifier, midpoint: float, scale: float, metric: str) -> None:
    if not isinstance(classifier, ZeroShotClassifier) or classifier.target != "label":
        allowed = "a ZeroShotClassifier, with one label for an image"
        raise ConfigError("not a model that an ensemble is made of", got=type(classifier).__name__, allowed=allowed)
    model = classifier.model
    active = [model.peft_config[name] for name in model.active_adapters] if isinstance(model, PeftModel) else []
    if any(config.peft_type == PeftType.TRAINABLE_TOKENS for config in active):
        raise ConfigError("the prompts have a learned context, which says nothing to the zero-shot model")
    if metric not in METRICS:
        raise ConfigError("unknown metric", got=metric, allowed=", ".join(METRICS))
    if not _is_finite(scale) or scale <= 0:
        raise ConfigError("scale is out of range", got=scale, allowed="a finite number above 0")
    if not _is_finite(midpoint):
        raise ConfigError("midpoint is no number", got=midpoint, allowed="a finite number")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
