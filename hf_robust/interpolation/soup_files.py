# SPDX-License-Identifier: Apache-2.0
"""A soup of checkpoints on disk, in little memory and in one step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..errors import ConfigError, MergeError
from ..tasks.task import CONFIG_FILE, WEIGHTS_FILE
from .arithmetic import mean_
from .checkpoints import check_same_tensors, classes_of_head, describe_cast, growth_of, wider_dtypes
from .files import COMPANION_FILES, Checkpoint, read_checkpoint
from .publish import check_output, publish_folder
from .soups import check_different
from .streaming import check_unchanged, merge_weights, same_bytes


def soup_checkpoints(
    folders: Sequence[str | Path], out_dir: str | Path, *, overwrite: bool = False, cast_up: bool = False
) -> None:
    """Writes the mean of several checkpoints that were fine-tuned from the same weights.

    The output has the files of the first one: the weights in the same shards, configuration, processor, and a
    trainable head, which is averaged too. Values are read in slices: memory grows by half a megabyte per checkpoint,
    whatever their size. Whatever happens, the output folder is what it was or complete. The arithmetic is that of
    `uniform_soup`.

    Model soups (Wortsman et al., ICML 2022, https://huggingface.co/papers/2203.05482).

    Args:
        folders: in transformers' format with safetensors weights, as for `interpolate_checkpoints`; names, shapes,
            dtypes (unless `cast_up`), integers, and the class names of heads must be the same.
        out_dir: a folder that is empty or does not exist.
        overwrite: whether `out_dir`, as a whole, may be replaced; on Linux only.
        cast_up: whether a tensor may have several floating-point dtypes; the output then has the one that holds all.

    Raises:
        ConfigError: there are no folders, or one twice.
        MergeError: the folders do not fit each other, are damaged, quantised or adapters, or changed during the
            merge; the output is in use, or the disk full. Nothing has been written.
        NonFiniteError: a weight is NaN or infinite. Nothing has been written.
        UnsafeFileError: weights are pickled or lie outside their folder. Nothing has been written.

    Example:
        >>> soup_checkpoints(["runs/a", "runs/b", "runs/c"], "soup")
        >>> model = AutoModel.from_pretrained("soup")
    """
    out_dir, paths = Path(out_dir), [Path(folder) for folder in folders]
    if not paths:
        raise ConfigError("a soup has no ingredients", allowed="at least one")
    check_different([path.resolve() for path in paths])
    check_output(out_dir, paths, overwrite)
    checkpoints = [read_checkpoint(path) for path in paths]
    check_soup(checkpoints, cast_up)
    first, sides = checkpoints[0], [checkpoint.tensors for checkpoint in checkpoints]
    dtypes = wider_dtypes(sides)
    growth = growth_of(first.tensors, dtypes)
    companions = [path for path in first.stamps if path.name in COMPANION_FILES]
    needed = sum(path.stat().st_size for path in [*first.data_starts, *companions]) + growth
    with publish_folder(out_dir, overwrite, needed) as folder:
        merge_weights(sides, [str(path) for path in paths], first, dtypes, _mean, folder)
        for path in [*([first.index] if first.index else []), *companions]:
            shutil.copyfile(path, folder / path.name)
        if dtypes:
            describe_cast(folder, set(dtypes.values()), growth)
        check_unchanged({path: mark for checkpoint in checkpoints for path, mark in checkpoint.stamps.items()})


def _mean(sides: list[Tensor]) -> Tensor:
    return mean_(sides[0], sides[1:])


def check_soup(checkpoints: Sequence[Checkpoint], cast_up: bool = False) -> None:
    """Refuses checkpoints whose mean is no model.

    Args:
        checkpoints: one or more.
        cast_up: as in `soup_checkpoints`.

    Raises:
        MergeError: they do not fit each other.

    Example:
        >>> check_soup([read_checkpoint(Path("runs/a")), read_checkpoint(Path("runs/b"))])
    """
    first, *others = checkpoints
    check_same_classes([checkpoint.folder for checkpoint in checkpoints])
    for other in others:
        sides = [str(checkpoint.folder) for checkpoint in (first, other)]
        check_same_tensors(first.tensors, other.tensors, cast_up, sides)
        for name, tensor in first.tensors.items():
            twin = other.tensors.get(name, tensor)
            if not tensor.dtype.is_floating_point and not same_bytes(tensor, twin):
                what = "checkpoints differ in whole numbers, which have no mean"
                raise MergeError(f"{what}: {name}", where=sides[1])


def check_same_classes(folders: Sequence[Path]) -> None:
    """Refuses folders of which only some have a trained head, or whose classifiers are of other classes.

    Args:
        folders: of models or adapters, as `RobustTrainer.save_model` writes them.

    Raises:
        MergeError: their heads do not fit each other.

    Example:
        >>> check_same_classes([Path("runs/a"), Path("runs/b")])
    """
    without = [folder for folder in folders if not (folder / WEIGHTS_FILE).exists()]
    if 0 < len(without) < len(folders):
        what = f"only some of the folders have a trained head, {WEIGHTS_FILE}"
        raise MergeError(what, where=f"missing in {without[0]}", remedy="Train all with the same head.")
    named = [folder for folder in folders if (folder / CONFIG_FILE).exists()]
    names = [classes_of_head(folder / CONFIG_FILE) for folder in named]
    for folder, found in zip(named, names, strict=True):
        if found != names[0]:
            raise MergeError("heads are of other classes", where=str(folder), got=f"{found} and {names[0]}")
