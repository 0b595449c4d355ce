"""DVC and Snakemake in one workspace: what one of them has made, the other is told.

DVC's book is dvc.lock: per stage the params, and the hashes of what it read and wrote. Snakemake's is `.snakemake`: per
output the params, and otherwise the files' times. `before_snakemake` and `after_snakemake` are called by the Snakefile.
A ledger of ours in `.snakemake` remembers what has been told, so that they cost milliseconds when nothing is new.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from maskdm import paths

BOOK = Path("dvc.lock")
PIPELINE = Path("dvc.yaml")
PARAMS = Path("params.yaml")
SNAKEMAKE = Path(".snakemake")
LEDGER = SNAKEMAKE / "maskdm-told.json"
ANSWERS = SNAKEMAKE / "maskdm-answers.json"
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each, on Linux
NESTED = "MASKDM_ENGINES_NESTED"  # set for the engines that are started here: they tell nobody anything
NOT_KNOWN = "not what DVC made, or made from other inputs"


class TellingError(Exception):
    """An engine could not be asked or told; the message is its own last line."""


def stages_use_a_gpu(device: str) -> bool:
    """Whether stages will compute on a GPU, told without PyTorch.

    Args:
        device: `compute.device`.
    """
    return device == "cuda" or (device == "auto" and any(NVIDIA_GPUS.glob("*")))


def before_snakemake(snakefile: str, options: Sequence[str] = ()) -> None:
    """Bring the two books together before Snakemake plans anything; a failure is a warning.

    Args:
        snakefile: its path.
        options: of Snakemake's command line, that change what it takes for up to date.
    """
    if not _has_dvc():
        return
    try:
        with _alone():
            _compare_books(snakefile, options)
    except (TellingError, OSError) as error:
        _say(
            f"warning: DVC and Snakemake could not be told of each other's results ({error}); what is up to date may "
            "run again; the next call of snakemake tries it again"
        )


def snakemake_starts() -> None:
    """Note that from now on there may be results that DVC does not know; a failure is a warning."""
    if not _has_dvc():
        return
    try:
        with _alone():
            _write_ledger({**_read_ledger(), "open": True})
    except OSError as error:
        _say(f"warning: cannot write {LEDGER} ({error}); when all is done, type: dvc commit -f dvc.yaml")


def after_snakemake(snakefile: str, options: Sequence[str] = ()) -> None:
    """Tell DVC what Snakemake has made, if nothing of the whole pipeline is left to do; a failure is a warning."""
    if not _has_dvc():
        return
    try:
        with _alone():
            ledger = _read_ledger()
            _tell_dvc(ledger, snakefile, options)
            _write_ledger({**ledger, "seen": None if ledger["open"] else _look()})
    except (TellingError, OSError) as error:
        _say(
            f"warning: DVC could not be told what Snakemake has made ({error}); the next call of snakemake tries it "
            "again, or type: dvc commit -f dvc.yaml"
        )


def given_answers() -> dict[str, Any] | None:
    """What Snakemake is to note as the params of each stage, by DVC's name; None but where it is being told."""
    file = os.environ.get(NESTED)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else None


def stage_name(stage: str, wildcards: Any) -> str:
    """DVC's name of a job of Snakemake's, e.g. `pretrain@patch-m50-0`."""
    parts = [str(wildcards.get(name)) for name in ("arm", "trial", "seed") if wildcards.get(name) is not None]
    return f"{stage}@{'-'.join(parts)}" if parts else stage


def plain(value: Any) -> Any:
    """Values of params.yaml such that equal ones are written equally, whoever has read them.

    DVC reads YAML 1.2 and Snakemake YAML 1.1: `2e-4` is a number for the one and a text for the other.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    text = str(value)
    if text.lower() in ("yes", "on", "true", "no", "off", "false"):
        return text.lower() in ("yes", "on", "true")
    try:
        return float(text)
    except ValueError:
        return text


def _has_dvc() -> bool:
    """Whether there is anybody to tell: DVC has this folder's pipeline, and this process was not started from here."""
    return NESTED not in os.environ and PIPELINE.is_file() and (paths.project_root() / ".dvc").is_dir()


def _compare_books(snakefile: str, options: Sequence[str]) -> None:
    """Tell Snakemake what DVC has made, and DVC what a Snakemake has made that was killed before it told.

    Raises:
        TellingError, OSError: it could not be done, and will be tried again.
    """
    ledger, now = _read_ledger(), _look()
    if ledger["seen"] == now:
        return
    if new := _made_by_dvc(ledger["told"]):
        _say(f"telling Snakemake what DVC has made: {len(new)} stages")
        _tell_snakemake(snakefile, options)
        ledger["told"] = _vouched_for()
    if ledger["open"]:
        _tell_dvc(ledger, snakefile, options)
    _write_ledger({**ledger, "seen": _look()})


# From DVC to Snakemake


def _made_by_dvc(told: Mapping[str, Any]) -> set[str]:
    """The stages whose results on disk are those of dvc.lock and were not told to Snakemake."""
    return {stage for stage, what in _vouched_for().items() if told.get(stage) != what}


