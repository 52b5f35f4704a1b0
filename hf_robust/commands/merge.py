# SPDX-License-Identifier: Apache-2.0
"""The command `hf-robust merge`: WiSE-FT and soups of models on disk.

Part of the way, of a whole model or an adapter (SAFT, A-CLIP, LoRA and what else can be merged):

    hf-robust merge --zero_shot openai/clip-vit-base-patch16 --fine_tuned runs/full --output merged
    hf-robust merge --zero_shot openai/clip-vit-base-patch16 --fine_tuned runs/saft --output merged

Several shares of the way, each into a folder of its own, `merged/alpha=0.250` and so on. If a head was trained, the
zero-shot model is what `RobustTrainer.save_model()` wrote before the training:

    hf-robust merge --zero_shot runs/before --fine_tuned runs/full --output merged --alpha 0.25 0.5 0.75

The mean of models, or of adapters of one base, that were fine-tuned from the same weights (an adapter, then); of all,
or of those that help on validation data:

    hf-robust merge --soup runs/a runs/b runs/c --output soup
    hf-robust merge --soup runs/a runs/b --output soup --soup_greedy --validation_data photos:validation
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from ..cards.merged import known_task, merged_card
from ..cards.push import write_card
from ..errors import ConfigError
from ..interpolation.adapters import wise_ft
from ..interpolation.arithmetic import check_alpha, check_finite, interpolate_tensor
from ..interpolation.checkpoints import check_same_head, interpolate_checkpoints
from ..interpolation.files import COMPANION_FILES, StoredTensor, read_checkpoint, read_header
from ..interpolation.publish import check_output, publish_folder
from ..scripting.arguments import setting
from ..scripting.checks import check_given
from ..scripting.loading import load_adapter_config
from ..tasks.task import PROCESSOR_FOLDER, WEIGHTS_FILE
from .soup import make_soup

DOWNLOADED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]
HALF = [0.5]
OF_GREEDY = ("validation_data", "class_names_file", "templates", "image_column", "label_column", "batch_size")


@dataclass
class MergeArguments:
    """WiSE-FT and soups of models on disk."""

    zero_shot: str | None = setting(None, "The model before fine-tuning: folder or Hub id.")
    fine_tuned: str | None = setting(None, "Folder of the fine-tuned model or adapter.")
    output: str | None = setting(None, "Folder to write.")
    alpha: list[float] = setting(HALF, "Shares of the way, 0 to 1.")
    fisher: list[str] | None = setting(None, "Fisher information of both, two safetensors files; not for adapters.")
    overwrite: bool = setting(False, "Replace output folders that hold something.")
    soup: list[str] | None = setting(None, "Folders of models, or of adapters of one base, to average; no fine_tuned.")
    soup_greedy: bool = setting(False, "Of these only those that help on validation data.")
    validation_data: str | None = setting(None, "For soup_greedy: labelled images.")
    class_names_file: str | None = setting(
        None, "Names by line, or .json by label; default: the first folder's, or the data's."
    )
    templates: str | None = setting(None, "Name of a template set, or one template with {}.")
    image_column: str | None = setting(None, "Column of images; else image, img, jpg, …")
    label_column: str | None = setting(None, "Column of labels; else label, labels or cls.")
    batch_size: int = setting(64, "Images encoded at once.")
    use_cpu: bool = setting(False, "Even where there is an accelerator.")

    def __post_init__(self) -> None:
        if self.soup is None:
            check_given(self, "zero_shot", "fine_tuned", "output")
            self._refuse("soup_greedy", *OF_GREEDY, remedy="Give the models to average with --soup.")
            return
        check_given(self, "soup", "output", *(["validation_data"] if self.soup_greedy else []))
        self._refuse("fine_tuned", "fisher", remedy="Merge the soup afterwards.")
        if not self.soup_greedy:
            self._refuse(*OF_GREEDY, remedy="Only --soup_greedy looks at images.")
        if self.alpha != HALF:
            raise ConfigError("not a setting of a soup", where="alpha", got=self.alpha)

    def _refuse(self, *names: str, remedy: str) -> None:
        for name in names:
            if getattr(self, name) != getattr(MergeArguments, name):
                raise ConfigError("does not go together with the others", where=name, remedy=remedy)


def local_folder(name: str) -> Path:
    """Returns a folder as it is, and downloads a model of the Hub; of its files those that can be merged.

    Args:
        name: folder or id on the Hub.

    Raises:
        ConfigError: it is neither.

    Example:
        >>> local_folder("runs/before")
        PosixPath('runs/before')
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as error:
        raise ConfigError("no such folder, and no such model on the Hub", where="zero_shot", got=name) from error


