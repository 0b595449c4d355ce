"""Stage `sample`: images drawn from the averaged weights of every milestone, and of the primer if asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from maskdm.base.checksums import file_sha256
from maskdm.base.publishing import publish_description
from maskdm.config import Run, paths
from maskdm.data.grids import save_grid
from maskdm.data.inputs import open_training_data
from maskdm.models.drawing import draw_images, load_model
from maskdm.stages.runner import Task
from maskdm.training import devices
from maskdm.training.ranks import Ranks, sharing
from maskdm.training.state import Pieces

INFO = "samples.json"
# Besides the milestones, the pretrained weights before any finetuning (the primer) can be sampled: seeing all patches
# at once, and each patch alone if they were trained on single patches.
PRIMER, PRIMER_ALONE = "primer", "primer_alone"
PRIMERS = (PRIMER, PRIMER_ALONE)


def run(task: Task, folder: Path) -> None:
    """Write the samples of every milestone of an arm: an array and a PNG grid each.

    Raises:
        UserError: the weights do not fit, or memory does not suffice.
    """
    arm, sampling = task.run, task.params.sampling
    compute = devices.resolve(task.params.compute, task.params.compute.devices)
    files = weights_of(arm)
    is_shared = sampling.num_samples > sampling.batch_size
    with sharing(task.job.words, task.params.compute, is_shared) as ranks:
        samples = {}
        for key, file in files.items():
            kept = Pieces(task.work / name_of(key)) if ranks.is_first else None
            images = _draw(arm, compute, ranks, key, file, kept)
            if ranks.is_first:
                samples[key] = _write(arm, images, folder, name_of(key))
        if ranks.is_first:
            hashes = {key: file_sha256(file) for key, file in files.items()}
            info = {**sampling.model_dump(), "weights_sha256": hashes, "samples_sha256": samples}
            publish_description(folder / INFO, info)
            num_images = sampling.num_samples * len(files)
            task.record.update(compute.describe(), num_images=num_images, devices=ranks.num_ranks)


def weights_of(run: Run) -> dict[str, Path]:
    """The files of weights to sample from, by milestone; first the primers, if there are any."""
    finetuned = paths.finetune(run.arm, run.seed)
    files = {f"{fraction:.3f}": finetuned / paths.milestone_file(fraction) for fraction, _ in run.milestones}
    if not run.has_primer:
        return files
    pretrained = paths.pretrain(run.arm, run.seed) / paths.CHECKPOINT
    alone = {PRIMER_ALONE: pretrained} if run.pretrain.num_visible == 1 else {}
    return {PRIMER: pretrained, **alone, **files}


def name_of(key: str) -> str:
    """The file name, without its suffix, of a milestone or a primer."""
    return key if key in PRIMERS else paths.milestone_name(float(key))


def title_of(key: str) -> str:
    """A milestone or a primer in messages."""
    primers = {PRIMER: "the primer", PRIMER_ALONE: "the primer, each patch alone"}
    return primers.get(key) or f"{float(key):.0%}"


def _draw(run: Run, compute: devices.Compute, ranks: Ranks, key: str, weights: Path, kept: Pieces | None) -> np.ndarray:
    """Draw the samples of a milestone or a primer; rank 0 returns them."""
    training = run.pretrain if key in PRIMERS else run.finetune
    params, num_classes = training.params, open_training_data(training).num_classes
    model, title = load_model(params, weights, num_classes, compute), f"sample {run.arm} at {title_of(key)}"
    network = PatchesAlone(model) if key == PRIMER_ALONE else model
    count = params.sampling.num_samples
    return draw_images(params, network, num_classes, run.seed, count, compute, title, kept, ranks)


class PatchesAlone(nn.Module):
    """A network that sees every patch alone, so that the patches of an image are drawn independently.

    Args:
        model: (patches (B, S, P), t (B,), visible_idx (B, S), labels (B,) or None) → predictions (B, S, P).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor, t: Tensor, visible_idx: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predictions (B, S, P), each made from its own patch."""
        count = patches.shape[1]
        labels = None if labels is None else labels.repeat_interleave(count)
        alone = (patches.flatten(0, 1)[:, None], t.repeat_interleave(count), visible_idx.flatten()[:, None], labels)
        return self.model(*alone).reshape(patches.shape)  # (B·S, 1, P) → (B, S, P)


def _write(run: Run, images: np.ndarray, folder: Path, name: str) -> str:
    """Write the samples and a grid of some of them; returns the sha256 of the samples."""
    np.save(folder / f"{name}.npy", images)
    save_grid(images[: run.params.sampling.grid_images], folder / f"{name}.png")
    return file_sha256(folder / f"{name}.npy")
