# SPDX-License-Identifier: Apache-2.0
"""Run by `test_class_names_steps.py` on two gloo ranks: the gradients of the live head, against one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_robust.encoders import class_embeds
from hf_robust.encoders.dual_encoder import text_embeds
from tests.tasks.test_class_names_steps import IMAGES, LABELS, build, full, same

SETTINGS = [
    {},
    {"text_chunk_size": 2},
    {"classes_per_step": 5},  # the share of the second rank is filled up
    {"templates": "single", "classes_per_step": 5, "text_chunk_size": 2},
]


def main(folder: str) -> None:
    whole = [build(full(), **settings) for settings in SETTINGS]
    for task in whole:  # before the process group: one process, all images
        task(**IMAGES, labels=LABELS).loss.backward()
    dist.init_process_group("gloo")
    rank, runs = dist.get_rank(), []
    own = slice(2 * rank, 2 * rank + 2)
    class_embeds.text_embeds = lambda m, ids, mask: runs.append(len(ids)) or text_embeds(m, ids, mask)
    for settings, one in zip(SETTINGS, whole, strict=True):
        task = build(full(), **settings)
        runs.clear()
        batch = {name: tensor[own] for name, tensor in IMAGES.items()}
        wrapped = DistributedDataParallel(task)
        wrapped(**batch, labels=LABELS[own]).loss.backward()
        assert sum(runs) == (3 if "text_chunk_size" not in settings else 6), runs  # twice each in chunks
        gradients = [{n: p.grad for n, p in of.named_parameters() if p.grad is not None} for of in (task, one)]
        same(*gradients)
    if rank == 0:  # evaluations and selections are no step: the other process need not come
        task.eval()(**IMAGES, labels=LABELS)
        with task.as_in_training():
            task(**IMAGES, labels=LABELS).loss.backward()
    dist.barrier()
    print("two ranks agree", torch.__version__)