def output_folders(output: Path, alphas: list[float]) -> dict[float, Path]:
    """Returns where the merged model goes, for every α.

    Args:
        output: the folder for one α, the folder of their folders for several.
        alphas: shares of the way.

    Raises:
        ConfigError: one is no fraction, or two give the same name.

    Example:
        >>> output_folders(Path("merged"), [0.25, 0.5])[0.25]
        PosixPath('merged/alpha=0.250')
    """
    alphas = [check_alpha(alpha) for alpha in alphas]
    folders = {alpha: output / f"alpha={alpha:.3f}" if len(alphas) > 1 else output for alpha in alphas}
    if len(set(folders.values())) < len(alphas):
        raise ConfigError("two alphas are the same in three decimals", got=alphas)
    return folders


def check_parents(output: Path) -> None:
    """Refuses an output folder that would lie in a file.

    Args:
        output: the folder.

    Raises:
        ConfigError: it would.
    """
    for parent in output.parents:
        if parent.is_file():
            raise ConfigError("a folder cannot lie in a file", where="output", got=str(output))


def precision(*sides: dict[str, StoredTensor]) -> torch.dtype:
    """Returns the dtype that holds all values.

    Args:
        *sides: tensors by name.
    """
    dtypes = {tensor.dtype for tensors in sides for tensor in tensors.values() if tensor.dtype.is_floating_point}
    return reduce(torch.promote_types, dtypes)


def say_precision(zero_shot: torch.dtype, fine_tuned: torch.dtype) -> None:
    """Prints in which precision a merge was made, where the two sides differ.

    Args:
        zero_shot: precision of the one side.
        fine_tuned: of the other.
    """
    if zero_shot != fine_tuned:
        names = [str(one).removeprefix("torch.") for one in (zero_shot, fine_tuned)]
        wider = str(torch.promote_types(zero_shot, fine_tuned)).removeprefix("torch.")
        print(f"zero-shot weights are {names[0]}, fine-tuned ones {names[1]}: merged in {wider}")


def merge_whole(zero_shot: Path, fine_tuned: Path, args: MergeArguments, folders: dict[float, Path]) -> None:
    """Interpolates all weights of two models.

    Args:
        zero_shot: folder of the one.
        fine_tuned: of the other.
        args: how to merge.
        folders: where the models go, by α.
    """
    precisions = [precision(read_checkpoint(one).tensors) for one in (zero_shot, fine_tuned)]
    about: Any = {"base_model_id": args.zero_shot, "fisher": bool(args.fisher)}
    cards = {alpha: merged_card(fine_tuned, alpha=alpha, **about) for alpha in folders}  # of what will be copied
    for alpha, folder in folders.items():
        how: Any = {"overwrite": args.overwrite, "fishers": args.fisher, "cast_up": True}
        interpolate_checkpoints(zero_shot, fine_tuned, folder, alpha, **how)
        write_card(folder, cards[alpha])
    say_precision(*precisions)


