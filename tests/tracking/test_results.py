"""What the report brings to MLflow of results/: verdicts, trials, data, models, and the views that show them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskdm import tracking
from maskdm.base import publishing
from maskdm.base.errors import UserError
from maskdm.base.tensors import save_tensors
from maskdm.config import Params, load_params, paths, resolve
from maskdm.config.jobs import Jobs
from maskdm.tracking import saved_view
from maskdm.tracking.store import Store, arm_key
from tests.conftest import Experiment
from tests.factories import protocol, tiny_model
from tests.tracking.tracked import (
    ARM,
    CONTENT,
    PARAMS,
    SEED,
    all_runs,
    arm_runs,
    history,
    log_run,
    params_with,
    publish,
    send,
    snapshot,
    stamp,
    write_data,
    write_metrics,
    write_record,
    write_results,
    write_verdicts,
)

pytest_plugins = ["tests.tracking.tracked_project"]
# SQLAlchemy's pool closes its connections only when the process ends; Python 3.13 notices.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")

TRIALS = {"given": {}, "low": {"pretrain.lr": 1e-3, "finetune.lr": 1e-3}, "large": {"finetune.batch_size": 256}}
TUNED = params_with(tuning={**CONTENT["tuning"], "trials": TRIALS})


def publish_report(params: Params = PARAMS, made_with: Params | None = None) -> None:
    """What the report does with all that there is in results/; unless said otherwise it was made with these params."""
    stamp(made_with or params)
    tracking.publish_report(Jobs(params))
    send()


def write_trial(trial: str = "low", arm: str = ARM, kid: float | None = 0.02, **changes: Any) -> None:
    """What `tune` leaves of a trial; no KID stands for one that has failed."""
    scores = {"fid": 30.0, "kid": kid, "kid_std": 0.001, "precision": 0.5, "recall": 0.5}
    result = {"arm": arm, "trial": trial, "values": TRIALS[trial], "seed": 1000, "budget_fraction": 0.3}
    known = {**dict.fromkeys(scores), "failed": "the loss is not finite"} if kid is None else {**scores, "failed": None}
    publishing.publish_json(paths.trial(arm, trial), {**result, **known, "data_sha256": "ab12", **changes})
    record = {"wall_seconds": 12.0, "device_seconds": 9.0, "git_commit": "c0ffee", "versions": {"torch": "2.7"}}
    publishing.publish_json(paths.record("tune", arm, trial=trial), record)


def trial_runs(store: Store, arm: str = ARM) -> dict[str, Any]:
    """The runs of an arm's trials by their names; each once."""
    runs = store._search(PARAMS.name, {"maskdm.kind": "trial", "maskdm.arm": arm})
    by_name = {run.data.params["trial"]: run for run in runs}
    assert len(by_name) == len(runs)
    return by_name


def test_an_arm_carries_what_the_report_says_of_it(store: Store) -> None:
    for arm in PARAMS.arms:
        write_results(arm)
    write_verdicts(scratch=1.0, patch_m50=0.61)
    publish_report(params_with(seeds=[0]))

    (run,) = arm_runs(store)
    said = {
        "compute_ratio": 0.61,
        "flops_at_equal_fid": 0.61e12,
        "device_seconds_at_equal_fid": 18.3,
        "delta_fid": -1.5,
    }
    assert run.data.metrics.items() >= said.items()
    assert run.data.tags["verdict"] == "as told"


def test_an_arm_and_a_trial_carry_what_their_scores_are_of(store: Store) -> None:
    write_results()
    publish()
    (run,) = arm_runs(store)
    assert "protocol" not in run.data.tags, "not recorded"

    write_metrics(fid=21.0, protocol={**protocol().as_dict(), "images": "x"})
    publish()
    (run,) = arm_runs(store)
    assert "protocol" not in run.data.tags and run.data.metrics["fid"] == 21.0, "the scores are there all the same"

    write_metrics(protocol=protocol().as_dict(), flip=0.5)
    publish()
    (run,) = arm_runs(store)
    assert run.data.tags["protocol"] == f"{protocol().text}\nTrained with left-right flips of probability 0.5."

    write_trial("low", protocol=protocol().as_dict())
    write_trial("given", kid=None, protocol=protocol().as_dict())
    publish_report(TUNED)
    trials = trial_runs(store)
    assert trials["low"].data.tags["protocol"] == protocol().text
    assert "protocol" not in trials["given"].data.tags, "it failed, and has no scores"