def _vouched_for() -> dict[str, list[str | None]]:
    """The stages whose results on disk are those of dvc.lock, each with what tells these results from others.

    A record is different after every run, and small: it stands for all that the run has made. The report has none.
    """
    vouched = {}
    for stage, entry in _read_book().items():
        outs = {out["path"]: out.get("md5") for out in entry.get("outs", [])}
        records = [path for path in outs if Path(path).parent == paths.RESULTS / "records"]
        if all(_md5(Path(path)) == outs[path] for path in records) and all(Path(path).exists() for path in outs):
            entry_hash = hashlib.sha256(json.dumps(entry, sort_keys=True, default=str).encode()).hexdigest()
            vouched[stage] = [entry_hash, *(_identity(Path(path)) for path in records)]
    return vouched


def _tell_snakemake(snakefile: str, options: Sequence[str]) -> None:
    """Have Snakemake note, for all outputs, times in order and the params that DVC says they were made with.

    A job whose results are not DVC's gets an answer that makes Snakemake run it again.
    """
    status = json.loads(_dvc("status", "--json", str(PIPELINE)).splitlines()[-1])
    answers = {
        stage: plain(entry.get("params", {}).get(str(PARAMS), {})) if _only_params(status.get(stage, [])) else NOT_KNOWN
        for stage, entry in _read_book().items()
    }
    ANSWERS.write_text(json.dumps(answers), encoding="utf-8")
    _snakemake(snakefile, *options, "--touch", "--forceall", "--cores", "1", answers=ANSWERS)


def _only_params(changes: Sequence[Any]) -> bool:
    """Whether nothing but params has changed since DVC ran the stage, in `dvc status`'s words for it."""
    return all(
        isinstance(c, dict) and set(c) == {"changed deps"} and set(c["changed deps"]) == {str(PARAMS)} for c in changes
    )


# From Snakemake to DVC


def _tell_dvc(ledger: dict[str, Any], snakefile: str, options: Sequence[str]) -> None:
    """Commit what is on disk, if Snakemake knows all of it to be up to date; note that in the ledger."""
    params = PARAMS.read_bytes()
    if not _all_done(_snakemake(snakefile, *options, "--summary")):
        return
    before = BOOK.read_bytes() if BOOK.is_file() else None
    _say("telling DVC what Snakemake has made: dvc commit")
    _dvc("commit", "--force", "--quiet", str(PIPELINE))
    if PARAMS.read_bytes() != params:  # else dvc.lock says that the results were made with the new ones
        _restore(before)
        raise TellingError("params.yaml was changed meanwhile")
    ledger.update(open=False, told=_vouched_for())


def _all_done(summary: str) -> bool:
    """Whether Snakemake's summary says of every result that it is there, known and up to date.

    The marks of shards that were made ahead are no results: they need not be there once `prepare` has run.
    """
    lines = [line.split("\t") for line in summary.splitlines() if "\t" in line]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    results = [row for row in rows if Path(row["output_file"]).is_relative_to(paths.RESULTS)]
    return bool(results) and all(
        r["plan"] == "no update" and r["status"] == "ok" and r["log-file(s)"] != "-" for r in results
    )


def _restore(book: bytes | None) -> None:
    """Put back dvc.lock as it was."""
    if book is None:
        BOOK.unlink()
        return
    old = BOOK.with_suffix(".lock.old")
    old.write_bytes(book)
    old.replace(BOOK)


# The ledger


def _look() -> dict[str, str | None]:
    """What tells the state of the workspace from others, without reading files."""
    records = paths.RESULTS / "records"
    files = [BOOK, PARAMS, paths.REPORT, *(sorted(records.glob("*.json")) if records.is_dir() else ())]
    return {str(file): _identity(file) for file in files}


def _identity(file: Path) -> str | None:
    """Changes when a file is replaced or written, and when its time is set."""
    try:
        found = file.stat()
    except OSError:
        return None
    return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"


def _read_ledger() -> dict[str, Any]:
    """What was seen and told; an unreadable ledger says that nothing was."""
    empty: dict[str, Any] = {"seen": None, "told": {}, "open": False}
    try:
        return {**empty, **json.loads(LEDGER.read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return empty


def _write_ledger(ledger: Mapping[str, Any]) -> None:
    new = LEDGER.with_suffix(".new")
    new.write_text(json.dumps(ledger), encoding="utf-8")
    new.replace(LEDGER)


@contextmanager
def _alone() -> Iterator[None]:
    """Let one Snakemake at a time tell and note."""
    SNAKEMAKE.mkdir(exist_ok=True)
    with LEDGER.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another Snakemake, which compares its results with DVC's")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Books and engines


def _read_book() -> dict[str, Any]:
    """The stages of dvc.lock by name; an unreadable one knows of none."""
    try:
        book = yaml.load(BOOK.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return {}
    return dict(book.get("stages") or {}) if isinstance(book, dict) else {}


def _md5(file: Path) -> str | None:
    try:
        return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    except OSError:
        return None


def _dvc(*words: str) -> str:
    return _run("dvc", *words, answers=None)


def _snakemake(snakefile: str, *words: str, answers: Path | None = None) -> str:
    return _run("snakemake", "-s", snakefile, "--nolock", "--no-hooks", *words, answers=answers)


def _run(engine: str, *words: str, answers: Path | None) -> str:
    """What the engine prints.

    Raises:
        TellingError: it failed.
    """
    environment = {**os.environ, NESTED: str(answers or "")}
    done = subprocess.run([sys.executable, "-m", engine, *words], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise TellingError(f"{engine}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def _say(message: str) -> None:
    print(f"maskdm: {message}", file=sys.stderr, flush=True)
