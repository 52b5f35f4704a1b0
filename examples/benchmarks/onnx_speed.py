# SPDX-License-Identifier: Apache-2.0
"""How long an ONNX file takes to write and to run, compared with PyTorch, and how much their answers differ.

    python examples/benchmarks/onnx_speed.py --threads 1

A randomly initialised CLIP with the vision tower of ViT-B/32, as a classifier of two classes. Seconds are those of
cores, so that other work on the machine counts little.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime
import torch
from transformers import AutoProcessor, CLIPConfig, CLIPModel, CLIPVisionConfig

from hf_robust import ZeroShotClassifier, to_onnx, with_image_size
from hf_robust.scripting.run import run
from hf_robust.scripting.timing import interleaved_medians, print_medians

DEMO = Path(__file__).parents[1] / "demo" / "clip-tiny-drawings"


def classifier() -> ZeroShotClassifier:
    """One with a vision tower of ViT-B/32's shape, and the demo's tokenizer."""
    text = CLIPConfig.from_pretrained(DEMO).text_config.to_dict()
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=CLIPVisionConfig().to_dict()))
    processor = with_image_size(AutoProcessor.from_pretrained(DEMO), 224, model)
    return ZeroShotClassifier(model, processor, ["cat", "dog"], head="frozen").eval()


@dataclass
class ScriptArguments:
    """How long an ONNX file takes to write and to run."""

    rounds: int = 7
    images: int = 8
    threads: int = field(default_factory=torch.get_num_threads)


@torch.inference_mode()
def main(arguments: ScriptArguments) -> None:
    """Writes a file, and times it."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    task = classifier()
    pixels = torch.randn(arguments.images, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        start = time.process_time()
        to_onnx(task, file)
        print(f"written in {time.process_time() - start:.1f} core-seconds, {file.stat().st_size / 2**20:.0f} MB")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = arguments.threads
        session = onnxruntime.InferenceSession(str(file), options)

        logits = {}

        def by_onnx() -> None:
            logits["onnxruntime"] = torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])

        def by_torch() -> None:
            logits["PyTorch"] = task(pixels).logits

        medians = interleaved_medians(
            {"PyTorch": by_torch, "onnxruntime": by_onnx}, arguments.rounds, time.process_time
        )
        difference = (logits["onnxruntime"] - logits["PyTorch"]).abs().max() / logits["PyTorch"].abs().max()
        print(f"logits differ by {difference:.1e} of the largest")
        print_medians(f"{arguments.images} images, of cores", medians, "PyTorch")


if __name__ == "__main__":
    run(main, ScriptArguments)
