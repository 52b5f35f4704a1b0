# SPDX-License-Identifier: Apache-2.0
"""Whether every method computes on a GPU what float64 computes on the CPU.

    CUDA_VISIBLE_DEVICES=0 python examples/benchmarks/cuda_correctness.py
    python examples/benchmarks/cuda_correctness.py --dry_run

The demo's CLIP and a small random SigLIP take five AdamW steps on random batches, ViT-B/32's shapes take two with SAFT
at the paper's density; then RobustTrainer trains the demo's CLIP. All is without TF32 and with deterministic
algorithms. Float32 on the CPU, beside the GPU, shows what rounding alone does. `same` is equality bit by bit.
"""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PrinterCallback, SiglipConfig, SiglipModel

from hf_robust import (
    ACLIPConfig,
    RAdapterConfig,
    RobustTrainer,
    RobustTrainingArguments,
    SAFTConfig,
    select_saft,
    wise_ft,
)
from hf_robust.encoders.dual_encoder import at_least_float32
from hf_robust.interpolation.adapters import zero_shot_copy
from hf_robust.scripting.results import package_versions
from hf_robust.scripting.run import run

DEMO = Path(__file__).parents[1] / "demo" / "clip-tiny-drawings"
CLASSES, LEARNING_RATE = 10, 1e-3
METHODS: dict[str, PeftConfig | None] = {
    "full": None,
    "A-CLIP": ACLIPConfig(),
    "R-Adapter": RAdapterConfig(average_decay=0.9, drop_path=0.0),
    "SAFT 0.1 %": SAFTConfig(density=0.001),
    "SAFT 2 %": SAFTConfig(density=0.02),
    "LoRA r=8": LoraConfig(r=8, target_modules="all-linear"),
}
OGEN = {"losses": {"ogen": {"new_class_names": ["lynx", "otter", "heron"], "neighbours": 3, "dropout": 0.0}}}
SIMILARITY = {"losses": {"similarity": {"weight": 10.0}}}
TRAININGS: dict[str, tuple[PeftConfig | None, dict[str, Any]]] = {
    "full + similarity": (None, SIMILARITY),
    **{f"full + {name}": (None, {"losses": {name: {}}}) for name in ("lipsum", "context", "features", "weights")},
    "full + spuriosity": (None, {"losses": {"spuriosity": {}}, "task": "flyp"}),
    "A-CLIP + similarity": (ACLIPConfig(), SIMILARITY),
    "SAFT + similarity": (SAFTConfig(density=0.01), SIMILARITY),
    "SAFT + similarity, cached": (SAFTConfig(density=0.01), {**SIMILARITY, "cache_reference_embeddings": True}),
    "LoRA + similarity": (METHODS["LoRA r=8"], SIMILARITY),
    "SAFT on text + OGEN": (SAFTConfig(density=0.01, towers="text"), OGEN),
}
Tensors, Cells = dict[str, Tensor], dict[str, str]


@dataclass(frozen=True)
class Task:
    """A pre-trained model and the batches that it is trained on, on one device."""

    base: nn.Module
    batches: list[Tensors]

    def to(self, device: str, dtype: torch.dtype = torch.float32) -> Task:
        """A copy elsewhere; the model casts the images."""
        batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in self.batches]
        return Task(copy.deepcopy(self.base).to(device, dtype), batches)


def make_task(base: nn.Module, images: int = 16, steps: int = 5) -> Task:
    """Random images, labels and class prompts; the prompts are the same in every batch."""
    config, side = base.config.text_config, base.config.vision_config.image_size
    prompts = torch.randint(10, config.vocab_size - 1, (CLASSES, 16))
    prompts[:, -1] = config.eos_token_id
    pixels, labels = torch.randn(steps, images, 3, side, side), torch.randint(CLASSES, (steps, images))
    inputs = zip(pixels, labels, strict=True)
    return Task(base.eval(), [{"pixel_values": one, "labels": label, "input_ids": prompts} for one, label in inputs])


