"""Tuning and the scale of the metrics: what trials are, what is chosen, and what an arm then runs with."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from maskdm.base.checksums import CHECKSUM, checked, values_sha256
from maskdm.base.publishing import publish_description
from maskdm.config import Run, load_params, paths, resolve
from maskdm.models.drawing import draw_images, load_model
from maskdm.scoring.extractors import open_classifier
from maskdm.scoring.scores import compute_metrics, floor_metrics
from maskdm.training import devices

if TYPE_CHECKING:
    from tests.conftest import Experiment, Outcome

ARM = "patch-m50"
ARMS = ["scratch", ARM, "block2-m75"]
OF_ARM = ["--arm", ARM, "--seed", "0"]
SCORES = ["fid", "kid", "kid_std", "precision", "recall", "num_samples"]
SPENT = ["flops", "images_seen", "tokens_seen"]
ORIGIN = ["extractor", "extractor_sha256", "data_sha256"]
LR_HIGH = {"pretrain.lr": 8e-3, "finetune.lr": 8e-3}
WILD = {"pretrain.lr": 1e12, "finetune.lr": 1e12}


def read(experiment: Experiment, path: Path) -> dict[str, Any]:
    content = json.loads(experiment.path(str(path)).read_text(encoding="utf-8"))
    return checked(content) if CHECKSUM in content else content


def edit(experiment: Experiment, path: Path, **values: Any) -> None:
    """Let a stage have made a result with other values."""
    content = {**read(experiment, path), **values}
    stamp = {**content.pop("stamp"), "content": values_sha256(content)}
    publish_description(experiment.path(str(path)), {**content, "stamp": stamp})


def trial_of(experiment: Experiment, trial: str, arm: str = ARM) -> dict[str, Any]:
    return read(experiment, paths.trial(arm, trial))


def run_of(experiment: Experiment, arm: str = ARM) -> Run:
    """An arm with the values that were chosen for it."""
    with contextlib.chdir(experiment.folder):
        return experiment.job("pretrain", arm, 0).run


def choice_of(experiment: Experiment, arm: str = ARM) -> str:
    return read(experiment, paths.chosen(arm))["trial"]


def learning_rates(experiment: Experiment, stage: str, arm: str = ARM) -> set[float]:
    return set(pd.read_csv(experiment.path("results", stage, arm, "seed-0/curve.csv"))["lr"])


def with_trials(experiment: Experiment, **trials: dict[str, Any]) -> Experiment:
    """Other trials altogether; `_` in a name stands for `-`."""
    named = {name.replace("_", "-"): values for name, values in trials.items()}
    content = experiment.content
    return experiment.rewrite({**content, "tuning": {**content["tuning"], "trials": named}})


def assert_refused(outcome: Outcome, *says: str) -> None:
    """The stage failed with one message, which holds all of `says`."""
    assert outcome.code == 1, outcome.err
    assert "maskdm: error: " in outcome.err and "Traceback" not in outcome.err
    for part in says:
        assert part in outcome.err


# --- trials ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arm", "trial"), [("scratch", "lr-high"), (ARM, "given"), (ARM, "lr-high")])
def test_a_trial_is_the_arm_run_by_hand_on_its_seed_and_budget(tuned: Experiment, arm: str, trial: str) -> None:
    result, params = trial_of(tuned, trial, arm), load_params(tuned.file)
    of_trial = resolve(params, arm, 0, trial).params
    shutil.rmtree(tuned.path("results/tuning"))
    tuned.rewrite(of_trial.model_dump(mode="json", exclude_unset=True)).succeed("choose")
    for stage in ("pretrain", "finetune", "sample", "evaluate"):
        tuned.succeed(stage, "--arm", arm, "--seed", "1000")
    by_hand = read(tuned, paths.metrics(arm, 1000))
    assert list(by_hand["milestones"]) == ["1.000"]
    whole = by_hand["milestones"]["1.000"]
    assert {k: result[k] for k in (*SCORES, *SPENT)} == {k: whole[k] for k in (*SCORES, *SPENT)}, "bit for bit"
    assert {k: result[k] for k in ORIGIN} == {k: by_hand[k] for k in ORIGIN}


def test_trials_say_what_they_are_of(tuned_once: Experiment) -> None:
    for arm in ARMS:
        for trial, values in (("given", {}), ("lr-high", LR_HIGH)):
            result = trial_of(tuned_once, trial, arm)
            about = ["arm", "trial", "values", "seed", "budget_fraction", "failed"]
            assert set(result) == {*about, *SCORES, *SPENT, *ORIGIN, "protocol", "stamp"}
            assert [result[key] for key in about] == [arm, trial, values, 1000, 0.5, None]
            assert result["num_samples"] == 64
        assert trial_of(tuned_once, "given", arm)["fid"] != trial_of(tuned_once, "lr-high", arm)["fid"]


def test_trials_of_all_arms_spend_the_same_to_within_a_step(tuned_once: Experiment) -> None:
    step = run_of(tuned_once, "scratch").finetune.flops_per_step
    spent = {arm: {trial_of(tuned_once, trial, arm)["flops"] for trial in ("given", "lr-high")} for arm in ARMS}
    assert all(len(flops) == 1 for flops in spent.values()), "the trials of an arm, which share their batch size here"
    assert spent["scratch"] == {10 * step}
    assert all(abs(flops - 10 * step) <= step / 2 for (flops,) in spent.values())


def test_trials_leave_no_state_behind_and_a_record_of_both_stages(tuned_once: Experiment) -> None:
    assert not list(tuned_once.path(".work").rglob("state-*.safetensors"))
    for arm in ARMS:
        record = read(tuned_once, paths.record("tune", arm, trial="lr-high"))
        assert (record["stage"], record["arm"], record["seed"], record["trial"]) == ("tune", arm, None, "lr-high")
        run = resolve(load_params(tuned_once.file), arm, 0, trial="lr-high")
        for stage in ("pretrain", "finetune"):
            of_stage, planned = record[stage], getattr(run, stage)
            assert (of_stage["steps"], of_stage["flops"]) == (planned.num_steps, planned.flops)
            assert (of_stage["device_seconds"] > 0) == (planned.num_steps > 0)
        seconds = record["pretrain"]["device_seconds"] + record["finetune"]["device_seconds"]
        assert 0 < seconds < record["wall_seconds"]


def test_where_nothing_is_tuned_there_is_no_trial(prepared: Experiment) -> None:
    outcome = prepared.run("tune", "--arm", ARM, "--trial", "lr-high")
    assert (outcome.code, "no trial 'lr-high' in tuning.trials: none, nothing is tuned" in outcome.err) == (2, True)


def test_a_trial_needs_the_features(prepared: Experiment) -> None:
    outcome = with_trials(prepared, given={}, lr_high=LR_HIGH).run("tune", "--arm", ARM, "--trial", "given")
    assert_refused(outcome, "results/features is missing; run first: maskdm features ")
    assert not prepared.path("results/tuning", ARM).exists()


def test_a_trial_is_not_scored_against_features_of_other_data(tuned: Experiment) -> None:
    tuned.change(dataset={"limit": 150}).succeed("prepare")
    outcome = tuned.run("tune", "--arm", ARM, "--trial", "given")
    assert_refused(outcome, "results/features is out of date: results/data has changed; run first: maskdm features ")


def more_steps(experiment: Experiment) -> Experiment:
    return experiment.keep_arm(ARM).change(
        budget={"unmasked_steps": 400}, training={"log_every": 1, "flip": 0.5}, saving={"every_seconds": 0.01}
    )


@pytest.fixture(scope="module")
def long_trial(tuned_once: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A longer trial that was not interrupted."""
    experiment = more_steps(tuned_once.copy_to(tmp_path_factory.mktemp("long_trial")))
    experiment.try_values("lr-high")
    return experiment


