# SPDX-License-Identifier: Apache-2.0
"""OGEN's generator of image features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoders.dual_encoder import at_least_float32
from ..errors import ConfigError


class FeatureGenerator(nn.Module):
    """Generates image features of classes from the features of other classes.

    G(Q, K, V) = l2norm(FFN(Q) + MHA(Q, K, V)), OGEN's joint extrapolation (arXiv 2401.15914, Eq. 5) as its released
    code has it. Q are text features of the classes to generate for, K text features of the classes to generate from,
    V image features of these.

    Args:
        dim: of the features.
        heads: attention heads.
        dropout: of the attention weights, a fraction.
        layer_norm: G = l2norm(FFN(LN(mean of V + MHA(Q, K, V)))) instead. The paper's formula is remembered to have a
            LayerNorm around a residual of the values; the released code does not, and the mean is our reading.
        seed: of the first weights.

    Raises:
        ConfigError: `heads` does not divide `dim`, or a setting is out of range.

    Example:
        >>> generator = FeatureGenerator(dim=512)
        >>> query, key, value = torch.randn(8, 1, 512), torch.randn(8, 3, 512), torch.randn(8, 3, 512)
        >>> generator(query, key, value).shape
        torch.Size([8, 1, 512])
    """

    def __init__(
        self, dim: int, heads: int = 4, dropout: float = 0.1, layer_norm: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            remedy = f"Take a divisor of {dim}."
            raise ConfigError("heads do not divide the features", where="heads", got=heads, remedy=remedy)
        if not 0 <= dropout < 1:
            raise ConfigError("dropout is out of range", got=dropout, allowed="[0, 1)")
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of accelerators too
            self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
            self.feed_forward = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim) if layer_norm else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Generates one feature per query.

        Args:
            query: `(batch, queries, dim)`.
            key: `(batch, keys, dim)`.
            value: `(batch, keys, dim)`.

        Returns:
            `(batch, queries, dim)`, L2-normalised, in float32 or better.
        """
        attended, _ = self.attention(query, key, value, need_weights=False)  # (batch, queries, dim)
        if self.norm is None:
            generated = self.feed_forward(query) + attended
        else:
            generated = self.feed_forward(self.norm(value.mean(1, keepdim=True) + attended))
        return F.normalize(at_least_float32(generated), dim=-1)
