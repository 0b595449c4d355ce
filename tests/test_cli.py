"""The command line: exit codes, messages, help, and how it ends when it is stopped."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from maskdm import __version__
from maskdm.cli import STAGES, main
from maskdm.config import load_params
from maskdm.config.jobs import ARM_STAGES, STAGE_VERSIONS
from tests.imported import run_python

if TYPE_CHECKING:
    from tests.conftest import Experiment, Outcome

ARM = "patch-m50"
OF_ARM = ["--arm", ARM, "--seed", "0"]
OF_TRIAL = ["--arm", ARM, "--trial", "given"]


def words_of(stage: str) -> list[str]:
    return [stage, *(OF_ARM if stage in ARM_STAGES else OF_TRIAL if stage == "tune" else [])]


def assert_message(outcome: Outcome, code: int, *says: str) -> None:
    """The command ended with this code and one message that contains all of `says`."""
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    for part in says:
        assert part in outcome.err


# --- what it says ---------------------------------------------------------------------------------------------


def test_validate_summarises_a_valid_file(tiny: Experiment) -> None:
    outcome = tiny.succeed("validate")
    assert outcome.out == "params.yaml is valid: experiment 'tiny', 3 arms × 1 seed, 4×4 patches\n"
    assert outcome.err == ""
    assert [f.name for f in tiny.folder.iterdir()] == ["params.yaml"]


def test_validate_names_missing_data(tiny: Experiment) -> None:
    tiny.change(dataset={"source": "image_folder", "root": "nowhere"})
    *_, line = tiny.succeed("validate").out.splitlines()
    assert line == f"! dataset.root: there is no {tiny.folder.resolve() / 'nowhere'} yet"
    tiny.path("nowhere").mkdir()
    assert "!" not in tiny.succeed("validate").out


@pytest.mark.parametrize("command", [*map(words_of, STAGES), ["validate"], ["plan"], ["summary"], ["ui"]], ids=" ".join)
def test_bad_params_are_exit_2_before_anything_is_written(tiny: Experiment, command: list[str]) -> None:
    tiny.change(model={"depth": 4})
    assert_message(tiny.run(*command), 2, "maskdm: error: params.yaml: model: depth 4 is even")
    assert [f.name for f in tiny.folder.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize("command", [["validate"], ["prepare"], words_of("pretrain"), ["ui"]], ids=" ".join)
def test_missing_params_file_is_exit_2_and_says_where_to_run(tiny: Experiment, command: list[str]) -> None:
    tiny.file.unlink()
    assert_message(tiny.run(*command), 2, f"no params.yaml in {tiny.folder.resolve()}", "experiments/<name>")


@pytest.mark.parametrize("stage", [*ARM_STAGES, "tune"])
def test_unknown_arm_is_exit_2_with_a_suggestion(tiny: Experiment, stage: str) -> None:
    outcome = tiny.run(*[word.replace(ARM, "patch-m5") for word in words_of(stage)])
    assert_message(outcome, 2, "there is no arm 'patch-m5' in params.yaml; did you mean 'patch-m50'?")


def test_arm_that_resembles_no_other_is_exit_2_with_the_list(tiny: Experiment) -> None:
    outcome = tiny.run("pretrain", "--arm", "zzz", "--seed", "0")
    assert_message(outcome, 2, "no arm 'zzz'", "expected one of: block2-m75, patch-m50, scratch")


@pytest.mark.parametrize("stage", ARM_STAGES)
def test_unknown_seed_is_exit_2(tiny: Experiment, stage: str) -> None:
    outcome = tiny.run(stage, "--arm", ARM, "--seed", "7")
    assert_message(outcome, 2, "seed 7 is not in `seeds` of params.yaml: [0]")


@pytest.mark.parametrize(
    ("tuning", "known"), [({}, "given, lr-high"), ({"trials": {}}, "none, nothing is tuned")], ids=["tuned", "untuned"]
)
def test_unknown_trial_is_exit_2_with_the_list(tiny: Experiment, tuning: dict[str, Any], known: str) -> None:
    outcome = tiny.change(tuning=tuning).run("tune", "--arm", ARM, "--trial", "lr-hihg")
    assert_message(outcome, 2, f"no trial 'lr-hihg' in tuning.trials: {known}")
    assert not tiny.path("results").exists()


@pytest.mark.parametrize("stage", list(STAGES))
def test_wrong_stage_version_is_exit_2_and_names_both(tiny: Experiment, stage: str) -> None:
    wrong = STAGE_VERSIONS[stage] + 1
    outcome = tiny.run(*words_of(stage), "--stage-version", str(wrong))
    expected = f"the workflow expects version {wrong} of stage {stage}, this maskdm has {STAGE_VERSIONS[stage]}"
    assert_message(outcome, 2, expected, "different commits")
    assert not tiny.path("results").exists()


def test_right_stage_version_runs_the_stage(tiny: Experiment) -> None:
    tiny.succeed("prepare", "--stage-version", str(STAGE_VERSIONS["prepare"]))
    assert tiny.path("results/data/manifest.json").is_file()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["pretrian"],
        ["pretrain"],
        ["pretrain", "--arm", ARM],
        ["pretrain", "--seed", "0"],
        ["pretrain", "--arm", ARM, "--seed", "zero"],
        ["prepare", *OF_ARM],
        ["tune"],
        ["tune", "--arm", ARM],
        ["tune", "--trial", "given"],
        ["tune", *OF_ARM],
        ["tune", *OF_TRIAL, "--seed", "0"],
        ["pretrain", *OF_ARM, "--trial", "given"],
        ["choose", "--arm", ARM],
        ["scale", *OF_ARM],
        ["validate", "--stage-version", "1"],
        ["ui", "--port", "http"],
    ],
    ids=" ".join,
)
def test_wrong_command_line_is_exit_2_with_the_usage(tiny: Experiment, words: list[str]) -> None:
    assert_message(tiny.run(*words), 2, "usage: ", "error: ")


CHOSEN = f"results/chosen/{ARM}.json"
FIRST = {
    "features": ("results/data", "maskdm prepare"),
    "scale": ("results/data", "maskdm prepare"),
    "tune": ("results/data", "maskdm prepare"),
    "pretrain": ("results/data", "maskdm prepare"),
    "finetune": ("results/data", "maskdm prepare"),
    "sample": ("results/data", "maskdm prepare"),
    "evaluate": ("results/data", "maskdm prepare"),
    "scale without features": ("results/features", "maskdm features"),
    "tune without features": ("results/features", "maskdm features"),
    "choose without tune": (f"results/tuning/{ARM}/lr-high.json", f"maskdm tune --arm {ARM} --trial lr-high"),
    "pretrain without choose": (CHOSEN, "maskdm choose"),
    "finetune without choose": (CHOSEN, "maskdm choose"),
    "sample without choose": (CHOSEN, "maskdm choose"),
    "evaluate without choose": (CHOSEN, "maskdm choose"),
    "finetune without pretrain": (f"results/pretrain/{ARM}", f"maskdm pretrain --arm {ARM} --seed 0"),
    "sample without finetune": (f"results/finetune/{ARM}", f"maskdm finetune --arm {ARM} --seed 0"),
    "evaluate without sample": (f"results/samples/{ARM}", f"maskdm sample --arm {ARM} --seed 0"),
    "evaluate without finetune": (f"results/finetune/{ARM}", f"maskdm finetune --arm {ARM} --seed 0"),
    "evaluate without features": ("results/features", "maskdm features"),
    "evaluate without scale": ("results/metrics/scale.json", "maskdm scale"),
}


def test_missing_earlier_stage_is_exit_1_and_names_the_command(scored: Experiment) -> None:
    for case, (missing, command) in FIRST.items():
        path, aside = scored.path(missing), scored.path("aside")
        path.rename(aside)
        left = scored.hashes("results")
        outcome = scored.run(*words_of(case.split()[0]))
        assert_message(outcome, 1, "maskdm: error: ", missing, f"run first: {command}")
        assert scored.hashes("results") == left, case
        aside.rename(path)


def test_summary_before_any_result_is_exit_1(tiny: Experiment) -> None:
    assert_message(tiny.run("summary"), 1, "is missing; run first: dvc repro")


def test_summary_shows_every_arm(finished_once: Experiment) -> None:
    out = finished_once.succeed("summary").out
    assert all(arm in out for arm in ("scratch", "patch-m50", "block2-m75"))


def test_ui_before_any_result_is_exit_1(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert_message(tiny.run("ui"), 1, "there are no results of experiment 'tiny' yet", "dvc repro")


def test_truncated_data_is_exit_1(prepared: Experiment) -> None:
    shard = prepared.path("results/data/images-00000.npy")
    shard.write_bytes(shard.read_bytes()[:100])
    outcome = prepared.stage("pretrain")
    assert_message(outcome, 1, "results/data/images-00000.npy has 100 bytes, expected", "run first: maskdm prepare")
    prepared.succeed("prepare")
    assert prepared.stage("pretrain").code == 0


def test_data_with_a_flipped_bit_is_exit_1(prepared: Experiment) -> None:
    shard = prepared.path("results/data/images-00000.npy")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    outcome = prepared.stage("pretrain")
    assert_message(outcome, 1, "results/data/images-00000.npy", "remove results/data and run `maskdm prepare` again")
    shutil.rmtree(prepared.path("results/data"))
    prepared.succeed("prepare")
    assert prepared.stage("pretrain").code == 0


# --- help -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", list(STAGES))
def test_help_of_a_stage_shows_its_options(tiny: Experiment, stage: str) -> None:
    outcome = tiny.run(stage, "--help")
    assert outcome.code == 0
    assert "--stage-version" in outcome.out
    for option, stages in (
        ("--arm", (*ARM_STAGES, "tune")),
        ("--seed", ARM_STAGES),
        ("--trial", ("tune",)),
        ("--force", STAGES),
    ):
        assert (option in outcome.out) == (stage in stages)


def test_help_lists_every_command_and_the_exit_codes(tiny: Experiment) -> None:
    outcome = tiny.run("--help")
    assert outcome.code == 0
    for command in (*STAGES, "validate", "plan", "summary", "status", "verify", "ui"):
        assert f"\n    {command} " in outcome.out
    for part in (
        "0 done",
        "1 a stage failed",
        "2 wrong params.yaml",
        "130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP",
    ):
        assert part in outcome.out


def test_version_is_that_of_the_package(tiny: Experiment) -> None:
    outcome = tiny.run("--version")
    assert (outcome.code, outcome.out) == (0, f"maskdm {__version__}\n")
    assert metadata.version("maskdm") == __version__


def test_every_stage_has_a_version() -> None:
    assert list(STAGE_VERSIONS) == list(STAGES)


# --- as a process ---------------------------------------------------------------------------------------------


def run_process(command: list[str], folder: Path) -> tuple[int, str, str]:
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [(["validate"], 0), (["pretrain", "--arm", "x", "--seed", "0"], 2)],
    ids=["valid", "invalid"],
)
def test_command_and_module_are_the_same(tiny: Experiment, words: list[str], code: int) -> None:
    command = Path(sys.executable).with_name("maskdm")
    as_command = run_process([str(command), *words], tiny.folder)
    as_module = run_process([sys.executable, "-m", "maskdm", *words], tiny.folder)
    assert as_command == as_module
    assert as_command[0] == code
    assert "Traceback" not in as_command[2]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_terminal_lacks_are_replaced(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr("maskdm.base.interrupts.install", lambda: None)
    monkeypatch.chdir(tiny.folder)
    assert main(["validate"]) == 0
    with contextlib.suppress(SystemExit):
        main(["--help"])
    said = stdout.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "3 arms {} 1 seed".format("?" if encoding == "ascii" else "×") in said
    assert "prepare ? features ? scale" in said


def test_package_imports_only_itself(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import maskdm; print(*sorted(set(sys.modules) - before))"
    assert run_python(code, tmp_path) == ["maskdm"]


def lengthen(experiment: Experiment) -> None:
    """Make training stages long, save their state at every step, and tune nothing."""
    experiment.change(training={"log_every": 1}, saving={"every_seconds": 0.01}, budget={"unmasked_steps": 20_000})
    experiment.change(tuning={"trials": {}}).succeed("choose")


@pytest.mark.parametrize(("stage", "number"), [("pretrain", signal.SIGTERM), ("finetune", signal.SIGINT)])
def test_stopped_training_has_an_exit_code_of_its_own_and_leaves_results_as_they_were(
    scored: Experiment, stop_when: Callable[..., Outcome], stage: str, number: signal.Signals
) -> None:
    lengthen(scored)
    if stage == "finetune":  # there is no old output, whereas pretraining has one
        scored.change(pretrain={"share": 0.001}).succeed(*words_of("pretrain"))
        shutil.rmtree(scored.path("results", stage, ARM))
        scored.path(f"results/records/{stage}-{ARM}-seed-0.json").unlink()
    before = scored.hashes("results")
    states = f".work/results/{stage}/{ARM}/seed-0/*/state-*.safetensors"
    process = scored.start(*words_of(stage))
    outcome = stop_when(process, lambda: any(scored.folder.glob(states)), number)
    code = {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert_message(outcome, code, f"maskdm: stopped by {number.name}: saved {stage} {ARM} seed 0 at step ")
    assert scored.hashes("results") == before
    assert any(scored.folder.glob(states)), "the training resumes from here"


def test_threads_of_the_numerical_libraries_are_those_of_params(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("OMP", "OPENBLAS", "MKL"):
        monkeypatch.setenv(f"{library}_NUM_THREADS", "7")
    tiny.change(compute={"threads": 2}).succeed("prepare")
    assert {os.environ[f"{library}_NUM_THREADS"] for library in ("OMP", "OPENBLAS", "MKL")} == {"2"}
    assert load_params(tiny.file).compute.threads == 2
