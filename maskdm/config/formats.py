"""Names in the files of results/ that their writers and their readers share."""

from __future__ import annotations

from typing import Literal

WeightSet = Literal["raw", "ema"]  # of the two sets of weights that training keeps

TRAINING_STAGES = ("pretrain", "finetune")
ARM_STAGES = (*TRAINING_STAGES, "sample", "evaluate")  # of an arm and a seed, in their order
CURVE_COLUMNS = ("step", "loss", "lr", "images_seen", "tokens_seen", "flops")
GIVEN = "given"  # the trial that was chosen for every arm where nothing is tuned
ORIGIN_KEYS = ("extractor", "extractor_sha256", "data_sha256")  # scores may be compared only where these agree
