"""`maskdm export`: a checkpoint of an experiment as plain safetensors, with a config and a model card."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import UserError
from maskdm.base.tensors import load_weights
from maskdm.config import Params, Run, load_params, parse_params, paths
from maskdm.config.architecture import architecture_of
from maskdm.config.formats import WeightSet
from maskdm.config.jobs import EVERYTHING, Job, Jobs
from maskdm.config.stamps import read_stamp
from maskdm.data.arrays import ImageArrays
from maskdm.data.inputs import open_training_data, read_json
from maskdm.models.exported import check_replaceable, publish_exported
from maskdm.models.model_card import Training, exported_card

EXPORTED = Path("exported")  # where folders go that are not given a place
PLACE = re.compile(r"results/(pretrain|finetune)/([a-z0-9][a-z0-9-]*)/seed-(\d+)(?:/([^/]+))?")
MILESTONE = re.compile(r"milestone-(\d\.\d{3})\.safetensors")
EXPECTED = (
    "expected results/finetune/ARM/seed-S/milestone-….safetensors, results/pretrain/ARM/seed-S/checkpoint.safetensors, "
    "or such a folder; run this where its params.yaml is"
)


@dataclass(frozen=True)
class Place:
    """A checkpoint of the experiment in the working directory.

    Attributes:
        stage: `pretrain` or `finetune`.
        milestone: its key, such as `1.000`; empty for `pretrain`.
        file: relative to the working directory.
    """

    stage: str
    arm: str
    seed: int
    milestone: str
    file: Path

    @property
    def name(self) -> str:
        """For a folder."""
        last = paths.milestone_name(float(self.milestone)) if self.milestone else "pretrained"
        return f"{self.arm}-seed-{self.seed}-{last}"

    @property
    def what(self) -> str:
        """For people."""
        last = f"at {float(self.milestone):.0%} of the budget" if self.milestone else "after pretraining alone"
        return f"arm {self.arm}, seed {self.seed}, {last}"


def run(options: argparse.Namespace) -> None:
    """Export a checkpoint.

    Args:
        options: of the command line.

    Raises:
        UserError: there is no such checkpoint here, it is of other params, or the place is taken.
    """
    given: Params = load_params()
    place = locate(Path(options.checkpoint), given)
    which: WeightSet = options.which
    out = Path(options.out) if options.out else EXPORTED / place.name
    check_replaceable(out)
    _check_is_there(place, given)
    jobs = Jobs(given)
    _check_params(jobs.find(place.stage, place.arm, place.seed), place)
    arm = jobs.run_of(place.arm, place.seed)
    params = arm.params if place.stage == "finetune" else _of_pretraining(arm.params, place.arm)
    num_classes = _num_classes(arm, place)
    weights, _ = load_weights(place.file, which, architecture_of(params, num_classes))
    source = {"file": place.file.as_posix(), "sha256": file_sha256(place.file), "arm": place.arm, "seed": place.seed}
    card = exported_card(out.name, params, num_classes, which, _training(jobs, place, which))
    publish_exported(out, params, num_classes, {which: weights}, which, source, card)
    print(f"written: {out} ({which} weights of {place.what}; README.md says how to draw images)")


def locate(path: Path, params: Params) -> Place:
    """Which checkpoint a path means; of a folder of milestones the last.

    Args:
        path: a file or a folder.
        params: of the experiment.

    Raises:
        UserError: it is none of the experiment in the working directory.
    """
    relative = Path(os.path.relpath(path)).as_posix()
    found = PLACE.fullmatch(relative)
    if found is None:
        raise UserError(f"{path} is no checkpoint of the experiment in {Path.cwd()}: {EXPECTED}")
    stage, arm, seed, name = found[1], found[2], int(found[3]), found[4]
    params.arm(arm)
    if name is None:
        name = paths.CHECKPOINT if stage == "pretrain" else paths.milestone_file(params.budget.milestones[-1])
    folder = paths.pretrain(arm, seed) if stage == "pretrain" else paths.finetune(arm, seed)
    if stage == "finetune" and name.startswith("milestone-") and folder.is_dir() and not (folder / name).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
        raise UserError(f"there is no {folder / name}; there are {there or 'no weights at all'}")
    milestone = MILESTONE.fullmatch(name)
    if (stage == "finetune") != (milestone is not None) or (stage == "pretrain" and name != paths.CHECKPOINT):
        raise UserError(f"{path} is no checkpoint of the stage {stage}: {EXPECTED}")
    return Place(stage, arm, seed, milestone[1] if milestone else "", folder / name)


def _check_is_there(place: Place, params: Params) -> None:
    if place.file.exists():
        return
    if place.seed not in params.seeds:
        raise UserError(f"seed {place.seed} is not in `seeds` of params.yaml: {params.seeds}")
    raise UserError(
        f"nothing to export yet: there is no {place.file}, which holds the weights of {place.what}; run the "
        "experiment first (dvc repro, or snakemake)"
    )


def _check_params(job: Job, place: Place) -> None:
    """Weights say which params they were trained with."""
    if reason := job.why_outdated():
        raise UserError(
            f"the model card of {place.file} would be wrong: {reason}; put params.yaml back, or run first: "
            f"{job.first.command}   {EVERYTHING}"
        )


def _of_pretraining(params: Params, arm: str) -> Params:
    """The params of pretrained weights on their own: their dataset is `dataset`, and there is no other arm."""
    content = params.for_pretraining(arm).model_dump(mode="json", exclude_unset=True)
    own = content["arms"][arm]
    for section in (content["pretrain"], own.get("pretrain", {})):
        section.pop("dataset", None)
    content["datasets"], content["arms"] = {}, {arm: own}
    content["evaluation"]["reference"] = "train"
    return parse_params(content, source=f"the params of arm {arm}'s pretraining")


def _num_classes(run: Run, place: Place) -> int:
    """Of the dataset that the network was trained on, where that counts."""
    if not run.params.model.class_conditional:
        return 0
    return open_training_data(run.pretrain if place.stage == "pretrain" else run.finetune).num_classes


def _training(jobs: Jobs, place: Place, which: WeightSet) -> Training:
    """All that results/ knows of a checkpoint."""
    run = jobs.run_of(place.arm, place.seed)
    record = _read_if_there(paths.record(place.stage, place.arm, place.seed), place.stage)
    scores, metrics, not_scored = _scores(jobs, place, which)
    return Training(
        what=place.what,
        arm=place.arm,
        manifests=_manifests(run.params, place, record),
        spent=_spent(run, place),
        record=record,
        scores=scores,
        metrics=metrics,
        not_scored=not_scored,
        started_from=run.params.pretrain_of(place.arm).checkpoint,
        started_from_sha256=_init_sha256(place),
        num_features=_num_features(metrics),
    )


def _init_sha256(place: Place) -> str | None:
    """Of the weights that pretraining started from, if it says so."""
    stamp = read_stamp(paths.pretrain(place.arm, place.seed))
    return None if stamp is None else stamp.inputs.get("pretrain.checkpoint")


def _num_features(metrics: dict[str, Any]) -> int:
    """D of the extractor that made the scores; 0 where it is not there any more."""
    info = _read_if_there(paths.FEATURES / paths.FEATURES_INFO, "features")
    is_same = (
        metrics.get("extractor_sha256") is not None and info.get("extractor_sha256") == metrics["extractor_sha256"]
    )
    return int(info.get("num_features", 0)) if is_same else 0


def _read_if_there(path: Path, stage: str) -> dict[str, Any]:
    return dict(read_json(path, stage)) if path.exists() else {}


def _manifests(params: Params, place: Place, record: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """What was trained on; data that have been prepared anew since are not claimed."""
    other = params.pretrain_of(place.arm).dataset
    found = {}
    if other is not None:
        found[f"pretrained on `{other}`"] = _manifest(paths.pretrain_data(other))
    if place.stage == "finetune" or other is None:
        manifest = _manifest(paths.DATA)
        is_other = manifest is not None and record.get("data_sha256") not in (None, manifest["sha256"])
        found["trained on" if other is None else "finetuned on"] = None if is_other else manifest
    return found


def _manifest(folder: Path) -> dict[str, Any] | None:
    return ImageArrays.open(folder).manifest if folder.exists() else None


def _spent(run: Run, place: Place) -> dict[str, dict[str, int]]:
    """Steps, images and FLOPs of the stages until the checkpoint."""
    spent_first = run.finetune.before
    first = {
        "steps": run.pretrain.num_steps,
        "batch_size": run.pretrain.batch_size,
        "images_seen": spent_first.images_seen,
        "flops": spent_first.flops,
    }
    spent = {"masked pretraining": first} if run.pretrain.num_steps else {}
    if place.stage == "pretrain":
        return spent or {"initialised, not trained": first}
    together = read_json(place.file.parent / paths.MILESTONES, "finetune")[place.milestone]
    second = {
        "steps": together["step"],
        "batch_size": run.finetune.batch_size,
        **{key: together[key] - first[key] for key in ("images_seen", "flops")},
    }
    return {
        **spent,
        "unmasked finetuning": second,
        "together": {key: together[key] for key in ("images_seen", "flops")},
    }


def _scores(jobs: Jobs, place: Place, which: WeightSet) -> tuple[dict[str, Any] | None, dict[str, Any], str]:
    """The scores of a checkpoint, the metrics that they stand in, and why there are none."""
    file = paths.metrics(place.arm, place.seed)
    if which == "raw":
        return None, {}, "scores are of averaged weights, and these are the raw ones"
    if not file.is_file():
        return None, {}, f"there was no {file} when it was exported"
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        if jobs.find("evaluate", place.arm, place.seed).why_outdated():
            return None, {}, f"{file} was of other params when it was exported"
        scores = metrics["milestones"][place.milestone] if place.milestone else metrics["primer"]
        return dict(scores), metrics, ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, {}, f"{file} had no scores of it when it was exported"
