"""The paths that stages read and write, relative to the folder of params.yaml, and names that their files share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from maskdm.config.schema import DatasetConfig

RESULTS = Path("results")
DATA = RESULTS / "data"
HELD_OUT = DATA / "held_out"  # the images that are never trained on
FEATURES = RESULTS / "features"
TUNING = RESULTS / "tuning"
CHOSEN = RESULTS / "chosen"
SCALE = RESULTS / "metrics" / "scale.json"  # scores of real images and of the untrained network
REPORT = RESULTS / "report"
WORK = Path(".work")  # locks, unfinished work and previous outputs
CURVE = "curve.csv"  # in the folders of pretrain and finetune
CHECKPOINT = "checkpoint.safetensors"  # of pretrain
MILESTONES = "milestones.json"  # of finetune: the compute spent at each milestone
FEATURES_INFO, CLASSIFIER, REAL_FEATURES = "features.json", "classifier.safetensors", "reference.npy"  # of features
DOWNLOADED = Path("data")  # downloaded files of datasets
MARKERS = WORK / "done"  # empty files that are the outputs of Snakemake's rules

WeightSet = Literal["raw", "ema"]  # the sets of weights that training keeps: as trained, and averaged

TRAINING_STAGES = ("pretrain", "finetune")
ARM_STAGES = (*TRAINING_STAGES, "sample", "evaluate")  # the stages of an arm and a seed, in order
GIVEN = "given"  # the name of the "chosen trial" of every arm if nothing is tuned
ORIGIN_KEYS = ("extractor", "extractor_sha256", "data_sha256")  # scores may be compared only if these agree


def milestone_name(fraction: float) -> str:
    """The beginning of the names of a milestone's files: `milestone-0.500`."""
    return f"milestone-{fraction:.3f}"


def milestone_file(fraction: float) -> str:
    """The name of the file of weights at a fraction of the budget."""
    return f"{milestone_name(fraction)}.safetensors"


def root_of(dataset: DatasetConfig) -> Path:
    """The folder in which the files of a dataset are searched, and to which they are downloaded."""
    return DOWNLOADED / dataset.source if dataset.root is None else Path(dataset.root)


def pretrain_data(name: str) -> Path:
    """The folder of one of `datasets`."""
    return DATA / "pretrain" / name


def trial(arm: str, name: str) -> Path:
    """The file of one trial of an arm's tuning."""
    return TUNING / arm / f"{name}.json"


def chosen(arm: str) -> Path:
    """The file of the values that an arm runs with."""
    return CHOSEN / f"{arm}.json"


def pretrain(arm: str, seed: int) -> Path:
    """The folder of an arm's pretrained weights and curve."""
    return RESULTS / "pretrain" / arm / f"seed-{seed}"


def finetune(arm: str, seed: int) -> Path:
    """The folder of an arm's finetuned weights, one file per milestone, and curve."""
    return RESULTS / "finetune" / arm / f"seed-{seed}"


def samples(arm: str, seed: int) -> Path:
    """The folder of an arm's samples: an array and a PNG grid per milestone."""
    return RESULTS / "samples" / arm / f"seed-{seed}"


def metrics(arm: str, seed: int) -> Path:
    """The file of an arm's metrics."""
    return RESULTS / "metrics" / f"{arm}-seed-{seed}.json"


def record(stage: str, arm: str | None = None, seed: int | None = None, trial: str | None = None) -> Path:
    """The file with provenance and timing of one run of a stage: what differs between equal runs is only here."""
    return RESULTS / "records" / f"{name_of(stage, arm, seed, trial)}.json"


def name_of(stage: str, arm: str | None = None, seed: int | None = None, trial: str | None = None) -> str:
    """The name of one run of a stage for files: `pretrain-patch-m50-seed-0`."""
    return stage if arm is None else f"{stage}-{arm}-seed-{seed}" if trial is None else f"{stage}-{arm}-trial-{trial}"


def work(output: Path) -> Path:
    """The work folder of an output; it has a subfolder for every key of a stamp (`maskdm.config.stamps`)."""
    return WORK / output.with_suffix("")


def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` that is a DVC repository; `start` itself if there is none."""
    here = (start or Path.cwd()).resolve()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)
