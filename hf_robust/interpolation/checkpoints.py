# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT of two checkpoints on disk, in little memory and in one step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, MergeError
from ..tasks.task import CONFIG_FILE, WEIGHTS_FILE
from .arithmetic import check_alpha, interpolate_
from .files import (
    COMPANION_FILES,
    INDEX_FILE,
    Checkpoint,
    Stamp,
    StoredTensor,
    read_checkpoint,
    read_header,
    read_json,
    some,
    stamp,
)
from .publish import check_output, publish_folder
from .streaming import check_unchanged, merge_weights, values

SIDES = ("zero-shot", "fine-tuned", "Fisher of zero-shot", "Fisher of fine-tuned")
PREFIXES = ("module.", "model.", "_orig_mod.", "base_model.model.")  # of models saved inside a wrapper


def interpolate_checkpoints(
    zero_shot_dir: str | Path,
    fine_tuned_dir: str | Path,
    out_dir: str | Path,
    alpha: float,
    *,
    overwrite: bool = False,
    fishers: tuple[str | Path, str | Path] | None = None,
    cast_up: bool = False,
) -> None:
    """Writes the model on the way from one checkpoint to another: (1 - α) θ₀ + α θ₁.

    The output has the files of the fine-tuned checkpoint: the weights in the same shards, configuration, processor,
    and a trainable head, which is interpolated too. For α = 0 and α = 1 the weights are copies of that side's files.
    Integers and booleans are the fine-tuned ones. Values are read in slices, so that models larger than memory can be
    merged. Whatever happens, the output folder is what it was or complete.

    WiSE-FT (Wortsman et al., CVPR 2022, https://huggingface.co/papers/2109.01903).

    Args:
        zero_shot_dir: θ₀, a folder in transformers' format with safetensors weights, in one file or in shards.
        fine_tuned_dir: θ₁, likewise; names, shapes and dtypes (unless `cast_up`) of the tensors must be the same.
            `position_ids`, which older transformers saved and newer ones compute, may be in one of them alone.
        out_dir: a folder that is empty or does not exist.
        alpha: the share of the way, a fraction in [0, 1].
        overwrite: whether `out_dir`, as a whole, may be replaced; on Linux only.
        fishers: safetensors files with the diagonal Fisher information of both, as `diagonal_fisher` gives it, to
            weight the mean by. Tensors that they lack are interpolated without.
        cast_up: whether a tensor may have two floating-point dtypes; the output then has the one that holds both,
            float32 for float16 and float32, and for float16 and bfloat16. The configuration names the widest.

    Raises:
        ConfigError: alpha is no fraction.
        MergeError: the folders do not fit each other, are damaged, quantised or adapters, or changed during the
            merge; the output is in use, or the disk full. Nothing has been written.
        NonFiniteError: a weight is NaN or infinite. Nothing has been written.
        UnsafeFileError: weights are pickled or lie outside their folder. Nothing has been written.

    Example:
        >>> interpolate_checkpoints("zero_shot", "runs/full", "merged", alpha=0.5)
        >>> model = AutoModel.from_pretrained("merged")
    """
    alpha = check_alpha(alpha)
    out_dir, folders = Path(out_dir), [Path(zero_shot_dir), Path(fine_tuned_dir)]
    check_output(out_dir, folders, overwrite)
    zero_shot, fine_tuned = (read_checkpoint(folder) for folder in folders)
    fisher_stamps, weights = _read_fishers(fishers, fine_tuned)
    check_same_head(zero_shot.folder, fine_tuned.folder, cast_up)
    check_same_tensors(zero_shot.tensors, fine_tuned.tensors, cast_up)
    dtypes = wider_dtypes([zero_shot.tensors, fine_tuned.tensors])
    layout = zero_shot if alpha == 0 and not dtypes else fine_tuned
    companions = [path for path in fine_tuned.stamps if path.name in COMPANION_FILES]
    growth = growth_of(layout.tensors, dtypes)
    needed = sum(path.stat().st_size for path in [*layout.data_starts, *companions]) + growth
    with publish_folder(out_dir, overwrite, needed) as folder:
        if alpha in (0, 1) and not dtypes:
            for path in layout.data_starts:
                shutil.copyfile(path, folder / path.name)
        else:
            sides = [zero_shot.tensors, fine_tuned.tensors, *weights]
            merge_weights(sides, SIDES[: len(sides)], fine_tuned, dtypes, partial(_mean, alpha), folder)
        for path in [*([layout.index] if layout.index else []), *companions]:
            shutil.copyfile(path, folder / path.name)
        if dtypes:
            describe_cast(folder, set(dtypes.values()), growth)
        check_unchanged({**zero_shot.stamps, **fine_tuned.stamps, **fisher_stamps})