def small_siglip() -> SiglipModel:
    """A random SigLIP."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 160, "max_position_embeddings": 16, "eos_token_id": 1}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 64, "patch_size": 16}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, parameter.mean().item(), std=0.1)
    model.logit_bias.requires_grad_(False)  # cross-entropy has no gradient for it but rounding
    return model


def prepared(task: Task, config: PeftConfig | None) -> nn.Module:
    """A copy of the base with the method around it, ready to be trained."""
    model = copy.deepcopy(task.base)
    model = model if config is None else get_peft_model(model, copy.deepcopy(config))
    if isinstance(config, SAFTConfig):
        select_saft(model, task.batches, cross_entropy)
    return model.eval()


def logits(model: nn.Module, batch: Tensors) -> Tensor:
    """`(images, classes)`."""
    return at_least_float32(model(batch["input_ids"], batch["pixel_values"]).logits_per_image)


def cross_entropy(model: nn.Module, batch: Tensors) -> Tensor:
    """Images against class prompts."""
    return F.cross_entropy(logits(model, batch), batch["labels"])


@torch.no_grad()
def outputs(model: nn.Module, task: Task) -> Tensors:
    """The logits of the first batch."""
    return {"logits": logits(model, task.batches[0])}


def train(model: nn.Module, task: Task) -> Tensors:
    """A step on every batch; the model is left in eval mode. Returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for batch in task.batches:
        losses.append(cross_entropy(model.train(), batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {"losses": torch.stack(losses).detach()}


def values(model: nn.Module) -> Tensors:
    """A copy of what is trained, by name."""
    return {name: one.detach().to("cpu", copy=True) for name, one in model.named_parameters() if one.requires_grad}


def change(before: nn.Module, after: nn.Module) -> Tensors:
    """What training changed, without keys' biases: their gradient is zero but for rounding, which Adam scales up."""
    first, last = values(before), values(after)
    biases = {name for name in last if ("k_proj" in name and "bias" in name) or "in_proj_bias" in name}
    return {name: last[name].double() - first[name] for name in last.keys() - biases}


def distance(found: Tensors, reference: Tensors) -> str:
    """‖found − reference‖ / ‖reference‖ over all tensors."""
    a, b = (torch.cat([one[name].cpu().double().flatten() for name in reference]) for one in (found, reference))
    return f"{torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b):.0e}"


def bits(found: Tensors, expected: Tensors) -> str:
    """The word `same` if both are equal bit by bit, else how far they are from each other."""
    flat = [[one[name].cpu().reshape(-1).view(torch.uint8) for name in expected] for one in (found, expected)]
    return "same" if len(found) == len(expected) and all(map(torch.equal, *flat)) else distance(found, expected)


def missing(found: nn.Module, reference: nn.Module) -> str:
    """How many of SAFT's entries are not those of the reference."""
    buffers = [[pair for pair in model.named_buffers() if "saft_indices" in pair[0]] for model in (found, reference)]
    one, other = ({(name, index) for name, buffer in pairs for index in buffer.tolist()} for pairs in buffers)
    return f"{len(one - other)} of {len(other)}"


def against_float64(config: PeftConfig | None, cpu: Task, gpu: Task) -> Cells:
    """The selection, and a training from the same start, on the GPU and in float32 on the CPU."""
    start, cells = prepared(cpu.to("cpu", torch.float64), config).float(), {}
    exact = copy.deepcopy(start).double()
    train(exact, cpu)
    for where, task in {"GPU": gpu, "CPU": cpu}.items():
        model = copy.deepcopy(start).to(task.base.device)
        train(model, task)
        cells[f"{where}: entries"] = missing(prepared(task, config), start)
        cells[f"{where}: change"] = distance(change(start, model), change(start, exact))
        cells[f"{where}: logits"] = distance(outputs(model, task), outputs(exact, cpu))
    return cells


def on_the_gpu(config: PeftConfig, gpu: Task) -> Cells:
    """What the states of an adapter give; `saved` is loaded on the CPU."""
    model = prepared(gpu, config)
    zero_shot, base = zero_shot_copy(model), outputs(model, gpu)
    losses, tuned = train(model, gpu), outputs(model, gpu)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(gpu.base).cpu(), folder).eval()
    with model.disable_adapter():
        cells = {"off": bits(outputs(model, gpu), base)}
    cells["on"] = bits(outputs(model, gpu), tuned)
    cells["merge_and_unload"] = bits(outputs(copy.deepcopy(model).merge_and_unload(), gpu), tuned)
    cells["unload"] = bits(copy.deepcopy(model).unload().state_dict(), gpu.base.state_dict())
    cells["saved"] = bits(outputs(loaded.to(gpu.base.device), gpu), tuned)
    for alpha, expected in {0: base, 1: tuned}.items():
        wise_ft(model, alpha, zero_shot)
        cells[f"α = {alpha}"] = bits(outputs(model, gpu), expected)
    model.merge_adapter()
    cells["merged"] = bits(outputs(model, gpu), tuned)
    model.unmerge_adapter()
    return cells | {"unmerged": bits(outputs(model, gpu), tuned)} | in_bf16(config, gpu, losses)


def in_bf16(config: PeftConfig, gpu: Task, losses: Tensors) -> Cells:
    """The losses over a base in bfloat16, and whether it gives its logits again without the adapter."""
    half = gpu.to(gpu.base.device, torch.bfloat16)
    model = prepared(half, config)
    base, found = outputs(model, half), train(model, half)
    with model.disable_adapter():
        return {"bf16 base": distance(found, losses), "bf16 base, off": bits(outputs(model, half), base)}


def pictures(count: int, seed: int) -> Dataset:
    """Random pictures, whose brightness tells the class."""
    labels = np.arange(count) % 4
    pixels = np.random.default_rng(seed).integers(0, 128, (count, 64, 64, 3)) + 40 * labels[:, None, None, None]
    rows = {"image": [Image.fromarray(one) for one in pixels.astype(np.uint8)], "label": labels}
    return Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["cat", "dog", "owl", "duck"]))


