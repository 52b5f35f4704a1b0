# SPDX-License-Identifier: Apache-2.0
"""What must be equal for a resumed training to be the training that was interrupted."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState

from ..data.collator import ImageCollator, OpeningCollator
from ..data.columns import Target
from ..data.digest import rows_digest
from ..data.rows import LabelledStream, labelled_images
from ..encoders.dual_encoder import base_model
from ..encoders.pretrained import pretrained_tensors
from ..errors import CheckpointError, ConfigError, close_matches
from ..evaluation.run import VERSIONS_OF
from ..interpolation.callback import WiSEFTCallback
from ..shown import shown

logger = logging.getLogger(__name__)

# Arguments that change nothing of what is trained: what is shown, saved and pushed, how fast it goes, how it resumes
WITHOUT_EFFECT = re.compile(
    "output_dir|do_.*|log_.*|logging_.*|save_.*|push_.*|hub_.*|report_to|run_name|project|trackio_.*|disable_tqdm|"
    "dataloader_(num_workers|pin_memory|prefetch_factor|persistent_workers|multiprocessing_context)|ddp_.*|local_rank|"
    "use_cpu|resume_from_checkpoint|allow_changed|ignore_data_skip|restore_callback_.*|skip_memory_metrics|"
    "torch_empty_cache_steps|selection_batch_size|"
    "eval_.*|per_device_eval_batch_size|prediction_loss_only|include_.*|batch_eval_metrics|(bf16|fp16)_full_eval|"
    "task|templates|head|losses|deepspeed|debug"  # the task has the first three
)
CHANGING = ExportableState | WiSEFTCallback  # callbacks that have a say in the result
CHOOSING = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps")
KEPT_BY_THE_OPTIMIZER = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim",
    "optimizer",
)
OF_A_MODEL_FILE = ("_name_or_path", "transformers_version", "architectures", "dtype")
OF_FILES = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "saved")
MOST_SHOWN = 4  # differences in a message
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def describe_run(trainer: Any) -> dict[str, Any]:
    """Describes a training by everything that its result depends on.

    Functions and objects (an augmentation, a loss, an optimizer) are described by what `repr` says of them.

    Args:
        trainer: a `RobustTrainer` with its training set, before its first step.

    Returns:
        Names and values, of what JSON can hold.

    Example:
        >>> describe_run(trainer)["learning_rate"]
        0.001
    """
    args, task, callbacks = trainer.args, trainer.model, trainer.callback_handler.callbacks
    chooses = args.metric_for_best_model is not None  # a model, a learning rate or when to stop, by evaluations
    settings = json.loads(args.to_json_string())
    found = {name: value for name, value in settings.items() if not WITHOUT_EFFECT.fullmatch(name)}
    if chooses:
        found |= {name: settings[name] for name in CHOOSING}
        found |= {
            "evaluation_data": _sets(trainer.eval_dataset, task.target),
            "compute_metrics": _text(trainer.compute_metrics),
        }
    rows = labelled_images(trainer.images_to_train_on, "train_dataset", target=task.target)
    if isinstance(rows, LabelledStream):  # workers share it by its parts
        found["dataloader_num_workers"] = args.dataloader_num_workers
    settings_of_task = {name: v for name, v in task.settings().items() if name != "data_names"}  # "data" has them
    found |= {"task": task.name, **settings_of_task}
    found |= {
        "ranks": args.world_size,
        "device": args.device.type,
        "losses": {name: {"class": type(term).__name__, **term.settings()} for name, term in task.terms.items()},
        "model": _settings(base_model(task.model).config.to_dict()),
        "attention": base_model(task.model).config._attn_implementation,
        "adapters": _adapters(task.model),
        "parameters": _parameters(task),
        "pretrained_weights": bit_digest(_pretrained(trainer)),
        "data": rows_digest(rows),
        "data_transform": _text(rows.columns and rows.columns.transform),
        "prompts": bit_digest(task.tokens().items()),
        "trainer": type(trainer).__name__,
        "mixed_precision": trainer.accelerator.mixed_precision,
        "compute_loss_func": _text(trainer.compute_loss_func),
        "optimizer": _text(trainer.optimizer_cls_and_kwargs or trainer.optimizers_given),
        "callbacks": sorted(type(one).__name__ for one in callbacks if isinstance(one, CHANGING)),
        **_collator(trainer),
    }
    return json.loads(json.dumps(found, default=_plain), parse_constant=str)  # infinity is no JSON


def versions() -> dict[str, str]:
    """Returns the versions of what the last bits of a result may depend on, by name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {package: version(package) for package in VERSIONS_OF} | {"device": device}


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], allow_changed: Sequence[str], where: str) -> None:
    """Refuses to resume a training as another one.

    Args:
        saved: what the manifest of the checkpoint says: `run` and `versions`.
        now: what `describe_run` has returned.
        allow_changed: names of what may differ; that of a group allows all of it.
        where: the checkpoint.

    Raises:
        CheckpointError: something else differs.
        ConfigError: a name in `allow_changed` is none, or one of what the optimizer's state brings along.
    """
    if saved["run"] is None:
        what, remedy = "it does not say of which run it is", "Set save_strategy to other than 'no' in the training."
        raise CheckpointError(what, where=where, remedy=remedy)
    fixed = sorted({*allow_changed} & {*KEPT_BY_THE_OPTIMIZER})
    if fixed:
        what, remedy = "the optimizer's saved state has it, so it cannot change", "Load the model, and train it anew."
        raise ConfigError(what, where="allow_changed", got=fixed, remedy=remedy)
    known = sorted({*saved["run"], *now})
    for name in allow_changed:
        if name.partition(".")[0] not in known:
            remedy = close_matches(name, known)
            raise ConfigError("nothing of that name can change", where="allow_changed", got=name, remedy=remedy)
    changed = differences(saved["run"], now)
    allowed = {name for name in changed if any(f"{name}.".startswith(f"{one}.") for one in allow_changed)}
    found = {name: values for name, values in changed.items() if name not in allowed}
    if found:
        what = "the checkpoint is of another run: " + listed(found)
        names = sorted({name.partition(".")[0] for name in found})
        goes_on = f"allow_changed={names} (in a script: --allow_changed {' '.join(names)})"
        kept = [name for name in names if name in KEPT_BY_THE_OPTIMIZER]
        then = f"is refused for {', '.join(kept)}" if kept else "goes on nevertheless; the result is another one"
        remedy = f"Resume as it was started. {goes_on} {then}."
        raise CheckpointError(what, where=where, remedy=remedy)
    if allowed:
        logger.warning("Resumed from %s with changes: %s", where, listed(changed))
    others = differences(saved["versions"], versions())
    if others:
        logger.warning("Resumed with other versions, so the result may differ in its last bits: %s", listed(others))


