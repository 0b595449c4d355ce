"""The runner: what happens around every stage.

A stage fills a folder. The runner does the rest: it compares stamps before torch is imported, allows one process at a
time to work, keeps the previous output, moves the new output into its place, and writes the record. The places:

    .work/OUTPUT/KEY/           unfinished work, from which a killed process resumes; `output` in it is being built
    .work/OUTPUT/previous/KEY/  the previous output with its record: going back to its values costs a rename
    .work/OUTPUT/record.json    a copy of the record, in case the record is lost
    results/records/            the record, written just before the output is renamed
    results/OUTPUT              the output, renamed into its place
"""

from __future__ import annotations

import datetime
import gc
import importlib
import json
import os
import socket
import sys
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from maskdm.base.checksums import checked
from maskdm.base.errors import UserError
from maskdm.base.locks import holder_of, one_writer
from maskdm.base.machine import is_follower, launched, measured
from maskdm.base.progress import Log
from maskdm.base.publishing import (
    BUILDING,
    explain_refusals,
    move,
    publish_description,
    publish_json,
    publish_text,
    remove,
    sync_tree,
)
from maskdm.config import Params, Run, paths
from maskdm.config.jobs import Job
from maskdm.config.stamps import Stamp, missing_files, read_stamp, stamp_folder, stamped

BEGUN, FAILED, OUTPUT, RECORD, PREVIOUS = "begun.json", "failed.json", "output", "record.json", "previous"
SHARED = ("tune", "pretrain", "finetune", "sample")  # stages that several processes may share
KEYS_KEPT = 2  # for each output, unfinished work of this many different values is kept
# `choose` reads the folder of all trials. Where nothing is tuned no other stage makes it, and DVC needs it.
TRIALS_NOTE = "One file for every trial of every arm: what it changed, and its scores. Empty where nothing is tuned.\n"


@dataclass
class Task:
    """A run of a stage, as the stage sees it.

    Attributes:
        job: what to do.
        work: the folder for unfinished work, from which a killed process resumes; removed when the stage is done.
        log: takes rows of a training curve, for MLflow.
        record: plain values that the stage adds to its record.
        inputs: digests of what it reads, by name.
        result: what the stage has returned; for an output that is one JSON file, its content.
    """

    job: Job
    work: Path
    log: Log = field(default_factory=Log)
    record: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str | None] = field(default_factory=dict)
    result: Any = None

    @property
    def params(self) -> Params:
        """The experiment, or of an arm's stage what the arm runs with."""
        return self.job.params if self.job.arm is None else self.job.run.params

    @property
    def run(self) -> Run:
        """The arm and seed, or the trial."""
        return self.job.run

    def log_row(self, row: dict[str, float], prefix: str = "") -> None:
        """Track a row of a training curve."""
        self.log.add(int(row["step"]), {prefix + name: value for name, value in row.items() if name != "step"})


def run_stage(job: Job, force: bool = False) -> None:
    """Run a stage, unless its output is up to date.

    Args:
        job: the stage, and its arm and seed or trial.
        force: run it even if the output is up to date.

    Raises:
        UserError: an input is missing or out of date, the stage fails, or a file can't be written.
        Stopped: a signal came; training has saved its state.
    """
    if is_follower():
        _load(job.stage).run(Task(job, paths.WORK), paths.WORK)
        return
    job.require_inputs()
    if not (force or job.why_outdated()):
        _say_up_to_date(job)
        return
    with one_writer(job.lock, job.title):
        _restore_record(job)
        job.jobs.forget()  # another process may have worked meanwhile
        job = job.jobs.find(job.stage, job.arm, job.seed, job.trial)
        if not (force or job.why_outdated()):
            _say_up_to_date(job)
        elif force or not _took_back(job):
            with _making_output(job) as (stage, task, building):
                task.result = stage.run(task, building)


def _restore_record(job: Job) -> None:
    """Write a lost record again from the copy of the work folder: no training is repeated for it."""
    stamp = None if job.record.exists() else read_stamp(job.output)
    try:
        text = (paths.work(job.output) / RECORD).read_text(encoding="utf-8")
        is_its_own = stamp is not None and checked(json.loads(text))["key"] == stamp.key
    except (OSError, ValueError, LookupError, RecursionError):
        return
    if is_its_own:
        publish_text(job.record, text)


