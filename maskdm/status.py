"""`maskdm status` and `maskdm verify`: the state of every stage, and whether outputs are intact. Imports no torch."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from maskdm.base.errors import UserError
from maskdm.base.interrupts import Stopped
from maskdm.base.locks import holder_of
from maskdm.base.progress import progress
from maskdm.base.units import duration, size
from maskdm.config import Params, load_params, paths
from maskdm.config.jobs import ARM_STAGES, Job, Jobs, OutdatedError
from maskdm.config.stamps import damaged_files, read_stamp

STATES = ("done", "running", "failed", "resumable", "out of date", "after tuning", "missing")
FAILED, PROGRESS = "failed.json", "progress.json"  # in a work folder (`maskdm.stages.runner`)
OUT_OF_DATE = " is out of date: "
UNREADABLE = (UserError, OSError, ValueError, LookupError)  # raised if a choice is missing, outdated or damaged
MIN_FREE_BYTES = 2**30
REWRITTEN_SECONDS = 0.2  # DVC needs less to rewrite its lock file, which is incomplete meanwhile
CLEAR_SCREEN = "\033[H\033[2J"
Details = dict[str, Any]


@dataclass(frozen=True)
class JobStatus:
    """The state of one job.

    Attributes:
        job: the job.
        state: one of `STATES`.
        details: plain values, as far as they are known: `reason`, `log`, `time`; `pid`, `host`, `since`; `done`,
            `total`, `unit`, `seconds_left`, and the `phase` of a trial.
    """

    job: Job
    state: str
    details: Details = field(default_factory=dict)


def run_status(as_json: bool = False, every_seconds: float | None = None) -> int:
    """Print the state of the experiment in the working directory.

    Args:
        as_json: print one JSON object instead of tables.
        every_seconds: print it again every so many seconds, until Ctrl-C; None prints it once.

    Returns:
        The exit code: 1 if a stage has failed or there is a problem.

    Raises:
        ParamsError: params.yaml is missing or not valid.
    """
    clear = CLEAR_SCREEN if every_seconds is not None and sys.stdout.isatty() and not as_json else ""
    try:
        while True:
            params = load_params()
            found, problems = [look_at(job) for job in Jobs(params).all()], find_problems()
            print(clear + (as_plain if as_json else as_text)(params, found, problems), flush=True)
            if every_seconds is None:
                return int(bool(problems) or any(one.state == "failed" for one in found))
            time.sleep(every_seconds)
    except KeyboardInterrupt as error:
        if every_seconds is None or (isinstance(error, Stopped) and error.number != signal.SIGINT):
            raise
        return 0


def look_at(job: Job) -> JobStatus:
    """Find out the state of a job."""
    folder, nothing_yet, reason, details = paths.work(job.output), "missing", "", {}
    if (holder := holder_of(job.lock)) is not None:
        return JobStatus(job, "running", {**holder, **_progress(folder, holder)})
    try:
        if not (reason := job.why_outdated()):
            return JobStatus(job, "done")
        work = folder / job.wanted().key
        saved = _saved(job, work)
        if (failure := _read(work / FAILED)) is not None:
            return JobStatus(job, "failed", {**failure, **saved})
        if saved:
            return JobStatus(job, "resumable", saved)
    except OutdatedError:
        nothing_yet = "after tuning"
    except UNREADABLE as error:  # e.g. every trial of the arm has failed; only pretraining shows it
        reason = reason or str(error)
        if job.stage == ARM_STAGES[0]:
            nothing_yet, details = "failed", {"reason": str(error)}
    if job.output.exists():
        return JobStatus(job, "out of date", {"reason": reason})
    return JobStatus(job, nothing_yet, details)


def _progress(folder: Path, holder: Details) -> Details:
    """The progress that the running process has written; the progress of an earlier process is ignored."""
    with suppress(OSError, ValueError, LookupError, TypeError):  # nothing is written yet
        file = max(folder.rglob(PROGRESS), key=lambda file: file.stat().st_mtime)
        note = {**json.loads(file.read_bytes()), **_phase(file)}
        if _time(note.pop("time")) >= _time(holder["since"]):
            return note
    return {}


def _saved(job: Job, work: Path) -> Details:
    """The step of the newest training state in a work folder; in a trial, finetuning comes after pretraining."""
    files = work.rglob("state-*.safetensors")
    newest = max(files, key=lambda file: (file.parent.name == "finetune", file.name), default=None)
    if newest is None:
        return {}
    saved = {"done": int(newest.stem.removeprefix("state-")), "unit": "step", **_phase(newest)}
    with suppress(*UNREADABLE):
        saved["total"] = getattr(job.run, saved.get("phase", job.stage)).num_steps
    return saved


def _phase(file: Path) -> Details:
    """The training stage within a trial: the folder of its files has its name."""
    return {"phase": file.parent.name} if file.parent.name in ARM_STAGES else {}


def find_problems() -> list[str]:
    """Problems outside of the stages, one line each, with the command that solves them."""
    damaged = [
        f"{file} is damaged and not used: its stage resumes from an earlier state; to remove it: rm {file}"
        for file in sorted(paths.WORK.rglob("*.damaged"))
    ]
    free = shutil.disk_usage(".").free
    full = [f"the disk is nearly full: {size(free)} are free; remove files"] if free < MIN_FREE_BYTES else []
    return [*_dvc_lock(), *damaged, *full]


def _dvc_lock() -> list[str]:
    """The lock file of DVC, if DVC refuses to work because of it; DVC itself drops the entries of ended processes."""
    file = paths.project_root() / ".dvc" / "tmp" / "rwlock"
    shown = os.path.relpath(file)
    if (content := _read(file)) is None and file.exists():
        time.sleep(REWRITTEN_SECONDS)
        if (content := _read(file)) is None and file.exists():
            return [f"{shown} is incomplete, so DVC refuses to work; if no DVC is running: rm {shown}"]
    pids = {int(pid) for pid in re.findall(r'"pid": (\d+)', json.dumps(content))} - {os.getpid()}
    found = {one.pid: one.info["cmdline"] or [] for one in psutil.process_iter(["cmdline"]) if one.pid in pids}
    if not found or any("dvc" in (Path(word).name for word in words[:3]) for words in found.values()):
        return []
    names = f"process {', '.join(map(str, sorted(found)))}, which is not DVC"
    return [f"{shown} names {names}, so DVC refuses to work; if no DVC is running: rm {shown}"]


def as_plain(params: Params, found: list[JobStatus], problems: list[str]) -> str:
    """The states as one JSON object."""
    jobs = [
        {
            **{name: getattr(one.job, name) for name in ("stage", "arm", "seed", "trial")},
            "state": one.state,
            "details": one.details,
        }
        for one in found
    ]
    return json.dumps({"experiment": params.name, "jobs": jobs, "problems": problems})


def as_text(params: Params, found: list[JobStatus], problems: list[str]) -> str:
    """The states as tables, with details, problems and the next command below."""
    counts = Counter(one.state for one in found)
    last = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    if counts["done"] < len(found):
        snakefile = os.path.relpath(paths.project_root() / "Snakefile")
        elsewhere = f"-s {snakefile} " if snakefile != "Snakefile" and Path(snakefile).is_file() else ""
        last += f"; run the same command again, it resumes: snakemake {elsewhere}--cores N, or dvc repro"
    parts = [*_tables(params, found), _lines(found), [f"problem: {line}" for line in problems], [last]]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _tables(params: Params, found: list[JobStatus]) -> Iterator[list[str]]:
    """A table of the stages of the experiment, one of the trials, and one with a row for every arm and seed."""
    cells = {(one.job.stage, one.job.arm, one.job.seed, one.job.trial): _cell(one) for one in found}
    shared = [one.job.stage for one in found if one.job.arm is None]
    yield _aligned(["experiment", *shared], [[params.name, *(cells[stage, None, None, None] for stage in shared)]])
    if trials := params.tuning.trials:
        rows = [[arm, *(cells["tune", arm, None, trial] for trial in trials)] for arm in params.arms]
        yield _aligned(["tune", *trials], rows)
    runs = [(arm, seed) for arm in params.arms for seed in params.seeds]
    rows = [[arm, str(seed), *(cells[stage, arm, seed, None] for stage in ARM_STAGES)] for arm, seed in runs]
    yield _aligned(["arm", "seed", *ARM_STAGES], rows)


def _aligned(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows)]


def _cell(one: JobStatus) -> str:
    done, total = one.details.get("done"), one.details.get("total")
    if one.state == "running" and done and total:
        return f"running {done / total:.0%}"
    return f"step {done}" + (f"/{total}" if total else "") if one.state == "resumable" else one.state


def _lines(found: list[JobStatus]) -> list[str]:
    """A line for every state with its details; jobs with equal details share a line."""
    titles: dict[str, list[str]] = {}
    for one in sorted(found, key=lambda one: STATES.index(one.state)):
        if one.details:
            titles.setdefault(f"{one.state}: {_sentence(one.details)}", []).append(one.job.title)
    return [f"{_first_few(named)}: {text}" for text, named in titles.items()]


def _first_few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _sentence(details: Details) -> str:
    """Details in words; a chain of outputs that are out of date is shortened to the first one."""
    parts = []
    if "reason" in details:
        parts.append(OUT_OF_DATE.join(" ".join(str(details["reason"]).split()).split(OUT_OF_DATE)[-2:]))
    if "done" in details:
        step = [details.get("phase"), details.get("unit"), str(details["done"])]
        step += ["of", str(details["total"])] if "total" in details else []
        parts.append(f"at {' '.join(filter(None, step))}")
    parts += [f"{duration(details['seconds_left'])} left"] if "seconds_left" in details else []
    parts += [f"process {details['pid']} on {details.get('host')}"] if "pid" in details else []
    if at := details.get("since") or details.get("time"):
        with suppress(ValueError, TypeError):  # the file is damaged
            parts.append(f"{'since ' if 'since' in details else ''}{_time(at):%Y-%m-%d %H:%M}")
    parts += [f"log: {details['log']}"] if details.get("log") else []
    return "; ".join(parts)


def _read(file: Path) -> Details | None:
    """The JSON object in a file; None if there is none."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(file.read_bytes()))
    return None


