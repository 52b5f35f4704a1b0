# SPDX-License-Identifier: Apache-2.0
"""What makes a checkpoint whole: a manifest of its files, written last, which is asked before anything is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.publish import seal, stream_sha256, sync
from ..data.text_files import read_json
from ..errors import CheckpointError, HfRobustError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
NEEDED = {"step", "epoch", "extra", "order", "run", "versions", "files"}
FOR_PEOPLE = ("README.md",)  # which they may edit
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d{{1,18}}")


def seal_checkpoint(folder: Path, facts: Mapping[str, Any]) -> None:
    """Waits until the files of a checkpoint are on the disk, and writes the manifest that lists them.

    Args:
        folder: with all its files.
        facts: what else the manifest says, of what JSON can hold.

    Raises:
        OSError: the disk is full or fails.

    Example:
        >>> seal_checkpoint(Path(".hf_robust-tmp-1"), {"step": 10})
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in FOR_PEOPLE]
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock to the one that waits for the disk
        digests = pool.map(_sha256, files)
        seal(folder)
    listed = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    content = {"format_version": FORMAT_VERSION, **facts, "files": listed}
    text = json.dumps({**content, "sha256": _own_digest(content)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    for path in (folder / MANIFEST, folder):
        sync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns what the manifest of a checkpoint says; the files that it lists are not looked at.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or a later version has written it.
    """
    if not folder.is_dir():
        remedy = "Name a folder checkpoint-*, or take the last: resume_from_checkpoint=True, in a script `last`."
        raise CheckpointError("no such checkpoint", where=str(folder), remedy=remedy)
    remedy = "Load the model from it, and start a new training."
    if not (folder / MANIFEST).is_file():
        what = f"checkpoint is not whole: it has no {MANIFEST}"
        raise CheckpointError(what, where=str(folder), remedy=remedy)
    try:
        content = read_json(folder / MANIFEST)
        own = content.pop("sha256")
        known, damaged = content["format_version"] == FORMAT_VERSION, own != _own_digest(content)
        damaged = damaged or (known and not content.keys() >= NEEDED)
    except (OSError, HfRobustError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError("manifest of a checkpoint is damaged", where=str(folder), remedy=remedy) from error
    if damaged:
        raise CheckpointError("manifest of a checkpoint is damaged", where=str(folder), remedy=remedy)
    if not known:
        what, got = "checkpoint is of a newer version of this package", content["format_version"]
        raise CheckpointError(what, where=str(folder), got=got, allowed=str(FORMAT_VERSION), remedy=remedy)
    return content


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Looks whether a checkpoint has all its files, each to the last bit.

    Args:
        folder: of the checkpoint.
        manifest: what `read_manifest` has returned.

    Raises:
        CheckpointError: a file is missing or damaged, or there is no state to resume from.
    """
    listed = manifest["files"]
    if not any(name.startswith("optimizer") for name in listed):
        remedy = "It was saved with save_only_model=True: load the model from it, and start a new training."
        raise CheckpointError("checkpoint has no optimizer state (save_only_model)", where=str(folder), remedy=remedy)
    for name, expected in listed.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint is incomplete: {name} is missing", where=str(folder))
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            what, allowed = f"checkpoint is damaged: {name} has another size", f"{expected['size']} bytes"
            raise CheckpointError(what, where=str(folder), got=size, allowed=allowed)
    with ThreadPoolExecutor() as pool, _readable(folder):
        for name, digest in zip(listed, pool.map(_sha256, (folder / name for name in listed)), strict=True):
            if digest != listed[name]["sha256"]:
                raise CheckpointError(f"checkpoint is damaged: {name} has other content", where=str(folder))


def checkpoints_in(output_dir: Path) -> dict[Path, dict[str, Any] | CheckpointError]:
    """Returns the manifest of every checkpoint in a folder, or why it has none, in the order they were saved in.

    Args:
        output_dir: of a training.

    Example:
        >>> [folder.name for folder in checkpoints_in(Path("runs/saft"))]
        ['checkpoint-100', 'checkpoint-200']
    """
    found: dict[Path, dict[str, Any] | CheckpointError] = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if folder.is_dir() and NAME.fullmatch(folder.name):
            try:
                found[folder] = read_manifest(folder)
            except CheckpointError as error:
                found[folder] = error
    return dict(sorted(found.items(), key=lambda item: _order(item[1])))


def _order(manifest: Any) -> int:
    return -1 if isinstance(manifest, CheckpointError) else manifest["order"]


def newest_whole(
    found: Mapping[Path, dict[str, Any] | CheckpointError],
) -> tuple[Path | None, list[CheckpointError]]:
    """Returns the checkpoint that was saved last among those that are whole, and what is wrong with others.

    Args:
        found: what `checkpoints_in` has returned.

    Returns:
        The folder, None where there is none, and an error for every one that was passed over.
    """
    problems = [manifest for manifest in found.values() if isinstance(manifest, CheckpointError)]
    whole = [(folder, manifest) for folder, manifest in found.items() if not isinstance(manifest, CheckpointError)]
    for folder, manifest in reversed(whole):
        try:
            check_files(folder, manifest)
        except CheckpointError as error:
            problems.append(error)
        else:
            return folder, problems
    return None, problems


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"checkpoint cannot be read ({error})", where=str(folder)) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return stream_sha256(stream).hex()


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
