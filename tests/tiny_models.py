# SPDX-License-Identifier: Apache-2.0
"""Tiny random dual encoders of every supported family, their processors and synthetic pictures, all made in code."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image as PILImage
from tokenizers import pre_tokenizers, processors
from transformers import PreTrainedModel, ProcessorMixin

FAMILIES: list[str] = ["clip", "metaclip_2", "siglip", "siglip2", "vision-text-dual-encoder"]
IMAGE_SIZE, PATCH_SIZE, HIDDEN, PROJECTION, MAX_LENGTH = 32, 16, 32, 24, 77
LETTERS = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-_{}%()[]/&+#<>\"ü"))
WORDS = "jkmquvwxyz"  # as words they are one token in every tokenizer, other letters two in some

TRANSFORMER = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TRANSFORMER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}


def tiny_model(family: str, seed: int = 0, legacy_eos: bool = False) -> PreTrainedModel:
    """A dual encoder in eval mode whose weights depend on `seed` alone; none of its tensors is zero, as trained ones.

    Args:
        family: one of `FAMILIES`.
        seed: of the random weights.
        legacy_eos: for "clip": a config with `eos_token_id=2`, as in CLIP's first checkpoints, which pools at the
            largest token id instead of at the first EOS.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[family]() if not legacy_eos else _clip(eos_token_id=2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 0:  # the logit scale and bias keep the values below
                    parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.05))
            if family.startswith("siglip"):
                model.logit_scale.fill_(2.3)
                model.logit_bias.fill_(-3.0)
    return model.eval()


def tiny_lora(model: PreTrainedModel, **settings: object) -> PeftModel:
    """`model` in eval mode with stock LoRA in the attention of both towers; `settings` are those of `LoraConfig`."""
    targets = {name.split(".")[-1] for name, _ in model.named_modules()} & {"q_proj", "v_proj", "query", "value"}
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, **settings)).eval()


def tiny_processor(family: str, legacy_eos: bool = False) -> ProcessorMixin:
    """Tokenizer of single letters and image processor for `tiny_model(family)`, made in code, without torchvision.

    Args:
        family: one of `FAMILIES`.
        legacy_eos: for "clip": EOS has the largest id, as in CLIP's own vocabulary, which legacy pooling relies on.
    """
    return _PROCESSORS[family]() if not legacy_eos else _clip_processor(legacy_eos=True)


