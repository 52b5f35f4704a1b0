# SPDX-License-Identifier: Apache-2.0
"""What pulls on the change to a model while it grows: one term of the loss a file, and θ₀ at hand for all of them."""

from . import log as log
from . import named as named
from . import state as state
from .context import ContextLoss as ContextLoss
from .features import FeatureLoss as FeatureLoss
from .lipsum import LipsumLoss as LipsumLoss
from .reference import BatchReference as BatchReference
from .reference import Moved as Moved
from .reference import Reference as Reference
from .reference import add_terms as add_terms
from .similarity import SimilarityLoss as SimilarityLoss
from .spuriosity import SpuriosityLoss as SpuriosityLoss
from .term import Term as Term
from .weights import WeightLoss as WeightLoss
