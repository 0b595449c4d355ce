"""What the ranks of a group compute, as a program of its own: test_ranks.py starts it in several processes.

Usage: python two_ranks.py FOLDER     in the folder of a prepared experiment, with RANK, WORLD_SIZE, … set
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from maskdm.base.errors import NonFiniteLossError
from maskdm.config import ComputeConfig, Params, parse_params, resolve
from maskdm.data.inputs import open_data
from maskdm.training.ranks import Ranks, sharing
from maskdm.training.trainer import Trainer

ARM, BAD_STEP = "patch-m50", 7
Change = Callable[[int, Tensor], Tensor]


def params_with(**compute: Any) -> Params:
    """The experiment of this folder, with all that averaging over ranks could get wrong."""
    content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    content["training"].update(flip=0.5, grad_clip=0.1, log_every=4)
    content["pretrain"].update(micro_batch_size=8)
    content["compute"].update(devices=2, **compute)
    return parse_params(content)


def trained(params: Params, ranks: Ranks, folder: Path, change: Change = lambda step, x_0: x_0) -> dict[str, Tensor]:
    """Pretrain; this rank's weights at the end, what the network was given at step 0, and the losses of the curve."""
    trainer = Trainer(resolve(params, ARM, 0).pretrain, open_data(params), folder, ranks)
    model, batches, seen = trainer.state.model, trainer.batches, list[tuple[Tensor, ...]]()
    model.register_forward_pre_hook(lambda _, given: seen.append(given))
    trainer.batches = lambda step: (change(step, batches(step)[0]), None)  # type: ignore[assignment, misc]
    failed = False
    try:
        trainer.run()
    except NonFiniteLossError:
        failed = True
    sets = trainer.state.tensors()
    micro_batches = params.pretrain.batch_size // ranks.num_ranks // 8
    first = seen[:micro_batches]
    return {
        **{f"{kind}/{name}": tensor.detach().clone() for kind in sets for name, tensor in sets[kind].items()},
        **{name: torch.cat([given[i] for given in first]) for i, name in enumerate(("patches", "t", "visible_idx"))},
        "curve": torch.tensor([row["loss"] for row in trainer.state.curve], dtype=torch.float64),
        "failed": torch.tensor(failed),
    }


def spoil_last_image(ranks: Ranks) -> Change:
    """Images of which one, the last rank's, is not finite at one step."""

    def change(step: int, x_0: Tensor) -> Tensor:
        if step == BAD_STEP and ranks.rank == ranks.num_ranks - 1:
            x_0[-1] = torch.nan
        return x_0

    return change


CASES: dict[str, Callable[[Ranks, Path], dict[str, Tensor]]] = {
    "good": lambda ranks, folder: trained(params_with(), ranks, folder),
    "bad": lambda ranks, folder: trained(params_with(), ranks, folder, spoil_last_image(ranks)),
}


def main(folder: Path) -> None:
    """Compute every case and write what came out."""
    rank = os.environ["RANK"]
    with sharing((), ComputeConfig(device="cpu", precision="fp32", devices=int(os.environ["WORLD_SIZE"]))) as ranks:
        for name, compute in CASES.items():
            outcome = compute(ranks, folder / f"{name}-work")
            save_file({key: tensor.contiguous() for key, tensor in outcome.items()}, folder / f"{name}-{rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