def test_an_arm_of_points_carries_their_distances_by_milestone_and_what_the_report_says_of_them(store: Store) -> None:
    write_results()
    publish()
    (run,) = arm_runs(store)
    assert not [key for key in run.data.metrics if "distance" in key]

    write_metrics(sliced=0.4)
    key = "distance_sliced_wasserstein"
    columns = f"arm,delta_{key},compute_ratio,flops_at_equal_{key},device_seconds_at_equal_{key},verdict"
    publishing.publish_text(paths.REPORT / "verdicts.csv", f"{columns}\n{ARM},-0.1,0.5,5e11,12.5,as told\n")
    publish_report(params_with(seeds=[0]))
    (run,) = arm_runs(store)
    assert history(store, run, key) == [(50, 0.5), (100, 0.4)]
    assert history(store, run, "distance_marginal_0") == [(50, 0.02), (100, 0.02)]
    assert run.data.metrics["distance_energy"] == pytest.approx(0.04)
    said = {f"delta_{key}": -0.1, "compute_ratio": 0.5, f"flops_at_equal_{key}": 5e11}
    assert run.data.metrics.items() >= {**said, f"device_seconds_at_equal_{key}": 12.5}.items()
    assert "delta_fid" not in run.data.metrics


def test_what_an_earlier_report_said_of_the_fid_of_points_is_gone(store: Store) -> None:
    write_results()
    write_metrics(sliced=0.4)
    write_verdicts(patch_m50=0.61)
    publish_report(params_with(seeds=[0]))
    assert "delta_fid" in arm_runs(store)[0].data.metrics

    columns = "arm,delta_distance_sliced_wasserstein,verdict"
    publishing.publish_text(paths.REPORT / "verdicts.csv", f"{columns}\n{ARM},-0.1,as told\n")
    publish_report(params_with(seeds=[0]))
    (run,) = arm_runs(store)
    assert run.data.metrics["delta_distance_sliced_wasserstein"] == -0.1
    assert not {"delta_fid", "flops_at_equal_fid", "compute_ratio"} & set(run.data.metrics)


def test_what_the_report_does_not_say_any_more_is_gone(store: Store) -> None:
    write_results()
    write_verdicts(patch_m50=0.61)
    publish_report()
    (before,) = arm_runs(store)
    publish()  # a stage knows nothing of the report, and leaves what it said
    assert arm_runs(store)[0].data.metrics["compute_ratio"] == 0.61

    write_verdicts(patch_m50=None)
    publish_report()
    (after,) = arm_runs(store)
    assert after.info.run_id != before.info.run_id
    assert not {"compute_ratio", "flops_at_equal_fid"} & set(after.data.metrics)
    assert (after.data.metrics["delta_fid"], after.data.tags["verdict"]) == (2.5, "no better")


def test_the_report_fills_an_empty_store_and_twice_changes_nothing(store: Store) -> None:
    write_data()
    for arm in TUNED.arms:
        for seed in TUNED.seeds:
            write_results(arm, seed)
        for trial in TRIALS:
            write_trial(trial, arm)
    write_verdicts(scratch=1.0, patch_m50=0.61)
    publish_report(TUNED)
    before = snapshot(store)
    kinds = [run.data.tags["maskdm.kind"] for run in all_runs(store)]
    assert (kinds.count("arm"), kinds.count("trial"), len(kinds)) == (4, 6, 10)
    assert {run.info.status for run in all_runs(store)} == {"FINISHED"}
    tags = store.client.get_experiment_by_name(TUNED.name).tags

    publish_report(TUNED)
    assert snapshot(store) == before
    assert store.client.get_experiment_by_name(TUNED.name).tags == tags


