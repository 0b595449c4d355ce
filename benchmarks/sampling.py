"""`sampling`: images per second, and quality against evaluations for every sampler on the default's model."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import get_args

import yaml

from benchmarks import machine
from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.settings import Settings
from benchmarks.shapes import ROOT, Shape
from benchmarks.timing import Spread, Task, interleave, looped
from benchmarks.workflow import command
from maskdm.base import rng
from maskdm.base.machine import git_state
from maskdm.config import Params, load_params, paths
from maskdm.config.schema import Sampler
from maskdm.data.inputs import open_data
from maskdm.method.backbones import build_model
from maskdm.method.backbones.uvit import UViT
from maskdm.models.drawing import draw_images, load_model
from maskdm.scoring.scorer import Scorer
from maskdm.training import devices

NUM_EVALUATIONS = 50
SAMPLERS = get_args(Sampler)
# shape → (images of a batch, evaluations that are timed, samplers); every evaluation costs the same
TIMED = {"tiny": (100, 50, SAMPLERS), "small": (16, 2, SAMPLERS[:1]), "celeba": (4, 2, SAMPLERS[:1])}
NUM_STEPS = (10, 20, 50)
REFERENCE = ("ddim", 250)
SEEDS = (0, 1, 2)
ARM, SEED = "scratch", 0
WORK = ROOT / ".work" / "benchmarks"
# The promise: samplers of a higher order need few evaluations. Its bound is measured: the range of the reference's FID.
TARGETS = {
    (sampler, num_steps): Target(
        f"FID of {sampler} with {num_steps} evaluations, from that of {REFERENCE[0]} with {REFERENCE[1]}", None, None
    )
    for sampler in ("dpmsolver++", "unipc")
    for num_steps in (20, 50)
}


def run(settings: Settings) -> Outcome:
    """Speed, and where there is time the quality."""
    speed = Outcome([_speed(settings)])
    if settings.is_quick:
        return Outcome(speed.tables, [], ["quality against evaluations: left out by --quick"])
    folder = trained_default(quality_folder(settings))
    quality = measure_quality(folder)
    table = quality_table(quality, trained_on(folder))
    return Outcome([*speed.tables, table], quality_targets(quality))


# --- speed


def _speed(settings: Settings) -> Table:
    tasks, about = {}, dict[str, tuple[int, int]]()
    for shape in settings.shapes:
        num_images, num_steps, samplers = (2, 2, SAMPLERS) if settings.is_quick else TIMED[shape.name]
        for sampler in samplers:
            name = f"{shape.name} {sampler}"
            tasks[name] = _drawing_task(shape, sampler, num_images, num_steps, settings)
            about[name] = num_images, num_steps
    rounds = interleave(tasks, settings.rounds, "sampling: speed")
    rows: list[dict[str, Cell]] = []
    for name, (num_images, num_steps) in about.items():
        shape_name, sampler = name.split()
        rows.append(
            {
                "shape": shape_name,
                "sampler": sampler,
                "batch": num_images,
                "images/s": rounds.rate(name, num_images * num_steps / NUM_EVALUATIONS),
                "ms per evaluation": rounds.of(name, 1e3 / num_steps),
                "over ddim": rounds.ratio(name, f"{shape_name} ddim"),
            }
        )
    note = f"timed: {', '.join(f'{name} {steps}' for name, (_, steps) in about.items())} evaluations per image"
    return Table(f"drawing images with {NUM_EVALUATIONS} evaluations each", rows, note)


def _drawing_task(shape: Shape, sampler: str, num_images: int, num_steps: int, settings: Settings) -> Task:
    params = shape.params(0.0, settings.threads, device=settings.device.type)
    params = with_sampler(params, sampler, num_steps, num_images)
    compute = devices.resolve(params.compute)
    model = build_model(params, 0)
    model.initialise(rng.generator(SEED, "init"))
    model.eval().to(compute.device)

    def draw() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its own progress
            draw_images(params, model, 0, SEED, num_images, compute, "sampling")

    return Task(looped(draw))


def with_sampler(params: Params, sampler: str, num_steps: int, batch_size: int | None = None) -> Params:
    """The same experiment, drawing otherwise.

    Args:
        params: the experiment.
        sampler: see `SamplingConfig`.
        num_steps: evaluations of the network per image.
        batch_size: images at once; None leaves it.
    """
    change: dict[str, Cell] = {"sampler": sampler, "num_steps": num_steps, "eta": 0.0}
    if batch_size is not None:
        change["batch_size"] = batch_size
    return params.model_copy(update={"sampling": params.sampling.model_copy(update=change)})


# --- quality


@dataclass(frozen=True)
class Quality:
    """Scores of a sampler.

    Attributes:
        sampler: which.
        num_steps: evaluations per image.
        fid: one for every seed of the samples.
        kid: likewise.
    """

    sampler: str
    num_steps: int
    fid: tuple[float, ...]
    kid: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean FID."""
        return fmean(self.fid)

    @property
    def range(self) -> float:
        """The largest FID of a seed less the smallest."""
        return max(self.fid) - min(self.fid)


