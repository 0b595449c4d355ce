"""Faults, for real and at length: kills at random moments, flipped bits, full disks; results are compared by byte.

    python -m benchmarks.faults                    everything: about half an hour on 2 cores
    python -m benchmarks.faults --kills 10 --only kills

Everything runs in a temporary folder on experiments/tiny, with two arms. tests/test_faults.py runs short versions of
the same. The table that it prints stands in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
TINY = Path("experiments/tiny")
ENGINE_FILES = ("dvc.yaml", "params.yaml", "Snakefile", "workflow", "profiles", ".dvcignore")
ARMS = ("scratch", "patch-m50")
ARM, TRIAL = "patch-m50", "lr-high"
OF_ARM = ("--arm", ARM, "--seed", "0")
# In the order of the pipeline, what a stage is typed with and what it publishes.
STAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "prepare": ((), "results/data"),
    "features": ((), "results/features"),
    "scale": ((), "results/metrics/scale.json"),
    "tune": (("--arm", ARM, "--trial", TRIAL), f"results/tuning/{ARM}/{TRIAL}.json"),
    "choose": ((), "results/chosen"),
    "pretrain": (OF_ARM, f"results/pretrain/{ARM}/seed-0"),
    "finetune": (OF_ARM, f"results/finetune/{ARM}/seed-0"),
    "sample": (OF_ARM, f"results/samples/{ARM}/seed-0"),
    "evaluate": (OF_ARM, f"results/metrics/{ARM}-seed-0.json"),
    "report": ((), "results/report"),
}
SHOWS_TIMES = ("report", "records")  # of results/: what equal runs need not have in common


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        fault: what was done.
        times: how often.
        outcome: what came of it.
    """

    fault: str
    times: int
    outcome: str


# --- stages without engines: forked from a process that has imported everything, so that a start costs nothing


class Stages:
    """Runs stages of the experiment in a folder.

    Args:
        folder: holds its params.yaml.
        log: the file there that gets what commands print.
    """

    def __init__(self, folder: Path, log: str = "said.txt") -> None:
        self.folder, self._log = folder, log

    def start(self, *words: str, limit: int | None = None) -> BaseProcess:
        """Start a command as a process of its own.

        Args:
            words: of the command.
            limit: bytes that a file may have: writing more fails, as on a full disk.
        """
        process = _server().Process(target=_run_command, args=(str(self.folder), self._log, list(words), limit))
        process.start()
        return process

    def run(self, *words: str, limit: int | None = None) -> int:
        """Run a command; its exit code."""
        process = self.start(*words, limit=limit)
        process.join()
        return int(process.exitcode or 0)

    def must(self, *words: str) -> None:
        """Run a command that must end well."""
        if (code := self.run(*words)) != 0:
            raise SystemExit(f"maskdm {' '.join(words)} ended with {code}:\n{self.said()}")

    def said(self) -> str:
        """What the last command printed."""
        log = self.folder / self._log
        return log.read_text(encoding="utf-8") if log.exists() else ""

    def path(self, place: str) -> Path:
        """A path in the folder."""
        return self.folder / place

    def digests(self, place: str = "results") -> dict[str, str]:
        """The sha256 of every final artefact at or below a place, by path."""
        return digests(self.path(place), self.folder)


def digests(top: Path, base: Path) -> dict[str, str]:
    """The sha256 of every file at or below `top`, by its path from `base`; without what shows times."""
    files = [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_file())
    named = {file.relative_to(base): file for file in files if not file.name.startswith(".")}
    return {
        str(name): hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in named.items()
        if len(name.parts) < 2 or name.parts[1] not in SHOWS_TIMES
    }


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.faults_preload"])
    return context


