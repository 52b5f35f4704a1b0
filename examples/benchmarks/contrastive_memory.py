# SPDX-License-Identifier: Apache-2.0
"""How much memory a batch of pairs takes, all at once and in chunks, and what chunks cost in time.

    python examples/benchmarks/contrastive_memory.py --batch_sizes 64 128 256 --chunk_size 32

One forward and backward of `ImageTextPairs` on the CPU, around a randomly initialised CLIP of ViT-B/32's widths with
four layers a tower: float32, images of 128 pixels, texts of 16 tokens. Memory is that beyond weights and gradients.
Each measurement has a process of its own, as only a process's highest memory is known.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor, CLIPConfig, CLIPModel

from hf_robust.scripting.run import run
from hf_robust.tasks.pairs import ImageTextPairs

DEMO = Path(__file__).parents[1] / "demo" / "clip-tiny-drawings"
IMAGE_SIZE, TOKENS, LAYERS, MIB = 128, 16, 4, 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h


def make_task(chunk_size: int | None) -> ImageTextPairs:
    """The task in train mode around a random model."""
    config, processor = CLIPConfig(), AutoProcessor.from_pretrained(DEMO)  # its defaults are ViT-B/32
    config.vision_config.image_size = IMAGE_SIZE
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = LAYERS
    return ImageTextPairs(CLIPModel(config), processor, contrastive_chunk_size=chunk_size).train()


def step(task: ImageTextPairs, size: int) -> None:
    """One forward and backward."""
    pixels, input_ids = torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(1000, 40_000, (size, TOKENS))
    input_ids[:, -1] = 49_407  # end of text
    loss: Any = task(pixels, input_ids).loss
    loss.backward()


def measured(size: int, chunk_size: int | None, threads: int) -> tuple[float, float]:
    """MiB beyond weights and gradients, and seconds."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    how = size, chunk_size, threads, sender
    process = multiprocessing.get_context("fork").Process(target=_measure, args=how)
    process.start()
    sender.close()  # else one that fails would be waited for
    found: tuple[float, float] = receiver.recv()
    process.join()
    return found


def _measure(size: int, chunk_size: int | None, threads: int, sender: Any) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # else glibc holds on to part of what has been freed
    task = make_task(chunk_size)
    step(task, 1)  # gradients are there
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    step(task, size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sender.send(((peak - before) / MIB, time.perf_counter() - start))


@dataclass
class ScriptArguments:
    """Memory of a batch of pairs, all at once and in chunks."""

    batch_sizes: list[int] = field(default_factory=lambda: [64, 128, 256])
    chunk_size: int = 32
    threads: int = field(default_factory=torch.get_num_threads)


def main(arguments: ScriptArguments) -> None:
    """Measures, and prints a table."""
    table = Table("batch", "all at once", f"in chunks of {arguments.chunk_size}", "time of chunks / at once")
    for size in arguments.batch_sizes:
        memory, seconds = measured(size, None, arguments.threads)
        of_chunks, seconds_of_chunks = measured(size, arguments.chunk_size, arguments.threads)
        row = f"{memory:,.0f} MiB", f"{of_chunks:,.0f} MiB", f"{seconds_of_chunks / seconds:.2f}"
        table.add_row(str(size), *row)
    Console().print(table)


if __name__ == "__main__":
    run(main, ScriptArguments)
