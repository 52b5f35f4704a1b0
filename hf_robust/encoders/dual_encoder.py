# SPDX-License-Identifier: Apache-2.0
"""One way to embed images and prompts with every supported dual encoder, plain or wrapped by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin

from ..errors import ConfigError, DataError
from .tokens import Tokenizer


@dataclass(frozen=True)
class Family:
    """What differs between the dual encoders of transformers.

    Args:
        vision: module names of the vision tower and, where there is one, its projection.
        text: module names of the text tower and, where there is one, its projection.
        padding: how prompts are padded. `"longest"`: to the longest prompt, for towers that pool at EOS behind a
            causal mask, or that are given an attention mask. `"max_length"`: to the tower's full length and without
            an attention mask, for towers that pool at the last position, padding or not, as in pre-training.
        qkv: names of the query, key and value projections of attention in both towers.
        out_proj: endings of the names of attention's output projections in both towers.
        mlp_out: endings of the names of the last projections of the MLPs in both towers.
        logit_bias: whether a learned bias is added to every logit.
    """

    vision: tuple[str, ...]
    text: tuple[str, ...]
    padding: Literal["longest", "max_length"]
    qkv: tuple[str, ...]
    out_proj: tuple[str, ...]
    mlp_out: tuple[str, ...]
    logit_bias: bool = False


_CLIP = Family(
    vision=("vision_model", "visual_projection"),
    text=("text_model", "text_projection"),
    padding="longest",
    qkv=("q_proj", "k_proj", "v_proj"),
    out_proj=("self_attn.out_proj",),
    mlp_out=("mlp.fc2",),
)
_SIGLIP = Family(  # both towers end in their own head
    vision=("vision_model",),
    text=("text_model",),
    padding="max_length",
    qkv=("q_proj", "k_proj", "v_proj"),
    out_proj=("self_attn.out_proj",),  # not that of the pooling head
    mlp_out=("mlp.fc2",),
    logit_bias=True,
)
FAMILIES: dict[str, Family] = {
    "clip": _CLIP,
    "metaclip_2": _CLIP,
    "siglip": _SIGLIP,
    "siglip2": _SIGLIP,
    "vision-text-dual-encoder": Family(
        vision=("vision_model", "visual_projection"),
        text=("text_model", "text_projection"),
        padding="longest",
        qkv=("q_proj", "k_proj", "v_proj", "query", "key", "value"),  # a ViT and a BERT name them differently
        out_proj=("attention.o_proj", "attention.output.dense", "self_attn.out_proj"),
        mlp_out=("mlp.fc2", "mlp.down_proj", "output.dense"),  # of a ViT, of DINOv3 and of a BERT
    ),
}

# Vision towers by what they do with images of another size than in pre-training: they interpolate their positions when
# asked to, or need not be asked. Other towers take one size alone, or have not been tried.
INTERPOLATING = ("clip_vision_model", "metaclip_2_vision_model", "siglip_vision_model", "vit", "deit")
SIZE_FREE = ("dinov2", "dinov2_with_registers", "dinov3_vit")
POOLING_AT_EOS = ("clip_text_model", "metaclip_2_text_model")  # text towers; in a prompt without it at the first token


def base_model(model: nn.Module) -> Any:  # a PreTrainedModel; mypy cannot know its towers
    """Returns the transformers model inside a `PeftModel`, or `model` itself; its layers keep their adapters.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.

    Example:
        >>> base_model(get_peft_model(clip, LoraConfig(target_modules=["q_proj"]))) is clip
        True
    """
    return model.get_base_model() if isinstance(model, PeftModel) else model


def family(model: nn.Module) -> Family:
    """Returns the row of `FAMILIES` for a model.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.

    Raises:
        ConfigError: the model is not one of the supported dual encoders.

    Example:
        >>> family(CLIPModel(CLIPConfig())).padding
        'longest'
    """
    base = base_model(model)
    model_type = _model_type(base)
    if model_type not in FAMILIES:
        raise ConfigError(
            "not a supported dual encoder; need get_image_features/get_text_features",
            got=f"{type(base).__name__} ({model_type})",
            allowed=", ".join(FAMILIES),
            remedy="Load a whole dual encoder with AutoModel.from_pretrained, not one of its towers; for an open_clip "
            "model take the checkpoint in the format of transformers.",
        )
    return FAMILIES[model_type]


def is_dual_encoder(model: nn.Module) -> bool:
    """Returns whether the model is one of the supported dual encoders.

    Args:
        model: any model, plain or wrapped by PEFT.
    """
    return _model_type(base_model(model)) in FAMILIES


def _model_type(base: nn.Module) -> str:
    return base.config.model_type if isinstance(base, PreTrainedModel) else type(base).__name__


def image_embeds(
    model: nn.Module,
    pixel_values: Tensor,
    pixel_attention_mask: Tensor | None = None,
    spatial_shapes: Tensor | None = None,
) -> Tensor:
    """Embeds images; of another size than in pre-training with interpolated positions.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        pixel_values: `(batch, channels, height, width)`, for SigLIP 2 `(batch, patches, patch pixels)`.
        pixel_attention_mask: `(batch, patches)`, SigLIP 2 only.
        spatial_shapes: `(batch, 2)`, height and width in patches, SigLIP 2 only.

    Returns:
        `(batch, dim)`, L2-normalised, in float32 or better.

    Raises:
        ConfigError: the images are of another size than in pre-training, which is no multiple of the patch size.
        DataError: there are no images.

    Example:
        >>> image_embeds(clip, processor(images=[picture], return_tensors="pt")["pixel_values"]).shape
        torch.Size([1, 512])
    """
    base = base_model(model)
    if pixel_values.shape[0] == 0:  # not len(), by which torch.export would fix the batch size
        raise DataError("batch has no images", got=tuple(pixel_values.shape), allowed="at least one image")
    extras: dict[str, Any] = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
    extras = {name: tensor for name, tensor in extras.items() if tensor is not None}
    if needs_interpolation(model, pixel_values):
        check_image_size(model, *pixel_values.shape[-2:])  # else the tower would drop what is left beside the patches
        extras["interpolate_pos_encoding"] = True
    return _normalise(base.get_image_features(pixel_values=pixel_values, **extras).pooler_output)


def needs_interpolation(model: nn.Module, pixel_values: Tensor) -> bool:
    """Returns whether transformers must be asked for `interpolate_pos_encoding` to embed these images.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        pixel_values: `(batch, channels, height, width)`, for SigLIP 2 `(batch, patches, patch pixels)`.

    Example:
        >>> [needs_interpolation(clip, torch.zeros(1, 3, side, side)) for side in (224, 448)]
        [False, True]
    """
    config, size = base_model(model).config.vision_config, tuple(pixel_values.shape[-2:])
    return config.model_type in INTERPOLATING and size != _height_and_width(config.image_size)


def check_image_size(model: nn.Module, height: int, width: int) -> None:
    """Refuses images that cannot be divided into patches, unless they are of the size of pre-training.

    Args:
        model: a dual encoder with a vision tower of `INTERPOLATING` or `SIZE_FREE`, plain or wrapped by PEFT.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Raises:
        ConfigError: height or width is no positive multiple of the patch size.
    """
    config = base_model(model).config.vision_config
    if (height, width) == _height_and_width(config.image_size):  # SigLIP has 384 pixels and patches of 14
        return
    for side, patch in zip((height, width), _height_and_width(config.patch_size), strict=True):
        if side <= 0 or side % patch:
            nearest = sorted({max(count, 1) * patch for count in (side // patch, side // patch + 1)})
            allowed = f"multiples of {patch}, the nearest: {', '.join(map(str, nearest))}"
            raise ConfigError("image size is no multiple of the patch size", got=side, allowed=allowed)


def _height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def text_embeds(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Embeds tokenised prompts.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        input_ids: `(prompts, tokens)`, as `tokenize` returns them.
        attention_mask: `(prompts, tokens)`, as `tokenize` returns it; None for a tower that was trained without.

    Returns:
        `(prompts, dim)`, L2-normalised, in float32 or better.

    Example:
        >>> text_embeds(clip, **tokenize(processor, ["a photo of a cat."], clip)).shape
        torch.Size([1, 512])
    """
    features = base_model(model).get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    return _normalise(features.pooler_output)