def _run_command(folder: str, log: str, words: list[str], limit: int | None) -> None:
    """In the new process: what `maskdm WORDS` does."""
    import resource

    from maskdm.cli import main

    heed_signals()
    os.chdir(folder)
    with Path(log).open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def heed_signals() -> None:
    """In a new process: what nohup or a shell's background had ignored is not ignored here."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def make_params(folder: Path, **sections: dict[str, Any]) -> Path:
    """The tiny experiment with two arms, longer and saved often, so that there is something to kill."""
    content = yaml.safe_load((ROOT / TINY / "params.yaml").read_text(encoding="utf-8"))
    content["arms"] = {arm: content["arms"][arm] for arm in ARMS}
    content |= {"tracking": {"enabled": False}, "saving": {"every_steps": 5}}
    changes: dict[str, dict[str, Any]] = {
        "budget": {"unmasked_steps": 120},
        "sampling": {"batch_size": 8},
        "compute": {"device": "cpu"},
        **sections,
    }
    for name, change in changes.items():
        content[name] = {**content.get(name, {}), **change}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder


def run_all(folder: Path) -> tuple[Stages, dict[str, float]]:
    """Every stage of one arm, not interrupted, after what the others need; and how long each took."""
    stages, seconds = Stages(folder), dict[str, float]()
    stages.must("validate")  # the process that forks is there
    for stage, (words, _) in STAGES.items():
        for other in _before(stage):
            stages.must(*other)
        started = time.perf_counter()
        stages.must(stage, *words)
        seconds[stage] = time.perf_counter() - started
    return stages, seconds


def _before(stage: str) -> list[tuple[str, ...]]:
    """What must have run before a stage beside the stages of `STAGES`: the other arm's and trial's."""
    if stage != "choose":
        return []
    pairs = [(arm, trial) for arm in ARMS for trial in ("given", TRIAL) if (arm, trial) != (ARM, TRIAL)]
    return [("tune", "--arm", arm, "--trial", trial) for arm, trial in pairs]


def kill_stage(stages: Stages, stage: str, kills: int, seconds: float, numbers: random.Random) -> int:
    """Kill a stage (kill -9) so many times at random moments of its work, then let it end.

    A process that has ended before its kill does not count: what it has done is removed, and it starts anew.

    Returns:
        how often it was killed.
    """
    words, output = STAGES[stage]
    done = 0
    while done < kills:
        process = stages.start(stage, *words)
        process.join(numbers.uniform(0.02, 0.98) * seconds)
        if process.is_alive():
            process.kill()
            done += 1
        process.join()
        if process.exitcode == 0:
            forget(stages, output)
    stages.must(stage, *words)
    return done


def forget(stages: Stages, output: str) -> None:
    """Remove an output and all that is kept of its making."""
    for path in (stages.path(output), stages.path(".work") / Path(output).with_suffix("")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# --- engines


def command_of(engine: str) -> list[str]:
    """How an engine is typed."""
    if engine == "dvc":
        return ["dvc", "repro", f"{TINY}/dvc.yaml"]
    return ["snakemake", "-d", str(TINY), "--cores", "2"]


def make_workspace(folder: Path, **sections: dict[str, Any]) -> Path:
    """A project without git, with the engines' files."""
    folder.mkdir(parents=True)
    for name in ENGINE_FILES:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    make_params(folder / TINY, **sections)
    (folder / TINY / "dvc.yaml").symlink_to("../../dvc.yaml")
    subprocess.run(["dvc", "init", "--quiet", "--no-scm"], cwd=folder, env=environment(), check=True)
    return folder


