"""`maskdm export`: a checkpoint of an experiment as plain safetensors, with a config and a model card."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from maskdm.base.checksums import file_sha256
from maskdm.base.errors import UserError
from maskdm.base.tensors import load_weights
from maskdm.config import Params, Run, load_params, parse_params, paths
from maskdm.config.jobs import EVERYTHING, Job, Jobs
from maskdm.config.paths import WeightSet
from maskdm.config.stamps import read_stamp
from maskdm.data.arrays import ImageArrays
from maskdm.data.inputs import open_training_data, read_json
from maskdm.models.card import model_card
from maskdm.models.exported import check_replaceable, publish_exported
from maskdm.scoring.protocol import Protocol, bias_note, extractor_caution, few_samples_caution

EXPORTED = Path("exported")  # where folders are written by default
PLACE = re.compile(r"results/(pretrain|finetune)/([a-z0-9][a-z0-9-]*)/seed-(\d+)(?:/([^/]+))?")
MILESTONE = re.compile(r"milestone-(\d\.\d{3})\.safetensors")
EXPECTED = (
    "expected results/finetune/ARM/seed-S/milestone-….safetensors, results/pretrain/ARM/seed-S/checkpoint.safetensors, "
    "or such a folder; run this where its params.yaml is"
)


def run(options: argparse.Namespace) -> None:
    """Export a checkpoint.

    Args:
        options: the parsed command line.

    Raises:
        UserError: there is no such checkpoint, it is out of date, or the output exists and is something else.
    """
    given, which = load_params(), options.which
    file = locate(Path(options.checkpoint), given)
    _, stage, arm, folder, name = file.parts
    seed = int(folder.removeprefix("seed-"))
    milestone = found[1] if (found := MILESTONE.fullmatch(name)) else ""
    what = f"at {float(milestone):.0%} of the budget" if milestone else "after pretraining alone"
    what = f"arm {arm}, seed {seed}, {what}"
    out = EXPORTED / f"{arm}-{folder}-{file.stem if milestone else 'pretrained'}"
    out = Path(options.out) if options.out else out
    check_replaceable(out)
    if not file.exists():
        if seed not in given.seeds:
            raise UserError(f"seed {seed} is not in `seeds` of params.yaml: {given.seeds}")
        raise UserError(
            f"nothing to export yet: there is no {file}, which holds the weights of {what}; run the experiment first "
            "(dvc repro, or snakemake)"
        )
    jobs = Jobs(given)
    job = jobs.find(stage, arm, seed)
    if reason := job.why_outdated():
        raise UserError(
            f"the model card of {file} would be wrong: {reason}; put params.yaml back, or run first: "
            f"{job.first.command}   {EVERYTHING}"
        )
    params, num_classes = job.run.params if milestone else _of_pretraining(job.run.params, arm), 0
    if params.model.class_conditional:
        num_classes = open_training_data(job.run.finetune if milestone else job.run.pretrain).num_classes
    weights, _ = load_weights(file, which, params.architecture(num_classes))
    source = {"file": file.as_posix(), "sha256": file_sha256(file), "arm": arm, "seed": seed}
    known = {"what": what, "arm": arm, **_trained(job.run, milestone), **_scored(jobs, job, milestone, which)}
    card = model_card(out.name, params, num_classes, which, **known)
    publish_exported(out, params, num_classes, {which: weights}, which, source, card)
    print(f"written: {out} ({which} weights of {what}; README.md says how to draw images)")


def locate(path: Path, params: Params) -> Path:
    """The checkpoint that a path means, relative to the working directory.

    Args:
        path: a checkpoint, or the folder of one; in a folder of milestones the last milestone is meant.
        params: the experiment in the working directory.

    Raises:
        UserError: it is not a checkpoint of this experiment.
    """
    found = PLACE.fullmatch(Path(os.path.relpath(path)).as_posix())
    if found is None:
        raise UserError(f"{path} is not a checkpoint of the experiment in {Path.cwd()}: {EXPECTED}")
    stage, arm, seed, name = found[1], found[2], int(found[3]), found[4]
    params.arm(arm)
    if stage == "pretrain":
        file = paths.pretrain(arm, seed) / (name or paths.CHECKPOINT)
        is_checkpoint = file.name == paths.CHECKPOINT
    else:
        file = paths.finetune(arm, seed) / (name or paths.milestone_file(params.budget.milestones[-1]))
        if file.name.startswith("milestone-") and file.parent.is_dir() and not file.is_file():
            there = ", ".join(sorted(other.name for other in file.parent.glob("*.safetensors")))
            raise UserError(f"there is no {file}; there are {there or 'no weights at all'}")
        is_checkpoint = MILESTONE.fullmatch(file.name) is not None
    if not is_checkpoint:
        raise UserError(f"{path} is not a checkpoint of the stage {stage}: {EXPECTED}")
    return file


def _of_pretraining(params: Params, arm: str) -> Params:
    """The params for pretrained weights alone: `dataset` is the one of pretraining, and there is no other arm."""
    content = params.for_pretraining(arm).model_dump(mode="json", exclude_unset=True)
    own = content["arms"][arm]
    for section in (content["pretrain"], own.get("pretrain", {})):
        section.pop("dataset", None)
    content["datasets"], content["arms"] = {}, {arm: own}
    content["evaluation"]["reference"] = "train"
    return parse_params(content, source=f"the params of arm {arm}'s pretraining")


def _trained(run: Run, milestone: str) -> dict[str, Any]:
    """What a checkpoint was trained on, from which weights, and at what cost; `milestone` is empty for pretraining."""
    stage, other = "finetune" if milestone else "pretrain", run.params.pretrain_of(run.arm).dataset
    record = _read_if_there(paths.record(stage, run.arm, run.seed), stage)
    manifests = {} if other is None else {f"pretrained on `{other}`": _manifest(paths.pretrain_data(other))}
    if milestone or other is None:
        manifest = _manifest(paths.DATA)
        if manifest and record.get("data_sha256") not in (None, manifest["sha256"]):
            manifest = None  # the data were prepared again since then
        manifests["trained on" if other is None else "finetuned on"] = manifest
    stamp = read_stamp(paths.pretrain(run.arm, run.seed))
    return {
        "record": record,
        "manifests": manifests,
        "started_from": run.params.pretrain_of(run.arm).checkpoint,
        "started_from_sha256": stamp.inputs.get("pretrain.checkpoint") if stamp else None,
        "spent": _spent(run, milestone),
    }


def _read_if_there(path: Path, stage: str) -> dict[str, Any]:
    return dict(read_json(path, stage)) if path.exists() else {}


def _manifest(folder: Path) -> dict[str, Any] | None:
    return ImageArrays.open(folder).manifest if folder.exists() else None


def _spent(run: Run, milestone: str) -> dict[str, dict[str, int]]:
    """Steps, images and FLOPs of the stages up to a checkpoint."""
    pretrain, finetune = run.pretrain, run.finetune
    first = {"steps": pretrain.num_steps, "batch_size": pretrain.batch_size, **finetune.before.as_dict()}
    spent = {"masked pretraining": first} if pretrain.num_steps else {}
    if not milestone:
        return spent or {"initialised, not trained": first}
    both = dict(read_json(paths.finetune(run.arm, run.seed) / paths.MILESTONES, "finetune")[milestone])
    second = {"steps": both.pop("step"), "batch_size": finetune.batch_size}
    second |= {key: both[key] - first[key] for key in ("images_seen", "flops")}
    return {**spent, "unmasked finetuning": second, "together": both}


def _scored(jobs: Jobs, job: Job, milestone: str, which: WeightSet) -> dict[str, Any]:
    """The scores of a checkpoint with their protocol, or why there are none."""
    assert job.arm is not None and job.seed is not None
    file = paths.metrics(job.arm, job.seed)
    if which == "raw":
        return {"not_scored": "scores are of averaged weights, and these are raw weights"}
    if not file.is_file():
        return {"not_scored": f"there was no {file} when the model was exported"}
    if jobs.find("evaluate", job.arm, job.seed).why_outdated():
        return {"not_scored": f"{file} was out of date when the model was exported"}
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        scores = metrics["milestones"][milestone] if milestone else metrics["primer"]
        protocol = Protocol.from_dict(metrics["protocol"])
    except (OSError, ValueError, LookupError):
        return {"not_scored": f"{file} had no scores of it when the model was exported"}
    features = _read_if_there(paths.FEATURES / paths.FEATURES_INFO, "features")
    are_those = features.get("extractor_sha256") == metrics["extractor_sha256"]
    fewest = min(protocol.num_samples, protocol.num_real)
    caveats = [
        extractor_caution(metrics["extractor"]),
        few_samples_caution(fewest, features["num_features"]) if are_those else "",
        bias_note(protocol.num_samples),
        "One run with one seed: another seed gives another number.",
    ]
    return {"scores": scores, "metrics": metrics, "protocol": protocol, "caveats": caveats, "not_scored": ""}