def test_a_trial_killed_while_finetuning_resumes_and_ends_as_if_uninterrupted(
    long_trial: Experiment, tmp_path: Path, stop_when: Callable[..., Outcome]
) -> None:
    experiment = long_trial.copy_to(tmp_path)
    result = paths.trial(ARM, "lr-high")
    experiment.path(str(result)).unlink()
    work = experiment.path(str(paths.work(result)))
    shutil.rmtree(work)
    process = experiment.start("tune", "--arm", ARM, "--trial", "lr-high")
    outcome = stop_when(process, lambda: any(work.glob("*/finetune/state-*.safetensors")), signal.SIGKILL)
    assert outcome.code == -signal.SIGKILL
    assert not experiment.path(str(result)).exists()
    out = experiment.try_values("lr-high").out
    resumed = {s: int(n) for s, n in re.findall(rf"(\w+) {ARM} trial lr-high: resuming from step (\d+)", out)}
    run = resolve(load_params(experiment.file), ARM, 0, trial="lr-high")
    assert 0 < resumed["finetune"] < run.finetune.num_steps
    assert resumed["pretrain"] == run.pretrain.num_steps, "not trained again"
    assert experiment.hashes(str(result)) == long_trial.hashes(str(result))
    assert {path.name for path in work.iterdir()} == {"lock", "record.json"}


