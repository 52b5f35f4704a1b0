# SPDX-License-Identifier: Apache-2.0
"""Pre-trains the demo's tiny CLIP on captioned drawings, contrastively, on a CPU.

    python examples/demo/pretrain.py

About half an hour of CPU time, repeatable on the same machine with the same number of threads. The tokenizer is the
model folder's own; `--learn_tokenizer` learns another one, which is not repeatable: BPE training breaks ties between
equally frequent pairs in no fixed order.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, field

import data
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from hf_robust.scripting.run import run

MAX_TOKENS = 32
VOCABULARY = 2500
STYLE_WORDINGS = {
    "colour": (
        "a drawing of a {}.",
        "a colour drawing of a {}.",
        "an emoji of a {}.",
        "a flat cartoon of a {}.",
        "a picture of a {}.",
        "{}",
    ),
    "outline": ("a drawing of a {}.", "an icon of a {}.", "an outline icon of a {}.", "a line drawing of a {}.", "{}"),
    "filled": ("a drawing of a {}.", "an icon of a {}.", "a filled icon of a {}.", "a black symbol of a {}.", "{}"),
}


def make_processor(captions: list[str]) -> CLIPProcessor:
    """CLIP's own processor at 64 px, with a byte-level BPE learned from the captions."""
    tokenizer = CLIPTokenizer().train_new_from_iterator(captions, vocab_size=VOCABULARY)
    tokenizer.model_max_length = MAX_TOKENS
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": data.SIZE}, crop_size=data.SIZE)
    return CLIPProcessor(image_processor, tokenizer)


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A randomly initialised CLIPModel: a ViT with 16 px patches and a small causal text tower."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 160,
        "intermediate_size": 640,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "image_size": data.SIZE,
        "patch_size": 16,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        **special,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def caption(picture: dict, rng: random.Random) -> tuple[str, str]:
    """A caption, and what it says: the drawing's kind or its name.

    If a drawing has a kind, 60 % of its captions name the kind alone, the others its name; half of those say both.
    """
    wording = rng.choice(STYLE_WORDINGS[picture["style"]])
    kind, name = picture["kind"], picture["name"].lower()
    chance = rng.random()
    if kind and chance < 0.6:
        return wording.replace("{}", kind), kind
    if kind and chance < 0.8:
        return wording.replace("{}", f"{name}, a {kind}"), name
    return wording.replace("{}", name), name


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale, shift, flip and tint a batch of images on white.

    Args:
        images: (batch, 3, height, width), 0 to 1.
        generator: The source of every random number.

    Returns:
        Images of the same shape.
    """
    batch = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(batch, *shape, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.2, 0.2), uniform(0.9, 1.2)  # radians; above 1 shrinks the drawing
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    stretch = uniform(0.92, 1.09)
    rows = (
        torch.stack([flip * scale * stretch * angle.cos(), -scale * angle.sin(), uniform(-0.1, 0.1)], dim=1),
        torch.stack([flip * scale * angle.sin(), scale / stretch * angle.cos(), uniform(-0.1, 0.1)], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    ink = F.grid_sample(1 - images, grid, mode="bilinear", align_corners=False)  # paper is 0: padding is paper
    grey = (uniform(0, 1, 1, 1, 1) < 0.15).float()
    ink = grey * ink.mean(dim=1, keepdim=True) + (1 - grey) * ink
    tinted = (uniform(0, 1, 1, 1, 1) < 0.5).float()
    paper = 1 - tinted * uniform(0, 0.25, 3, 1, 1)
    return ((1 - ink * uniform(0.8, 1.0, 1, 1, 1)) * paper).clamp(0, 1)


def contrastive_loss(logits: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """CLIP's loss where an image may match several captions: all of its matches share the target.

    Args:
        logits: (images, captions).
        matches: (images, captions), True where the caption is true of the image.
    """
    targets = matches.float()
    image_to_text = F.cross_entropy(logits, targets / targets.sum(dim=1, keepdim=True))
    text_to_image = F.cross_entropy(logits.T, targets.T / targets.T.sum(dim=1, keepdim=True))
    return (image_to_text + text_to_image) / 2


def make_optimizers(model: CLIPModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the towers, with which the loss falls twice as fast, AdamW for all else."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embedding" not in name]
    embeddings = [p for name, p in named if p.ndim > 1 and "embedding" in name]
    plain = [p for _, p in named if p.ndim <= 1]
    groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.98)),
    ]


def train(model: CLIPModel, processor: CLIPProcessor, pictures: list[dict], args: ScriptArguments) -> None:
    """Warm-up and cosine decay over `args.steps` batches; saves every 500 steps and at the end."""
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    pixels = torch.stack([torch.frombuffer(bytearray(p["image"].tobytes()), dtype=torch.uint8) for p in pictures])
    pixels = pixels.view(-1, data.SIZE, data.SIZE, 3).permute(0, 3, 1, 2)  # (pictures, 3, height, width)
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    optimizers = make_optimizers(model)
    # Kinds are what the classifier needs: their pictures come twice in an epoch.
    epoch = [i for i, picture in enumerate(pictures) for _ in range(2 if picture["kind"] else 1)]
    order: list[int] = []
    started = time.time()
    for step in range(args.steps):
        if len(order) < args.batch_size:
            order = rng.sample(epoch, len(epoch))
        batch = [order.pop() for _ in range(args.batch_size)]
        captions, meanings = zip(*(caption(pictures[i], rng) for i in batch), strict=True)
        truths = [{pictures[i]["kind"], pictures[i]["name"].lower()} for i in batch]
        matches = torch.tensor([[meaning in truth for meaning in meanings] for truth in truths])
        # Few captions are longer, and the text tower costs as much as its longest caption.
        tokens = processor.tokenizer(list(captions), padding=True, truncation=True, max_length=16, return_tensors="pt")
        images = (augmented(pixels[batch] / 255, generator) - mean) / std
        warm_up, progress = min(1.0, (step + 1) / args.warm_up), step / args.steps
        rate = args.learning_rate * warm_up * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        logits = model(pixel_values=images, **tokens).logits_per_image
        loss = contrastive_loss(logits, matches)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 50 == 0:
            print(f"step {step} of {args.steps}, loss {loss:.3f}, {time.time() - started:.0f} s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save(model, args.output)


def save(model: CLIPModel, folder: str) -> None:
    """Save the weights in float16, which halves the file."""
    half = CLIPModel(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    half.config.dtype = torch.float32  # what a plain `from_pretrained` loads: fine-tuning in float16 would not work
    half.config.save_pretrained(folder)


@dataclass
class ScriptArguments:
    """Pre-trains the demo's tiny CLIP."""

    output: str = str(data.MODEL)
    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 3e-3
    warm_up: int = 100
    threads: int = 2
    seed: int = 0
    learn_tokenizer: bool = field(default=False, metadata={"help": "Another tokenizer; not repeatable."})


def main(args: ScriptArguments) -> None:
    """Draw the pictures, train and save."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    pictures = data.pretraining()
    rng = random.Random(args.seed)
    if args.learn_tokenizer:
        processor = make_processor([caption(picture, rng)[0] for picture in pictures])
    else:
        processor = CLIPProcessor.from_pretrained(data.MODEL)
    processor.save_pretrained(args.output)  # now, as every call of a tokenizer leaves its settings in it
    model = make_model(processor.tokenizer)
    print(f"{len(pictures)} pictures, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, processor, pictures, args)


if __name__ == "__main__":
    run(main, ScriptArguments)
