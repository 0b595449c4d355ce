"""What every run in MLflow carries: a function of params.yaml and of the files in results/ and .work/ alone."""

from __future__ import annotations

import csv
import datetime
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from maskdm.base.checksums import checked, file_sha256, short_hash
from maskdm.base.errors import UserError
from maskdm.base.locks import holder_of
from maskdm.config import Params, Run, Section, paths, resolve
from maskdm.config.jobs import ARM_STAGES, MANIFEST, Job, Jobs
from maskdm.config.paths import TRAINING_STAGES
from maskdm.scoring.headline import DISTANCE, HEADLINES, SCALE_KEYS, SCORE_KEYS, SCORES, flat_scores, scale_scores
from maskdm.scoring.protocol import said_of

SECTIONS = {"dataset", "model", "diffusion", "budget", "training", "sampling", "evaluation"}
OF_COMPUTE = {"device", "precision"}  # the other values there change rounding alone, and params in MLflow can't change
AT_MILESTONES = (*(score.key for score in SCORES), "flops", "images_seen", "tokens_seen")
# What only the report knows of an arm: it compares the arm with scratch, over all seeds, by the experiment's headline.
OF_A_SCORE = ("delta_{}", "flops_at_equal_{}", "device_seconds_at_equal_{}")
VERDICTS = ("compute_ratio", *(name.format(headline.key) for headline in HEADLINES for name in OF_A_SCORE))
# Of a record: what stands elsewhere in its run.
ELSEWHERE = {"stage", "arm", "seed", "trial", "id", "key", "checksum", "starts", "timings", "images", "started"}
ENDED = ("FINISHED", "FAILED", "KILLED")
FINAL = 100  # percent of the budget: the step of a trial's scores


