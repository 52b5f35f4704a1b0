# SPDX-License-Identifier: Apache-2.0
"""Fine-tune CLIP-like models without forgetting: robust fine-tuning methods as a PEFT extension."""

from .collator import ImageCollator as ImageCollator
from .losses import SimilarityLoss as SimilarityLoss
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
from .wise_ft import AlphaSweep as AlphaSweep
from .wise_ft import WiSEFTCallback as WiSEFTCallback
from .wise_ft import alpha_sweep as alpha_sweep
from .wise_ft import diagonal_fisher as diagonal_fisher
from .wise_ft import interpolate as interpolate
from .wise_ft import interpolate_checkpoints as interpolate_checkpoints
from .wise_ft import wise_ft as wise_ft
from .zero_shot import TEMPLATES as TEMPLATES
from .zero_shot import ZeroShotClassifier as ZeroShotClassifier
from .zero_shot import class_embeddings as class_embeddings