def check_same_head(zero_shot_dir: Path, fine_tuned_dir: Path, cast_up: bool = False) -> None:
    """Refuses two folders of which only one has a trained head, or whose heads are of other classes or shapes.

    Args:
        zero_shot_dir: as `RobustTrainer.save_model` writes it.
        fine_tuned_dir: likewise.
        cast_up: as in `interpolate_checkpoints`.

    Raises:
        MergeError: the heads do not fit each other.

    Example:
        >>> check_same_head(Path("runs/before"), Path("runs/full"))
    """
    folders = zero_shot_dir, fine_tuned_dir
    without = [folder for folder in folders if not (folder / WEIGHTS_FILE).exists()]
    if len(without) == 2:
        return
    if without:
        raise MergeError(
            f"only one of the folders has a trained head, {WEIGHTS_FILE}",
            where=str(without[0]),
            remedy="Merge with the zero-shot classifier: save_model() of a RobustTrainer that has not trained.",
        )
    first, second = (read_header(folder / WEIGHTS_FILE)[1] for folder in folders)
    check_same_tensors(first, second, cast_up)
    configs = [folder / CONFIG_FILE for folder in folders if (folder / CONFIG_FILE).exists()]
    names = [classes_of_head(config) for config in configs]
    if len(names) == 2 and names[0] != names[1]:
        raise MergeError("heads are of other classes", where=str(zero_shot_dir), got=f"{names[0]} and {names[1]}")


def classes_of_head(file: Path) -> list[str] | None:
    """Returns the class names or identities that a saved task tells apart, in order; None where it has none.

    Args:
        file: `classifier.json` of the task.

    Example:
        >>> classes_of_head(Path("runs/full/classifier.json"))
        ['cat', 'dog']
    """
    saved = read_json(file)
    return saved.get("class_names") or saved.get("identities")


def check_same_tensors(
    zero_shot: dict[str, StoredTensor],
    fine_tuned: dict[str, StoredTensor],
    cast_up: bool = False,
    sides: Sequence[str] = SIDES,
) -> None:
    """Refuses tensors of other names, dtypes or shapes.

    Args:
        zero_shot: tensors by name.
        fine_tuned: likewise; integers named `position_ids` may be in one alone.
        cast_up: as in `interpolate_checkpoints`.
        sides: what the two are, for messages.

    Raises:
        MergeError: they differ.

    Example:
        >>> check_same_tensors(read_header(Path("a.safetensors"))[1], read_header(Path("b.safetensors"))[1])
    """
    _check_same_names(zero_shot, fine_tuned, sides)
    common = [name for name in fine_tuned if name in zero_shot]
    different = [
        f"{name}: {_kind(zero_shot[name])} and {_kind(fine_tuned[name])}"
        for name in common
        if not _fit(zero_shot[name], fine_tuned[name], cast_up)
    ]
    if different:
        remedy = "If it is the precision: pass cast_up=True, or save one side in the other's dtype."
        raise MergeError(f"{len(different)} tensors differ in dtype or shape", got=some(different), remedy=remedy)


def _fit(first: StoredTensor, second: StoredTensor, cast_up: bool) -> bool:
    both_floats = first.dtype.is_floating_point and second.dtype.is_floating_point
    return first.shape == second.shape and (first.dtype == second.dtype or (cast_up and both_floats))


