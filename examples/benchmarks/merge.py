# SPDX-License-Identifier: Apache-2.0
"""How long merging two checkpoints takes, and how much memory, compared with copying files.

    python examples/benchmarks/merge.py --gigabytes 1 --rounds 5

Two checkpoints of random float32 weights. Reading both and writing one is what any merge must do: `cat` of both to
nowhere and `cp` of one. `sync` lets the copy reach the disk, as the merge does before its output gets its name. All
take turns in every round. Memory is what the merge alone holds at most, without pages of files.
"""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_robust.interpolation.checkpoints import interpolate_checkpoints
from hf_robust.scripting.run import run

N_TENSORS, ALPHA = 16, 0.5
Measurement = tuple[float, float]  # seconds, megabytes


def write_checkpoint(folder: Path, gigabytes: float, seed: int) -> None:
    """Random weights, and a configuration."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    n_values = int(gigabytes * 1e9 / 4 / N_TENSORS)
    weights = {f"layer_{index}": torch.randn(n_values, generator=generator) for index in range(N_TENSORS)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")


def shell(command: str, folder: Path) -> Measurement:
    """Runs a command in the folder of the checkpoints."""
    start = time.perf_counter()
    subprocess.run(command, shell=True, check=True, cwd=folder)
    return time.perf_counter() - start, 0.0


def anonymous_memory() -> float:
    """Memory of this process that belongs to no file, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


def merge(folder: Path) -> Measurement:
    """Merges, and watches the memory."""
    imported, peak, done = anonymous_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak.append(anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    interpolate_checkpoints(folder / "a", folder / "b", folder / "merged", ALPHA)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return seconds, max(peak) - imported


def merge_in_child(folder: Path) -> Measurement:
    """Merges in a fresh process, whose memory holds nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        measurement = pool.submit(merge, folder).result()
    shutil.rmtree(folder / "merged")
    return measurement


def interleaved(tasks: dict[str, Callable[[], Measurement]], rounds: int) -> dict[str, list[Measurement]]:
    """Measures each task in every round."""
    measurements: dict[str, list[Measurement]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            measurements[name].append(task())
    return measurements


def report(measurements: dict[str, list[Measurement]]) -> None:
    """Prints medians, and how often the time of reading and copying they are."""
    seconds = {name: statistics.median(second for second, _ in values) for name, values in measurements.items()}
    copy, durable = list(seconds.values())[:2]
    print(f"{'':<20} {'seconds':>8} {'x cat, cp':>10} {'x cat, cp, sync':>16} {'peak MB':>8}")
    for name, values in measurements.items():
        took, peak = seconds[name], max(megabytes for _, megabytes in values)
        print(f"{name:<20} {took:>8.2f} {took / copy:>10.2f} {took / durable:>16.2f} {peak:>8.0f}")


@dataclass
class ScriptArguments:
    """How long a merge takes."""

    gigabytes: float = field(default=1.0, metadata={"help": "Size of each checkpoint."})
    rounds: int = 5
    folder: str | None = field(
        default=None, metadata={"help": "On the disk to measure; by default the one of temporary files."}
    )


def main(arguments: ScriptArguments) -> None:
    """Makes the checkpoints and measures."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for seed, side in enumerate("ab"):
            write_checkpoint(folder / side, arguments.gigabytes, seed)
        copy = "cat a/model.safetensors b/model.safetensors > /dev/null; cp a/model.safetensors copy"
        tasks = {
            "cat, cp": lambda: shell(f"{copy}; rm copy", folder),
            "cat, cp, sync": lambda: shell(f"{copy}; sync copy; rm copy", folder),
            "merge": lambda: merge_in_child(folder),
        }
        report(interleaved(tasks, arguments.rounds))


if __name__ == "__main__":
    run(main, ScriptArguments)
