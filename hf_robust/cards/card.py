# SPDX-License-Identifier: Apache-2.0
"""Model cards: what was trained, how to load it, and what it cost."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import TrainingArguments

from ..encoders.dual_encoder import base_model, family, needs_interpolation
from ..encoders.image_size import pixels_of
from ..errors import ConfigError
from ..peft_types import method_name
from ..tasks.task import Task
from ..tuners.saft import exports_to_shira
from .markdown import code, escape, hub_id
from .results import CardResults
from .tables import eval_results, more_table, results_table

if TYPE_CHECKING:
    from ..training.arguments import RobustTrainingArguments

TEMPLATE = Path(__file__).with_name("model_card_template.md")
REPOSITORY = "this-repository"  # stands in the usage snippet until the card is pushed
METHODS = {  # other adapters go by PEFT's own name
    "SAFT": "SAFT",
    "ACLIP": "A-CLIP",
    "RADAPTER": "R-Adapter",
    "TRAINABLE_TOKENS": "CoOp",
}
MODEL_SOUP = "model soup"
OURS = {"SAFT", "ACLIP", "RADAPTER"}  # those that PEFT alone cannot load

# Allow-lists: paths, tokens, user names and names of runs are in other settings.
TRAINING_SETTINGS = (
    "head head_first_epochs head_first_learning_rate image_size cache_reference_embeddings "
    "class_weights label_smoothing_factor train_sampling_strategy "
    "learning_rate num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps lr_scheduler_type warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm bf16 fp16 tf32 seed data_seed full_determinism dataloader_drop_last"
).split()
ADAPTER_SETTINGS = (
    "density score scope towers exclude_input_embeddings train_bias train_out_proj target_modules exclude_modules "
    "modules_to_save seed r lora_alpha lora_dropout use_rslora use_dora bias rank_pattern alpha_pattern "
    "layers_to_transform layers_pattern mask_type random_seed feedforward_modules token_indices "
    "scale drop_path drop_unit average_decay"
).split()
TERMS = {  # others go by their own names
    "similarity": "similarity loss",
    "lipsum": "Lipsum-FT",
    "context": "CAR-FT",
    "features": "LDIFS",
    "weights": "L2-SP",
    "spuriosity": "StarFT",
    "ogen": "OGEN",
}
LOSS_SETTINGS = (
    "weight distance towers schedule prompts tokens templates layers norm_axis reduction phrases neighbours heads "
    "dropout layer_norm noise warmup generation_weight base_as_unknown_weight reverse_weight new_weight "
    "cross_entropy_weight distillation_weight average decay largest_window smallest_window seed"
).split()
IMAGE_SETTINGS = "do_resize size resample do_center_crop crop_size image_mean image_std".split()
PACKAGES = ("hf_robust", "peft", "transformers", "torch", "datasets")
MOST_CLASSES = 50  # that a card lists


def model_card(
    task: Task,
    args: RobustTrainingArguments | None = None,
    results: CardResults | None = None,
    *,
    base_model_id: str | None = None,
    datasets: Sequence[str] = (),
    data: str | None = None,
    train_images: int | None = None,
    license: str | None = None,
    picture: str | None = None,
    left_out: Sequence[str] = (),
) -> ModelCard:
    """Makes the card of a fine-tuned task.

    It shows no path, token, user name or name of a run: settings are taken from an allow-list, and a base model that
    was loaded from a folder goes without a name unless `base_model_id` gives one. Names of classes and sets are
    escaped.

    Args:
        task: as it is saved; the method is read off its adapters, `args` and `results`.
        args: what it was trained with.
        results: what the evaluation found.
        base_model_id: the base model's id on the Hub, where it was loaded from somewhere else.
        datasets: ids of the training data on the Hub.
        data: a sentence about the training data; shown as plain text.
        train_images: number of training images.
        license: of the weights, as the Hub names it, `"apache-2.0"` for instance.
        picture: name of a PNG file that lies beside the card, such as the curve over α.
        left_out: images, classes and adapters that had no part in it, a sentence each; shown as plain text.

    Raises:
        ConfigError: an id is none, or `picture` is no plain name of a PNG file.

    Example:
        >>> card = model_card(trainer.model, trainer.args, results, picture="curve.png")
        >>> card.save("my-adapter/README.md")
    """
    for name in (*datasets, *([base_model_id] if base_model_id is not None else [])):
        if hub_id(name) is None:
            raise ConfigError("not an id on the Hub", got=name, allowed="'name' or 'owner/name', no local folder")
    if picture is not None and re.fullmatch(r"\w[\w.-]*\.png", picture, re.ASCII) is None:
        raise ConfigError("not a plain name of a PNG file", where="picture", got=picture)
    encoder, configs = base_model(task.model), _adapter_configs(task)
    base = base_model_id or hub_id(encoder.config.name_or_path)
    methods = _methods(task, args, results)
    metric = task.metrics[0] if results is None else results.metric
    of_task = task.settings()
    class_names, templates = of_task.get("class_names", []), of_task.get("templates", [])
    title = f"{' + '.join(methods)} on {base.split('/')[-1] if base else type(encoder).__name__}"
    metadata = ModelCardData(
        base_model=base,
        library_name="peft" if configs else "transformers",
        pipeline_tag=task.pipeline_tag,
        tags=tags(methods, encoder.config.model_type, base if configs else None),
        datasets=list(datasets) or None,
        license=license,
        metrics=[metric],
        model_name=title,
        eval_results=eval_results(results, task.pipeline_tag) or None,
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=title,
        methods=methods,
        adapters=[method_name(config) for config in configs],
        is_ours=bool(OURS & {method_name(config) for config in configs}),
        base=base,
        architecture=type(encoder).__name__,
        repository=REPOSITORY,
        base_argument=', base="folder-of-the-base-model"' if configs and base is None else "",
        plain_peft=_needs_peft_alone(task, configs),
        interpolates=_interpolates(task),
        task=task.name,
        task_class=_class_name(task),
        exports_to_shira=exports_to_shira(task.model),
        purpose=task.purpose,
        head=of_task.get("head"),
        alpha=None if results is None else results.chosen_alpha,
        ingredients=None,
        fisher=False,
        metric=metric,
        table=results_table(results) if results is not None and results.sets else None,
        more=None if results is None else more_table(results),
        chosen_on=_chosen_on(args, results),
        picture=picture,
        settings=_settings(args, configs, task),
        class_names=listed(class_names, MOST_CLASSES),
        n_classes=len(class_names),
        new_class_names=_new_class_names(task),
        prompts=[code(template) for template in templates],
        data=None if data is None else escape(data),
        data_ids=list(datasets),
        train_images=train_images,
        left_out=[escape(one) for one in left_out],
        preprocessing=_preprocessing(task),
        versions={package: version(package) for package in PACKAGES},
    )


def _adapter_configs(task: Task) -> list[Any]:
    model = task.model
    return [model.peft_config[name] for name in model.active_adapters] if isinstance(model, PeftModel) else []


def _needs_peft_alone(task: Task, configs: list[Any]) -> bool:
    """Returns whether the model gives the same predictions without this package, by its processor's defaults."""
    stock = bool(configs) and not OURS & {method_name(config) for config in configs}
    of_task = task.settings()
    plain = of_task.get("head") in ("live", "frozen") and len(of_task["templates"]) == 1 and task.target == "label"
    two_towers = base_model(task.model).config.model_type == "vision-text-dual-encoder"
    plain = plain and not (two_towers and _interpolates(task))  # its forward cannot be asked to
    return stock and plain and family(task.model).padding == "longest"