def test_other_throughput_supersedes_the_run(store: Store) -> None:
    write_results()
    publish()
    (before,) = arm_runs(store)
    record = json.loads(paths.record("finetune", ARM, SEED).read_text())
    record["timings"][-1]["device_seconds"] += 2.0
    publishing.publish_json(paths.record("finetune", ARM, SEED), record)
    publish()
    (after,) = arm_runs(store)
    assert after.info.run_id != before.info.run_id
    assert history(store, after, "finetune/images_per_second")[-1] == (3000, 12800 / 4.0)


def test_throughput_leaves_out_what_has_no_time(store: Store) -> None:
    write_results(losses=3)
    write_record("finetune", rows=2)  # a row without a timing
    record = json.loads(paths.record("pretrain", ARM, SEED).read_text())
    for timing in record["timings"]:
        timing["device_seconds"] = 1.0
    publishing.publish_json(paths.record("pretrain", ARM, SEED), record)
    publish()
    (run,) = arm_runs(store)
    assert history(store, run, "finetune/images_per_second") == [(200, 6400.0)]
    assert "pretrain/images_per_second" not in run.data.metrics


def test_trials_carry_what_they_ran_with_and_their_scores(store: Store) -> None:
    write_data()
    for trial in TRIALS:
        write_trial(trial)
        write_trial(trial, "scratch")
    publish_report(TUNED)

    runs = trial_runs(store)
    assert {run.info.run_name for run in runs.values()} == {f"{ARM}-{trial}" for trial in TRIALS}
    values = {
        trial: [run.data.params[path] for path in ("pretrain.lr", "finetune.lr", "finetune.batch_size")]
        for trial, run in runs.items()
    }
    assert values == {
        "given": ["0.002", "0.002", "128"],
        "low": ["0.001", "0.001", "128"],
        "large": ["0.002", "0.002", "256"],
    }
    assert runs["low"].data.params["budget_fraction"] == "0.3"
    assert runs["low"].data.metrics.items() >= {"kid": 0.02, "fid": 30.0, "wall_seconds": 12.0}.items()
    assert [entry.dataset.name for entry in runs["low"].inputs.dataset_inputs] == ["digits"]
    assert "pretrain.lr" not in trial_runs(store, "scratch")["low"].data.params


def test_a_trial_that_failed_is_shown_as_failed(store: Store) -> None:
    write_trial(kid=None)
    publish_report(TUNED)
    run = trial_runs(store)["low"]
    assert (run.info.status, run.data.tags["failed"]) == ("FAILED", "the loss is not finite")
    assert "kid" not in run.data.metrics


def test_a_trial_that_ran_keeps_its_curve_and_gets_its_scores(store: Store) -> None:
    for _ in range(2):  # a rerun takes the place of the older run
        with tracking.stage_run(TUNED, "tune", resolve(TUNED, ARM, 0, "low")) as run:
            run.params(**TRIALS["low"])
            run.log(100, loss=0.5)
        send()
    with tracking.stage_run(TUNED, "tune", resolve(TUNED, "scratch", 0, "low")):
        pass
    write_trial()
    publish_report(TUNED)

    logged = trial_runs(store)["low"]
    assert history(store, logged, "loss") == [(100, 0.5)]
    assert (logged.data.metrics["kid"], logged.info.status) == (0.02, "FINISHED")
    write_trial(kid=0.03)
    publish_report(TUNED)
    after = trial_runs(store)["low"]
    assert (after.data.metrics["kid"], after.info.run_id != logged.info.run_id) == (0.03, True)


def test_without_tuning_there_are_no_trials(store: Store) -> None:
    write_trial("given")
    publish_report(PARAMS, made_with=TUNED)
    assert all_runs(store) == []


