"""Where every stage reads and writes, relative to the folder of params.yaml: one place, for code and engines.

Names that the files of results/ have in common stand here as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from maskdm.config.schema import DatasetConfig

RESULTS = Path("results")
DATA = RESULTS / "data"
HELD_OUT = DATA / "held_out"  # its part that is never trained on
FEATURES = RESULTS / "features"
TUNING = RESULTS / "tuning"
CHOSEN = RESULTS / "chosen"
SCALE = RESULTS / "metrics" / "scale.json"  # of the metrics: real against real, and the untrained network
REPORT = RESULTS / "report"
WORK = Path(".work")  # locks, unfinished work and previous outputs: never an output of a stage
CURVE = "curve.csv"  # in the folders of pretrain and finetune
CHECKPOINT = "checkpoint.safetensors"  # of pretrain
MILESTONES = "milestones.json"  # of finetune: what is spent by each
FEATURES_INFO, CLASSIFIER, REAL_FEATURES = "features.json", "classifier.safetensors", "reference.npy"  # of features
DOWNLOADED = Path("data")  # beside params.yaml
MARKERS = WORK / "done"  # empty files that Snakemake takes for outputs

WeightSet = Literal["raw", "ema"]  # of the two sets of weights that training keeps

TRAINING_STAGES = ("pretrain", "finetune")
ARM_STAGES = (*TRAINING_STAGES, "sample", "evaluate")  # of an arm and a seed, in their order
GIVEN = "given"  # the trial that was chosen for every arm where nothing is tuned
ORIGIN_KEYS = ("extractor", "extractor_sha256", "data_sha256")  # scores may be compared only where these agree


def milestone_name(fraction: float) -> str:
    """`milestone-0.500`: files of a milestone start with it."""
    return f"milestone-{fraction:.3f}"


def milestone_file(fraction: float) -> str:
    """The weights at a fraction of the budget."""
    return f"{milestone_name(fraction)}.safetensors"


def root_of(dataset: DatasetConfig) -> Path:
    """Where a dataset's files are looked for and downloaded to, from the folder of params.yaml."""
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
    """The provenance and timing of one run of a stage: what differs between equal runs lives here alone."""
    return RESULTS / "records" / f"{name_of(stage, arm, seed, trial)}.json"


def name_of(stage: str, arm: str | None = None, seed: int | None = None, trial: str | None = None) -> str:
    """The name of one run of a stage, for files: `pretrain-patch-m50-seed-0`."""
    return stage if arm is None else f"{stage}-{arm}-seed-{seed}" if trial is None else f"{stage}-{arm}-trial-{trial}"


def work(output: Path) -> Path:
    """The work folder of an output; in it, one folder for every key of a stamp (`maskdm.config.stamps`)."""
    return WORK / output.with_suffix("")


def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` that holds a DVC repository, else `start` itself."""
    here = (start or Path.cwd()).resolve()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)