def logit_scale(model: nn.Module) -> Tensor:
    """Returns the factor between cosine similarity and logits, `exp(logit_scale)`, 0-dim, with its gradient.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
    """
    return at_least_float32(base_model(model).logit_scale).exp().squeeze()


def logit_bias(model: nn.Module) -> Tensor | None:
    """Returns what SigLIP and SigLIP 2 add to every logit, 0-dim, with its gradient; None for the other families.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
    """
    if not family(model).logit_bias:
        return None
    return at_least_float32(base_model(model).logit_bias).squeeze()


def input_embeddings(model: nn.Module) -> list[nn.Module]:
    """Returns the patch embedding of the vision tower and the token embedding of the text tower.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.

    Example:
        >>> input_embeddings(clip)
        [Conv2d(3, 768, kernel_size=(32, 32), stride=(32, 32), bias=False), Embedding(49408, 512)]
    """
    family(model)
    base = base_model(model)
    return [base.vision_model.get_input_embeddings(), base.text_model.get_input_embeddings()]


def tower_modules(model: nn.Module, towers: Literal["vision", "text", "both"] = "both") -> list[str]:
    """Returns the names of the modules that make up the towers, each tower with its projection.

    Args:
        model: a dual encoder, plain or wrapped by PEFT.
        towers: `"vision"`, `"text"` or `"both"`.

    Returns:
        Names as in `base_model(model).named_modules()`; every parameter of the towers is below exactly one of them.

    Raises:
        ConfigError: the model is no supported dual encoder, or `towers` is none of the three.

    Example:
        >>> tower_modules(clip, "vision")
        ['vision_model', 'visual_projection']
    """
    row = family(model)
    names = {"vision": row.vision, "text": row.text, "both": row.vision + row.text}
    if towers not in names:
        raise ConfigError("unknown tower", got=towers, allowed="'vision', 'text', 'both'")
    return list(names[towers])


