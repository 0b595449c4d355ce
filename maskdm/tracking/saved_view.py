"""The comparison of arms as a saved view: an experiment's tag that MLflow's UI reads.

Its format is undocumented; this one was seen to work in MLflow 3.17.
"""

from __future__ import annotations

import json
from typing import Any

VIEW_NAME = "arms"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_NAME}"
ARMS_FILTER = "tags.`maskdm.kind` = 'arm'"
# The table's columns with their widths in pixels.
COLUMNS = {
    "params.`strategy`": 90,
    "params.`realised_mask_rate`": 150,
    "metrics.`fid`": 90,
    "metrics.`kid`": 100,
    "metrics.`precision`": 90,
    "metrics.`recall`": 90,
    "metrics.`flops`": 160,
    "metrics.`train_seconds`": 110,
}
# The charts' sections; other metrics follow under MLflow's own heading, which must be listed to be kept.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Scores by percent of the budget": ("fid", "kid", "precision", "recall"),
    "Loss by step": ("pretrain/loss", "finetune/loss"),
    "Model metrics": (),
}


def view_json() -> str:
    """The view: every arm run, best FID first, with what the ablation compares."""
    return json.dumps(_table() | _charts())


def _table() -> dict[str, Any]:
    return {
        "searchFilter": ARMS_FILTER,
        "orderByKey": "metrics.`fid`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(COLUMNS),
        "columnWidths": COLUMNS,
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": None,
    }


def _charts() -> dict[str, Any]:
    return {
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": True, "columns": 2} for name in SECTIONS
        ],
        "compareRunCharts": [_line(name, metric) for name, metrics in SECTIONS.items() for metric in metrics],
        "isAccordionReordered": True,  # else MLflow sorts its own sections before ours
    }


def _line(section: str, metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "uuid": f"maskdm-{metric}",
        "metricSectionId": section,
        "metricKey": metric,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "lineSmoothness": 0,
        "selectedXAxisMetricKey": "",
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }
