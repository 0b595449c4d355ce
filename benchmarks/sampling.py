"""`sampling`: images per second, and FID against the number of evaluations, for every sampler."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import get_args

import yaml

from benchmarks.outcome import Cell, Outcome, Table, Target
from benchmarks.shapes import Settings, Shape, default_params
from benchmarks.timing import Spread, Task, interleave, looped
from benchmarks.workflow import command
from maskdm.base import rng
from maskdm.config import Params, load_params, paths
from maskdm.config.schema import Sampler
from maskdm.data.inputs import open_data
from maskdm.method.backbones import build_model
from maskdm.models.drawing import draw_images, load_model
from maskdm.scoring.scorer import Scorer
from maskdm.training import devices

NUM_EVALUATIONS = 50
SAMPLERS = get_args(Sampler)
# shape → (images per batch, timed evaluations, samplers); every evaluation takes the same time
TIMED = {"tiny": (100, 50, SAMPLERS), "small": (16, 2, SAMPLERS[:1]), "celeba": (4, 2, SAMPLERS[:1])}
NUM_STEPS = (10, 20, 50)
REFERENCE = ("ddim", 250)
SEEDS = (0, 1, 2)
ARM, SEED = "scratch", 0
Fids = Mapping[tuple[str, int], Sequence[float]]  # (sampler, number of evaluations) → FID of every seed
# Higher-order samplers need few evaluations. The bound is measured: the range of the reference's FID over seeds.
TARGETS = {
    (sampler, num_steps): Target(
        f"FID of {sampler} with {num_steps} evaluations, from that of {REFERENCE[0]} with {REFERENCE[1]}", float("nan")
    )
    for sampler in ("dpmsolver++", "unipc")
    for num_steps in (20, 50)
}


def run(settings: Settings) -> Outcome:
    """Measure speed, then quality on the default experiment's scratch arm, which is trained first."""
    tables = [_speed(settings)]
    if settings.is_quick:
        return Outcome(tables, notes=["quality against evaluations: left out by --quick"])
    folder = _train_default(settings.folder / "quality")
    fids = _measure_quality(folder)
    record = json.loads((folder / paths.record("finetune", ARM, SEED)).read_text(encoding="utf-8"))
    table = quality_table(fids, f"{record['device_name']}, {record['precision']}")
    return Outcome([*tables, table], quality_targets(fids))


def _speed(settings: Settings) -> Table:
    tasks, sizes = {}, dict[tuple[str, str], tuple[int, int]]()
    for shape in settings.shapes:
        num_images, num_steps, samplers = (2, 2, SAMPLERS) if settings.is_quick else TIMED[shape.name]
        for sampler in samplers:
            tasks[f"{shape.name} {sampler}"] = _drawing_task(shape, sampler, num_images, num_steps, settings)
            sizes[shape.name, sampler] = num_images, num_steps
    rounds = interleave(tasks, settings.rounds, "sampling: speed")
    rows: list[dict[str, Cell]] = []
    for (shape_name, sampler), (num_images, num_steps) in sizes.items():
        name = f"{shape_name} {sampler}"
        rows.append(
            {
                "shape": shape_name,
                "sampler": sampler,
                "batch": num_images,
                "timed evaluations": num_steps,
                "images/s": rounds.rate(name, num_images * num_steps / NUM_EVALUATIONS),
                "ms per evaluation": rounds.of(name, 1e3 / num_steps),
                "over ddim": rounds.ratio(name, f"{shape_name} ddim"),
            }
        )
    return Table(f"drawing images with {NUM_EVALUATIONS} evaluations each", rows)


def _drawing_task(shape: Shape, sampler: str, num_images: int, num_steps: int, settings: Settings) -> Task:
    params = shape.params(0.0, settings.threads, device=settings.device.type)
    params = with_sampler(params, sampler, num_steps, num_images)
    compute = devices.resolve(params.compute)
    model = build_model(params, 0)
    model.initialise(rng.generator(SEED, "init"))
    model.eval().to(compute.device)

    def draw() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress display
            draw_images(params, model, 0, SEED, num_images, compute, "sampling")

    return Task(looped(draw))


