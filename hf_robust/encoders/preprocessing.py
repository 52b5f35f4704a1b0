# SPDX-License-Identifier: Apache-2.0
"""Whether images are prepared as they were when an adapter was trained."""

from __future__ import annotations

import json
import warnings
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import ProcessorMixin

from ..shown import shown

TRAINED_WITH = "_trained_with"  # attribute of a config: settings of the image processor that was saved beside it


def warn_of_other_images(model: nn.Module, processor: ProcessorMixin) -> None:
    """Warns if the image processor differs from that in the folder which an adapter was loaded from.

    Images of another size, or with other means, cost accuracy and show in nothing else. This is known of adapters of
    SAFT and A-CLIP from folders on this machine.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        processor: what prepares its images.

    Example:
        >>> warn_of_other_images(PeftModel.from_pretrained(clip, "my-adapter"), other_processor)
        UserWarning: The adapter default was trained with other images: size was {'shortest_edge': 448}, ...
    """
    configs: Any = model.peft_config if isinstance(model, PeftModel) else {}
    for name in model.active_adapters if isinstance(model, PeftModel) else ():
        then = vars(configs[name]).get(TRAINED_WITH)
        if then is None:
            continue
        now = json.loads(processor.image_processor.to_json_string())
        kinds = ("image_processor_type", "processor_class")  # of which several prepare images alike
        other = [key for key in sorted(then.keys() & now.keys()) if then[key] != now[key] and key not in kinds]
        if other:
            facts = ", ".join(f"{key} was {shown(then[key])} and is {shown(now[key])}" for key in other)
            remedy = "Use the processor in the subfolder processor of the adapter's folder."
            warnings.warn(f"The adapter {name} was trained with other images: {facts}. {remedy}", stacklevel=2)