@pytest.fixture
def wild(tuned: Experiment) -> Experiment:
    """One arm whose second trial's loss does not stay finite."""
    return with_trials(tuned.keep_arm(ARM).change(compute={"precision": "fp32"}), given={}, wild=WILD)


def test_a_trial_whose_loss_is_not_finite_has_failed_and_is_not_chosen(wild: Experiment) -> None:
    outcome = wild.try_values("wild")
    result = trial_of(wild, "wild")
    assert re.fullmatch(r"the (loss is|weights are) not finite .*\(learning rate 1e\+12\)", result["failed"])
    assert f"{ARM} trial wild has failed, {result['failed']}" in outcome.err
    assert all(result[key] is None for key in SCORES)
    wild.try_values("given")
    wild.succeed("choose")
    assert read(wild, paths.chosen(ARM)) == {"arm": ARM, "trial": "given", "values": {}}


def test_a_failed_trial_fails_again_instead_of_resuming_its_bad_state(wild: Experiment) -> None:
    wild.try_values("wild")
    before = wild.hashes(str(paths.trial(ARM, "wild")))
    work = wild.path(str(paths.work(paths.trial(ARM, "wild"))))
    assert {path.name for path in work.iterdir()} == {"lock", "record.json"}
    wild.succeed("tune", "--arm", ARM, "--trial", "wild", "--force")
    assert wild.hashes(str(paths.trial(ARM, "wild"))) == before


def test_only_an_arm_whose_trials_all_failed_cannot_run(wild: Experiment) -> None:
    with_trials(wild, wild=WILD, wilder={**WILD, "finetune.lr": 1e13})
    reasons = []
    for trial in ("wild", "wilder"):
        wild.try_values(trial)
        reasons.append(f"{trial}: {trial_of(wild, trial)['failed']}")
    outcome = wild.run("choose")
    assert outcome.code == 0 and f"every trial of arm {ARM} has failed: {'; '.join(reasons)}" in outcome.err
    assert read(wild, paths.chosen(ARM))["trial"] is None
    refused = wild.run("pretrain", "--arm", ARM, "--seed", "0")
    assert_refused(refused, f"every trial of arm {ARM} has failed ({'; '.join(reasons)})", "learning rates")


# --- the choice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", ["given", "lr-high"])
@pytest.mark.parametrize("metric", ["kid", "fid"])
def test_the_trial_with_the_lowest_metric_is_chosen_for_each_arm(tuned: Experiment, metric: str, best: str) -> None:
    other, scored_by_the_other = {"given", "lr-high"} - {best}, {"kid": "fid", "fid": "kid"}[metric]
    for trial, low in ((best, True), (*other, False)):
        scores = {metric: -0.5 if low else 0.1, scored_by_the_other: 9.0 if low else 0.0}
        edit(tuned, paths.trial(ARM, trial), **scores)
        edit(tuned, paths.trial("scratch", trial), **{**scores, metric: -scores[metric]})
    tuned.change(tuning={"metric": metric}).succeed("choose")
    assert choice_of(tuned) == best
    assert choice_of(tuned, "scratch") in other
    values = {"given": {}, "lr-high": LR_HIGH}
    assert read(tuned, paths.chosen(ARM)) == {"arm": ARM, "trial": best, "values": values[best]}