def tokenize(processor: ProcessorMixin, prompts: list[str], model: nn.Module) -> dict[str, Tensor]:
    """Tokenises prompts the way the model's text tower needs them.

    Args:
        processor: the model's processor.
        prompts: texts.
        model: a dual encoder, plain or wrapped by PEFT.

    Returns:
        `input_ids` and, where the tower uses one, `attention_mask`, each `(prompts, tokens)`, on the CPU. `tokens` is
        the length of the longest prompt where the tower's pooling allows it, else the tower's full length.

    Raises:
        ConfigError: the tokenizer is that of another model: it has tokens that the tower does not know, or ends no
            prompt with the one that the tower looks for.
        DataError: a prompt has more tokens than the tower takes; cut off, it could equal another class's prompt.

    Example:
        >>> tokenize(processor, ["a photo of a cat.", "a photo of a hummingbird."], clip)["input_ids"].shape
        torch.Size([2, 7])
    """
    return text_tokenizer(processor, model)(prompts)


def text_tokenizer(processor: ProcessorMixin, model: nn.Module, truncate: bool = False) -> Tokenizer:
    """Returns what tokenises texts the way the model's text tower needs them, and does not hold the model.

    Args:
        processor: the model's processor.
        model: a dual encoder, plain or wrapped by PEFT.
        truncate: whether texts that are too long are cut; else they are refused.

    Raises:
        ConfigError: the model is no supported dual encoder.

    Example:
        >>> text_tokenizer(processor, clip, truncate=True)([99 * "very " + "big"])["input_ids"].shape
        torch.Size([1, 77])
    """
    padding = family(model).padding
    tokenizer, text_config = processor.tokenizer, base_model(model).config.text_config
    largest = pools_at_largest_id(text_config)
    end = tokenizer.eos_token_id if largest else text_config.eos_token_id
    return Tokenizer(
        tokenizer,
        padding,
        max_length=min(tokenizer.model_max_length, text_config.max_position_embeddings),
        vocab_size=text_config.vocab_size,
        end=end if text_config.model_type in POOLING_AT_EOS else None,
        end_is_largest=largest,
        truncate=truncate,
    )


def pools_at_largest_id(text_config: Any) -> bool:
    """Returns whether a text tower pools at the largest token id of a prompt, as CLIP's first configs have it.

    Args:
        text_config: of the text tower.
    """
    return text_config.model_type == "clip_text_model" and text_config.eos_token_id == 2


def at_least_float32(tensor: Tensor) -> Tensor:
    """Casts bfloat16 and float16 to float32, leaves float32 and float64 alone.

    Args:
        tensor: any floating-point tensor.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _normalise(embeds: Tensor) -> Tensor:
    return F.normalize(at_least_float32(embeds), dim=-1)  # (batch, dim)