def test_a_trial_that_is_out_of_date_is_not_published_with_the_values_of_today(store: Store) -> None:
    for trial in TRIALS:
        write_trial(trial)
    others = {**TRIALS, "low": {"pretrain.lr": 5e-4, "finetune.lr": 5e-4}}
    publish_report(params_with(tuning={**CONTENT["tuning"], "trials": others}), made_with=TUNED)
    assert set(trial_runs(store)) == {"given", "large"}


@pytest.mark.parametrize(
    ("section", "has_pretrained"), [("pretrain", False), ("finetune", True)], ids=["pretrain", "finetune"]
)
def test_an_arm_that_is_out_of_date_is_not_published_with_the_params_of_today(
    store: Store, section: str, has_pretrained: bool
) -> None:
    write_results()
    publish_report(params_with(**{section: {**CONTENT[section], "lr": 1e-3}}), made_with=PARAMS)
    runs = arm_runs(store)
    assert bool(runs) == has_pretrained
    for run in runs:  # of its pretraining, which is of today
        assert run.data.params["finetune.lr"] == "0.001"
        assert {"pretrain/loss", "pretrain_seconds"} <= set(run.data.metrics)
        assert not {"fid", "finetune/loss", "finetune_seconds"} & set(run.data.metrics)


@pytest.mark.parametrize(
    ("root", "source"),
    [
        (None, ("code", {"tags": {"mlflow.source.name": "scikit-learn digits"}})),
        ("../images", ("local", {"uri": "../images"})),
    ],
)
def test_arms_and_training_stages_name_the_data(store: Store, root: str | None, source: tuple[str, Any]) -> None:
    write_data(root=root)
    write_results()
    for stage in ("pretrain", "evaluate"):
        log_run(stage, ARM, SEED)
    publish()
    publish()

    (arm,) = arm_runs(store)
    stages = {run.info.run_name: run for run in store.stages_of(PARAMS.name, arm.info.run_id)}
    assert stages["evaluate"].inputs.dataset_inputs == []
    for run in (arm, stages["pretrain"]):
        (entry,) = run.inputs.dataset_inputs
        dataset = entry.dataset
        assert (dataset.name, dataset.digest) == ("image_folder" if root else "digits", "ab" * 18)
        assert (dataset.source_type, json.loads(dataset.source)) == source
        assert json.loads(dataset.profile)["num_rows"] == 20
        assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]


def test_other_data_supersede_the_run(store: Store) -> None:
    write_data()
    write_results()
    publish()
    write_data("cd" * 32)
    publish()
    (run,) = arm_runs(store)
    assert [entry.dataset.digest for entry in run.inputs.dataset_inputs] == ["cd" * 18]


def test_a_damaged_manifest_costs_only_the_dataset(store: Store) -> None:
    write_data()
    (paths.DATA / "manifest.json").write_text("{")
    log_run("pretrain", ARM, SEED)
    (arm,) = arm_runs(store)
    assert len(store.stages_of(PARAMS.name, arm.info.run_id)) == 1


def test_stages_and_report_agree_on_a_tuned_arm(store: Store) -> None:
    chosen = resolve(TUNED, ARM, 0, chosen=TRIALS["low"]).params
    assert arm_key(resolve(chosen, ARM, SEED)).fingerprint != arm_key(resolve(TUNED, ARM, SEED)).fingerprint
    log_run("pretrain", ARM, SEED, chosen)
    for arm in TUNED.arms:
        for trial in TRIALS:
            write_trial(trial, arm)
    publishing.publish_description(paths.chosen(ARM), {"arm": ARM, "trial": "low", "values": TRIALS["low"]})
    write_results()
    publish_report(TUNED)
    (run,) = arm_runs(store)
    assert run.data.params["pretrain.lr"] == "0.001"
    assert len(store.stages_of(PARAMS.name, run.info.run_id)) == 1


# --- views