def _time(text: str) -> datetime.datetime:
    """A time in ISO format, in the time zone of this machine."""
    return datetime.datetime.fromisoformat(text).astimezone()


def run_verify() -> int:
    """Hash every file of every output of the experiment in the working directory, and print which are damaged.

    Outputs that are intact but out of date are not damaged.

    Returns:
        The exit code: 1 if an output is damaged.

    Raises:
        ParamsError: params.yaml is missing or not valid.
        UserError: a file cannot be read at the moment.
    """
    stamps = {job: read_stamp(job.output) for job in Jobs(load_params()).all() if job.output.exists()}
    damaged: dict[Job, list[str]] = {}
    for job, stamp in progress(stamps.items(), len(stamps), "verify", "output"):
        if stamp is None:  # the stamp of a single file was compared with its content when it was read
            damaged[job] = [f"{job.output} has no stamp that fits its content"]
        elif found := list(damaged_files(job.output, stamp)):
            damaged[job] = found
    for job, found in damaged.items():
        print(f"damaged: {_first_few(found)}; to make it again: {job.command} --force")
    if not damaged:
        num_files = sum(len(stamp.files) or 1 for stamp in stamps.values() if stamp is not None)
        print(f"{len(stamps)} outputs, {num_files} files: all are intact")
    return int(bool(damaged))
