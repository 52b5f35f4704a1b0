# SPDX-License-Identifier: Apache-2.0
"""How much each parameter matters to the predictions: diagonal Fisher information."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.embeds_cache import IMAGE_INPUTS
from ..encoders.class_embeds import evaluating
from ..encoders.dual_encoder import at_least_float32
from ..errors import ConfigError, DataError
from ..tasks.class_names import ZeroShotClassifier
from .arithmetic import check_finite


def diagonal_fisher(
    classifier: ZeroShotClassifier, images: Iterable[Mapping[str, Tensor]], seed: int = 0
) -> dict[str, Tensor]:
    """Estimates the diagonal Fisher information of the parameters of a classifier's dual encoder.

    The mean over images of the squared gradient of -log p(label), one image at a time, with a label drawn from the
    model's own prediction, as in the official code of WiSE-FT
    (Wortsman et al., CVPR 2022, https://huggingface.co/papers/2109.01903). Eval mode; the model is left as it was.

    Args:
        classifier: a classifier around a plain model.
        images: batches of any size with `pixel_values`, `(batch, channels, height, width)`; for SigLIP 2 with
            `pixel_attention_mask` and `spatial_shapes` too. Labels are not used.
        seed: for drawing the labels.

    Returns:
        One tensor per parameter of the encoder that requires gradients, of its name in the encoder's state dict, its
        shape, and float32 or better.

    Raises:
        ConfigError: the model has adapters, or no parameter requires gradients.
        DataError: there are no images.
        NonFiniteError: a gradient is NaN or infinite.

    Example:
        >>> fisher = diagonal_fisher(classifier, [{"pixel_values": torch.randn(8, 3, 224, 224)}])
        >>> safetensors.torch.save_file(fisher, "fisher.safetensors")  # for `interpolate_checkpoints`
    """
    if isinstance(classifier.model, PeftModel):
        raise ConfigError("Fisher information is that of a plain model", remedy="Merge the adapter first.")
    parameters = {name: one for name, one in classifier.model.named_parameters() if one.requires_grad}
    if not parameters:
        raise ConfigError("no parameter of the dual encoder requires gradients", remedy="Call requires_grad_().")
    sums = {name: torch.zeros_like(at_least_float32(one.detach())) for name, one in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    n_images = 0
    with evaluating(classifier), torch.enable_grad():
        for image in _single_images(images):
            for name, gradient in _gradients(classifier, image, parameters, generator).items():
                sums[name] += at_least_float32(gradient).square()
            n_images += 1
    if n_images == 0:
        raise DataError("no images to estimate Fisher information from")
    fisher = {name: total / n_images for name, total in sums.items()}
    for name, tensor in fisher.items():
        check_finite(tensor, name)
    return fisher


def _single_images(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        inputs = {name: batch[name] for name in IMAGE_INPUTS if name in batch}
        for index in range(len(batch["pixel_values"])):
            yield {name: tensor[index : index + 1] for name, tensor in inputs.items()}


def _gradients(
    classifier: ZeroShotClassifier,
    image: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Of -log p(label); parameters that the head does not use have none."""
    device = next(iter(parameters.values())).device
    logits = classifier(**{name: tensor.to(device) for name, tensor in image.items()}).logits  # (1, classes)
    check_finite(logits, "logits")
    label = torch.multinomial(logits.detach().cpu().double().softmax(dim=-1), 1, generator=generator)  # (1, 1)
    loss = F.cross_entropy(logits, label[0].to(device))
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: one for name, one in zip(parameters, gradients, strict=True) if one is not None}