@dataclass
class Content:
    """What one run carries.

    Attributes:
        name: as MLflow shows it.
        slot: the place in the experiment, as tags: kind, stage, arm, seed, trial. One run of a slot is the current one.
        identity: which piece of work it is, as tags: a run that carries another value of one of them is another run.
        params: what it was given, flat. MLflow never lets a param change.
        points: curves and scores by (metric, step).
        values: metrics that are one number, such as times; the newest value counts. NaN withdraws an older value.
        tags: provenance, and what people read.
        files: attached to the run.
        folder: where among the run's artifacts the files are.
        status: MLflow's: RUNNING, SCHEDULED (an arm whose next stage has not begun), FINISHED, FAILED or KILLED.
        start_ms: when the work began, in milliseconds since 1970; None: not known.
        end_ms: when it ended.
        dataset: what it was trained on, as the fields of MLflow's Dataset.
        children: the runs of the stages of an arm.
    """

    name: str
    slot: dict[str, str]
    identity: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    points: dict[tuple[str, int], float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    folder: str | None = None
    status: str = "FINISHED"
    start_ms: int | None = None
    end_ms: int | None = None
    dataset: dict[str, str] | None = None
    children: list[Content] = field(default_factory=list)

    @property
    def files_digest(self) -> str:
        """A short hash of the attached files with their names."""
        return short_hash([(file.name, file_sha256(file)) for file in self.files])

    @property
    def digest(self) -> str:
        """A short hash of everything, the children aside: a run that carries it needs no work."""
        points = sorted([*at, value] for at, value in self.points.items())
        values = {key: str(value) for key, value in self.values.items()}  # NaN has no JSON
        other = {"points": points, "values": values, "files": self.files_digest, "children": []}
        return short_hash({**asdict(self), **other})


def contents(jobs: Jobs) -> Iterator[Content]:
    """The runs of everything in results/ that is up to date, and of stages that failed or were killed.

    Outdated results are left out: they were not made with the values of today's params.yaml, and have runs of their own
    from the time when they were made.

    Args:
        jobs: of the experiment.

    Yields:
        every arm with its stages as children, then trials and the stages of the whole experiment.
    """
    for arm, seed in product(jobs.params.arms, jobs.params.seeds):
        with _leaving_out_unreadable(f"{arm} with seed {seed}"):
            yield from arm_contents(jobs, arm, seed)
    for job in jobs.all():
        if job.arm is None or job.trial is not None:
            with _leaving_out_unreadable(job.title):
                yield from stage_contents(job)


@contextmanager
def _leaving_out_unreadable(title: str) -> Iterator[None]:
    """Go on without a run whose files are damaged: stamps compare sizes only."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"warning: tracking: left out {title}, its files can't be read: {error!r}", file=sys.stderr, flush=True)


def arm_contents(jobs: Jobs, arm: str, seed: int, running: Job | None = None, work_id: str = "") -> Iterator[Content]:
    """The run of an arm, if it has results, or work has begun on it.

    Args:
        jobs: of the experiment.
        arm: its key.
        seed: of the run.
        running: the job of the arm that a process works on; it and what follows it have no results yet.
        work_id: the id of that work.
    """
    of_arm = [jobs.find(stage, arm, seed) for stage in ARM_STAGES]
    if running is not None:
        of_arm = of_arm[: ARM_STAGES.index(running.stage)]
    try:
        run = jobs.run_of(arm, seed)
    except UserError:  # its values are not chosen yet
        return
    records = {job.stage: record for job in of_arm if (record := read_record(job)) is not None}
    children = [child for job in of_arm for child in stage_contents(job)]
    if running is not None:
        children.append(running_content(running, work_id))
    if not children:
        return
    slot = {"kind": "arm", "arm": arm, "seed": str(seed)}
    begun = [child for child in children if child.status in ("RUNNING", "FINISHED")]
    ids = {f"id.{child.slot['stage']}": child.identity["id"] for child in begun}
    content = Content(f"{arm}-seed-{seed}", slot, {"fingerprint": run.fingerprint(), **ids}, arm_params(run))
    content.children, content.dataset = children, read_dataset()
    content.status = children[-1].status
    if content.status == "FINISHED" and "evaluate" not in records:
        is_worked_on = any(holder_of(jobs.find(stage, arm, seed).lock) is not None for stage in ARM_STAGES)
        content.status = "RUNNING" if is_worked_on else "SCHEDULED"
    _add_results(content, run, records)
    if "evaluate" in records:
        _add_verdict(content, jobs)
    starts = [child.start_ms for child in children if child.start_ms is not None]
    content.start_ms = min(starts, default=None)
    if content.status in ENDED:
        content.end_ms = max((child.end_ms for child in children if child.end_ms is not None), default=None)
    yield content


def stage_contents(job: Job) -> Iterator[Content]:
    """The run of a stage or of a trial, where it has ended: well, in an error, or by a kill."""
    if not job.why_outdated():
        record = read_record(job)
        if record is not None:
            yield _finished(job, record)
        elif job.stage == "report":  # it shows all records and has none
            files = sorted(job.output.iterdir())
            at_ms = int(job.output.stat().st_mtime * 1000)
            identity = {"id": job.wanted().key}
            yield Content("report", _slot(job), identity, files=files, start_ms=at_ms, end_ms=at_ms)
        return
    with suppress(UserError, OSError, ValueError, LookupError, TypeError):  # unreadable, or nothing was begun
        work = paths.work(job.output) / job.wanted().key
        begun = json.loads((work / "begun.json").read_bytes())
        if holder_of(job.lock) is None:
            content = running_content(job, str(begun["id"]))
            content.status, content.start_ms = "KILLED", _milliseconds(begun["time"])
            if (failed := work / "failed.json").is_file():
                failure = json.loads(failed.read_bytes())
                content.status, content.end_ms = "FAILED", _milliseconds(failure["time"])
                content.tags["failed"] = str(failure["reason"])
            yield content


def running_content(job: Job, work_id: str) -> Content:
    """What is known of a stage or trial before it ends.

    Args:
        job: which.
        work_id: the id of the work.
    """
    name = job.stage if job.trial is None else f"{job.arm}-{job.trial}"
    params = {key: str(value) for key, value in flat(job.values)}
    if job.arm is not None and job.trial is not None:
        params |= trial_params(job.params, job.arm, job.trial)
    content = Content(name, _slot(job), {"id": work_id}, params, status="RUNNING")
    if job.stage in ("tune", *TRAINING_STAGES):
        content.dataset = read_dataset()
    return content


def read_record(job: Job) -> dict[str, Any] | None:
    """The record of a job's output; None where it is out of date, has no record, or the record is damaged."""
    if job.why_outdated() or job.stage == "report":
        return None
    try:
        return dict(checked(json.loads(job.record.read_bytes())))
    except (OSError, ValueError, RecursionError):
        return None


def trial_params(params: Params, arm: str, trial: str) -> dict[str, str]:
    """The values that a trial runs with, of all parameters that some trial changes: its own, or the arm's.

    Args:
        params: the experiment.
        arm: the arm's key.
        trial: the trial's name.
    """
    tried = resolve(params, arm, seed=0, chosen=params.tuning.trials[trial])
    sections: dict[str, Section] = {"training": tried.params.training, "finetune": tried.finetune.config}
    if params.arm(arm).strategy != "none":
        sections["pretrain"] = tried.pretrain.config
    used = {}
    for path in tuned_paths(params):
        section, _, key = path.partition(".")
        if section in sections:
            used[path] = str(getattr(sections[section], key))
    return {"arm": arm, "trial": trial, "budget_fraction": str(params.tuning.budget_fraction), **used}


def tuned_paths(params: Params) -> list[str]:
    """Every parameter that some trial changes, by dotted path."""
    return sorted({path for values in params.tuning.trials.values() for path in values})


def arm_params(run: Run) -> dict[str, str]:
    """What an arm runs with, flat: its own values by their bare name, those of sections with a dot."""
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


def read_dataset() -> dict[str, str] | None:
    """The dataset in results/, as the fields of MLflow's Dataset; None where there is none that can be read."""
    try:
        manifest = json.loads((paths.DATA / MANIFEST).read_text(encoding="utf-8"))
        labels, (kind, root) = manifest["labels"], (manifest["source"][key] for key in ("kind", "root"))
        tensor = {"dtype": manifest["dtype"], "shape": [-1, *manifest["shape"]]}
        features = json.dumps([{"type": "tensor", "tensor-spec": tensor}])
        sizes = {
            "num_rows": int(manifest["count"]),
            "num_classes": len(labels["class_names"]) if labels else 0,
            "num_skipped": len(manifest["skipped"]),
        }
        return {
            "name": str(kind),
            "digest": str(manifest["sha256"])[:36],  # MLflow's limit
            "source_type": "local" if root else "code",
            "source": json.dumps({"uri": root} if root else {"tags": {"mlflow.source.name": str(kind)}}),
            "schema": json.dumps({"mlflow_tensorspec": {"features": features, "targets": None}}),
            "profile": json.dumps(sizes),
        }
    except (OSError, ValueError, KeyError, TypeError):  # the stages say what is wrong with it
        return None


def _slot(job: Job) -> dict[str, str]:
    which = {"arm": job.arm, "seed": None if job.trial else job.seed, "trial": job.trial}
    kind = "stage" if job.trial is None else "trial"
    return {"kind": kind, "stage": job.stage, **{key: str(value) for key, value in which.items() if value is not None}}


def _finished(job: Job, record: dict[str, Any]) -> Content:
    """The run of a stage or trial that has ended well; of a trial whose loss became non-finite, too."""
    content = running_content(job, str(record["id"]))
    content.status = "FINISHED"
    _add_record(content, record)
    content.start_ms = _milliseconds(record["started"])
    content.end_ms = content.start_ms + round(1000 * record["wall_seconds"])
    if job.output.is_dir():
        content.files = sorted(job.output.glob("*.png"))
    if job.stage in TRAINING_STAGES:
        content.points = _curve(job.output, record)
    elif job.output.is_file():
        _add_scores(content, job.stage, _read_json(job.output))
    curves = {key for key, _ in content.points}
    content.values |= {key: float(v) for key, v in _facts(record) if _is_number(v) and key not in curves}
    return content


def _add_scores(content: Content, stage: str, result: dict[str, Any]) -> None:
    """What the one file of a stage says: scores, and what they are of."""
    if stage == "scale":
        content.values |= _numbers(scale_scores(result))
    elif stage == "evaluate":
        content.points = _scores_by_percent(result)
    elif stage == "tune":  # the number of samples is no score
        content.points = {(key, FINAL): v for key, v in _numbers(result, SCORE_KEYS).items() if key != "num_samples"}
        if result.get("failed"):
            content.status, content.tags["failed"] = "FAILED", str(result["failed"])
    if content.points:
        _add_protocol(content, result)


def _add_results(content: Content, run: Run, records: dict[str, dict[str, Any]]) -> None:
    """Curves, scores, times, images and provenance of an arm, from the stages that are done."""
    for stage, folder in zip(TRAINING_STAGES, (paths.pretrain, paths.finetune), strict=True):
        if stage in records:
            curve = _curve(folder(run.arm, run.seed), records[stage])
            wanted = ("loss", "images_per_second")
            content.points |= {(f"{stage}/{key}", step): v for (key, step), v in curve.items() if key in wanted}
    if "sample" in records:
        content.files, content.folder = sorted(paths.samples(run.arm, run.seed).glob("*.png")), "samples"
    if "evaluate" in records:
        metrics = _read_json(paths.metrics(run.arm, run.seed))
        content.points |= _scores_by_percent(metrics)
        content.values |= _numbers(metrics, SCALE_KEYS)
        content.params |= {key: str(metrics[key]) for key in ("num_samples", "extractor") if metrics.get(key)}
        _add_protocol(content, metrics)
    for record in records.values():
        _add_record(content, record)
    content.values |= _times(records)


def _add_verdict(content: Content, jobs: Jobs) -> None:
    """What an up-to-date report says of the arm; what it does not say any more is withdrawn."""
    if jobs.find("report").why_outdated():
        return
    row = next((row for row in _read_rows(paths.REPORT / "verdicts.csv") if row["arm"] == content.slot["arm"]), {})
    content.values |= {**dict.fromkeys(VERDICTS, math.nan), **_numbers(row, VERDICTS)}
    content.tags |= {key: row[key] for key in ("verdict", "kind") if row.get(key)}


def _add_protocol(content: Content, scores: dict[str, Any]) -> None:
    """Say what scores are of, as far as the file says it."""
    with suppress(ValueError, TypeError):
        if said := said_of(scores):
            content.tags["protocol"] = said


def _add_record(content: Content, record: dict[str, Any]) -> None:
    """Tag with what a record says in words."""
    words = {key.replace("versions.", "version."): v for key, v in _facts(record) if not _is_number(v)}
    content.tags |= {key: str(value) for key, value in words.items() if value is not None}


def _facts(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a record says, flat, without lists and without what stands elsewhere in the run."""
    facts = flat({key: value for key, value in record.items() if key not in ELSEWHERE})
    return ((key, value) for key, value in facts if not isinstance(value, list))


def _curve(folder: Path, record: dict[str, Any]) -> dict[tuple[str, int], float]:
    """The rows of a training curve, and the images per second between them; the first row holds the warm-up."""
    rows = {int(row["step"]): row for row in _read_rows(folder / paths.CURVE)}
    seconds = {int(timing["step"]): float(timing["device_seconds"]) for timing in record.get("timings", [])}
    points = {(key, step): v for step, row in rows.items() for key, v in _numbers(row).items() if key != "step"}
    for before, after in pairwise(sorted(rows.keys() & seconds.keys())):
        if (elapsed := seconds[after] - seconds[before]) > 0:
            images = float(rows[after]["images_seen"]) - float(rows[before]["images_seen"])
            points["images_per_second", after] = images / elapsed
    return points


def _scores_by_percent(metrics: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Scores at the milestones; the steps are percents of the budget, so that arms share their abscissae."""
    points: dict[tuple[str, int], float] = {}
    for fraction, scores in metrics.get("milestones", {}).items():
        scored = flat_scores(scores)
        keys = (*AT_MILESTONES, *(key for key in scored if key.startswith(DISTANCE)))
        points |= {(key, round(100 * float(fraction))): value for key, value in _numbers(scored, keys).items()}
    return points


def _times(records: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds of every stage, and of pretraining and finetuning together, where both are known."""
    found: dict[str, Any] = {f"{stage}_seconds": record.get("wall_seconds") for stage, record in records.items()}
    found |= {f"{stage}_images_per_second": record.get("images_per_second") for stage, record in records.items()}
    trained = [records[stage] for stage in TRAINING_STAGES if stage in records]
    if len(trained) == len(TRAINING_STAGES):
        found["device_seconds"] = seconds = sum(record["device_seconds"] for record in trained)
        found["data_wait_share"] = sum(record["data_wait_seconds"] for record in trained) / seconds if seconds else None
    memory = [timing["peak_memory_gib"] for record in trained for timing in record.get("timings", [])]
    found["peak_memory_gib"] = max(memory, default=None)
    return _numbers(found)


def _numbers(values: dict[str, Any], keys: Iterable[str] | None = None) -> dict[str, float]:
    """Those values that are finite numbers, in words or not."""
    found = {}
    for key in values if keys is None else keys:
        with suppress(ValueError, TypeError):
            if math.isfinite(number := float(values.get(key, math.nan))):
                found[key] = number
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _read_rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def _milliseconds(time: str) -> int:
    return round(1000 * datetime.datetime.fromisoformat(time).timestamp())