def _say_up_to_date(job: Job) -> None:
    _make_extras(job)
    if holder_of(job.lock) is None and (stamp := read_stamp(job.output)) is not None:
        remove(paths.work(job.output) / stamp.key)  # of a process that was killed just before its end
    print(f"{job.title}: up to date", flush=True)
    if job.stage == "prepare" and job.params.dataset.root is not None:
        print("the images behind dataset.root were not looked at; if they changed: maskdm prepare --force", flush=True)
    _dismiss_others(job)


def _dismiss_others(job: Job) -> None:
    """Notify the other ranks that a launcher has started with this process: there is no work."""
    if (launched() or (0, 1))[1] > 1 and job.stage in SHARED:
        from maskdm.training.ranks import sharing

        with sharing((), job.run.params.compute, is_shared=False):
            pass


@contextmanager
def _making_output(job: Job) -> Iterator[tuple[ModuleType, Task, Path]]:
    """Surround the work of a stage: claim its work folder, time it, log it, then put the output into its place.

    Yields:
        the stage's module, its task, and the folder to fill; for an output that is one file, the path of that file.
    """
    if job.output.exists() and (reason := job.why_outdated()):
        print(f"{job.title}: {reason}", file=sys.stderr, flush=True)
    stamp, work = job.wanted(), paths.work(job.output) / job.wanted().key
    with explain_refusals(work.parent):
        _remove_half_files(job)
        begun = _begin(work)
    building = work / OUTPUT
    which = {"stage": job.stage, "arm": job.arm, "seed": job.seed, "trial": job.trial}
    record = {**which, "id": begun["id"], "starts": begun["starts"], "key": stamp.key}
    try:
        stage = _load(job.stage)
        remove(building)
        with _live_log(job, begun["id"]) as log:
            task = Task(job, work, log, inputs=stamp.inputs)
            with measured(job.params, record), explain_refusals(job.output):
                if not job.output.suffix:
                    building.mkdir()
                yield stage, task, building
                _stamp(job, task, building, stamp)
            record |= {"data_sha256": stamp.inputs.get(str(paths.DATA)), **task.record}
            with explain_refusals(job.output):
                publish_description(work / RECORD, record)
                _put_in_place(job, building, work / RECORD)
                _make_extras(job)
        if hasattr(stage, "after"):
            stage.after(task)
    except (Exception, SystemExit) as error:
        _note_failure(work, error)
        raise
    remove(work)


@contextmanager
def _live_log(job: Job, work_id: str) -> Iterator[Log]:
    """Log to MLflow while the block works, if the stage works for long and is tracked."""
    if not job.params.tracking.enabled:
        yield Log()
        return
    from maskdm.tracking.live import live_log

    with live_log(job, work_id) as log:
        yield log


def _stamp(job: Job, task: Task, building: Path, stamp: Stamp) -> None:
    """Stamp an output, and have it on the disk."""
    if job.output.suffix:
        publish_description(building, stamped(task.result, stamp))
    else:
        stamp_folder(building, stamp)
        sync_tree(building)


def _remove_half_files(job: Job) -> None:
    """Remove files that a killed process has left half written; states may be large."""
    output, record = job.output, job.record
    halves = [*paths.work(output).glob(f"**/.*{BUILDING}"), *record.parent.glob(f".{record.name}.*{BUILDING}")]
    for half in (*halves, output.with_name(f".{output.name}{BUILDING}")):
        remove(half)


def _load(stage: str) -> ModuleType:
    """Import a stage and all its modules, with the garbage collector off, and exempt them from later collections.

    They hold no garbage. Looking for it takes a quarter of the CPU time of a process that imports PyTorch and exits.
    """
    gc.disable()
    try:
        return importlib.import_module(f"maskdm.stages.{stage}")
    finally:
        gc.freeze()
        gc.enable()


