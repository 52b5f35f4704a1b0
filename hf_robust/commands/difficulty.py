# SPDX-License-Identifier: Apache-2.0
"""The command `hf-robust difficulty`: how hard is a task, and which method to start with, before anything is trained.

    hf-robust difficulty photos:train --model_name_or_path openai/clip-vit-base-patch32

Look at training or validation images; a choice made on test images flatters the result.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import torch

from ..evaluation.difficulty import task_difficulty
from ..evaluation.difficulty_plot import plot_difficulty
from ..evaluation.difficulty_report import Silhouette, TaskDifficulty
from ..evaluation.report import write_json
from ..scripting.arguments import setting
from ..scripting.checks import check_file, check_given
from ..scripting.loading import DEFAULT_MODEL, load_images, load_model, load_processor, read_class_names
from ..scripting.results import package_versions

LORA = (
    "The silhouette is above 0: the zero-shot space separates part of the task already, so little may have to change. "
    "LoRA forgot least of the methods compared there; it may gain less on other domains."
)
ACLIP = (
    "The silhouette is not above 0: the zero-shot space does not separate the task, so more has to change. A-CLIP "
    "kept the best balance there between gains on other domains and forgetting. If other domains matter more to you "
    "than what is forgotten: full fine-tuning, like CLIP-Adapter, did better on them and forgot more. If forgetting "
    "matters most: LoRA forgot least."
)
HOW = (
    "How this was chosen: by the sign of the silhouette alone. The findings are those of the paper of A-CLIP (arXiv "
    "2402.09613), averages over its own tasks. Thresholds are not known to us from the paper: 0 is our line, where "
    "another class is as near as the own one, and close to it the sign says little. The paper does not compare SAFT, "
    "the similarity loss, OGEN and WiSE-FT. Compare a few methods on validation data before you settle."
)


@dataclass
class DifficultyArguments:
    """How well a dual encoder separates classes before anything is trained, and which method to start with."""

    data: str | None = setting(None, "Labelled images: files, a folder, or a Hub dataset.", positional=True)
    model_name_or_path: str = setting(DEFAULT_MODEL, "Folder or Hub id.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Of the weights.")
    class_names_file: str | None = setting(None, "Names by line, or .json by label.")
    image_column: str | None = setting(None, "Column of images; else image, img, jpg, …")
    label_column: str | None = setting(None, "Column of labels; else label, labels or cls.")
    templates: str = setting("single", "Name of a template set, or one template with {}.")
    silhouette: Silhouette = setting("centroid", "Distances to class texts, or all to all.")
    sample_size: int = setting(10_000, "joint, image_only: images compared with one another.")
    seed: int = setting(0, "Of the sample.")
    batch_size: int = setting(64, "Images embedded at once.")
    workers: int = setting(0, "Processes that open images.")
    output: str | None = setting(None, "JSON file to write.")
    picture: str | None = setting(None, "Picture to write, of the classes.")

    def __post_init__(self) -> None:
        check_given(self, "data")


def suggest(difficulty: TaskDifficulty) -> dict[str, str]:
    """Which method of `hf-robust train` to start with, why, and how that was chosen."""
    if difficulty.silhouette > 0:
        return {"method": "lora", "reason": LORA, "how": HOW}
    return {"method": "aclip", "reason": ACLIP, "how": HOW}


def write_outputs(difficulty: TaskDifficulty, suggestion: dict[str, str], args: DifficultyArguments) -> None:
    """Writes the JSON and the picture that were asked for."""
    if args.picture:
        Path(args.picture).parent.mkdir(parents=True, exist_ok=True)
        picture: Any = plot_difficulty(difficulty).figure
        picture.savefig(args.picture, dpi=150)
    if args.output:
        results: dict[str, Any] = {"difficulty": asdict(difficulty), "suggestion": suggestion, "config": asdict(args)}
        results["versions"] = package_versions()
        write_json(results, Path(args.output))


def main(args: DifficultyArguments) -> None:
    """Loads, embeds, measures, prints.

    Args:
        args: of which data, by which model.

    Raises:
        ConfigError: what is to be written is a folder; nothing has been computed.
    """
    check_file(args.output, "output")
    check_file(args.picture, "picture")
    names: Any = read_class_names(args.class_names_file)
    dataset = load_images(str(args.data), "data", args, names)
    model = load_model(args.model_name_or_path, args.dtype)
    difficulty = task_difficulty(
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval(),
        dataset,
        names,
        processor=load_processor(args.model_name_or_path),
        templates=args.templates,
        silhouette=args.silhouette,
        sample_size=args.sample_size,
        seed=args.seed,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    suggestion = suggest(difficulty)
    print(difficulty)
    start = f"Start with --method {suggestion['method']} of hf-robust train. {suggestion['reason']}"
    print(f"\n{fill(start, 100)}\n\n{fill(suggestion['how'], 100)}")
    write_outputs(difficulty, suggestion, args)


TYPES = (DifficultyArguments,)
EXAMPLE = "hf-robust difficulty photos:train --picture classes.png"