def tiny_batch(family: str, n_images: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The vision inputs of `n_images` synthetic pictures: `pixel_values`, for "siglip2" also its mask and shapes."""
    pictures = [synthetic_picture(index, 5, 40, seed=seed + index) for index in range(n_images)]
    return dict(tiny_processor(family).image_processor(images=pictures, return_tensors="pt"))


def image_dataset(n: int, class_names: list[str], size: int = 40, seed: int = 0) -> Dataset:
    """`n` pictures with columns `image` and `label`; the class decides colour and stripes, the rest is noise.

    Labels go round robin, so every class has `n // len(class_names)` pictures or one more.
    """
    labels = [index % len(class_names) for index in range(n)]
    pictures = [synthetic_picture(label, len(class_names), size, seed + index) for index, label in enumerate(labels)]
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    return Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def synthetic_picture(label: int, n_classes: int, size: int, seed: int) -> PILImage.Image:
    """A picture of class `label`: stripes in the colour of the class, with noise from `seed`."""
    generator = np.random.default_rng(seed)
    colour = 0.5 + 0.5 * np.cos(2 * np.pi * (label / n_classes + np.array([0, 1 / 3, 2 / 3])))
    columns = np.arange(size) * (1 + label % 4) + generator.integers(size)
    stripes = 0.75 + 0.25 * np.sin(2 * np.pi * columns / size)
    if label % 2:
        pixels = stripes[None, :, None] * np.ones((size, 1, 1)) * colour
    else:
        pixels = stripes[:, None, None] * np.ones((1, size, 1)) * colour
    pixels = pixels + generator.normal(0, 0.08, (size, size, 3))
    return PILImage.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


# --- models ---


def _clip(eos_token_id: int = 1) -> PreTrainedModel:
    text = {**TRANSFORMER, "vocab_size": 514, "max_position_embeddings": MAX_LENGTH, "projection_dim": PROJECTION}
    text |= {"bos_token_id": 0, "eos_token_id": eos_token_id, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=PROJECTION)
    return transformers.CLIPModel(config)


def _metaclip_2() -> PreTrainedModel:
    text = {**TRANSFORMER, "vocab_size": 80, "max_position_embeddings": MAX_LENGTH, "projection_dim": PROJECTION}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = transformers.MetaClip2Config(text_config=text, vision_config=VISION, projection_dim=PROJECTION)
    return transformers.MetaClip2Model(config)


def _siglip_text() -> dict:
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    return {**TRANSFORMER, "vocab_size": 160, "max_position_embeddings": 64, **ids}


def _siglip() -> PreTrainedModel:
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=_siglip_text(), vision_config=VISION))


def _siglip2() -> PreTrainedModel:
    vision = {**TRANSFORMER, "patch_size": PATCH_SIZE, "num_patches": 4}
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=_siglip_text(), vision_config=vision))


def _vision_text() -> PreTrainedModel:
    vision = transformers.ViTConfig(**VISION)
    text = transformers.BertConfig(**TRANSFORMER, vocab_size=160, max_position_embeddings=MAX_LENGTH)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=PROJECTION)
    return transformers.VisionTextDualEncoderModel(config)


# --- processors ---


def _square(processor_class: type) -> object:
    return processor_class(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def _clip_images() -> object:
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop)


def _clip_processor(legacy_eos: bool = False) -> ProcessorMixin:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials, letters = ["<|startoftext|>", "<|endoftext|>"], [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens = letters + specials if legacy_eos else specials + letters
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_LENGTH)
    return transformers.CLIPProcessor(_clip_images(), tokenizer)


def _metaclip_2_processor() -> ProcessorMixin:
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = [(token, 0.0) for token in specials] + [(letter, -1.0) for letter in ["▁", *LETTERS]] + [("<mask>", 0.0)]
    vocab += [("▁" + letter, -1.0) for letter in WORDS]
    tokenizer = transformers.XLMRobertaTokenizer(vocab=vocab, model_max_length=MAX_LENGTH)
    return transformers.CLIPProcessor(_clip_images(), tokenizer)


def _letter_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As SigLIP's: no BOS, EOS at the end; it returns an attention mask, which SigLIP must not be given."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS, *("▁" + letter for letter in WORDS)]
    vocab, merges = {token: index for index, token in enumerate(tokens)}, [("▁", letter) for letter in WORDS]
    tokenizer = transformers.Siglip2Tokenizer(vocab=vocab, merges=merges)
    end = processors.TemplateProcessing(single=["$A", "<eos>"], special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = end
    return tokenizer


def _siglip_processor() -> ProcessorMixin:
    return transformers.SiglipProcessor(_square(transformers.SiglipImageProcessorPil), _letter_tokenizer())


def _siglip2_processor() -> ProcessorMixin:
    images = transformers.Siglip2ImageProcessorPil(patch_size=PATCH_SIZE, max_num_patches=6)
    return transformers.Siglip2Processor(images, _letter_tokenizer())


def _vision_text_processor() -> ProcessorMixin:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*specials, *LETTERS, *("##" + letter for letter in LETTERS)]
    tokenizer = transformers.BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})
    return transformers.VisionTextDualEncoderProcessor(_square(transformers.ViTImageProcessorPil), tokenizer)


_BUILDERS = {
    "clip": _clip,
    "metaclip_2": _metaclip_2,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "vision-text-dual-encoder": _vision_text,
}
_PROCESSORS = {
    "clip": _clip_processor,
    "metaclip_2": _metaclip_2_processor,
    "siglip": _siglip_processor,
    "siglip2": _siglip2_processor,
    "vision-text-dual-encoder": _vision_text_processor,
}


def recompute_activations(model: torch.nn.Module, settings: dict | None = None) -> None:
    """Turns checkpointing on; the last transformers for Python 3.10 have the old name alone."""
    is_new = "activation_checkpointing_enable" in vars(PreTrainedModel)
    (model.activation_checkpointing_enable if is_new else model.gradient_checkpointing_enable)(settings)