def environment() -> dict[str, str]:
    """For engines: `maskdm` is this environment's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**{k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}, "PATH": path}


@contextlib.contextmanager
def started(engine: str, workspace: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An engine at work in a session of its own; nothing of it is left behind."""
    with (workspace / "said.txt").open("ab") as said:
        process = subprocess.Popen(
            command_of(engine),
            cwd=workspace,
            env=environment(),
            stdout=said,
            stderr=said,
            start_new_session=True,
            preexec_fn=heed_signals,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stages_at_work(workspace: Path) -> list[psutil.Process]:
    """The stages that run in a workspace, orphans too."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "--stage-version" in process.cmdline() and Path(process.cwd()) == workspace / TINY:
                found.append(process)
    return found


def kill_something(process: subprocess.Popen[bytes], workspace: Path, numbers: random.Random) -> str:
    """Send kill -9 to a stage, to the engine with its stages or to the engine alone, or Ctrl-C to all."""
    what = numbers.choice(["stage", "engine and stages", "engine alone", "Ctrl-C"])
    at_work = stages_at_work(workspace)
    if what == "stage" and at_work:
        with contextlib.suppress(psutil.Error):
            numbers.choice(at_work).kill()
        process.wait()
        return what
    if what == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        return what
    process.kill()
    process.wait()
    if what == "engine alone":
        return what
    for stage in at_work:
        with contextlib.suppress(psutil.Error):
            stage.kill()
    return "engine and stages"


def kills_of_engines(folder: Path, engine: str, kills: int, numbers: random.Random) -> list[Row]:
    """Run the experiment over and over, killing something at random moments, until so many kills are done."""
    whole = make_workspace(folder / f"{engine}-whole")
    began = time.monotonic()
    with started(engine, whole) as process:
        if process.wait() != 0:
            raise SystemExit((whole / "said.txt").read_text(encoding="utf-8"))
    longest = min(8.0, time.monotonic() - began)  # seconds until a kill, at most
    expected = digests(whole / TINY / "results", whole / TINY)
    counts, rounds, mended = Counter[str](), 0, 0
    while counts.total() < kills:
        workspace = make_workspace(folder / f"{engine}-{rounds}")
        while not (done := _until_killed(engine, workspace, counts, kills, longest, numbers)):
            mended += done is None
        rounds += 1
        if digests(workspace / TINY / "results", workspace / TINY) != expected:
            raise SystemExit(f"{engine}: after {counts.total()} kills in {rounds} rounds the results are others")
        shutil.rmtree(workspace)
    how = ", ".join(f"{count} of {what}" for what, count in sorted(counts.items()))
    typed = f"{mended} times `maskdm doctor --fix` had to be typed first (a torn lock file of DVC's)"
    outcome = (
        f"the same command again, {typed if mended else 'nothing else to type'}; "
        f"all {len(expected)} artefacts bit-identical at the end of each of {rounds} runs"
    )
    return [Row(f"kills at random moments under {engine} ({how})", counts.total(), outcome)]


def _until_killed(
    engine: str, workspace: Path, counts: Counter[str], kills: int, longest: float, numbers: random.Random
) -> bool | None:
    """Start an engine and kill something of it; whether it ended before, or None if DVC's lock had to be mended."""
    said = workspace / "said.txt"
    before = said.stat().st_size if said.exists() else 0
    with started(engine, workspace) as process:
        limit = numbers.uniform(1.0, longest) if counts.total() < kills else None
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.wait(limit) == 0:
                return True
            text = said.read_bytes()[before:].decode()
            if "Unable to read RWLock-file" not in text:
                raise SystemExit(f"{engine} failed unkilled:\n{text[-5000:]}")
            subprocess.run(["maskdm", "doctor", "--fix"], cwd=workspace / TINY, env=environment(), check=True)
            return None
        counts[kill_something(process, workspace, numbers)] += 1
    print(f"{engine}: {counts.total()}/{kills} kills", file=sys.stderr, flush=True)
    return False


# --- the faults


def kills_of_stages(folder: Path, kills: int, numbers: random.Random) -> list[Row]:
    """Each stage in turn, killed at random moments."""
    whole, seconds = run_all(make_params(folder / "stages-whole"))
    killed = Stages(make_params(folder / "stages-killed"))
    each = max(5, kills // len(STAGES))
    for stage in STAGES:
        for other in _before(stage):
            killed.must(*other)
        kill_stage(killed, stage, each, seconds[stage], numbers)
        output = STAGES[stage][1]
        if killed.digests(output) != whole.digests(output):
            raise SystemExit(f"{stage}: killed {each} times, it came out otherwise")
        print(f"{stage}: killed {each} times", file=sys.stderr, flush=True)
    return [Row(f"kill -9 of each of {len(STAGES)} stages at random moments", each * len(STAGES), "bit-identical")]


# What a stage reads: a flipped bit or a cut must be refused by it, naming the file.
READ_BY: dict[str, tuple[str, ...]] = {
    "pretrain": ("results/data/images-00000.npy", "results/data/labels.npy", f"results/chosen/{ARM}.json"),
    "finetune": (f"results/pretrain/{ARM}/seed-0/checkpoint.safetensors",),
    "sample": (
        f"results/finetune/{ARM}/seed-0/milestone-0.600.safetensors",
        f"results/finetune/{ARM}/seed-0/milestones.json",
    ),
    "evaluate": (
        f"results/samples/{ARM}/seed-0/milestone-1.000.npy",
        f"results/samples/{ARM}/seed-0/samples.json",
        "results/features/reference.npy",
        "results/features/features.json",
        "results/features/classifier.safetensors",
        "results/metrics/scale.json",
        f"results/finetune/{ARM}/seed-0/run.json",
    ),
    "choose": (f"results/tuning/{ARM}/given.json",),
    "features": ("results/data/manifest.json",),
}


def flip(content: bytes, numbers: random.Random) -> bytes:
    """One random bit of a file the other way round."""
    position = numbers.randrange(len(content))
    return content[:position] + bytes([content[position] ^ 1 << numbers.randrange(8)]) + content[position + 1 :]


def is_harmless(file: Path, before: bytes, after: bytes) -> bool:
    """Whether a flipped bit leaves what a file says as it was: white space, or the case of an exponent, in JSON."""
    import json

    if file.suffix != ".json":
        return False
    with contextlib.suppress(ValueError):
        return bool(json.loads(before) == json.loads(after))
    return False


def damage(stages: Stages, stage: str, name: str, change: Callable[[bytes], bytes]) -> str:
    """Change a file that a stage reads; what becomes of it: refused, harmless, or what went wrong."""
    file, words = stages.path(name), STAGES[stage][0]
    before = file.read_bytes()
    replace(file, after := change(before))
    try:
        code = stages.run(stage, *words)
    finally:
        replace(file, before)
    if is_harmless(file, before, after) or after == before:
        return "harmless"
    # the manifest's provenance tells nobody anything about the pixels
    if code == 1 and str(Path(name).parent if name.endswith("labels.npy") else name) in stages.said():
        return "refused"
    return f"{stage} with a damaged {name} ended with {code}: {stages.said()[-500:]}"


def replace(file: Path, content: bytes) -> None:
    """Write a file anew: what is kept of finished work is another name of the old one."""
    other = file.with_name(f".{file.name}.other")
    other.write_bytes(content)
    other.replace(file)


def damages(folder: Path, times: int, numbers: random.Random) -> list[Row]:
    """Flipped bits and cuts at random places of every file that a stage reads."""
    stages, _ = run_all(make_params(folder / "damaged"))
    files = [(stage, name) for stage, names in READ_BY.items() for name in names]
    rows = []
    for what, change in (
        ("one flipped bit", lambda content: flip(content, numbers)),
        ("a truncated file", lambda content: content[: numbers.randrange(len(content))]),
    ):
        outcomes = [damage(stages, stage, name, change) for stage, name in files for _ in range(times)]
        wrong = [outcome for outcome in outcomes if outcome not in ("refused", "harmless")]
        if wrong:
            raise SystemExit("\n".join(wrong))
        refused, harmless = outcomes.count("refused"), outcomes.count("harmless")
        said = f"{refused} refused, naming the file" + (
            f"; {harmless} changed nothing that it says" if harmless else ""
        )
        rows.append(Row(f"{what} in each of {len(files)} files that stages read", len(outcomes), said))
    return rows


def full_disk(folder: Path, times: int, numbers: random.Random) -> list[Row]:
    """A small filesystem that is full at random moments of training; then there is space, and the command again."""
    whole, _ = run_all(make_params(folder / "disk-whole"))
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        return [Row("a full disk", 0, f"not tried: no filesystem could be mounted ({mounted.stderr.decode().strip()})")]
    try:
        tried = [_fill(whole, disk / str(number), numbers) for number in range(times)]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    failed = sum(tried)
    return [
        Row(
            "a disk that fills up at a random moment of pretraining",
            times,
            f"{failed} times a clear error (else there was room enough); with space again bit-identical every time",
        )
    ]


def _fill(whole: Stages, folder: Path, numbers: random.Random) -> bool:
    """Fill the disk but for a random rest, pretrain, make space, pretrain; whether the first one failed."""
    shutil.copytree(whole.folder, folder, ignore=shutil.ignore_patterns(".work", "pretrain"))
    stages, rest = Stages(folder), numbers.randrange(4_000, 400_000)
    ballast = folder.parent / "ballast"
    free = shutil.disk_usage(folder).free
    with ballast.open("wb") as file:
        file.write(bytes(max(0, free - rest)))
    code = stages.run("pretrain", *OF_ARM)
    said = stages.said()
    ballast.unlink()
    if code not in (0, 1) or (code == 1 and os.strerror(errno.ENOSPC) not in said):
        raise SystemExit(f"on a full disk pretrain ended with {code}: {said}")
    if "Traceback" in said:
        raise SystemExit(f"on a full disk: {said}")
    stages.must("pretrain", *OF_ARM)
    if stages.digests(STAGES["pretrain"][1]) != whole.digests(STAGES["pretrain"][1]):
        raise SystemExit("after a full disk pretraining came out otherwise")
    shutil.rmtree(folder)
    return code == 1


def run(only: Sequence[str], kills: int, seed: int) -> Iterator[Row]:
    """Every fault that is asked for, as rows of the table."""
    numbers = random.Random(seed)
    faults: dict[str, Callable[[Path], list[Row]]] = {
        "kills": lambda folder: kills_of_engines(folder, "snakemake", kills, numbers),
        "kills-dvc": lambda folder: kills_of_engines(folder, "dvc", max(1, kills // 4), numbers),
        "kills-stages": lambda folder: kills_of_stages(folder, kills, numbers),
        "damages": lambda folder: damages(folder, max(1, kills // 5), numbers),
        "full-disk": lambda folder: full_disk(folder, max(1, kills // 5), numbers),
    }
    if unknown := set(only) - set(faults):
        raise SystemExit(f"no fault {', '.join(sorted(unknown))}; there are {', '.join(faults)}")
    for name, fault in faults.items():
        if name in only or not only:
            with tempfile.TemporaryDirectory(prefix=f"faults-{name}-") as folder:
                yield from fault(Path(folder).resolve())


def main() -> None:
    """Run what the command line asks for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills under Snakemake; the others in proportion")
    parser.add_argument("--only", nargs="*", default=[], help="kills kills-dvc kills-stages damages full-disk")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places (moments depend on the machine)")
    options = parser.parse_args()
    print("| fault | times tried | outcome |\n|---|---|---|", flush=True)
    for row in run(options.only, options.kills, options.seed):
        print(f"| {row.fault} | {row.times} | {row.outcome} |", flush=True)


if __name__ == "__main__":
    main()
