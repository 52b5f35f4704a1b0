# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_robust"]
# ///
"""How hard is a task for a dual encoder, and which method to start with: known before anything is trained.

Without flags it looks at the demo's model and its training drawings; otherwise name both:

    python examples/difficulty.py
    python examples/difficulty.py --model_name_or_path openai/clip-vit-base-patch32 --data photos/train

Look at training or validation images; a choice made on test images flatters the result.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import torch

from hf_robust.errors import ConfigError
from hf_robust.evaluation.difficulty import task_difficulty
from hf_robust.evaluation.difficulty_plot import plot_difficulty
from hf_robust.evaluation.difficulty_report import Silhouette, TaskDifficulty
from hf_robust.evaluation.report import write_json
from hf_robust.scripting.loading import load_images, load_model, load_processor, read_class_names
from hf_robust.scripting.results import package_versions
from hf_robust.scripting.run import run

DEMO = Path(__file__).parent / "demo"
DEMO_MODEL, DEMO_DATA = str(DEMO / "clip-tiny-drawings"), str(DEMO / "data" / "train.parquet")
DEMO_TEMPLATE = "an icon of a {}."

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
class ScriptArguments:
    """Model and data; data is what examples/train.py takes."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder."})
    data: str | None = field(default=None, metadata={"help": "Labelled images: files, a folder, or a Hub dataset."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    class_names_file: str | None = field(default=None, metadata={"help": "Names by line, or .json by label."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images; else image, img, jpg, …"})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels; else label, labels or cls."})
    templates: str | None = field(default=None, metadata={"help": "Name of a template set, or one template with {}."})
    silhouette: Silhouette = field(default="centroid", metadata={"help": "Distances to class texts, or all to all."})
    sample_size: int = field(default=10_000, metadata={"help": "joint, image_only: images compared with one another."})
    seed: int = field(default=0, metadata={"help": "Of the sample."})
    batch_size: int = field(default=64, metadata={"help": "Images embedded at once."})
    workers: int = field(default=0, metadata={"help": "Processes that open images."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})
    picture: str | None = field(default=None, metadata={"help": "Picture to write, of the classes."})

    def __post_init__(self) -> None:
        if self.model_name_or_path is None and self.data is None:
            self.model_name_or_path, self.data = DEMO_MODEL, DEMO_DATA
            self.templates = self.templates or DEMO_TEMPLATE
            if not Path(DEMO_DATA).exists():
                raise ConfigError(
                    "the demo's drawings are not there", where=DEMO_DATA, remedy="Call `make demo` once."
                )
        for name in ("model_name_or_path", "data"):
            if not getattr(self, name):
                raise ConfigError("model and data are needed, or neither for those of the demo", where=name)
        self.templates = self.templates or "single"


def suggest(difficulty: TaskDifficulty) -> dict[str, str]:
    """Which method of examples/train.py to start with, why, and how that was chosen."""
    if difficulty.silhouette > 0:
        return {"method": "lora", "reason": LORA, "how": HOW}
    return {"method": "aclip", "reason": ACLIP, "how": HOW}


def write_outputs(difficulty: TaskDifficulty, suggestion: dict[str, str], args: ScriptArguments) -> None:
    """Writes the JSON and the picture that were asked for."""
    if args.picture:
        Path(args.picture).parent.mkdir(parents=True, exist_ok=True)
        plot_difficulty(difficulty).figure.savefig(args.picture, dpi=150)
    if args.output:
        results: dict[str, Any] = {"difficulty": asdict(difficulty), "suggestion": suggestion, "config": asdict(args)}
        results["versions"] = package_versions()
        write_json(results, Path(args.output))


def main(args: ScriptArguments) -> None:
    """Loads, embeds, measures, prints."""
    names = read_class_names(args.class_names_file)
    dataset = load_images(args.data, "data", args, names)
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
    start = f"Start with --method {suggestion['method']} in examples/train.py. {suggestion['reason']}"
    print(f"\n{fill(start, 100)}\n\n{fill(suggestion['how'], 100)}")
    write_outputs(difficulty, suggestion, args)


if __name__ == "__main__":
    run(main, ScriptArguments)