def test_of_two_equal_trials_the_first_of_params_is_chosen(tuned: Experiment) -> None:
    for trial in ("given", "lr-high"):
        edit(tuned, paths.trial(ARM, trial), kid=0.25)
    tuned.succeed("choose")
    assert choice_of(tuned) == "given"
    with_trials(tuned, lr_high=LR_HIGH, given={}).succeed("choose")
    assert choice_of(tuned) == "lr-high"


def test_without_tuning_the_values_as_given_are_chosen(prepared_once: Experiment) -> None:
    assert [path.name for path in prepared_once.path("results/tuning").iterdir()] == ["README.md"], "no trial is needed"
    for arm in ARMS:
        assert read(prepared_once, paths.chosen(arm)) == {"arm": arm, "trial": "given", "values": {}}
    assert read(prepared_once, paths.record("choose"))["num_trials"] == 1


def test_the_record_of_the_choice_says_how_many_trials_there_were(tuned_once: Experiment) -> None:
    assert read(tuned_once, paths.record("choose"))["num_trials"] == 2


STALE: dict[str, tuple[str, dict[str, Any], str]] = {
    "values": (
        "lr-high",
        {"tuning": {"trials": {"given": {}, "lr-high": {"finetune.lr": 7e-3}}}},
        ": finetune.lr was 0.008, is 0.007",
    ),
    "seed": ("given", {"tuning": {"seed": 1001}}, "pretrain.seed was 1000, is 1001"),
    "fraction": ("given", {"tuning": {"budget_fraction": 0.6}}, "finetune.num_steps was 10, is 12"),
    "model": ("given", {"model": {"class_conditional": True}}, "model.class_conditional was false, is true"),
}


@pytest.mark.parametrize("case", STALE)
def test_a_trial_of_other_values_is_refused_with_the_command(tuned: Experiment, case: str) -> None:
    trial, change, says = STALE[case]
    before = tuned.hashes("results/chosen")
    outcome = tuned.change(**change).run("choose")
    assert_refused(outcome, f"results/tuning/scratch/{trial}.json is out of date: ", says)
    assert f"run first: maskdm tune --arm scratch --trial {trial} " in outcome.err
    assert tuned.hashes("results/chosen") == before


def test_a_missing_trial_is_refused_with_the_command(tuned: Experiment) -> None:
    tuned.path(str(paths.trial("block2-m75", "lr-high"))).unlink()
    says = "results/tuning/block2-m75/lr-high.json is missing; run first: maskdm tune --arm block2-m75 --trial lr-high"
    assert_refused(tuned.run("choose"), says)


def test_a_damaged_trial_is_refused(tuned: Experiment) -> None:
    file = tuned.path(str(paths.trial(ARM, "given")))
    file.write_bytes(file.read_bytes()[:30])
    says = f"results/tuning/{ARM}/given.json is damaged or of an older version"
    assert_refused(tuned.run("choose"), says, f"run first: maskdm tune --arm {ARM} --trial given ")


def test_another_worse_trial_retrains_nothing(tuned: Experiment) -> None:
    tuned.succeed("pretrain", *OF_ARM)
    before = {arm: tuned.hashes(str(paths.chosen(arm))) for arm in ARMS}
    values = dict(tuned.content["tuning"]["trials"], slow={"pretrain.lr": 1e-9, "finetune.lr": 1e-9})
    tuned.change(tuning={"trials": values})
    for arm in ARMS:
        tuned.try_values("slow", arm)
        assert trial_of(tuned, "slow", arm)["kid"] > trial_of(tuned, choice_of(tuned, arm), arm)["kid"]
    tuned.succeed("choose")
    assert {arm: tuned.hashes(str(paths.chosen(arm))) for arm in ARMS} == before
    assert read(tuned, paths.record("choose"))["num_trials"] == 3
    assert "up to date" in tuned.succeed("pretrain", *OF_ARM).out


