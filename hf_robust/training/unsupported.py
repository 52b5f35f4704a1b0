# SPDX-License-Identifier: Apache-2.0
"""Options of `transformers.TrainingArguments` that `RobustTrainer` refuses, with the reason."""

from __future__ import annotations

import logging
import os
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import OffloadPolicy, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..errors import ConfigError
from ..tuners.saft import saft_unselected

logger = logging.getLogger(__name__)

COMPILING = (
    "a compiled model would keep class embeddings and base weights that training changes",
    "Leave it; bf16=True makes training faster.",
)
LIGER = "it replaces layers of language models", "Leave it."
IN_BACKWARD = ("galore", "apollo", "lomo", "adalomo")
OPTIMIZERS = tuple(name.value for name in OptimizerNames if not name.value.startswith(IN_BACKWARD))
GALORE = "GaLore, APOLLO and LOMO need gradients of whole matrices", "Use another optimizer, as 'adamw_torch'."

# by option: the values that are served, why no others are, and what to do instead
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "torch_compile": ((False,), *COMPILING),
    "torch_compile_backend": ((None,), *COMPILING),
    "torch_compile_mode": ((None,), *COMPILING),
    "use_liger_kernel": ((False,), *LIGER),
    "liger_kernel_config": ((None,), *LIGER),
    "neftune_noise_alpha": (
        (None,),
        "NEFTune adds noise to the token embeddings of instructions; prompts of class names are the classifier's head",
        "Regularise with weight_decay, label_smoothing_factor or losses=[SimilarityLoss()].",
    ),
    "train_sampling_strategy": (
        ("random", "sequential"),
        "images have no lengths to group or balance them by",
        "Use 'random'.",
    ),
    "include_num_input_tokens_seen": (
        ("no", False),
        "images have no tokens to count",
        "Images seen are steps times the batch size.",
    ),
    "label_names": ((None, ["labels"]), "the classifier takes its labels as `labels`", "Leave it."),
    "eval_use_gather_object": ((False,), "outputs are tensors, which are gathered as such", "Leave it."),
    "dataloader_in_order": (
        (True,),
        "predictions would not be in the order of the rows, and a run not be repeatable",
        "Leave it True.",
    ),
    "auto_find_batch_size": (
        (False,),
        "a second attempt would start from weights that the first has moved away from the pre-trained ones",
        "Set per_device_train_batch_size lower and gradient_accumulation_steps higher: their product is the batch.",
    ),
    "optim": (OPTIMIZERS, *GALORE),
    "optim_target_modules": ((None,), *GALORE),
    "optim_args": (
        (None,),
        "most optimizers ignore it without a word",
        "Use RobustTrainer(optimizer_cls_and_kwargs=(torch.optim.SGD, {'lr': 0.1, 'momentum': 0.9})).",
    ),
    "deepspeed": ((None,), "DeepSpeed is not tested with this package", "Use DDP or FSDP: `accelerate launch`."),
    "parallelism_config": ((None,), "a tower is not split over devices", "Use DDP or FSDP: `accelerate launch`."),
    "enable_jit_checkpoint": (
        (False,),
        "it saves before a step has ended, from where a run cannot go on as it was",
        "Leave it: at SIGTERM, SIGINT and SIGUSR1 a checkpoint is saved when the step has ended.",
    ),
    "save_on_each_node": (
        (False,),
        "a checkpoint is one folder, with the part of every rank",
        "Give all machines an output_dir that they share.",
    ),
    "remove_unused_columns": ((False,), "it would drop the images before they are opened", "Leave it False."),
    "logging_nan_inf_filter": (
        (False,),
        "it would hide losses that are not finite, in evaluation too",
        "Leave it False: training stops at such a loss.",
    ),
}

# by attribute of Accelerate's FSDP plugin: its name in a config, the values that are served, why no others are
UNSUPPORTED_SHARDING: dict[str, tuple[str, tuple[Any, ...], str, str]] = {
    "fsdp_version": ("fsdp_version", (2,), "the first FSDP cannot shard CLIP's scale, nor SAFT", "Set it to 2."),
    "state_dict_type": (
        "fsdp_state_dict_type",
        (StateDictType.FULL_STATE_DICT,),
        "what is saved is what it is without FSDP: whole",
        "Set it to FULL_STATE_DICT.",
    ),
    "cpu_ram_efficient_loading": (
        "fsdp_cpu_ram_efficient_loading",
        (False,),
        "every rank needs the pre-trained weights before training: for zero-shot heads, selection and references",
        "Set it to false.",
    ),
    "cpu_offload": (
        "fsdp_offload_params",
        (OffloadPolicy(),),
        "weights on the CPU would have to be clipped together with a scale that is not",
        "Set it to false.",
    ),
    "auto_wrap_policy": (
        "fsdp_auto_wrap_policy",
        (transformer_auto_wrap_policy, None),
        "modules of any size would be cut out of adapters and attention, which read the weights inside them",
        "Set it to TRANSFORMER_BASED_WRAP.",
    ),
    "transformer_cls_names_to_wrap": (
        "fsdp_transformer_layer_cls_to_wrap",
        (None,),
        "the layers of both towers are found in the model",
        "Leave it out.",
    ),
    "ignored_modules": ("fsdp_ignored_modules", (None,), "all that can be sharded is", "Leave it out."),
}