def view_of(store: Store, tag: str = saved_view.VIEW_TAG) -> dict[str, Any]:
    """A saved view, out of its envelope."""
    envelope = json.loads(store.client.get_experiment_by_name(PARAMS.name).tags[tag])
    assert isinstance(envelope["name"], str) and isinstance(envelope["createdAt"], int)
    view: dict[str, Any] = json.loads(envelope["state"])
    return view


def test_the_arms_are_a_saved_view_with_a_row_per_arm(store: Store) -> None:
    log_run()
    view = view_of(store)
    assert view["searchFilter"] == "tags.`maskdm.kind` = 'arm'"
    wanted = ["params.`strategy`", "params.`mask_rate`", "metrics.`fid`", "metrics.`compute_ratio`"]
    assert view["selectedColumns"][:5] == [*wanted, "metrics.`device_seconds`"]
    assert view["groupBy"]["groupByKeys"] == [{"mode": "param", "groupByData": "arm"}]
    assert view["groupsExpanded"] == {"param.arm.scratch": False, f"param.arm.{ARM}": False}
    charts = {chart["metricKey"]: chart for chart in view["compareRunCharts"]}
    assert (charts["fid"]["xAxisKey"], charts["fid"]["selectedXAxisMetricKey"]) == ("metric", "flops")
    assert {"pretrain/loss", "finetune/loss", "finetune/images_per_second", "compute_ratio"} <= set(charts)
    assert {chart["metricSectionId"] for chart in charts.values()} < {s["uuid"] for s in view["compareRunSections"]}

    log_run(params=params_with(seeds=[0], arms={"scratch": {"strategy": "none"}}))
    assert view_of(store)["groupBy"] is None  # one seed: a run is an arm, and shows its strategy
    assert view_of(store)["groupsExpanded"] == {"param.arm.scratch": False}


def test_the_view_of_points_goes_by_their_distances() -> None:
    dataset = {"source": "swissroll", "image_size": [1, 2], "channels": 1}
    model = {**CONTENT["model"], "patch_size": 1}
    points = params_with(dataset=dataset, model=model, evaluation={"features": "pixels"})
    view = saved_view.arms_view(points)
    assert view["orderByKey"] == "metrics.`distance_sliced_wasserstein`"
    assert "metrics.`delta_distance_sliced_wasserstein`" in view["selectedColumns"]
    assert {"distance_sliced_wasserstein", "distance_energy"} <= {c["metricKey"] for c in view["compareRunCharts"]}
    assert "fid" not in json.dumps(view)
    assert "best sliced W₁ first" in json.loads(saved_view.experiment_tags(points)[saved_view.VIEW_TAG])["name"]
    assert saved_view.arms_view(PARAMS)["orderByKey"] == "metrics.`fid`"


def test_the_views_fit_into_a_tag() -> None:
    arms = {f"patch-m{i}": {"strategy": "patch", "mask_rate": i / 100} for i in range(10, 70)}
    tags = saved_view.experiment_tags(params_with(arms=arms, tuning=TUNED.tuning.model_dump()))
    assert max(map(len, tags.values())) < 20_000  # mlflow's limit


def test_the_trials_are_a_saved_view(store: Store) -> None:
    log_run(params=TUNED)
    view = view_of(store, saved_view.TRIALS_VIEW_TAG)
    assert view["searchFilter"] == "tags.`maskdm.kind` = 'trial'"
    assert view["orderByKey"] == "metrics.`kid`"
    assert {"params.`trial`", "params.`pretrain.lr`", "params.`finetune.batch_size`"} <= set(view["selectedColumns"])


