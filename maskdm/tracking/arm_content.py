"""What an arm's run in MLflow carries: a pure function of params and the files in results/."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from maskdm.config import Run, paths
from maskdm.config.paths import ARM_STAGES, TRAINING_STAGES
from maskdm.scoring.headline import DISTANCE, HEADLINES, SCALE_KEYS, SCORES, flat_scores
from maskdm.tracking.dataset import read_dataset
from maskdm.tracking.run_content import Points, RunContent, finite, only_numbers, read_json, read_rows

REPORT = "report"  # not of an arm, but the last that says something of it
SECTIONS = {"dataset", "model", "diffusion", "budget", "training", "sampling", "evaluation"}
OF_COMPUTE = {"device", "precision"}  # all else there changes rounding alone, and MLflow's params can't change
AT_MILESTONES = (*(score.key for score in SCORES), "flops", "images_seen", "tokens_seen")
# What only the report knows of an arm: it compares with scratch, over all seeds, by the headline of the experiment.
OF_A_SCORE = ("delta_{}", "flops_at_equal_{}", "device_seconds_at_equal_{}")
VERDICTS = ("compute_ratio", *(name.format(headline.key) for headline in HEADLINES for name in OF_A_SCORE))


def read_arm(run: Run, through: str = "evaluate", base: Path = Path()) -> RunContent:
    """Gather what results/ holds of an arm; what isn't there is left out.

    Args:
        run: the arm and seed.
        through: the last stage whose results to read: those of later ones may still be of an older run.
        base: the folder that results/ is in.

    Raises:
        ValueError: a file is not what its stage writes.
    """
    arm, seed = run.arm, run.seed
    stages = ARM_STAGES if through == REPORT else ARM_STAGES[: ARM_STAGES.index(through) + 1]
    records = {stage: read_json(base / paths.record(stage, arm, seed)) for stage in stages}
    content = RunContent(arm_params(run), dataset=read_dataset(base))
    for stage, folder in (("pretrain", paths.pretrain(arm, seed)), ("finetune", paths.finetune(arm, seed))):
        if stage in stages:
            rows = read_rows(base / folder / "curve.csv")
            content.points |= _losses(stage, rows) | _throughput(stage, rows, records[stage])
    if "sample" in stages:
        content.images = sorted((base / paths.samples(arm, seed)).glob("*.png"))
    if "evaluate" in stages:
        _add_metrics(content, read_json(base / paths.metrics(arm, seed)))
    _add_records(content, records)
    if through == REPORT and content.has_results:
        _add_verdict(content, arm, read_rows(base / paths.REPORT / "verdicts.csv"))
    return content


def arm_params(run: Run) -> dict[str, str]:
    """An arm's effective params, flat: its own by their bare name, the sections' with a dot."""
    params, pretrain = run.params, run.pretrain
    nested = {
        "arm": run.arm,
        "seed": run.seed,
        **run.mask,
        "mask_rate": pretrain.mask.mask_rate,  # a number, so that charts can place `none`
        "realised_mask_rate": pretrain.realised_mask_rate,
        "num_visible": pretrain.num_visible,
        **params.model_dump(mode="json", include=SECTIONS),
        "compute": params.compute.model_dump(include=OF_COMPUTE),
        "pretrain": pretrain.config.model_dump(mode="json") if pretrain.num_steps else {"share": 0.0},
        "finetune": run.finetune.config.model_dump(mode="json"),
    }
    return {key: str(value) for key, value in flat(nested) if value is not None}


def flat(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested plain values by dotted path."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _losses(stage: str, rows: list[dict[str, str]]) -> Points:
    losses = {int(row["step"]): finite(row["loss"]) for row in rows}
    return {(f"{stage}/loss", step): loss for step, loss in losses.items() if loss is not None}


def _throughput(stage: str, rows: list[dict[str, str]], record: dict[str, Any]) -> Points:
    """Images per second between one row of the curve and the next; the first row holds the warm-up."""
    seen = {int(row["step"]): float(row["images_seen"]) for row in rows}
    seconds = {int(timing["step"]): float(timing["device_seconds"]) for timing in record.get("timings", [])}
    steps = sorted(seen.keys() & seconds.keys())
    return {
        (f"{stage}/images_per_second", after): (seen[after] - seen[before]) / (seconds[after] - seconds[before])
        for before, after in pairwise(steps)
        if seconds[after] > seconds[before]
    }


def _add_metrics(content: RunContent, metrics: dict[str, Any]) -> None:
    """Scores at the milestones; steps are percents of the budget, so that arms share their abscissae."""
    for fraction, scores in metrics.get("milestones", {}).items():
        percent = round(100 * float(fraction))
        flat = flat_scores(scores)
        of_points = [key for key in flat if key.startswith(DISTANCE)]
        found = only_numbers({key: flat.get(key) for key in (*AT_MILESTONES, *of_points)})
        content.points |= {(key, percent): value for key, value in found.items()}
        content.status = "FINISHED"
    scales = only_numbers({key: metrics.get(key) for key in SCALE_KEYS})
    content.points |= {(key, 0): value for key, value in scales.items()}
    content.params |= {key: str(metrics[key]) for key in ("num_samples", "extractor") if metrics.get(key)}
    content.add_protocol(metrics)
    if metrics.get("data_sha256"):
        content.tags["data_sha256"] = str(metrics["data_sha256"])


def _add_records(content: RunContent, records: dict[str, dict[str, Any]]) -> None:
    trained = [records[stage] for stage in TRAINING_STAGES if records.get(stage)]
    device_seconds = _total("device_seconds", records, content.params["strategy"])
    waited = _total("data_wait_seconds", records, content.params["strategy"])
    measures = {f"{stage}_seconds": record.get("wall_seconds") for stage, record in records.items()}
    measures |= {f"{stage}_images_per_second": record.get("images_per_second") for stage, record in records.items()}
    measures["device_seconds"] = device_seconds
    measures["data_wait_share"] = waited / device_seconds if device_seconds and waited is not None else None
    measures["peak_memory_gib"] = max(map(_peak_memory_gib, trained), default=None)
    content.measures |= only_numbers(measures)
    content.add_provenance(next((record for record in reversed(records.values()) if record), {}))


def _total(key: str, records: dict[str, dict[str, Any]], strategy: str) -> float | None:
    """Of pretraining and finetuning together; nothing where one of them is unknown."""
    pretrain, finetune = (finite(records.get(stage, {}).get(key)) for stage in TRAINING_STAGES)
    if finetune is None or (pretrain is None and strategy != "none"):
        return None
    return finetune + (pretrain or 0.0)


def _peak_memory_gib(record: dict[str, Any]) -> float:
    """Of the device while training, as the timings have it; of the process where there are none."""
    timed = [float(timing["peak_memory_gib"]) for timing in record.get("timings", [])]
    return max(timed, default=finite(record.get("peak_memory_gib")) or 0.0)


def _add_verdict(content: RunContent, arm: str, rows: list[dict[str, str]]) -> None:
    """What the report says of the arm; what it does not say must not be left of an older report."""
    row = next((row for row in rows if row["arm"] == arm), {})
    found = only_numbers({key: row.get(key) for key in VERDICTS})
    content.measures |= found
    content.withdrawn = set(VERDICTS) - set(found)
    if row.get("verdict"):
        content.tags["verdict"] = row["verdict"]
