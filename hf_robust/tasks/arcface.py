# SPDX-License-Identifier: Apache-2.0
"""ArcFace whose gradients stay finite."""

from __future__ import annotations

from pytorch_metric_learning.losses import ArcFaceLoss
from torch import Tensor

WITHIN = 1 - 1e-7  # arccos has an infinite slope at 1, where the images of an identity that are all alike start


class FiniteArcFace(ArcFaceLoss):
    """`ArcFaceLoss` with cosines of the own identity kept off -1 and 1."""

    def modify_cosine_of_target_classes(self, cosine_of_target_classes: Tensor) -> Tensor:
        """Adds the margin to the angle of each.

        Args:
            cosine_of_target_classes: `(batch,)`.
        """
        return super().modify_cosine_of_target_classes(cosine_of_target_classes.clamp(-WITHIN, WITHIN))
