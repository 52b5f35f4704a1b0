# SPDX-License-Identifier: Apache-2.0
"""Soups of folders: whole models, or adapters of one base."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PrinterCallback, ProcessorMixin

from ..cards.merged import known_task, merged_card
from ..cards.push import write_card
from ..data.class_spaces import class_space
from ..data.rows import LabelledImages
from ..data.text_files import read_json
from ..errors import ConfigError, MergeError
from ..interpolation.arithmetic import mean_tensor
from ..interpolation.files import read_checkpoint
from ..interpolation.publish import check_output, publish_folder
from ..interpolation.soup_adapters import trying
from ..interpolation.soup_files import check_same_classes, check_soup, soup_checkpoints
from ..interpolation.soups import check_different, choose_greedily, uniform_soup
from ..scripting.loading import load_adapter_config, load_images, load_processor, read_class_names
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.task import CONFIG_FILE, PROCESSOR_FOLDER, WEIGHTS_FILE
from ..training.arguments import RobustTrainingArguments
from ..training.trainer import RobustTrainer

METRIC = "validation_accuracy"
SOUP = "default"  # the adapter that PEFT saves in the folder itself
Metrics = dict[str, float]
Score = Callable[[Sequence[int]], Metrics]


def make_soup(args: Any) -> None:
    """Averages folders, all of them or those that help on validation data, and says what it wrote.

    Args:
        args: `MergeArguments` with a `soup`.

    Raises:
        ConfigError, MergeError: the folders do not fit each other, or the output is in use; nothing has been written.
        AdapterFileError, DataError: a file about the task or model cannot be used; nothing has been written.
    """
    folders, output = [Path(name) for name in args.soup], Path(args.output)
    check_different([folder.resolve() for folder in folders])
    check_output(output, folders, args.overwrite)
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise ConfigError("no such folder", where="soup", got=missing)
    adapters = [(folder / "adapter_config.json").exists() for folder in folders]
    if any(adapters) and not all(adapters):
        odd = folders[adapters.index(False)]
        raise MergeError("a soup is of adapters or of whole models", where=str(odd), got="a folder without an adapter")
    if args.zero_shot and not any(adapters):
        raise ConfigError("a soup of whole models has no base", where="zero_shot")
    for folder in folders:
        known_task(folder)
    members = _soup_adapters(folders, output, args) if any(adapters) else _soup_models(folders, output, args)
    kind = "adapter" if any(adapters) else "model"
    print(f"soup of {len(members)} {kind}{'' if len(members) == 1 else 's'}: {output}")


def _soup_models(folders: Sequence[Path], output: Path, args: Any) -> list[int]:
    check_soup([read_checkpoint(folder) for folder in folders], cast_up=True)

    def score(validation: Validation, members: Sequence[int]) -> Metrics:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=output.parent) as temporary:  # where there is room for the soup
            soup = Path(temporary, "soup")
            soup_checkpoints([folders[member] for member in members], soup, cast_up=True)
            return validation.metrics(AutoModel.from_pretrained(soup, dtype="auto"), _mean_head([soup]))

    members = _members(folders, args, score)
    card = merged_card(folders[members[0]], ingredients=len(members))  # whose files will be copied
    how = {"overwrite": args.overwrite, "cast_up": True}
    soup_checkpoints([folders[member] for member in members], output, **how)
    write_card(output, card)
    return members


def _soup_adapters(folders: Sequence[Path], output: Path, args: Any) -> list[int]:
    check_same_classes(folders)
    model, names = _load_adapters(folders, args.zero_shot)

    def score(validation: Validation, members: Sequence[int]) -> Metrics:
        with trying(model, SOUP, keep=False):
            uniform_soup([names[member] for member in members], model, SOUP)
            return validation.metrics(model, _mean_head([folders[member] for member in members]))

    members = _members(folders, args, score)
    uniform_soup([names[member] for member in members], model, SOUP)
    head = _mean_head([folders[member] for member in members])
    with publish_folder(output, args.overwrite) as temporary:
        model.save_pretrained(str(temporary), selected_adapters=[SOUP], save_embedding_layers=False)
        (temporary / "README.md").unlink()  # PEFT's card, with nothing in it but a path of this machine
        if (folders[0] / CONFIG_FILE).exists():
            shutil.copyfile(folders[0] / CONFIG_FILE, temporary / CONFIG_FILE)
        if (folders[0] / PROCESSOR_FOLDER).is_dir():
            shutil.copytree(folders[0] / PROCESSOR_FOLDER, temporary / PROCESSOR_FOLDER)
        if head:
            save_file(head, temporary / WEIGHTS_FILE)
        base = args.zero_shot or load_adapter_config(str(temporary)).base_model_name_or_path
        write_card(temporary, merged_card(temporary, ingredients=len(members), base_model_id=base))
    return members


def _load_adapters(folders: Sequence[Path], zero_shot: str | None) -> tuple[PeftModel, list[str]]:
    configs = [load_adapter_config(str(folder)) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if config.peft_type != configs[0].peft_type:
            got = f"{config.peft_type.value} and {configs[0].peft_type.value}"
            raise MergeError("adapters are of different methods", where=str(folder), got=got)
    bases = sorted({str(config.base_model_name_or_path) for config in configs})
    if len(bases) > 1 and not zero_shot:
        remedy = "If these are one model, give it as --zero_shot."
        raise MergeError("adapters name different base models", got=bases, remedy=remedy)
    name = zero_shot or configs[0].base_model_name_or_path
    if not name:
        raise ConfigError(
            "the adapter does not name its base model", where=str(folders[0]), remedy="Give --zero_shot."
        )
    names = [f"ingredient_{number}" for number in range(len(folders))]
    base = AutoModel.from_pretrained(name, dtype="auto", use_safetensors=True)
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=names[0])
    for folder, adapter in zip(folders[1:], names[1:], strict=True):
        model.load_adapter(str(folder), adapter)
    return model.eval(), names


def _mean_head(folders: Sequence[Path]) -> dict[str, Tensor]:
    """Of the heads that were trained; empty where there are none."""
    heads = [load_file(folder / WEIGHTS_FILE) for folder in folders if (folder / WEIGHTS_FILE).exists()]
    return {name: mean_tensor(head[name] for head in heads) for name in (heads[0] if heads else ())}


# --- greedy ---


def _members(folders: Sequence[Path], args: Any, score: Callable[[Validation, Sequence[int]], Metrics]) -> list[int]:
    if not args.soup_greedy:
        return list(range(len(folders)))
    found = choose_greedily([str(folder) for folder in folders], partial(score, _validation(folders, args)), METRIC)
    print(found)
    return found.members


@dataclass(frozen=True)
class Validation:
    """What soups are compared by: images, and the classifier that is made of a soup.

    Args:
        rows: labelled images.
        processor: of the models.
        settings: class names, templates and head.
        batch_size: images encoded at once.
        use_cpu: even where there is an accelerator.
    """

    rows: LabelledImages
    processor: ProcessorMixin
    settings: dict[str, Any]
    batch_size: int
    use_cpu: bool

    def metrics(self, model: nn.Module, head: dict[str, Tensor]) -> Metrics:
        """Returns what is measured of a dual encoder.

        Args:
            model: the dual encoder.
            head: tensors of its trained head; empty for a head made of class names.
        """
        task = ZeroShotClassifier(model, self.processor, **self.settings).requires_grad_(False)
        task.load_state_dict(head, strict=False)
        with TemporaryDirectory() as folder:
            how: Any = {"per_device_eval_batch_size": self.batch_size, "use_cpu": self.use_cpu}
            arguments = RobustTrainingArguments(folder, report_to="none", disable_tqdm=True, **how)
            sets = {"validation": self.rows}
            trainer = RobustTrainer(task, arguments, eval_dataset=sets, processing_class=self.processor)
            trainer.remove_callback(PrinterCallback)
            return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def _validation(folders: Sequence[Path], args: Any) -> Validation:
    file = folders[0] / CONFIG_FILE
    saved = read_json(file) if file.exists() else {}
    if saved.get("task", "class_names") != ZeroShotClassifier.name:
        what = "a greedy soup is chosen by the accuracy of class names"
        raise ConfigError(what, where=str(file), got=saved["task"], remedy="Use greedy_soup with a metric of yours.")
    trained = (folders[0] / WEIGHTS_FILE).exists()
    given: Any = read_class_names(args.class_names_file)
    rows = load_images(args.validation_data, "validation_data", args, given)
    if given is None and saved:
        names, data_names = saved["class_names"], saved.get("data_names")
    elif trained:
        raise ConfigError("a trained head has its classes", where="class_names_file", got=args.class_names_file)
    else:
        space = class_space(rows.class_names, given, "class_names_file")
        names, data_names = space.words, space.data_names
    settings = {
        "class_names": names,
        "data_names": data_names,
        "templates": args.templates or saved.get("templates", "single"),
        "head": "trainable" if trained else "live",
    }
    return Validation(rows, load_processor(str(folders[0])), settings, args.batch_size, args.use_cpu)
