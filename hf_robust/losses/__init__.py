# SPDX-License-Identifier: Apache-2.0
"""What pulls on the change to a model while it grows: one loss a file, each working on embeddings."""

from .similarity import SimilarityLoss as SimilarityLoss