def merge_adapter(zero_shot: Path, adapter: Path, args: MergeArguments, folders: dict[float, Path]) -> None:
    """Scales what the adapter changes, merges it, and saves the model with its processor.

    Args:
        zero_shot: folder of the base.
        adapter: of the adapter.
        args: how to merge.
        folders: where the models go, by α.
    """
    about: Any = {
        "base_model_id": args.zero_shot,
        "method": load_adapter_config(str(adapter)).peft_type.value,
    }
    if (adapter / WEIGHTS_FILE).exists():
        check_same_head(zero_shot, adapter, cast_up=True)
    for folder in folders.values():
        check_output(folder, [zero_shot, adapter], args.overwrite)
    tuned = precision(read_header(adapter / SAFETENSORS_WEIGHTS_NAME)[1])
    base = AutoModel.from_pretrained(zero_shot, dtype="auto", use_safetensors=True)
    say_precision(base.dtype, tuned)
    base = base.to(torch.promote_types(base.dtype, tuned))  # what the adapter has learned is not rounded away
    model = PeftModel.from_pretrained(base, adapter).eval()
    for alpha, folder in folders.items():
        wise_ft(model, alpha)
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
        with publish_folder(folder, args.overwrite, needed=merged.get_memory_footprint()) as temporary:
            merged.save_pretrained(temporary)
            copy_companions([adapter / PROCESSOR_FOLDER, adapter, zero_shot], temporary)
            if (adapter / WEIGHTS_FILE).exists():
                merge_head(zero_shot / WEIGHTS_FILE, adapter / WEIGHTS_FILE, alpha, temporary / WEIGHTS_FILE)
            write_card(temporary, merged_card(temporary, alpha=alpha, **about))


def merge_head(zero_shot: Path, fine_tuned: Path, alpha: float, output: Path) -> None:
    """Interpolates the heads that were trained beside an adapter.

    Args:
        zero_shot: file of the head before the training.
        fine_tuned: after it.
        alpha: the share of the way.
        output: the file to write.
    """
    first, second = load_file(zero_shot), load_file(fine_tuned)
    merged = {}
    for name in second:
        check_finite(first[name], f"{name} of {zero_shot}")
        check_finite(second[name], f"{name} of {fine_tuned}")
        dtype = torch.promote_types(first[name].dtype, second[name].dtype)
        merged[name] = interpolate_tensor(first[name].to(dtype), second[name].to(dtype), alpha)
    save_file(merged, output)


def copy_companions(sources: list[Path], folder: Path) -> None:
    """Copies the files of processor, tokenizer and classifier; of two, that of the first source.

    Args:
        sources: folders.
        folder: where to.
    """
    for name in COMPANION_FILES:
        found = [source / name for source in sources if (source / name).is_file()]
        if found and not (folder / name).exists():
            shutil.copyfile(found[0], folder / name)


def main(args: MergeArguments) -> None:
    """Merges for every α, or makes a soup, and says what it wrote.

    Args:
        args: what to merge.

    Raises:
        ConfigError, MergeError: the models do not fit each other, or the output is in use; nothing has been written.
        AdapterFileError, DataError: a file about the task or model cannot be used; nothing has been written.

    Example:
        >>> main(MergeArguments(soup=["runs/a", "runs/b"], output="soup"))
        soup of 2 models: soup
    """
    folders = output_folders(Path(str(args.output)), args.alpha)
    for folder in folders.values():
        check_parents(folder)
    if args.soup is not None:
        make_soup(args)
        return
    zero_shot, fine_tuned = local_folder(str(args.zero_shot)), Path(str(args.fine_tuned))
    for side in (zero_shot, fine_tuned):
        known_task(side)
    if (fine_tuned / "adapter_config.json").exists():
        if args.fisher:
            raise ConfigError("Fisher information weights whole checkpoints, not adapters", where="fisher")
        merge_adapter(zero_shot, fine_tuned, args, folders)
    else:
        merge_whole(zero_shot, fine_tuned, args, folders)
    for alpha, folder in folders.items():
        print(f"alpha {alpha:g}: {folder}")


TYPES = (MergeArguments,)
EXAMPLE = "hf-robust merge --zero_shot openai/clip-vit-base-patch32 --fine_tuned runs/full --output merged"
