"""The comparison of arms, and of trials, as saved views: an experiment's tags that MLflow's UI reads.

Their format is undocumented; this one was seen to work in MLflow 3.17, and a test looks at the real UI.
"""

from __future__ import annotations

import json
from typing import Any

from maskdm.config import Params
from maskdm.scoring.headline import FID, SLICED_WASSERSTEIN, Headline
from maskdm.tracking.content import tuned_paths

VIEW_NAME = "arms"
TRIALS_VIEW_NAME = "trials"
SHARED_VIEW = "mlflow.sharedViewState."
VIEW_TAG = SHARED_VIEW + VIEW_NAME
TRIALS_VIEW_TAG = SHARED_VIEW + TRIALS_VIEW_NAME
# The kind of experiment whose page shows runs; MLflow infers it from runs, of an empty experiment it asks.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
# Columns with their widths in pixels; MLflow shows these two always.
NAME_COLUMNS = {"attributes.`Run Name`": 200, "runDateAndNestInfo": 110}
TRIAL_COLUMNS = {"params.`arm`": 110, "params.`trial`": 90}
PROTOCOL = "tags.`protocol`"  # what the scores of a row are of
TRIAL_SCORES = {
    "metrics.`kid`": 110,
    "metrics.`fid`": 110,
    "metrics.`precision`": 110,
    "metrics.`recall`": 110,
    PROTOCOL: 300,
}
CURRENT = {"superseded": "false", "exp": "workspace"}  # neither of older values nor of a `dvc exp run`
STEP, BAR = "step", "bar"
Charts = tuple[tuple[str, str], ...]


def _columns(headline: Headline) -> dict[str, int]:
    """The columns of the table of arms with their widths."""
    return {
        "params.`strategy`": 85,
        "params.`mask_rate`": 95,
        f"metrics.`{headline.key}`": 120,
        "metrics.`compute_ratio`": 125,
        "metrics.`device_seconds`": 125,
        f"metrics.`delta_{headline.key}`": 110,
        f"metrics.`{headline.second.key}`": 110,
        "metrics.`precision`": 110,
        "metrics.`recall`": 110,
        PROTOCOL: 300,
    }


def _sections(headline: Headline) -> dict[str, Charts]:
    """The charts by section: (metric, what it is drawn against: the step, another metric, or a bar per arm).

    MLflow's own section must be listed to be kept; it holds all other metrics.
    """
    return {
        "Quality against compute": ((headline.key, "flops"), (headline.second.key, "flops")),
        f"Compute for scratch's {headline.name}; device seconds": (
            ("compute_ratio", BAR),
            ("device_seconds", BAR),
        ),
        "Loss by step": (("pretrain/loss", STEP), ("finetune/loss", STEP)),
        "Images per second by step": (("pretrain/images_per_second", STEP), ("finetune/images_per_second", STEP)),
        "Precision and recall against compute": (("precision", "flops"), ("recall", "flops")),
        "Model metrics": (),
    }


def experiment_tags(params: Params) -> dict[str, str]:
    """What an experiment carries for the UI."""
    tags = {KIND_TAG: KIND, VIEW_TAG: _saved(f"Arms, best {_headline(params).name} first", arms_view(params))}
    if params.tuning.enabled:
        tags[TRIALS_VIEW_TAG] = _saved("Trials of the tuning, best first", trials_view(params))
    return tags


def _headline(params: Params) -> Headline:
    from maskdm.scoring import points  # NumPy, which nothing else here needs

    return SLICED_WASSERSTEIN if points.apply_to(params) else FID


def arms_view(params: Params) -> dict[str, Any]:
    """A row per arm, the best first, its seeds folded; a line per arm, the mean of its seeds."""
    headline = _headline(params)
    group = {"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "arm"}]}
    return {
        **_table("arm", headline.key, _columns(headline)),
        **_charts(_sections(headline)),
        "groupBy": group if len(params.seeds) > 1 else None,  # a group's row has no text, such as the strategy
        "groupsExpanded": {f"param.arm.{arm}": False for arm in params.arms},  # unfolded unless it is said of each
        "useGroupedValuesInCharts": True,
    }


def trials_view(params: Params) -> dict[str, Any]:
    """A row per trial of every arm, best first, with the values that it tried."""
    columns = TRIAL_COLUMNS | {f"params.`{path}`": 130 for path in tuned_paths(params)} | TRIAL_SCORES
    return {**_table("trial", params.tuning.metric, columns), "groupBy": None}


def _saved(name: str, view: dict[str, Any]) -> str:
    """A view as MLflow's menu of views keeps it; its time is always the same, so that equal views are equal."""
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": json.dumps(view)})


def _table(kind: str, metric: str, columns: dict[str, int]) -> dict[str, Any]:
    widths, shown = NAME_COLUMNS | columns, {"kind": kind, **CURRENT}
    return {
        "searchFilter": " and ".join(f"tags.`maskdm.{name}` = '{value}'" for name, value in shown.items()),
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(columns),
        "columnOrder": list(widths),
        "columnWidths": widths,
        "runsHiddenMode": "SHOW_ALL",
    }


def _charts(sections: dict[str, Charts]) -> dict[str, Any]:
    return {
        "compareRunSections": [
            {"uuid": name, "name": name, "display": bool(charts), "isReordered": True, "columns": 2}
            for name, charts in sections.items()
        ],
        "compareRunCharts": [_chart(name, *chart) for name, charts in sections.items() for chart in charts],
        "isAccordionReordered": True,  # else MLflow sorts its own sections before ours
    }


def _chart(section: str, metric: str, against: str) -> dict[str, Any]:
    chart = {
        "uuid": f"maskdm-{metric}",
        "metricSectionId": section,
        "metricKey": metric,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }
    return chart | ({"type": "BAR"} if against == BAR else _line(metric, against))


def _line(metric: str, against: str) -> dict[str, Any]:
    """A line over steps, or over another metric, whose values at equal steps are the abscissae."""
    by_step = against == STEP
    return {
        "type": "LINE",
        "selectedMetricKeys": [metric],
        "xAxisKey": "step" if by_step else "metric",
        "selectedXAxisMetricKey": "" if by_step else against,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "lineSmoothness": 0,
        "useGlobalXaxisKey": False,  # else MLflow's setting for all charts takes the place of ours
        "useGlobalLineSmoothing": True,
    }
