# SPDX-License-Identifier: Apache-2.0
"""OGEN: features of classes without images, generated from their names, and a mean teacher of the last epochs."""

from .config import OGENConfig as OGENConfig
from .generator import FeatureGenerator as FeatureGenerator
from .loss import OGENLoss as OGENLoss
from .prototypes import Prototypes as Prototypes
from .prototypes import class_prototypes as class_prototypes