def choose(experiment: Experiment, trial: str, arm: str = ARM) -> None:
    """Let a trial be the best of an arm."""
    for other in experiment.content["tuning"]["trials"]:
        edit(experiment, paths.trial(arm, other), kid=0.0 if other == trial else 1.0)
    experiment.succeed("choose")
    assert choice_of(experiment, arm) == trial


def test_an_arm_is_trained_with_its_chosen_values(tuned: Experiment) -> None:
    weights = []
    for trial, lr in (("lr-high", 8e-3), ("given", 2e-3)):
        choose(tuned, trial)
        for stage in ("pretrain", "finetune"):
            tuned.succeed(stage, *OF_ARM)
            assert learning_rates(tuned, stage) == {lr}
        weights.append(tuned.hashes(f"results/finetune/{ARM}/seed-0/milestone-1.000.safetensors"))
    assert weights[0] != weights[1]


def test_an_arm_without_pretraining_is_finetuned_with_its_chosen_values(tuned: Experiment) -> None:
    for trial, lr in (("lr-high", 8e-3), ("given", 2e-3)):
        choose(tuned, trial, "scratch")
        for stage in ("pretrain", "finetune"):
            tuned.succeed(stage, "--arm", "scratch", "--seed", "0")
        assert learning_rates(tuned, "finetune", "scratch") == {lr}


def test_a_chosen_batch_size_leaves_the_budget_as_it_was(tuned: Experiment) -> None:
    with_trials(tuned.keep_arm(ARM), given={}, larger={"finetune.batch_size": 64, "pretrain.batch_size": 64})
    tuned.try_values("larger")
    flops = {}
    for trial in ("given", "larger"):
        choose(tuned, trial)
        for stage in ("pretrain", "finetune"):
            tuned.succeed(stage, *OF_ARM)
        flops[trial] = read(tuned, Path(f"results/finetune/{ARM}/seed-0/milestones.json"))["1.000"]
    step = resolve(load_params(tuned.file), ARM, 0).finetune.flops_per_step  # of 32 images
    assert abs(flops["given"]["flops"] - flops["larger"]["flops"]) <= 1.5 * step
    assert flops["larger"]["step"] == pytest.approx(flops["given"]["step"] / 2, abs=1)


CHANGES_OF_TUNING: dict[str, tuple[dict[str, Any], str]] = {
    "values": (
        {"given": {}, "lr-high": {"finetune.lr": 7e-3}},
        f"results/tuning/{ARM}/lr-high.json is out of date: finetune.lr was 0.008, is 0.007; ",
    ),
    "name": (
        {"given": {}, "high": LR_HIGH},
        f"high.json is missing; run first: maskdm tune --arm {ARM} --trial high ",
    ),
}


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "sample", "evaluate"])
@pytest.mark.parametrize("case", CHANGES_OF_TUNING)
def test_a_choice_among_other_trials_is_refused(scored: Experiment, stage: str, case: str) -> None:
    trials, says = CHANGES_OF_TUNING[case]
    before = scored.hashes("results")
    assert_refused(scored.change(tuning={"trials": trials}).stage(stage), says)
    assert scored.hashes("results") == before


def test_another_arms_trials_do_not_matter_to_the_choice_of_an_arm(scored: Experiment) -> None:
    arms = scored.content["arms"]
    scored.change(arms={"block2-m75": {**arms["block2-m75"], "mask_rate": 0.5}})
    assert "up to date" in scored.stage("evaluate").out
    assert_refused(scored.stage("pretrain", "block2-m75"), "results/tuning/block2-m75/given.json is out of date: ")


