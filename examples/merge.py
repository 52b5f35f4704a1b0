# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_robust"]
# ///
"""WiSE-FT: go part of the way from a zero-shot model to its fine-tuned self.

A model that was fine-tuned as a whole, or an adapter (SAFT, A-CLIP, LoRA and what else can be merged):

    python examples/merge.py --zero_shot openai/clip-vit-base-patch16 --fine_tuned runs/full --output merged
    python examples/merge.py --zero_shot openai/clip-vit-base-patch16 --fine_tuned runs/saft --output merged

Several shares of the way, each into a folder of its own, `merged/alpha=0.250` and so on. If a head was trained, the
zero-shot model is what `RobustTrainer.save_model()` wrote before the training:

    python examples/merge.py --zero_shot runs/before --fine_tuned runs/full --output merged --alpha 0.25 0.5 0.75
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_robust.errors import ConfigError
from hf_robust.interpolation.adapters import wise_ft
from hf_robust.interpolation.arithmetic import check_alpha, check_finite, interpolate_tensor
from hf_robust.interpolation.checkpoints import check_same_head, interpolate_checkpoints
from hf_robust.interpolation.files import COMPANION_FILES, StoredTensor, read_checkpoint, read_header
from hf_robust.interpolation.publish import check_output, publish_folder
from hf_robust.scripting.checks import check_given
from hf_robust.scripting.run import run
from hf_robust.tasks.task import PROCESSOR_FOLDER, WEIGHTS_FILE

DOWNLOADED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass
class ScriptArguments:
    """WiSE-FT of models on disk."""

    zero_shot: str | None = field(default=None, metadata={"help": "The model before fine-tuning: folder or Hub id."})
    fine_tuned: str | None = field(default=None, metadata={"help": "Folder of the fine-tuned model or adapter."})
    output: str | None = field(default=None, metadata={"help": "Folder to write."})
    alpha: list[float] = field(default_factory=lambda: [0.5], metadata={"help": "Shares of the way, 0 to 1."})
    fisher: list[str] | None = field(
        default=None, metadata={"help": "Fisher information of both, two safetensors files; not for adapters."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace output folders that hold something."})

    def __post_init__(self) -> None:
        check_given(self, "zero_shot", "fine_tuned", "output")


def local_folder(name: str) -> Path:
    """A folder as it is, a model of the Hub downloaded; of its files those that can be merged."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as error:
        raise ConfigError("no such folder, and no such model on the Hub", where="zero_shot", got=name) from error


def output_folders(output: Path, alphas: list[float]) -> dict[float, Path]:
    """Where the merged model goes, for every α."""
    alphas = [check_alpha(alpha) for alpha in alphas]
    folders = {alpha: output / f"alpha={alpha:.3f}" if len(alphas) > 1 else output for alpha in alphas}
    if len(set(folders.values())) < len(alphas):
        raise ConfigError("two alphas are the same in three decimals", got=alphas)
    return folders


def precision(*sides: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype that holds all values."""
    dtypes = {tensor.dtype for tensors in sides for tensor in tensors.values() if tensor.dtype.is_floating_point}
    return reduce(torch.promote_types, dtypes)


def say_precision(zero_shot: torch.dtype, fine_tuned: torch.dtype) -> None:
    """Prints in which precision a merge was made, where the two sides differ."""
    if zero_shot != fine_tuned:
        names = [str(one).removeprefix("torch.") for one in (zero_shot, fine_tuned)]
        wider = str(torch.promote_types(zero_shot, fine_tuned)).removeprefix("torch.")
        print(f"zero-shot weights are {names[0]}, fine-tuned ones {names[1]}: merged in {wider}")


def merge_whole(zero_shot: Path, args: ScriptArguments, folders: dict[float, Path]) -> None:
    """Interpolates all weights of two models."""
    for alpha, folder in folders.items():
        how: Any = {"overwrite": args.overwrite, "fishers": args.fisher, "cast_up": True}
        interpolate_checkpoints(zero_shot, args.fine_tuned, folder, alpha, **how)
    say_precision(*(precision(read_checkpoint(one).tensors) for one in (zero_shot, Path(args.fine_tuned))))


def merge_adapter(zero_shot: Path, adapter: Path, folders: dict[float, Path], overwrite: bool) -> None:
    """Scales what the adapter changes, merges it, and saves the model with its processor."""
    if (adapter / WEIGHTS_FILE).exists():
        check_same_head(zero_shot, adapter, cast_up=True)
    for folder in folders.values():
        check_output(folder, [zero_shot, adapter], overwrite)
    tuned = precision(read_header(adapter / SAFETENSORS_WEIGHTS_NAME)[1])
    base = AutoModel.from_pretrained(zero_shot, dtype="auto", use_safetensors=True)
    say_precision(base.dtype, tuned)
    base = base.to(torch.promote_types(base.dtype, tuned))  # what the adapter has learned is not rounded away
    model = PeftModel.from_pretrained(base, adapter).eval()
    for alpha, folder in folders.items():
        wise_ft(model, alpha)
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        with publish_folder(folder, overwrite, needed=merged.get_memory_footprint()) as temporary:
            merged.save_pretrained(temporary)
            copy_companions([adapter / PROCESSOR_FOLDER, adapter, zero_shot], temporary)
            if (adapter / WEIGHTS_FILE).exists():
                merge_head(zero_shot / WEIGHTS_FILE, adapter / WEIGHTS_FILE, alpha, temporary / WEIGHTS_FILE)


def merge_head(zero_shot: Path, fine_tuned: Path, alpha: float, output: Path) -> None:
    """Interpolates the heads that were trained beside an adapter."""
    first, second = load_file(zero_shot), load_file(fine_tuned)
    merged = {}
    for name in second:
        check_finite(first[name], f"{name} of {zero_shot}")
        check_finite(second[name], f"{name} of {fine_tuned}")
        dtype = torch.promote_types(first[name].dtype, second[name].dtype)
        merged[name] = interpolate_tensor(first[name].to(dtype), second[name].to(dtype), alpha)
    save_file(merged, output)


def copy_companions(sources: list[Path], folder: Path) -> None:
    """Copies the files of processor, tokenizer and classifier; of two, that of the first source."""
    for name in COMPANION_FILES:
        found = [source / name for source in sources if (source / name).is_file()]
        if found and not (folder / name).exists():
            shutil.copyfile(found[0], folder / name)


def main(args: ScriptArguments) -> None:
    """Merges for every α, and says what it wrote."""
    folders = output_folders(Path(args.output), args.alpha)
    zero_shot, fine_tuned = local_folder(args.zero_shot), Path(args.fine_tuned)
    if (fine_tuned / "adapter_config.json").exists():
        if args.fisher:
            raise ConfigError("Fisher information weights whole checkpoints, not adapters", where="fisher")
        merge_adapter(zero_shot, fine_tuned, folders, args.overwrite)
    else:
        merge_whole(zero_shot, args, folders)
    for alpha, folder in folders.items():
        print(f"alpha {alpha:g}: {folder}")


if __name__ == "__main__":
    run(main, ScriptArguments)
