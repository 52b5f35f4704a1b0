# SPDX-License-Identifier: Apache-2.0
"""Gathering and losses on two gloo ranks, which have different numbers of images and of texts, against one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hf_robust.tasks.contrastive import gather_pairs, sigmoid_loss, softmax_loss
from hf_robust.tasks.gather import gather_rows

IMAGE_OF_TEXT = torch.tensor([0, 1, 1, 1, 2, 3, 4, 4])
SAYS = torch.tensor([[5], [6], [7], [6], [5], [8], [9], [7]])  # some the same on both ranks, some within one


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 4, dtype=torch.float64), nn.Linear(6, 4, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor, image_of_text: Tensor, says: Tensor) -> Tensor:
        embeds = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        pairs = gather_pairs(*embeds, image_of_text, says)
        smoothed = softmax_loss(pairs, self.scale, "positive", label_smoothing=0.1, margin=0.05)
        return softmax_loss(pairs, self.scale) + smoothed + sigmoid_loss(pairs, self.scale, self.bias)


def main(folder: str) -> None:
    torch.manual_seed(0)
    towers = Towers()
    images, texts = torch.randn(5, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    expected_loss = towers(images, texts, IMAGE_OF_TEXT, SAYS)  # before the process group: one process, all pairs
    expected_loss.backward()
    expected = [p.grad.clone() for p in towers.parameters()]
    towers.zero_grad()

    dist.init_process_group("gloo")
    own_images, own_texts = [(slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 8))][dist.get_rank()]
    share = images[own_images], texts[own_texts], IMAGE_OF_TEXT[own_texts] - own_images.start, SAYS[own_texts]
    wrapped = DistributedDataParallel(towers)
    loss = wrapped(*share)
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, expected_loss.detach(), rtol=1e-9, atol=0)
    for parameter, want in zip(towers.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-12)
    assert gather_rows(SAYS[own_texts]).equal(SAYS)
