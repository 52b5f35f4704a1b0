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

import argparse
import copy
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_robust.errors import ConfigError
from hf_robust.interpolation.adapters import wise_ft
from hf_robust.interpolation.arithmetic import check_alpha, check_finite, interpolate_tensor
from hf_robust.interpolation.checkpoints import check_same_head, interpolate_checkpoints
from hf_robust.interpolation.files import COMPANION_FILES
from hf_robust.interpolation.publish import check_output, publish_folder
from hf_robust.tasks.class_names import WEIGHTS_FILE

DOWNLOADED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zero_shot", required=True, help="The model before fine-tuning: folder or Hub id.")
    parser.add_argument("--fine_tuned", type=Path, required=True, help="Folder of the fine-tuned model or adapter.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write.")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.5], help="Shares of the way, 0 to 1.")
    parser.add_argument("--fisher", nargs=2, help="Fisher information of both, safetensors files; not for adapters.")
    parser.add_argument("--overwrite", action="store_true", help="Replace output folders that hold something.")
    return parser.parse_args()


def local_folder(name: str) -> Path:
    """A folder as it is, a model of the Hub downloaded; of its files those that can be merged."""
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=DOWNLOADED))


def output_folders(output: Path, alphas: list[float]) -> dict[float, Path]:
    """Where the merged model goes, for every α."""
    alphas = [check_alpha(alpha) for alpha in alphas]
    folders = {alpha: output / f"alpha={alpha:.3f}" if len(alphas) > 1 else output for alpha in alphas}
    if len(set(folders.values())) < len(alphas):
        raise ConfigError("two alphas are the same in three decimals", got=alphas)
    return folders


def merge_adapter(zero_shot: Path, adapter: Path, folders: dict[float, Path], overwrite: bool) -> None:
    """Scales what the adapter changes, merges it, and saves the model with its processor."""
    if (adapter / WEIGHTS_FILE).exists():
        check_same_head(zero_shot, adapter)
    for folder in folders.values():
        check_output(folder, [zero_shot, adapter], overwrite)
    base = AutoModel.from_pretrained(zero_shot, dtype="auto", use_safetensors=True)
    model = PeftModel.from_pretrained(base, adapter).eval()
    for alpha, folder in folders.items():
        wise_ft(model, alpha)
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        with publish_folder(folder, overwrite, needed=merged.get_memory_footprint()) as temporary:
            merged.save_pretrained(temporary)
            copy_companions([adapter, zero_shot], temporary)
            if (adapter / WEIGHTS_FILE).exists():
                merge_head(zero_shot / WEIGHTS_FILE, adapter / WEIGHTS_FILE, alpha, temporary / WEIGHTS_FILE)


def merge_head(zero_shot: Path, fine_tuned: Path, alpha: float, output: Path) -> None:
    """Interpolates the heads that were trained beside an adapter."""
    first, second = load_file(zero_shot), load_file(fine_tuned)
    for name in second:
        check_finite(first[name], f"{name} of {zero_shot}")
        check_finite(second[name], f"{name} of {fine_tuned}")
    save_file({name: interpolate_tensor(first[name], second[name], alpha) for name in second}, output)


def copy_companions(sources: list[Path], folder: Path) -> None:
    """Copies the files of processor, tokenizer and classifier; of two, that of the first source."""
    for name in COMPANION_FILES:
        found = [source / name for source in sources if (source / name).is_file()]
        if found and not (folder / name).exists():
            shutil.copyfile(found[0], folder / name)


def main(args: argparse.Namespace) -> None:
    """Merges for every α, and says what it wrote."""
    folders = output_folders(args.output, args.alpha)
    zero_shot = local_folder(args.zero_shot)
    if (args.fine_tuned / "adapter_config.json").exists():
        if args.fisher:
            raise ConfigError("Fisher information weights whole checkpoints, not adapters", where="fisher")
        merge_adapter(zero_shot, args.fine_tuned, folders, args.overwrite)
    else:
        for alpha, folder in folders.items():
            interpolate_checkpoints(
                zero_shot, args.fine_tuned, folder, alpha, overwrite=args.overwrite, fishers=args.fisher
            )
    for alpha, folder in folders.items():
        print(f"alpha {alpha:g}: {folder}")


if __name__ == "__main__":
    main(parse_arguments())