def _begin(work: Path) -> dict[str, Any]:
    """Claim a work folder: note the id of the work, and how many processes have worked on it, including this one."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        begun = dict(json.loads((work / BEGUN).read_bytes()))
        begun = {"id": str(begun["id"]), "starts": int(begun["starts"]) + 1}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        begun = {"id": uuid.uuid4().hex, "starts": 1}
    publish_json(work / BEGUN, {**begun, "pid": os.getpid(), "host": socket.gethostname(), "time": _now()})
    remove(work / FAILED)
    others = [path for path in work.parent.iterdir() if (path / BEGUN).is_file() and path != work]
    for old in sorted(others, key=lambda path: (path / BEGUN).stat().st_mtime)[: -(KEYS_KEPT - 1)]:
        remove(old)
    return begun


def _note_failure(work: Path, error: BaseException) -> None:
    """Write down the reason for `maskdm status`; on a full disk even this may fail."""
    reason = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception_only(error)).strip()
    failure = {"reason": reason, "host": socket.gethostname(), "pid": os.getpid(), "log": _log(), "time": _now()}
    with suppress(OSError, UserError):
        publish_json(work / FAILED, failure)


def _log() -> str | None:
    """The file that stderr is redirected to; None if it is a terminal or a pipe."""
    with suppress(OSError):
        target = Path("/proc/self/fd/2").readlink()
        return str(target) if target.is_file() else None
    return None


def _took_back(job: Job) -> bool:
    """Exchange the output with the one in `previous`, if that one has the wanted key."""
    key = job.wanted().key
    kept = paths.work(job.output) / PREVIOUS / key
    stamp = read_stamp(kept / OUTPUT)
    if stamp is None or stamp.key != key or missing_files(kept / OUTPUT, stamp):
        return False
    if job.stage != "report" and not (kept / RECORD).is_file():
        return False
    with explain_refusals(job.output):
        _remove_half_files(job)
        if (stamp_there := read_stamp(job.output)) is not None and stamp_there.key == key:
            remove(job.output)  # the same one, incomplete
        _put_in_place(job, kept / OUTPUT, kept / RECORD)
        _make_extras(job)
    print(f"{job.title}: made before with the same values and inputs; it is back in {job.output}", flush=True)
    _dismiss_others(job)
    return True


def _put_in_place(job: Job, made: Path, record: Path) -> None:
    """Move an output and its record into place; those that were there go to `previous`.

    If this fails, they are moved back. A process that is killed at any moment leaves the old ones or the new ones in
    place, or no output there and the whole old one in `previous`.

    Args:
        job: the stage.
        made: the complete output, in another place.
        record: its record, in another place; the report has none, because it shows all records.
    """
    before = _copy_record_aside(job)
    try:
        if before is None:  # nothing was there, or nothing complete
            remove(job.output)
        else:
            move(job.output, before / OUTPUT)
        if job.stage != "report":
            text = record.read_text(encoding="utf-8")
            publish_text(job.record, text)
            publish_text(paths.work(job.output) / RECORD, text)
        move(made, job.output)
    except BaseException:  # a signal too
        if before is not None and not job.output.exists():
            move(before / OUTPUT, job.output)
            if (before / RECORD).is_file():
                move(before / RECORD, job.record)
        raise
    _keep_one_previous(job, before)


def _copy_record_aside(job: Job) -> Path | None:
    """Make the folder in `previous` for the current output, with a copy of its record; None if it is not complete."""
    stamp = read_stamp(job.output)
    if stamp is None or missing_files(job.output, stamp):
        return None
    kept = paths.work(job.output) / PREVIOUS / stamp.key
    remove(kept)
    kept.mkdir(parents=True)
    if job.record.is_file():
        publish_text(kept / RECORD, job.record.read_text(encoding="utf-8"))
    return kept


def _keep_one_previous(job: Job, before: Path | None) -> None:
    """Keep one output in `previous`: the last one that is not in place."""
    stamp, folder = read_stamp(job.output), paths.work(job.output) / PREVIOUS
    now = None if stamp is None else folder / stamp.key
    last = None if before == now else before
    for kept in folder.iterdir() if folder.is_dir() else ():
        if kept == now or (last is not None and kept != last):
            remove(kept)


def _make_extras(job: Job) -> None:
    note = paths.TUNING / "README.md"
    if job.stage == "prepare" and not note.is_file():
        publish_text(note, TRIALS_NOTE)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
