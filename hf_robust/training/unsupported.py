# SPDX-License-Identifier: Apache-2.0
"""Options of `transformers.TrainingArguments` that `RobustTrainer` refuses, with the reason."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..errors import ConfigError
from ..tuners.saft import saft_unselected

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
        "Regularise with weight_decay, label_smoothing_factor or similarity_weight.",
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
    "remove_unused_columns": ((False,), "it would drop the images before they are opened", "Leave it False."),
    "logging_nan_inf_filter": (
        (False,),
        "it would hide losses that are not finite, in evaluation too",
        "Leave it False: training stops at such a loss.",
    ),
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
        ConfigError: ranks would get batches of other sizes, weights are sharded in a way that is not served, or a CPU
            would use fp16.
    """
    if args.fp16 and args.device.type == "cpu":
        remedy = "Use bf16=True."
        raise ConfigError("a CPU would train in float32 as if nothing was said", where="fp16", got=True, remedy=remedy)
    if not accelerator.even_batches:
        what = "ranks with fewer images would count as much as others in the mean gradient"
        raise ConfigError(what, where="accelerator_config", got={"even_batches": False}, allowed="even_batches=True")
    plugins = {"DeepSpeed": "deepspeed_plugin", "FSDP": "fsdp_plugin"}
    sharded = [name for name, plugin in plugins.items() if getattr(accelerator.state, plugin, None) is not None]
    if "DeepSpeed" in sharded:
        _, reason, remedy = UNSUPPORTED["deepspeed"]
        raise ConfigError(reason, where="accelerate launch", got=sharded, remedy=remedy)
    if sharded and (args.bf16_full_eval or args.fp16_full_eval):
        what, remedy = "a sharded model is not copied to evaluate it in half precision", "Use bf16=True."
        raise ConfigError(what, where="bf16_full_eval, fp16_full_eval", got=sharded, remedy=remedy)


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
