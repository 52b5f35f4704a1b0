# SPDX-License-Identifier: Apache-2.0
"""The card of a merge or a soup on disk, read off its files: its weights may be larger than memory."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..data.text_files import read_json
from ..errors import AdapterFileError, DataError, close_matches
from ..tasks.choose import TASKS
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.files import read_settings
from ..tasks.task import CONFIG_FILE, PROCESSOR_FOLDER, Task
from .card import IMAGE_SETTINGS, METHODS, MODEL_SOUP, MOST_CLASSES, OURS, PACKAGES, REPOSITORY, TEMPLATE, listed, tags
from .markdown import code, hub_id

ADAPTER, MODEL = "adapter_config.json", "config.json"
NOTHING: dict[str, Any] = {  # of what a card of a training has besides
    **dict.fromkeys("head metric table more picture chosen_on new_class_names data train_images".split()),
    **dict.fromkeys("plain_peft exports_to_shira interpolates".split(), False),
    **{"settings": {}, "data_ids": [], "left_out": []},
}
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def merged_card(
    folder: str | Path,
    *,
    alpha: float | None = None,
    ingredients: int | None = None,
    method: str | None = None,
    base_model_id: str | None = None,
    fisher: bool = False,
) -> ModelCard:
    """Makes the card of a model or adapter that was merged from others. It shows no path.

    Args:
        folder: what the merge has written.
        alpha: that of WiSE-FT.
        ingredients: of a soup, how many models it is the mean of.
        method: PEFT's name of the method of an adapter that was merged into its base.
        base_model_id: what all began with, if it is on the Hub; another name is not shown.
        fisher: whether the mean was weighted by Fisher information.

    Raises:
        AdapterFileError: the task is unknown, or its file holds no settings.
        DataError: a file of the folder is missing, no valid JSON, or no JSON object.

    Example:
        >>> interpolate_checkpoints("zero_shot", "runs/full", "merged", alpha=0.5)
        >>> write_card("merged", merged_card("merged", alpha=0.5, base_model_id="openai/clip-vit-base-patch32"))
    """
    folder = Path(folder)
    is_adapter = (folder / ADAPTER).exists()
    config = _read_object(folder / (ADAPTER if is_adapter else MODEL))
    saved = read_settings(folder) if (folder / CONFIG_FILE).exists() else None
    kind = known_task(folder) or ZeroShotClassifier
    base = hub_id(base_model_id or "")
    adapters = [config["peft_type"]] if is_adapter else []
    methods = [METHODS.get(name, name) for name in ([method] if method else adapters)]
    methods += ([MODEL_SOUP] if ingredients else []) + (["WiSE-FT"] if alpha is not None else [])
    architecture = "dual encoder" if is_adapter else (config.get("architectures") or ["dual encoder"])[0]
    title = f"{' + '.join(methods)} on {base.split('/')[-1] if base else architecture}"
    class_names = (saved or {}).get("class_names", [])
    metadata = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=kind.pipeline_tag,
        tags=tags(methods, config.get("model_type"), base if is_adapter else None),
        model_name=title,
    )
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=title,
        methods=methods,
        adapters=adapters,
        is_ours=bool(OURS & set(adapters)),
        base=base,
        base_argument=', base="folder-of-the-base-model"' if is_adapter and base is None else "",
        architecture=architecture,
        repository=REPOSITORY,
        task=kind.name if saved else None,
        task_class=kind.__name__,
        purpose=kind.purpose if saved else None,
        alpha=alpha,
        ingredients=ingredients,
        fisher=fisher,
        class_names=listed(class_names, MOST_CLASSES),
        n_classes=len(class_names),
        prompts=[code(template) for template in (saved or {}).get("templates", [])],
        preprocessing=_preprocessing(folder / PROCESSOR_FOLDER if is_adapter else folder),
        versions={package: version(package) for package in PACKAGES},
        **NOTHING,
    )


def known_task(folder: Path) -> type[Task] | None:
    """Returns the task that a folder was saved as; None where it does not say.

    Args:
        folder: of a model or adapter.

    Raises:
        AdapterFileError: the task is unknown, or its file holds no settings.
        DataError: the file is no valid JSON.
    """
    if not (folder / CONFIG_FILE).exists():
        return None
    name = read_settings(folder)["task"]
    if not isinstance(name, str) or name not in TASKS:
        where, remedy = str(folder / CONFIG_FILE), close_matches(str(name), list(TASKS))
        raise AdapterFileError("unknown task", where=where, got=name, remedy=remedy)
    return TASKS[name]


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError("file is malformed", where=str(path), got=type(content).__name__, allowed="a JSON object")
    return content


def _preprocessing(folder: Path) -> dict[str, str]:
    found: dict[str, Any] = {}
    for name in PROCESSORS:
        if (folder / name).exists():
            content = _read_object(folder / name)
            found |= content.get("image_processor", content)
    return {name: code(str(found[name])) for name in IMAGE_SETTINGS if found.get(name) is not None}
