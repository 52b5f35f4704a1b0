# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint gets its name, and how old ones and leftovers go; by one rank."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.publish import TEMPORARY, sync
from ..errors import CheckpointError, HfRobustError
from .manifest import seal_checkpoint


def publish_checkpoint(temporary: Path, folder: Path, facts: Mapping[str, Any]) -> None:
    """Gives a checkpoint its name when it is whole and on the disk; one that had the name before is a leftover then.

    Args:
        temporary: where its files are, beside its place.
        folder: its place.
        facts: what its manifest says beside the files.

    Raises:
        OSError: the disk is full or fails.

    Example:
        >>> publish_checkpoint(Path("runs/.hf_robust-tmp-1"), Path("runs/checkpoint-10"), {"step": 10, "order": 1})
    """
    seal_checkpoint(temporary, facts)
    old = folder.with_name(f"{TEMPORARY}old-{folder.name}")
    if folder.exists():  # of an earlier training
        os.rename(folder, old)
    os.rename(temporary, folder)
    sync(folder.parent)


def not_saved(error: Exception, temporary: Path) -> HfRobustError:
    """Returns what is raised where a checkpoint cannot be saved.

    Args:
        error: why.
        temporary: where it was written.
    """
    if isinstance(error, HfRobustError):
        return error
    remedy = "Those saved before are whole: resume_from_checkpoint=True goes on from the last."
    where = str(temporary.with_name(temporary.name.removeprefix(TEMPORARY)))
    return CheckpointError(f"checkpoint cannot be saved ({error})", where=where, remedy=remedy)


def rotate(before: Mapping[Path, object], saved: Path, limit: int | None, best: str | None) -> None:
    """Makes leftovers of the whole checkpoints that were saved first, until no more than a limit are left.

    Args:
        before: what `checkpoints_in` returned before the last was saved.
        saved: the one just saved, which stays.
        limit: how many may be left, at least this one and the best; None for no limit.
        best: the best, which stays; None where none is known.

    Example:
        >>> rotate(checkpoints_in(Path("runs/saft")), Path("runs/saft/checkpoint-30"), limit=2, best=None)
    """
    if limit is None or limit <= 0:
        return
    found = [folder for folder, manifest in before.items() if isinstance(manifest, dict) and folder != saved]
    kept = {saved, *([] if best is None else [Path(best)])}
    others = [folder for folder in found if folder not in kept]
    for folder in others[: max(0, len(found) + 1 - max(limit, len(kept)))]:
        os.rename(folder, folder.with_name(f"{TEMPORARY}old-{folder.name}"))  # so that it is never there in part


def sweep(folder: Path) -> None:
    """Removes leftovers: checkpoints that have lost their name, and those of a killed job, which had none yet.

    Args:
        folder: of a training that no other job writes to.
    """
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:  # a checkpoint may be a link to another disk
            path.unlink(missing_ok=True)