def test_the_urls_name_the_views(store: Store) -> None:
    log_run()
    number = store.client.get_experiment_by_name(PARAMS.name).experiment_id
    runs = f"http://127.0.0.1:5000/#/experiments/{number}/runs?"
    assert tracking.compare_url(PARAMS) == f"{runs}viewStateShareKey=arms&workflowType=machine_learning"
    assert tracking.trials_url(PARAMS) == f"{runs}viewStateShareKey=trials&workflowType=machine_learning"
    charts = tracking.chart_url(PARAMS, "http://host:1/")
    query = "compareRunsMode=CHART&viewStateShareKey=arms&workflowType=machine_learning"
    assert charts == f"http://host:1/#/experiments/{number}/runs?{query}"
    with pytest.raises(UserError, match="has no experiment 'other' yet"):
        tracking.compare_url(params_with(name="other"))


# --- models

ONE_SEED = params_with(seeds=[0])


def write_weights(arm: str = ARM, params: Params = ONE_SEED, seed: int = 0) -> None:
    """What `finetune` leaves at the last milestone, from a network drawn from `seed`."""
    folder = paths.finetune(arm, SEED)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "milestone-1.000.safetensors", params, seed)


def save_checkpoint(file: Path, params: Params = ONE_SEED, seed: int = 0) -> None:
    """Raw and averaged weights, as stages write them."""
    states = {which: dict(tiny_model(params, seed).state_dict()) for which in ("raw", "ema")}
    save_tensors(file, states, {"architecture": params.architecture(10)})


def versions(store: Store) -> dict[int, str]:
    """The versions' arms."""
    found = store.client.search_model_versions(f"name = '{PARAMS.name}'")
    return {int(version.version): version.tags["arm"] for version in found}


def aliases(store: Store) -> dict[str, int]:
    """Alias → version."""
    found = store.client.get_registered_model(PARAMS.name).aliases
    return {alias: int(version) for alias, version in found.items()}


def test_every_arm_has_a_version_and_the_best_its_alias(store: Store) -> None:
    for arm, fid in (("scratch", 20.0), (ARM, 18.0)):
        write_results(arm, fid=fid)
        write_weights(arm)
    publish_report(ONE_SEED)
    assert versions(store) == {1: "scratch", 2: ARM}
    assert aliases(store) == {"scratch": 1, ARM: 2, "best": 2}
    found = store.client.get_model_version(PARAMS.name, "2")
    (run,) = arm_runs(store)
    assert found.tags.items() >= {"seed": "0", "fid": "18", "mean_fid": "18"}.items()
    assert found.run_id == run.info.run_id
    assert [f"models:/{output.model_id}" for output in run.outputs.model_outputs] == [found.source]

    before = snapshot(store)
    publish_report(ONE_SEED)
    assert (versions(store), snapshot(store)) == ({1: "scratch", 2: ARM}, before)
    assert len(store.client.search_logged_models([store.experiment(PARAMS.name)])) == 2


def test_other_weights_are_a_new_version_and_move_the_aliases(store: Store) -> None:
    write_results()
    write_weights()
    publish_report(ONE_SEED)
    write_weights(seed=1)
    write_metrics(fid=17.0)
    publish_report(ONE_SEED)
    assert versions(store) == {1: ARM, 2: ARM}
    assert aliases(store) == {ARM: 2, "best": 2}

    write_weights(seed=0)
    write_metrics(fid=16.0)
    publish_report(ONE_SEED)
    assert aliases(store) == {ARM: 1, "best": 1}
    assert store.client.get_model_version(PARAMS.name, "1").tags["fid"] == "16"


def test_the_best_arm_is_the_best_over_all_seeds(store: Store) -> None:
    fids = {"scratch": (20.0, 20.0), ARM: (18.0, 24.0)}
    for arm, of_seeds in fids.items():
        write_weights(arm)
        for seed, fid in enumerate(of_seeds):
            write_results(arm, seed, fid)
    publish_report(PARAMS)
    assert aliases(store)["best"] == aliases(store)["scratch"]
    assert store.client.get_model_version_by_alias(PARAMS.name, ARM).tags["mean_fid"] == "21"

    (paths.finetune("scratch", 1) / "curve.csv").unlink()  # an arm with a seed missing is not compared
    tracking.publish_report(Jobs(PARAMS))
    send()
    assert aliases(store)["best"] == aliases(store)[ARM]


