# SPDX-License-Identifier: Apache-2.0
"""The features OGEN generates for a batch, and the losses on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from .generator import FeatureGenerator
from .prototypes import Prototypes


@dataclass(frozen=True)
class Synthesised:
    """Generated features of a batch, each L2-normalised, and what they are of.

    Args:
        base_as_unknown: p1 `(batch, dim)`, of each image's own class, from its neighbours.
        reverse: p2 `(batch, k, dim)`, of the neighbours of the image's class, from the image.
        new: p3 `(batch, k, dim)`, of the nearest new classes, from the image.
        neighbour_images: I_k `(batch, k, dim)`, prototypes of the neighbours, moved by noise; not normalised.
        neighbours: `(batch, k)`, labels of `reverse`.
        new_labels: `(batch, k)`, labels of `new` among the new classes.
    """

    base_as_unknown: Tensor
    reverse: Tensor
    new: Tensor
    neighbour_images: Tensor
    neighbours: Tensor
    new_labels: Tensor


def synthesise(
    generator: FeatureGenerator,
    image_embeds: Tensor,
    labels: Tensor,
    base_embeds: Tensor,
    new_embeds: Tensor,
    prototypes: Prototypes,
    base_neighbours: Tensor,
    new_neighbours: Tensor,
    noise: Tensor,
) -> Synthesised:
    """Generates features in the three ways of OGEN's released code (arXiv 2401.15914).

    The text features of new classes are given to the generator with gradient; those of known classes and all images
    without.

    Args:
        generator: G.
        image_embeds: `(batch, dim)`, L2-normalised, of the frozen image tower.
        labels: `(batch,)`, among the known classes.
        base_embeds: `(known classes, dim)`, text features of the known classes, L2-normalised.
        new_embeds: `(new classes, dim)`, of the new ones.
        prototypes: statistics of the known classes' image features.
        base_neighbours: `(known classes, k)`, see `nearest_base_classes`.
        new_neighbours: `(known classes, k)`, see `nearest_new_classes`.
        noise: u, uniform in [0, 1): `(dim,)`, one for the batch, or `(batch, 1, dim)`, one per image.
    """
    neighbours, new_labels = base_neighbours[labels], new_neighbours[labels]  # (batch, k)
    own_text = base_embeds.detach()[labels, None]  # W_q (batch, 1, dim)
    neighbour_texts = base_embeds.detach()[neighbours]  # W_k (batch, k, dim)
    moved = prototypes.mean[neighbours] + noise * prototypes.std[neighbours]
    neighbour_images = moved.detach()  # I_k (batch, k, dim)
    own_image = image_embeds.detach()[:, None]  # (batch, 1, dim)
    return Synthesised(
        base_as_unknown=generator(own_text, neighbour_texts, neighbour_images)[:, 0],
        reverse=generator(neighbour_texts, own_text, own_image),
        new=generator(new_embeds[new_labels], own_text, own_image),
        neighbour_images=neighbour_images,
        neighbours=neighbours,
        new_labels=new_labels,
    )


def generation_losses(synthesised: Synthesised, image_embeds: Tensor) -> dict[str, Tensor]:
    """Returns the squared L2 distances of generated features to the real ones, means over the features, 0-dim.

    The released code's 512 * MSE is this in CLIP ViT-B's 512 dimensions.

    Args:
        synthesised: what `synthesise` returned.
        image_embeds: `(batch, dim)`, L2-normalised.
    """
    base = synthesised.base_as_unknown - image_embeds.detach()  # (batch, dim)
    reverse = synthesised.reverse - synthesised.neighbour_images  # (batch, k, dim)
    return {
        "generation_base": base.square().sum(-1).mean(),
        "generation_reverse": reverse.square().sum(-1).mean(),
    }


def classification_losses(
    synthesised: Synthesised,
    labels: Tensor,
    base_logits: Callable[[Tensor], Tensor],
    new_logits: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Returns the cross-entropies of generated features, means over the features, 0-dim, without weights.

    Args:
        synthesised: what `synthesise` returned.
        labels: `(batch,)`, among the known classes.
        base_logits: from features `(..., dim)` to logits over the known classes `(..., known classes)`.
        new_logits: from features `(..., dim)` to logits over the new classes alone `(..., new classes)`.
    """
    reverse, new = base_logits(synthesised.reverse), new_logits(synthesised.new)  # (batch, k, classes)
    return {
        "base_as_unknown": F.cross_entropy(base_logits(synthesised.base_as_unknown), labels),
        "reverse": F.cross_entropy(reverse.flatten(0, 1), synthesised.neighbours.flatten()),
        "new": F.cross_entropy(new.flatten(0, 1), synthesised.new_labels.flatten()),
    }
