"""How MLflow's UI shows arms and trials; test_ui.py looks at the real UI."""

from __future__ import annotations

import json
from typing import Any

import pytest

from maskdm.config.jobs import Jobs
from maskdm.tracking import saved_view
from maskdm.tracking.publishing import track
from maskdm.tracking.store import Store
from maskdm.tracking.ui import urls
from tests.tracking.tracked import ARM, CONTENT, PARAMS, params_with

pytestmark = pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
TRIALS = {"given": {}, "low": {"pretrain.lr": 1e-3, "finetune.batch_size": 64}}
TUNED = params_with(tuning={**CONTENT["tuning"], "trials": TRIALS})
CURRENT = "tags.`maskdm.superseded` = 'false' and tags.`maskdm.exp` = 'workspace'"


def view_of(store: Store, tag: str = saved_view.VIEW_TAG) -> dict[str, Any]:
    """A saved view, out of its envelope."""
    envelope = json.loads(store.client.get_experiment_by_name(PARAMS.name).tags[tag])
    assert isinstance(envelope["name"], str) and isinstance(envelope["createdAt"], int)
    view: dict[str, Any] = json.loads(envelope["state"])
    return view


def test_the_arms_are_a_saved_view_with_a_row_per_arm(store: Store) -> None:
    track(Jobs(PARAMS))
    view = view_of(store)
    assert view["searchFilter"] == f"tags.`maskdm.kind` = 'arm' and {CURRENT}"
    wanted = ["params.`strategy`", "params.`mask_rate`", "metrics.`fid`", "metrics.`compute_ratio`"]
    assert view["selectedColumns"][:5] == [*wanted, "metrics.`device_seconds`"]
    assert view["groupBy"]["groupByKeys"] == [{"mode": "param", "groupByData": "arm"}]
    assert view["groupsExpanded"] == {"param.arm.scratch": False, f"param.arm.{ARM}": False}
    charts = {chart["metricKey"]: chart for chart in view["compareRunCharts"]}
    assert (charts["fid"]["xAxisKey"], charts["fid"]["selectedXAxisMetricKey"]) == ("metric", "flops")
    assert {"pretrain/loss", "finetune/loss", "finetune/images_per_second", "compute_ratio"} <= set(charts)
    assert {chart["metricSectionId"] for chart in charts.values()} < {s["uuid"] for s in view["compareRunSections"]}

    track(Jobs(params_with(seeds=[0], arms={"scratch": {"strategy": "none"}})))
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
    assert max(map(len, tags.values())) < 20_000  # MLflow's limit


def test_the_trials_are_a_saved_view(store: Store) -> None:
    track(Jobs(TUNED))
    view = view_of(store, saved_view.TRIALS_VIEW_TAG)
    assert view["searchFilter"] == f"tags.`maskdm.kind` = 'trial' and {CURRENT}"
    assert view["orderByKey"] == "metrics.`kid`"
    assert {"params.`trial`", "params.`pretrain.lr`", "params.`finetune.batch_size`"} <= set(view["selectedColumns"])


def test_the_addresses_name_the_views(store: Store) -> None:
    number = store.client.get_experiment_by_name(PARAMS.name).experiment_id
    page = f"http://host:1/#/experiments/{number}/runs?"
    found = urls(TUNED, "http://host:1/")
    assert found == {
        "arms, the best first": f"{page}viewStateShareKey=arms&workflowType=machine_learning",
        "charts of the arms": f"{page}compareRunsMode=CHART&viewStateShareKey=arms&workflowType=machine_learning",
        "trials of the tuning": f"{page}viewStateShareKey=trials&workflowType=machine_learning",
    }
    assert "trials of the tuning" not in urls(PARAMS, "http://host:1")
