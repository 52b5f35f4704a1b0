# SPDX-License-Identifier: Apache-2.0
"""Fine-tune CLIP-like models without forgetting: robust fine-tuning methods as a PEFT extension."""

from .card import model_card as model_card
from .card_results import CardResults as CardResults
from .card_results import results_from_reports as results_from_reports
from .card_results import results_from_sweep as results_from_sweep
from .collator import ImageCollator as ImageCollator
from .hub import push as push
from .hub import write_card as write_card
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
from .prompts import context_prompt as context_prompt
from .reference_cache import with_image_embeds as with_image_embeds
from .trainer import RobustTrainer as RobustTrainer
from .training_args import RobustTrainingArguments as RobustTrainingArguments
from .tuners.aclip import ACLIPConfig as ACLIPConfig
from .tuners.aclip import ACLIPModel as ACLIPModel
from .tuners.saft import SAFTConfig as SAFTConfig
from .tuners.saft import SAFTModel as SAFTModel
from .tuners.saft import export_shira as export_shira
from .tuners.saft import mask_summary as mask_summary
from .tuners.saft import saft_unselected as saft_unselected
from .tuners.saft import select_saft as select_saft
from .zero_shot import TEMPLATES as TEMPLATES
from .zero_shot import ZeroShotClassifier as ZeroShotClassifier
from .zero_shot import class_embeddings as class_embeddings