def _class_name(task: Task) -> str:
    """Of a class of one's own, the name of ours that it is derived from."""
    return next(one.__name__ for one in type(task).__mro__ if one.__module__.startswith("hf_robust."))


def _chosen_on(args: RobustTrainingArguments | None, results: CardResults | None) -> str | None:
    """A set that is shown, and that the best checkpoint was chosen on."""
    if args is None or results is None or not args.load_best_model_at_end:
        return None
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    names = [one.name for one in results.sets if metric.startswith(f"{one.name}_")]
    plain = [one.name for one in results.sets if one.name == "evaluation"]  # metrics of it have no name of a set
    found = max(names, key=len, default=None) or (plain[0] if plain else None)
    return None if found is None else escape(found)


def _interpolates(task: Task) -> bool:
    return needs_interpolation(task.model, pixels_of(task.processor))


def _methods(task: Task, args: RobustTrainingArguments | None, results: CardResults | None) -> list[str]:
    configs = _adapter_configs(task)
    methods = [METHODS.get(method_name(config), method_name(config)) for config in configs] or ["full fine-tuning"]
    methods += ["LP-FT"] if args is not None and args.head_first_epochs > 0 else []
    methods += [_title(name) for name in task.terms]
    return methods + (["WiSE-FT"] if results is not None and results.chosen_alpha is not None else [])


