# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_robust"]
# ///
"""WiSE-FT and soups of models on disk; the same as the command `hf-robust merge`.

Go part of the way from a zero-shot model to its fine-tuned self.

A model that was fine-tuned as a whole, or an adapter (SAFT, A-CLIP, LoRA and what else can be merged):

    python examples/merge.py --zero_shot openai/clip-vit-base-patch16 --fine_tuned runs/full --output merged
    python examples/merge.py --zero_shot openai/clip-vit-base-patch16 --fine_tuned runs/saft --output merged

Several shares of the way, each into a folder of its own, `merged/alpha=0.250` and so on. If a head was trained, the
zero-shot model is what `RobustTrainer.save_model()` wrote before the training:

    python examples/merge.py --zero_shot runs/before --fine_tuned runs/full --output merged --alpha 0.25 0.5 0.75

The mean of models, or of adapters of one base, that were fine-tuned from the same weights (an adapter, then); of all,
or of those that help on validation data:

    python examples/merge.py --soup runs/a runs/b runs/c --output soup
    python examples/merge.py --soup runs/a runs/b --output soup --soup_greedy --validation_data photos:validation
"""

from __future__ import annotations

from hf_robust.scripting.merging import MergeArguments, merge
from hf_robust.scripting.run import run

if __name__ == "__main__":
    run(merge, MergeArguments)