def with_sampler(params: Params, sampler: str, num_steps: int, batch_size: int | None = None) -> Params:
    """The same experiment with another sampler.

    Args:
        params: the experiment.
        sampler: see `SamplingConfig`.
        num_steps: evaluations of the network per image.
        batch_size: images per batch; None leaves it.
    """
    change: dict[str, Cell] = {"sampler": sampler, "num_steps": num_steps, "eta": 0.0}
    if batch_size is not None:
        change["batch_size"] = batch_size
    return params.model_copy(update={"sampling": params.sampling.model_copy(update=change)})


def _train_default(folder: Path) -> Path:
    """Train the default experiment's scratch arm in a folder; returns the folder."""
    folder.mkdir(parents=True)
    content = default_params()
    content |= {"arms": {ARM: content["arms"][ARM]}, "tracking": {"enabled": False}}
    (folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    for stage in ("prepare", "features", "choose"):
        command(["maskdm", stage], folder)
    for stage in ("pretrain", "finetune"):
        print(f"{stage} of the default's {ARM} arm …", flush=True)
        command(["maskdm", stage, "--arm", ARM, "--seed", f"{SEED}"], folder)
    return folder


def _measure_quality(folder: Path) -> Fids:
    """The FID of every sampler at several numbers of evaluations, the reference first."""
    cases = [REFERENCE, *((sampler, num_steps) for num_steps in NUM_STEPS for sampler in SAMPLERS)]
    fids = {}
    with contextlib.chdir(folder):
        params = load_params()
        compute, images = devices.resolve(params.compute), open_data(params)
        weights = paths.finetune(ARM, SEED) / paths.milestone_file(1.0)
        model = load_model(params, weights, images.num_classes, compute)
        scorer = Scorer(params, compute)

        def fid(drawn_with: Params, seed: int) -> float:
            with contextlib.redirect_stderr(io.StringIO()):  # their progress displays
                num_images = params.sampling.num_samples
                drawn = draw_images(drawn_with, model, images.num_classes, seed, num_images, compute, "draw")
                return scorer.score(drawn, "score").fid

        for sampler, num_steps in cases:
            drawn_with = with_sampler(params, sampler, num_steps)
            fids[sampler, num_steps] = [fid(drawn_with, seed) for seed in SEEDS]
            print(f"{sampler} with {num_steps} evaluations: FID {fmean(fids[sampler, num_steps]):.3f}", flush=True)
    return fids


def quality_table(fids: Fids, trained_on: str) -> Table:
    """FID of every sampler, and its difference from the reference's.

    Args:
        fids: with those of the reference.
        trained_on: device and precision of training.
    """
    rows: list[dict[str, Cell]] = [
        {
            "sampler": sampler,
            "evaluations": num_steps,
            "mean FID": fmean(of_seeds),
            "less the reference's": fmean(of_seeds) - fmean(fids[REFERENCE]),
            "range": max(of_seeds) - min(of_seeds),
            "FID of the seeds": Spread(tuple(of_seeds)),
        }
        for (sampler, num_steps), of_seeds in fids.items()
    ]
    note = (
        f"One model, trained on {trained_on}; {len(SEEDS)} sampling seeds. Range: largest less smallest FID of them. "
        f"The range of the reference, {REFERENCE[0]} with {REFERENCE[1]} evaluations, bounds the targets."
    )
    return Table("quality against evaluations, the default's scratch arm", rows, note)


def quality_targets(fids: Fids) -> list[Target]:
    """With few evaluations the mean FID must differ from the reference's by at most the range of the reference."""
    reference = fids[REFERENCE]
    return [
        target.measured(abs(fmean(fids[case]) - fmean(reference)), max(reference) - min(reference))
        for case, target in TARGETS.items()
        if case in fids
    ]
