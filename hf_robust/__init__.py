# SPDX-License-Identifier: Apache-2.0
"""Fine-tune CLIP-like models without forgetting: robust fine-tuning methods as a PEFT extension."""

from .cards.card import model_card as model_card
from .cards.push import push as push
from .cards.push import write_card as write_card
from .cards.results import CardResults as CardResults
from .cards.results import results_from_reports as results_from_reports
from .cards.results import results_from_sweep as results_from_sweep
from .data.collator import ImageCollator as ImageCollator
from .data.embeds_cache import with_image_embeds as with_image_embeds
from .encoders.context import context_prompt as context_prompt
from .encoders.image_size import with_image_size as with_image_size
from .interpolation import AlphaSweep as AlphaSweep
from .interpolation import WiSEFTCallback as WiSEFTCallback
from .interpolation import alpha_sweep as alpha_sweep
from .interpolation import diagonal_fisher as diagonal_fisher
from .interpolation import interpolate as interpolate
from .interpolation import interpolate_checkpoints as interpolate_checkpoints
from .interpolation import wise_ft as wise_ft
from .losses import SimilarityLoss as SimilarityLoss
from .ogen import FeatureGenerator as FeatureGenerator
from .ogen import OGENClassifier as OGENClassifier
from .ogen import OGENConfig as OGENConfig
from .tasks.class_names import TEMPLATES as TEMPLATES
from .tasks.class_names import ZeroShotClassifier as ZeroShotClassifier
from .tasks.class_names import class_embeddings as class_embeddings
from .training.arguments import RobustTrainingArguments as RobustTrainingArguments
from .training.trainer import RobustTrainer as RobustTrainer
from .tuners.aclip import ACLIPConfig as ACLIPConfig
from .tuners.aclip import ACLIPModel as ACLIPModel
from .tuners.saft import SAFTConfig as SAFTConfig
from .tuners.saft import SAFTModel as SAFTModel
from .tuners.saft import export_shira as export_shira
from .tuners.saft import mask_summary as mask_summary
from .tuners.saft import saft_unselected as saft_unselected
from .tuners.saft import select_saft as select_saft