def test_an_arm_that_is_no_longer_tuned_runs_with_the_given_values(tuned: Experiment) -> None:
    choose(tuned, "lr-high")
    tuned.succeed("pretrain", *OF_ARM)
    with_trials(tuned)
    says = f"results/pretrain/{ARM}/seed-0 is out of date: pretrain.lr was 0.008, is 0.002"
    assert_refused(tuned.stage("finetune"), says, f"run first: maskdm pretrain --arm {ARM} --seed 0 ")
    tuned.succeed("pretrain", *OF_ARM)
    assert learning_rates(tuned, "pretrain") == {2e-3}


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "sample", "evaluate"])
def test_an_arm_without_a_choice_is_refused(scored: Experiment, stage: str) -> None:
    scored.path(str(paths.chosen(ARM))).unlink()
    assert_refused(scored.stage(stage), f"results/chosen/{ARM}.json is missing; run first: maskdm choose")


def test_a_damaged_choice_is_refused(tuned: Experiment) -> None:
    file = tuned.path(str(paths.chosen(ARM)))
    size = file.stat().st_size
    file.write_text('{"arm": ', encoding="utf-8")
    says = f"results/chosen/{ARM}.json has 8 bytes, expected {size}; run first: maskdm choose "
    assert_refused(tuned.stage("pretrain"), says)
    file.write_text('{"arm": '.ljust(size), encoding="utf-8")
    assert_refused(tuned.stage("pretrain"), f"results/chosen/{ARM}.json is damaged", "run first: maskdm choose --force")
    tuned.succeed("choose", "--force")
    tuned.succeed("pretrain", *OF_ARM)


# --- the scale of the metrics ---------------------------------------------------------------------------------


def test_the_scale_says_what_it_is_of(tuned_once: Experiment) -> None:
    scale = read(tuned_once, paths.SCALE)
    features = read(tuned_once, Path("results/features/features.json"))
    assert set(scale) == {"floor", "untrained", "protocol", "stamp", *ORIGIN}
    assert set(scale["floor"]) == set(scale["untrained"]) == set(SCORES)
    assert {key: scale[key] for key in ORIGIN} == {key: features[key] for key in ORIGIN}
    assert scale["data_sha256"] == read(tuned_once, Path("results/data/manifest.json"))["sha256"]
    assert (scale["floor"]["num_samples"], scale["untrained"]["num_samples"]) == (64, 64)


def test_the_floor_is_of_as_many_real_images_as_samples(tuned: Experiment) -> None:
    real, evaluation = np.load(tuned.path("results/features/reference.npy")), load_params(tuned.file).evaluation
    assert read(tuned, paths.SCALE)["floor"] == floor_metrics(real, 64, evaluation).as_dict()
    tuned.change(sampling={"num_samples": 80}).succeed("scale")
    assert read(tuned, paths.SCALE)["floor"] == floor_metrics(real, 80, evaluation).as_dict()
    tuned.change(sampling={"num_samples": 150}).succeed("scale")
    scale = read(tuned, paths.SCALE)
    assert (scale["floor"]["num_samples"], scale["untrained"]["num_samples"]) == (100, 150), "half of 200 images"


def test_the_untrained_network_is_what_scratch_starts_from(scored_once: Experiment) -> None:
    params, compute = load_params(scored_once.file), devices.resolve(load_params(scored_once.file).compute)
    model = load_model(params, scored_once.path("results/pretrain/scratch/seed-0/checkpoint.safetensors"), 10, compute)
    drawn = draw_images(params, model, 10, 0, 64, compute, "by hand")
    folder = scored_once.path("results/features")
    extractor = open_classifier(folder / "classifier.safetensors", compute.device)
    features = extractor.features(drawn, params.evaluation.batch_size, "by hand")
    expected = compute_metrics(features, np.load(folder / "reference.npy"), params.evaluation).as_dict()
    assert read(scored_once, paths.SCALE)["untrained"] == expected


def test_every_arm_lies_on_the_scale(scored_once: Experiment) -> None:
    scale = read(scored_once, paths.SCALE)
    for arm in ARMS:
        metrics = read(scored_once, paths.metrics(arm, 0))
        for score in ("fid", "kid"):
            assert scale["floor"][score] < metrics[score] < scale["untrained"][score]