def test_the_best_arm_of_points_is_that_of_the_least_distance(store: Store) -> None:
    for arm, fid, sliced in (("scratch", 18.0, 0.4), (ARM, 20.0, 0.2)):
        write_results(arm)
        write_metrics(arm, fid=fid, sliced=sliced)
        write_weights(arm)
    publish_report(ONE_SEED)
    assert aliases(store)["best"] == aliases(store)[ARM]
    key = "distance_sliced_wasserstein"
    tags = store.client.get_model_version_by_alias(PARAMS.name, ARM).tags
    assert tags.items() >= {key: "0.2", f"mean_{key}": "0.2"}.items()


def test_an_arm_that_is_gone_loses_its_alias_and_a_reserved_name_gets_none(store: Store) -> None:
    arms = {"latest": {"strategy": "none"}, "v1": {"strategy": "none"}, ARM: CONTENT["arms"][ARM]}
    for arm in arms:
        write_results(arm, fid=20.0 if arm == "latest" else 25.0)
        write_weights(arm)
    publish_report(params_with(seeds=[0], arms=arms))
    assert aliases(store) == {ARM: 3, "best": 1}
    store.client.set_registered_model_alias(PARAMS.name, "champion", "2")
    publish_report(params_with(seeds=[0], arms={"latest": arms["latest"]}))
    assert aliases(store) == {"best": 1, "champion": 2}, "an alias that somebody else has set stays"


def test_what_a_killed_sender_left_half_is_not_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit

    write_results()
    write_weights()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("mlflow.MlflowClient.log_model_artifacts", killed)
        publish_report(ONE_SEED)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("mlflow.MlflowClient.create_model_version", killed)
        send()
    send()
    (logged,) = store.client.search_logged_models([store.experiment(PARAMS.name)])
    assert store.client.get_model_version(PARAMS.name, "1").source == f"models:/{logged.model_id}"
    assert versions(store) == {1: ARM}


@pytest.mark.workflow
def test_the_best_model_draws_what_the_stage_sample_drew(
    finished: Experiment, store: Store, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project == finished.folder  # both are in tmp_path
    finished.change(tracking={"enabled": True})
    tracking.publish_report(Jobs(load_params()))
    send()
    code = """
        import hashlib, sys, mlflow, pandas as pd
        mlflow.set_tracking_uri(sys.argv[1])
        model = mlflow.pyfunc.load_model("models:/tiny@best")
        rows = pd.DataFrame({"seed": [0, 5], "num_images": [64, 3]})
        images = model.predict(rows)
        print(images.shape, images.dtype, hashlib.sha256(images[:64].tobytes()).hexdigest())
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines()), tracking.store_uri()],
        capture_output=True,
        text=True,
        check=False,
        cwd=project.parent,
    )
    arm = store.client.get_model_version_by_alias("tiny", "best").tags["arm"]
    drawn = np.load(paths.samples(arm, 0) / "milestone-1.000.npy")
    expected = f"(67, 8, 8, 1) uint8 {hashlib.sha256(drawn.tobytes()).hexdigest()}\n"
    assert done.stdout == expected, done.stderr


def test_a_model_holds_no_pickle_and_only_the_averaged_weights(tmp_path: Path) -> None:
    from safetensors import safe_open

    from maskdm.tracking.logged_model import save_model

    file = tmp_path / "weights.safetensors"
    save_checkpoint(file)
    (tmp_path / "made").mkdir()
    folder = save_model(tmp_path / "made", ONE_SEED, file)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {
        ".py",
        ".safetensors",
        ".json",
        ".md",
        ".yaml",
        ".txt",
        "",
    }
    with safe_open(folder / "artifacts" / "weights.safetensors", framework="np") as held:
        assert {key.split("/")[0] for key in held.keys()} == {"ema"}  # noqa: SIM118  (no mapping)
    assert "torch==" in (folder / "requirements.txt").read_text()