def wider_dtypes(sides: Sequence[dict[str, StoredTensor]]) -> dict[str, torch.dtype]:
    """Returns the dtype that holds all sides of a tensor, for every tensor that has several, by name.

    Args:
        sides: tensors by name, which fit each other.
    """
    dtypes = {name: {side[name].dtype for side in sides if name in side} for name in sides[-1]}
    return {name: reduce(torch.promote_types, found) for name, found in dtypes.items() if len(found) > 1}


def growth_of(tensors: dict[str, StoredTensor], dtypes: dict[str, torch.dtype]) -> int:
    """Returns how many bytes tensors gain in other dtypes.

    Args:
        tensors: by name.
        dtypes: those of some of them.
    """
    pairs = [(tensors[name], dtype) for name, dtype in dtypes.items()]
    return sum(values(tensor) * (dtype.itemsize - tensor.dtype.itemsize) for tensor, dtype in pairs)


def describe_cast(folder: Path, dtypes: set[torch.dtype], growth: int) -> None:
    """Corrects size and dtype in what was copied; else a model would be loaded in fewer bits than it has.

    Args:
        folder: of the checkpoint.
        dtypes: that tensors have got.
        growth: in bytes.
    """
    index, config = folder / INDEX_FILE, folder / "config.json"
    if index.exists():
        found = read_json(index)
        if "total_size" in found.get("metadata", {}):
            found["metadata"]["total_size"] += growth
        index.write_text(json.dumps(found, indent=2))
    widest = str(max(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
    settings = read_json(config)
    for part in [settings, *(one for one in settings.values() if isinstance(one, dict))]:
        part |= {key: widest for key in ("dtype", "torch_dtype") if part.get(key) is not None}
    config.write_text(json.dumps(settings, indent=2))


def _read_fishers(
    fishers: tuple[str | Path, str | Path] | None, model: Checkpoint
) -> tuple[dict[Path, Stamp], list[dict[str, StoredTensor]]]:
    if fishers is None:
        return {}, []
    paths = [Path(path) for path in fishers]
    if len(paths) != 2:
        raise ConfigError("Fisher information is needed of both models", got=len(paths), allowed="two files")
    stamps = {path: stamp(path) for path in paths if path.exists()}
    both = [read_header(path)[1] for path in paths]
    _check_same_names(both[0], both[1], SIDES)
    for path, tensors in zip(paths, both, strict=True):
        for name, tensor in tensors.items():
            if name not in model.tensors:
                raise MergeError("Fisher information of a tensor that the model lacks", where=str(path), got=name)
            weight = model.tensors[name]
            if tensor.shape != weight.shape or not (tensor.dtype.is_floating_point and weight.dtype.is_floating_point):
                got = f"{name}: {_kind(tensor)} for {_kind(weight)}"
                raise MergeError("Fisher information does not fit the tensor", where=str(path), got=got)
    return stamps, both


def _check_same_names(
    zero_shot: dict[str, StoredTensor], fine_tuned: dict[str, StoredTensor], sides: Sequence[str]
) -> None:
    left, right = (
        sorted(name for name in one.keys() - other.keys() if not _is_computed(name, one[name]))
        for one, other in ((zero_shot, fine_tuned), (fine_tuned, zero_shot))
    )
    if not left and not right:
        return
    found = "; ".join(
        f"{len(names)} only in {side}" + (f": {some(names)}" if names else "")
        for side, names in zip(sides, (left, right), strict=False)
    )
    remedy = None
    for prefix in PREFIXES:
        if [prefix + name for name in left] == right or left == [prefix + name for name in right]:
            remedy = f"The prefix {prefix!r} is the only difference; save the model without its wrapper."
    raise MergeError(f"checkpoints have different tensors: {found}", remedy=remedy)


def _is_computed(name: str, tensor: StoredTensor) -> bool:
    return name.endswith(".position_ids") and not tensor.dtype.is_floating_point


def _kind(tensor: StoredTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tensor.shape}"


def _mean(alpha: float, sides: list[Tensor]) -> Tensor:
    return sides[int(alpha)] if alpha in (0, 1) else interpolate_(sides[0], sides[1], alpha, *sides[2:])
