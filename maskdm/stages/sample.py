"""Stage `sample`: images from the averaged weights of every milestone, and of the primer if asked."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from maskdm import device, paths
from maskdm.architecture import architecture_of
from maskdm.checksums import file_sha256
from maskdm.config import Params
from maskdm.data.grids import save_grid
from maskdm.drawing import draw_images, load_model
from maskdm.parallel import Ranks
from maskdm.publishing import publish_description, publish_folder
from maskdm.resume import Pieces
from maskdm.stages import finetune, pretrain
from maskdm.stages.inputs import open_data, open_pretraining_data, read_json, require, with_chosen_values
from maskdm.stages.joint import joint_session
from maskdm.tracking import publish_arm

INFO = "samples.json"
# The pretrained weights before any finetuning, among the milestones: seeing all patches, as finetuning does, and one at
# a time, where that is what they were trained on.
PRIMER, PRIMER_ALONE = "primer", "primer_alone"
PRIMERS = (PRIMER, PRIMER_ALONE)


def run(params: Params, arm: str, seed: int) -> None:
    """Sample every milestone of an arm into results/samples/ARM/seed-SEED: an array and a PNG grid each.

    Raises:
        UserError: the weights are missing or do not fit.
    """
    params = with_chosen_values(params, arm)
    compute = device.resolve(params.compute, params.training.devices)
    num_classes, output = open_data(params).num_classes, paths.samples(arm, seed)
    files = weights_of(params, arm, seed)
    hashes = {key: file_sha256(file) for key, file in files.items()}
    inputs = {
        "architecture": architecture_of(params, num_classes),
        "sampling": params.sampling,
        "compute": params.compute,
        "seed": seed,
        "weights_sha256": hashes,
    }
    is_shared = params.sampling.num_samples > params.sampling.batch_size
    with joint_session(params, "sample", arm, seed, inputs=inputs, output=output, is_shared=is_shared) as (
        session,
        ranks,
    ):
        draw = partial(_draw, params, arm, seed, compute, ranks)
        if not ranks.is_first:
            for key, file in files.items():
                draw(key, file)
        elif session.is_to_do:
            with publish_folder(output) as folder:
                samples = {}
                for key, file in files.items():
                    images = draw(key, file, Pieces(session.folder / name_of(key)))
                    samples[key] = _write(params, images, folder, name_of(key))
                info = {**params.sampling.model_dump(), "weights_sha256": hashes, "samples_sha256": samples}
                publish_description(folder / INFO, info)
            num_images = params.sampling.num_samples * len(files)
            session.record.update(compute.describe(), num_images=num_images, devices=ranks.num_ranks)
            for key in files:
                session.tracked.figure(output / f"{name_of(key)}.png")
    publish_arm(params, arm, seed, through="sample")


def weights_of(params: Params, arm: str, seed: int) -> dict[str, Path]:
    """The weights that an arm is sampled from: by milestone, the primers first if there are any.

    Raises:
        UserError: some are missing.
    """
    finetuned = require(paths.finetune(arm, seed), "finetune", arm, seed)
    milestones = read_json(finetuned / finetune.MILESTONES, "finetune")
    files = {key: finetuned / finetune.milestone_file(float(key)) for key in milestones}
    for file in files.values():
        require(file, "finetune", arm, seed)
    if not has_primer(params, arm):
        return files
    pretrained = require(paths.pretrain(arm, seed) / pretrain.CHECKPOINT, "pretrain", arm, seed)
    alone = {PRIMER_ALONE: pretrained} if params.visible_of(arm).num_visible == 1 else {}
    return {PRIMER: pretrained, **alone, **files}


def has_primer(params: Params, arm: str) -> bool:
    """Whether an arm's pretrained weights are sampled, too: if asked, and it has some."""
    return params.sampling.primer and params.arm(arm).strategy != "none"


def name_of(key: str) -> str:
    """How the files of a milestone or of a primer begin."""
    return key if key in PRIMERS else finetune.milestone_name(float(key))


def title_of(key: str) -> str:
    """A milestone or a primer, for people."""
    primers = {PRIMER: "the primer", PRIMER_ALONE: "the primer, each patch alone"}
    return primers.get(key) or f"{float(key):.0%}"


def _draw(
    params: Params,
    arm: str,
    seed: int,
    compute: device.Compute,
    ranks: Ranks,
    key: str,
    weights: Path,
    kept: Pieces | None = None,
) -> np.ndarray:
    """The samples of a milestone or of a primer, on the first rank."""
    is_primer = key in PRIMERS
    given = params.for_pretraining(arm) if is_primer else params
    num_classes = (open_pretraining_data(params, arm) if is_primer else open_data(params)).num_classes
    model, title = load_model(given, weights, num_classes, compute), f"sample {arm} at {title_of(key)}"
    network = PatchesAlone(model) if key == PRIMER_ALONE else model
    return draw_images(given, network, num_classes, seed, params.sampling.num_samples, compute, title, kept, ranks)


class PatchesAlone(nn.Module):
    """A network that is shown every patch alone: its patches of an image are drawn independently of each other.

    Args:
        model: maps patches (B, S, P), t (B,), visible_idx (B, S) and labels to predictions (B, S, P).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor, t: Tensor, visible_idx: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predictions (B, S, P), each of its own patch."""
        number = patches.shape[1]
        labels = None if labels is None else labels.repeat_interleave(number)
        alone = (patches.flatten(0, 1)[:, None], t.repeat_interleave(number), visible_idx.flatten()[:, None], labels)
        return self.model(*alone).reshape(patches.shape)  # (B·S, 1, P) → (B, S, P)


def _write(params: Params, images: np.ndarray, folder: Path, name: str) -> str:
    """Write samples and a grid of some of them; the sha256 of the former."""
    np.save(folder / f"{name}.npy", images)
    save_grid(images[: params.sampling.grid_images], folder / f"{name}.png")
    return file_sha256(folder / f"{name}.npy")
