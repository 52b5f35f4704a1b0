# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_robust", "psutil"]
# ///
"""What a training step of the live head costs with many classes and many wordings.

    python examples/benchmarks/many_classes.py
    python examples/benchmarks/many_classes.py --threads 1 --chunk_size 128

A randomly initialised text tower of CLIP ViT-B/32's shape, all of it trained by AdamW in float32, 32 images given as
their embeddings. Each row is a process of its own: the seconds of one step, summed over cores, and the most memory it
had beside what Python and the libraries take, so with the weights, their gradients and AdamW's state (1 GB in all).
Before wordings were drawn a step encoded all `prompts`, with the activations of all.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from hf_robust.encoders.templates import TEMPLATES, class_prompts
from hf_robust.scripting.run import run
from hf_robust.tasks.class_names import ZeroShotClassifier

IMAGES = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Case:
    """A step.

    Args:
        classes: how many there are.
        templates: a key of `TEMPLATES`.
        chunk_size: prompts of a chunk; None for all at once.
        per_step: classes of a step; None for all.
        threads: of the process.
    """

    classes: int
    templates: str
    chunk_size: int | None
    per_step: int | None
    threads: int

    @property
    def encoded(self) -> int:
        """Prompts that the step encodes."""
        return self.per_step or self.classes


def make_processor(names: list[str]) -> CLIPProcessor:
    """A tokenizer in which every word is a token, as common words are in CLIP's; and CLIP's image processor."""
    pieces, vocab = pre_tokenizers.Whitespace(), {BOS: 49_406, EOS: 49_407}
    for prompt in class_prompts(["thing"], TEMPLATES["photo"]) + names:
        for word, _ in pieces.pre_tokenize_str(prompt):
            vocab.setdefault(word, len(vocab) - 2)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=EOS))
    tokenizer.pre_tokenizer = pieces
    ends = [(token, vocab[token]) for token in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ends)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    return CLIPProcessor(
        CLIPImageProcessorPil(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77, **special)
    )


def measure(case: Case) -> tuple[float, float]:
    """The core-seconds of a step, and gigabytes at most beside the libraries'."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    before = psutil.Process().memory_info().rss
    model = CLIPModel(CLIPConfig(vision_config=SMALL))  # the text tower's defaults are ViT-B/32's
    names = [f"thing {number}" for number in range(case.classes)]
    sizes = case.chunk_size, case.per_step
    task = ZeroShotClassifier(model, make_processor(names), names, case.templates, "live", None, *sizes)
    task.model.vision_model.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-5)
    images = F.normalize(torch.randn(IMAGES, 512), dim=-1)
    start = time.process_time()
    task(image_embeds=images, labels=torch.randint(case.classes, (IMAGES,))).loss.backward()
    optimizer.step()
    seconds = time.process_time() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e9


@dataclass
class ScriptArguments:
    """What many classes cost."""

    chunk_size: int = 64
    per_step: int = 128
    threads: int = field(default_factory=torch.get_num_threads)


def main(arguments: ScriptArguments) -> None:
    """Measures and prints a step a row."""
    chunk, some = arguments.chunk_size, arguments.per_step
    rows = [
        (100, "single", None, None),
        (100, "single", chunk, None),
        (1_000, "single", None, None),
        (1_000, "photo", chunk, None),
        (1_000, "photo", chunk, some),
        (10_000, "single", None, some),
        (10_000, "photo", chunk, some),
    ]
    print(f"{'classes':>8} {'wordings':>8} {'prompts':>8} {'encoded':>8} {'chunk':>6} {'core-s':>8} {'GB':>6}")
    for row in rows:
        case = Case(*row, arguments.threads)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, gigabytes = pool.submit(measure, case).result()
        wordings = len(TEMPLATES[case.templates])
        counts = f"{case.classes:>8} {wordings:>8} {case.classes * wordings:>8} {case.encoded:>8}"
        print(f"{counts} {case.chunk_size or '-':>6} {seconds:>8.1f} {gigabytes:>6.2f}", flush=True)


if __name__ == "__main__":
    run(main, ScriptArguments)