def quality_folder(settings: Settings) -> Path:
    """Where the model is trained: once for every commit, as stages find their work done; anew where there are changes.

    Args:
        settings: with the folder of this run.
    """
    commit, has_changes = git_state(machine.ROOT)
    return settings.folder / "quality" if commit is None or has_changes else WORK / f"quality-{commit[:7]}"


def trained_on(folder: Path) -> str:
    """The device and precision that the model was trained with.

    Args:
        folder: with a trained default.
    """
    path = folder / "results" / "records" / f"finetune-{ARM}-seed-{SEED}.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    return f"{record['device_name']}, {record['precision']}"


def trained_default(folder: Path) -> Path:
    """The default experiment's scratch arm, trained; done before, it takes seconds.

    Args:
        folder: of the experiment; made.

    Returns:
        the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content |= {"arms": {ARM: content["arms"][ARM]}, "tracking": {"enabled": False}}
    (folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    for stage in ("prepare", "features", "choose"):
        command(["maskdm", stage], folder)
    for stage in ("pretrain", "finetune"):
        print(f"{stage} of the default's {ARM} arm …", flush=True)
        command(["maskdm", stage, "--arm", ARM, "--seed", f"{SEED}"], folder)
    return folder


def measure_quality(folder: Path) -> list[Quality]:
    """Score every sampler at several numbers of evaluations, the reference first.

    Args:
        folder: with a trained default.
    """
    cases = [REFERENCE, *((sampler, num_steps) for num_steps in NUM_STEPS for sampler in SAMPLERS)]
    with contextlib.chdir(folder):
        params = load_params()
        compute, images = devices.resolve(params.compute), open_data(params)
        weights = paths.finetune(ARM, SEED) / paths.milestone_file(1.0)
        model = load_model(params, weights, images.num_classes, compute)
        scorer = Scorer(params, compute)
        found = []
        for sampler, num_steps in cases:
            drawn_with = with_sampler(params, sampler, num_steps)
            scores = [_score(drawn_with, model, images.num_classes, seed, compute, scorer) for seed in SEEDS]
            fid, kid = zip(*scores, strict=True)
            found.append(Quality(sampler, num_steps, fid, kid))
            print(f"{sampler} with {num_steps} evaluations: FID {found[-1].mean:.3f}", flush=True)
    return found


def _score(
    params: Params, model: UViT, num_classes: int, seed: int, compute: devices.Compute, scorer: Scorer
) -> tuple[float, float]:
    with contextlib.redirect_stderr(io.StringIO()):  # their own progress
        drawn = draw_images(params, model, num_classes, seed, params.sampling.num_samples, compute, "draw")
        metrics = scorer.score(drawn, "score")
    return metrics.fid, metrics.kid


def quality_table(qualities: list[Quality], trained: str) -> Table:
    """FID and KID of every sampler, and how far the FID is from the reference's.

    Args:
        qualities: the reference first.
        trained: what the model was trained on.
    """
    reference = qualities[0]
    rows: list[dict[str, Cell]] = [
        {
            "sampler": quality.sampler,
            "evaluations": quality.num_steps,
            "mean FID": quality.mean,
            "less the reference's": quality.mean - reference.mean,
            "range": quality.range,
            "FID of the seeds": Spread(quality.fid),
            "KID×1000 of the seeds": Spread(tuple(1000 * kid for kid in quality.kid)),
        }
        for quality in qualities
    ]
    sampler, num_steps = REFERENCE
    note = (
        f"{len(SEEDS)} seeds of the samples, one model, trained on {trained}; range: the seeds' largest FID less their "
        f"smallest. The reference is {sampler} with {num_steps} evaluations; its range bounds the targets."
    )
    return Table("quality against evaluations, the default's scratch arm", rows, note)


def quality_targets(qualities: list[Quality]) -> list[Target]:
    """Few evaluations must give the reference's mean FID to within the range of the reference's seeds.

    Args:
        qualities: the reference first.
    """
    reference = qualities[0]
    return [
        TARGETS[quality.sampler, quality.num_steps].measured(abs(quality.mean - reference.mean), reference.range)
        for quality in qualities
        if (quality.sampler, quality.num_steps) in TARGETS
    ]
