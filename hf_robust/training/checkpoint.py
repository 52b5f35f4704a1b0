# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint of a task holds, and how it is read back.

A folder has the adapter as PEFT writes it, or the whole dual encoder as transformers writes it, so that both load
without this module; beside it lie `classifier.json` (the task: class names, templates, head) and, where the task has
tensors of its own, `classifier.safetensors`, see `hf_robust.tasks.files`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from ..encoders.dual_encoder import base_model
from ..errors import CheckpointError, ConfigError
from ..tasks.files import require_all
from ..tasks.task import PROCESSOR_FOLDER, WEIGHTS_FILE, Task
from ..tuners.matching import check_adapter_name
from .manifest import check_files, checkpoints_in, newest_whole, read_manifest

logger = logging.getLogger(__name__)

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # files of a saved adapter, as patterns
WHOLE_MODEL = ("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
ENCODER = "model."  # in the names of a task's tensors


def save_encoder(task: Task, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes the adapters of the task's dual encoder, or the whole encoder where it has none.

    Args:
        task: the task.
        folder: where to.
        state_dict: the task's tensors, where they cannot be read from the modules (FSDP).

    Raises:
        ConfigError: the name of an adapter is none of a folder.
    """
    if state_dict is not None:
        state_dict = {name.removeprefix(ENCODER): tensor for name, tensor in state_dict.items()}
    encoder: Any = task.model
    if isinstance(encoder, PeftModel):
        for name in encoder.peft_config:  # PEFT makes a folder of each
            check_adapter_name(name)
        # "auto" would ask the Hub whether the vocabulary has grown
        encoder.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
    else:
        encoder.save_pretrained(folder, state_dict=state_dict)


def processor_folder(task: Task, folder: Path) -> Path:
    """Returns where the processor of a saved task goes.

    It does not lie beside an adapter: PEFT's `AutoPeftModel` takes a tokenizer there for a sign that the vocabulary
    may have grown, and asks the base for its input embeddings, which a dual encoder does not give.

    Args:
        task: the task.
        folder: where its encoder is saved.

    Example:
        >>> processor_folder(task, Path("my-adapter"))
        PosixPath('my-adapter/processor')
    """
    return folder / PROCESSOR_FOLDER if isinstance(task.model, PeftModel) else folder


def check_not_base(task: Task, folder: Path) -> None:
    """Refuses to save an adapter where its base lies.

    Args:
        task: the task.
        folder: where to.

    Raises:
        ConfigError: it is the base's folder.
    """
    base = base_model(task.model).config.name_or_path
    if isinstance(task.model, PeftModel) and base and Path(base).resolve() == folder.resolve():
        what, remedy = "an adapter would be saved into the folder of its base", "Set another output_dir."
        raise ConfigError(what, where="output_dir", got=str(folder), remedy=remedy)


def remove_others(task: Task, folder: Path) -> None:
    """Removes from the folder of a saved task what an earlier one has left, which would be loaded in its place.

    Args:
        task: that has been saved.
        folder: where.
    """
    stale = WHOLE_MODEL if isinstance(task.model, PeftModel) else ADAPTER
    for pattern in (*stale, *([] if task.own_tensors() else [WEIGHTS_FILE])):
        for path in folder.glob(pattern):
            path.unlink()


def load_encoder(task: Task, folder: Path) -> None:
    """Reads back what `save_encoder` wrote, in place.

    Args:
        task: a task with the same adapters, or without any if the folder holds a whole encoder.
        folder: where from.

    Raises:
        AdapterFileError: the folder lacks weights of the model.
    """
    encoder: Any = task.model
    if isinstance(encoder, PeftModel):
        for name in list(encoder.peft_config):
            _load_adapter(encoder, name, folder if name == "default" else folder / name)
        return
    saved, report = type(encoder).from_pretrained(folder, dtype="auto", output_loading_info=True)
    require_all(sorted(report["missing_keys"]), folder)
    encoder.load_state_dict(saved.state_dict())


def _load_adapter(model: PeftModel, name: str, folder: Path) -> None:
    active = name in model.active_adapters
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    type(model.peft_config[name]).from_pretrained(str(folder))  # PEFT looks at no config for an adapter that is there
    report = model.load_adapter(str(folder), name, is_trainable=active, torch_device="cpu")
    require_all(report.missing_keys, folder)
    if active:
        model.set_adapter(name)
    for parameter in frozen:  # PEFT lets all of an active adapter require gradients, also in a tower the head froze
        parameter.requires_grad_(False)


def checkpoint_to_resume(given: str | bool, output_dir: Path) -> str:
    """Returns the folder of a checkpoint that a training can go on from.

    Args:
        given: the folder, or True for the one in `output_dir` that was saved last and is whole to the last bit; those
            that are passed over are logged, with the reason.
        output_dir: of the training.

    Raises:
        CheckpointError: there is none, or it is damaged or lacks the state of the training.

    Example:
        >>> checkpoint_to_resume(True, Path("runs/saft"))
        'runs/saft/checkpoint-300'
    """
    if given is not True:
        folder = Path(str(given))
        check_files(folder, read_manifest(folder))
        return str(folder)
    newest, problems = newest_whole(checkpoints_in(output_dir))
    if newest is None:
        what = "; ".join(["no whole checkpoint to resume from", *map(_in_short, problems)])
        raise CheckpointError(what, where=str(output_dir), remedy="Train without resume_from_checkpoint.")
    for problem in problems:
        logger.warning("Resumed from %s; passed over %s", newest.name, _in_short(problem))
    return str(newest)


def _in_short(problem: CheckpointError) -> str:
    return f"{Path(str(problem.where)).name}: {problem.what}"