def fit(model: nn.Module, folder: str, device: str, resume: str | None = None, **settings: Any) -> RobustTrainer:
    """A trainer that has trained a copy of the model."""
    made = {"processing_class": CLIPProcessor.from_pretrained(DEMO)}
    fixed = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": LEARNING_RATE}
    fixed |= {"save_strategy": "epoch", "save_only_model": False, "disable_tqdm": True, "use_cpu": device == "cpu"}
    args = RobustTrainingArguments(folder, **fixed | settings)
    trainer = RobustTrainer(copy.deepcopy(model), args, train_dataset=pictures(32, seed=0), **made)
    trainer.remove_callback(PrinterCallback)
    assert trainer.args.device.type == device
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trainings(config: PeftConfig | None, settings: dict[str, Any], device: str) -> Cells:
    """A training on the GPU against float64; a second one, one that is resumed in its middle, one in bfloat16."""
    start = CLIPModel.from_pretrained(DEMO)
    start = start if config is None else get_peft_model(start, copy.deepcopy(config))
    dtype = torch.float32 if "ogen" in settings["losses"] else torch.float64  # OGEN's generator is in float32
    with tempfile.TemporaryDirectory() as folder:
        exact = fit(copy.deepcopy(start).to(dtype), f"{folder}/exact", "cpu", **settings)
        first = fit(start, f"{folder}/first", "cpu", learning_rate=0.0, **settings)  # the values that all begin with
        one, again = (fit(start, f"{folder}/{name}", device, **settings) for name in ("one", "again"))
        resumed = fit(start, f"{folder}/resumed", device, resume=f"{folder}/one/checkpoint-4", **settings)
        cells = {
            "entries": missing(one.model, exact.model),
            "change": distance(change(first.model, one.model), change(first.model, exact.model)),
            "twice": bits(values(again.model), values(one.model)),
            "resumed": bits(values(resumed.model), values(one.model)),
        }
        exactly, found = sweep(exact), sweep(one)
        half = sweep(fit(start, f"{folder}/half", device, bf16=True, **settings))
        return cells | {"sweep": distance(found, exactly), "bf16 sweep": distance(half, exactly)}


def sweep(trainer: RobustTrainer) -> Tensors:
    """The losses on WiSE-FT's way; the model is left at the best α."""
    rows = trainer.wise_ft_sweep(pictures(16, seed=1), alphas=(0, 0.5, 1)).rows
    return {"losses": torch.tensor([row["validation_loss"] for row in rows])}


def show(title: str, rows: dict[str, Cells]) -> None:
    """Prints a table."""
    table = Table("", *max(rows.values(), key=len), title=title, box=SIMPLE_HEAD, title_justify="left")
    for name, cells in rows.items():
        table.add_row(name, *cells.values())
    Console(width=165).print(table)


@dataclass
class ScriptArguments:
    """Whether every method computes on a GPU what float64 computes on the CPU."""

    dry_run: bool = False  # on the CPU, to see that all of this runs


def main(arguments: ScriptArguments) -> None:
    """Trains everywhere, and prints what differs."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for deterministic matrix products
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    device, card = ("cpu", "CPU") if arguments.dry_run else ("cuda", torch.cuda.get_device_name())
    print(card, *(f"{package} {version}" for package, version in package_versions().items()), sep=", ")
    exact, alone = {}, {}
    for family, base in {"CLIP": CLIPModel.from_pretrained(DEMO), "SigLIP": small_siglip()}.items():
        cpu = make_task(base)
        gpu = cpu.to(device)
        for name, config in METHODS.items():
            exact[f"{family}, {name}"] = against_float64(config, cpu, gpu)
            if config is not None:
                alone[f"{family}, {name}"] = on_the_gpu(config, gpu)
    if not arguments.dry_run:
        cpu = make_task(CLIPModel(CLIPConfig()), images=4, steps=2)
        exact["ViT-B/32, SAFT 0.1 %"] = against_float64(METHODS["SAFT 0.1 %"], cpu, cpu.to(device))
    show("Relative difference to float64, and entries of SAFT that are not those of float64", exact)
    show("On the GPU alone: logits in every state of an adapter", alone)
    trained = {name: trainings(*one, device) for name, one in TRAININGS.items()}
    show("RobustTrainer, against float64 and on the GPU alone", trained)


if __name__ == "__main__":
    run(main, ScriptArguments)