def _title(name: str) -> str:
    return TERMS.get(name, name.replace("_", " "))


def tags(methods: list[str], model_type: str | None, adapted_base: str | None) -> list[str]:
    """Returns the tags of a card.

    Args:
        methods: as the card names them.
        model_type: of the dual encoder; None where it is not known.
        adapted_base: the base's id, of an adapter.

    Example:
        >>> tags(["LP-FT"], "clip", None)
        ['hf-robust', 'robust-fine-tuning', 'clip', 'lp-ft']
    """
    known = ["hf-robust", "robust-fine-tuning", *([model_type] if model_type else [])]
    known += [name.lower().replace(" ", "-") for name in methods]
    return known + ([f"base_model:adapter:{adapted_base}"] if adapted_base else [])


def _settings(args: RobustTrainingArguments | None, configs: list[Any], task: Task) -> dict[str, dict[str, str]]:
    found = {method_name(config): _changed(config, ADAPTER_SETTINGS) for config in configs}
    for name, term in task.terms.items():
        defaults = {n: argument.default for n, argument in term.arguments().items()}
        settings = {n: value for n, value in term.settings().items() if n in LOSS_SETTINGS}
        shown = {n: value for n, value in settings.items() if n == "weight" or value != defaults[n]}
        found[_title(name)] = {n: code(str(value)) for n, value in shown.items()}
    if args is not None:
        found["Training"] = _changed(args, TRAINING_SETTINGS, TrainingArguments)  # commands begin with others
    return {title: settings for title, settings in found.items() if settings}


def _changed(settings: Any, names: Sequence[str], first: Any = None) -> dict[str, str]:
    """Returns those of the named settings that are not at their default, as code; a base class's counts first."""
    changed = {}
    of_base = {} if first is None else {field.name: field for field in fields(first)}
    for field in (of_base.get(field.name, field) for field in fields(settings)):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = _simple(getattr(settings, field.name))
        if field.name in names and value != _simple(default):
            changed[field.name] = code(str(value))
    return changed


def _simple(value: Any) -> Any:
    if isinstance(value, (set, tuple)):
        return sorted(value) if isinstance(value, set) else list(value)
    return value.value if isinstance(value, Enum) else value


def _preprocessing(task: Task) -> dict[str, str]:
    settings: dict[str, Any] = json.loads(task.processor.image_processor.to_json_string())
    return {name: code(str(settings[name])) for name in IMAGE_SETTINGS if settings.get(name) is not None}


def _new_class_names(task: Task) -> str | None:
    names = [name for term in task.terms.values() for name in term.told().get("new_class_names", [])]
    return listed(names, len(names)) if names else None


def listed(names: Sequence[str], most: int) -> str:
    """Returns names as Markdown shows them, with commas between.

    Args:
        names: text of users.
        most: how many at most.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(escape, names[:most])) + more