def differences(first: Any, second: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns what differs between two descriptions, by name; names inside a group are joined by dots.

    Args:
        first: of what JSON can hold.
        second: likewise.
        name: of both.

    Example:
        >>> differences({"seed": 1, "data": {"rows": 9}}, {"seed": 1, "data": {"rows": 8}})
        {'data.rows': (9, 8)}
    """
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return {} if first == second else {name: (first, second)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*first, *(key for key in second if key not in first)]:
        inside = f"{name}.{key}" if name else key
        found |= differences(first.get(key), second.get(key), inside)
    if name == "parameters" and not found and list(first) != list(second):  # an optimizer tells them by their order
        found[f"{name}.order"] = list(first), list(second)
    return found


def listed(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns differences in words, the first ones alone where there are many.

    Args:
        found: what `differences` has returned.

    Example:
        >>> listed({"seed": (42, 43)})
        'seed was 42, is 43'
    """
    some = [f"{name} was {shown(old)}, is {shown(new)}" for name, (old, new) in list(found.items())[:MOST_SHOWN]]
    return "; ".join(some) + (f" (+{len(found) - MOST_SHOWN} more)" if len(found) > MOST_SHOWN else "")


def bit_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Returns a digest of tensors that costs one look at their bits: names, formats, shapes, and sums of the bits.

    Args:
        tensors: with their names.

    Example:
        >>> bit_digest([("weight", torch.zeros(2))]) == bit_digest([("weight", torch.ones(2))])
        False
    """
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_sum_of_bits(tensor)}\n".encode())
    return found.hexdigest()[:16]


def _sum_of_bits(tensor: Tensor) -> tuple[int, int]:
    """As whole numbers of 8 bytes, modulo 2^64, and the bytes behind the last of these: no rounding hides a bit."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = len(content) // 8 * 8
    whole = content[:words] if content.storage_offset() % 8 == 0 else content[:words].clone()
    rest = int.from_bytes(bytes(content[words:].tolist()), "little")
    return int(whole.view(torch.int64).sum()), rest


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model: dropout, activation functions, how attention is computed."""
    inside = {name: value for name, value in config.items() if name not in OF_A_MODEL_FILE}
    return {name: _settings(value) if isinstance(value, Mapping) else value for name, value in inside.items()}


def _adapters(encoder: nn.Module) -> dict[str, Any]:
    if not isinstance(encoder, PeftModel):
        return {}
    found = {}
    for name, config in encoder.peft_config.items():
        settings: dict[str, Any] = {key: v for key, v in config.to_dict().items() if key not in OF_FILES}
        found[name] = settings | {"active": name in encoder.active_adapters}
    return found


def _parameters(task: nn.Module) -> dict[str, list[Any]]:
    """Shape, format and whether it is trained; SAFT's values are not there before it selects."""
    named = ((name, p) for name, p in task.named_parameters() if "saft_" not in name)
    return {name: [list(p.shape), str(p.dtype).removeprefix("torch."), p.requires_grad] for name, p in named}


def _pretrained(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    if trainer.zero_shot is None:
        yield from pretrained_tensors(trainer.model.model)
        return
    for name, parameter in trainer.model.named_parameters():
        if not name.startswith("terms."):  # which a checkpoint brings along
            yield name, trainer.zero_shot.get(name, parameter)


def _sets(given: Any, target: Target) -> Any:
    sets = given if isinstance(given, Mapping) else {"": given}
    known = {name: rows for name, rows in sets.items() if rows is not None}
    return {name: rows_digest(labelled_images(rows, name, target=target)) for name, rows in known.items()}


def _collator(trainer: Any) -> dict[str, Any]:
    collator = trainer.data_collator
    if not isinstance(collator, ImageCollator):
        return {"collator": _text(collator.collator if isinstance(collator, OpeningCollator) else collator)}
    settings = json.loads(collator.image_processor.to_json_string())
    return {"collator": _text(collator.transform), "image_processor": settings}


def _text(value: Any) -> str:
    return ADDRESS.sub("", repr(value))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else _text(value)