def check_options(args: TrainingArguments) -> None:
    """Refuses settings that `RobustTrainer` does not serve.

    Args:
        args: the training arguments.

    Raises:
        ConfigError: an option has such a value.
    """
    for option, (allowed, reason, remedy) in UNSUPPORTED.items():
        if getattr(args, option) not in allowed:
            values = ", ".join(map(repr, allowed))
            raise ConfigError(reason, where=option, got=getattr(args, option), allowed=values, remedy=remedy)
    unknown = sorted(set(args.include_for_metrics) - {"inputs", "loss"})
    if unknown:
        what, served = "metrics get nothing else", "'inputs', 'loss'"
        raise ConfigError(what, where="include_for_metrics", got=unknown, allowed=served)


def check_accelerator(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Refuses settings that do not go with the machine, `accelerate launch` or an `accelerator_config`.

    Args:
        accelerator: the trainer's.
        args: its arguments.

    Raises:
        ConfigError: ranks would get batches of other sizes, DeepSpeed is used, a CPU would use fp16, or the order of
            images would hang on what ran before.
    """
    if args.fp16 and args.device.type == "cpu":
        remedy = "Use bf16=True."
        raise ConfigError("a CPU would train in float32 as if nothing was said", where="fp16", got=True, remedy=remedy)
    if not accelerator.even_batches:
        what = "ranks with fewer images would count as much as others in the mean gradient"
        raise ConfigError(what, where="accelerator_config", got={"even_batches": False}, allowed="even_batches=True")
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        _, reason, remedy = UNSUPPORTED["deepspeed"]
        raise ConfigError(reason, where="accelerate launch", got="DeepSpeed", remedy=remedy)
    if not accelerator.use_seedable_sampler:
        what, got = "a resumed run would see the images in another order", {"use_seedable_sampler": False}
        raise ConfigError(what, where="accelerator_config", got=got, allowed="use_seedable_sampler=True")


def check_sharding(accelerator: Accelerator, classifier: nn.Module, optimizers: tuple[Any, Any]) -> None:
    """Refuses what cannot be trained with FSDP, and warns where Accelerate does not use the FSDP that was asked for.

    Args:
        accelerator: the trainer's.
        classifier: the model to train.
        optimizers: an optimizer and a schedule given, or None.

    Raises:
        ConfigError: a setting of FSDP is not served, or fp16 or an optimizer given do not go with it.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # Accelerate sets it, too
        if asked and accelerator.is_main_process:
            where = f"{accelerator.num_processes} processes on {accelerator.device.type}"
            logger.warning("FSDP is not used: Accelerate shards over several GPUs alone, and these are %s.", where)
        return
    for attribute, (option, allowed, reason, remedy) in UNSUPPORTED_SHARDING.items():
        if getattr(plugin, attribute) not in allowed:
            raise ConfigError(reason, where=option, got=getattr(plugin, attribute), remedy=remedy)
    if accelerator.mixed_precision == "fp16":  # torch's scaler takes shards or whole tensors, not both
        raise ConfigError(
            "FSDP cannot scale the loss of a scale it leaves whole", where="fp16", remedy="Use bf16=True."
        )
    if any(part is not None for part in optimizers):
        remedy = "Pass optimizer_cls_and_kwargs=(torch.optim.SGD, {'lr': 0.1}): it is made when training starts."
        raise ConfigError("an optimizer made before FSDP shards has no shards", where="optimizers", remedy=remedy)


def check_optimizer(optimizer: Optimizer | None, model: nn.Module) -> None:
    """Refuses an optimizer that would train nothing of the model.

    Args:
        optimizer: what the user made; None for none.
        model: the model to train.

    Raises:
        ConfigError: SAFT's entries are not selected yet, or the optimizer has no trainable parameter of the model.
    """
    if optimizer is None:
        return
    remedy = "Pass optimizer_cls_and_kwargs=(torch.optim.SGD, {'lr': 0.1}): it is made when training starts."
    if saft_unselected(model):
        what = "an optimizer made before SAFT's entries are selected does not know them"
        raise ConfigError(what, where="optimizers", got=type(optimizer).__name__, remedy=remedy)
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(parameter.requires_grad and id(parameter) in known for parameter in model.parameters()):
        what = "the optimizer has no parameter that is trained"
        raise ConfigError(what, where="optimizers", got=type(optimizer).__name__, remedy=remedy)
