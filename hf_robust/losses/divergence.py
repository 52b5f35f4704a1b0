# SPDX-License-Identifier: Apache-2.0
"""How far a distribution has moved from that of the pre-trained model."""

from __future__ import annotations

from torch import Tensor

from ..encoders.dual_encoder import at_least_float32


def divergence(tuned: Tensor, reference: Tensor) -> Tensor:
    """Returns the Kullback-Leibler divergence of the tuned distributions from those of the pre-trained model.

    KL(p || q) = Σ_j p_j log(p_j / q_j), p = softmax(reference), q = softmax(tuned), is computed as
    Σ_j [p_j log(p_j / q_j) + q_j - p_j]: both sums are 1, so what is added is 0, but it makes value and gradient
    exactly 0 where the logits are equal. Of the usual form rounding leaves a gradient there.

    Args:
        tuned: `(rows, columns)`, logits; what is masked holds `torch.finfo(...).min`, in both.
        reference: `(rows, columns)`, likewise; gets no gradient.

    Returns:
        0-dim, the mean over the rows, from 0, in float32 or better.

    Example:
        >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(0.1109)
    """
    log_q = at_least_float32(tuned).log_softmax(dim=-1)  # (rows, columns)
    log_p = at_least_float32(reference.detach()).log_softmax(dim=-1)  # (rows, columns)
    return (log_p.exp() * (log_p - log_q) + log_q.exp() - log_p.exp()).sum(dim=-1).mean()
