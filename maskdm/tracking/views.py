"""URLs of MLflow's UI that compare the arms."""

from __future__ import annotations

from urllib.parse import urlencode

from maskdm.base.errors import UserError
from maskdm.config import Params, paths
from maskdm.tracking.saved_view import TRIALS_VIEW_NAME, VIEW_NAME
from maskdm.tracking.store import open_store, shown, store_uri

LOCAL_UI = "http://127.0.0.1:5000"


def compare_url(params: Params, base: str = LOCAL_UI) -> str:
    """The table of arms, the best first, a row per arm.

    Args:
        params: their `name` is the experiment.
        base: where the UI is served.

    Raises:
        UserError: the store can't be read, or holds nothing of this experiment.
    """
    return _url(params, base, viewStateShareKey=VIEW_NAME)


def chart_url(params: Params, base: str = LOCAL_UI) -> str:
    """The charts of arms: scores against compute, losses, throughput; a line per arm.

    Args:
        params: their `name` is the experiment.
        base: where the UI is served.

    Raises:
        UserError: the store can't be read, or holds nothing of this experiment.
    """
    return _url(params, base, compareRunsMode="CHART", viewStateShareKey=VIEW_NAME)


def trials_url(params: Params, base: str = LOCAL_UI) -> str:
    """The table of the tuning's trials, best first.

    Args:
        params: their `name` is the experiment.
        base: where the UI is served.

    Raises:
        UserError: the store can't be read, or holds nothing of this experiment.
    """
    return _url(params, base, viewStateShareKey=TRIALS_VIEW_NAME)


def _url(params: Params, base: str, **query: str) -> str:
    """The runs' page; MLflow opens on a page for chat traces unless it is told that models are trained."""
    query["workflowType"] = "machine_learning"
    return f"{base.rstrip('/')}/#/experiments/{_experiment_id(params)}/runs?{urlencode(query)}"


def _experiment_id(params: Params) -> str:
    uri = store_uri()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        found = open_store(uri, paths.project_root()).find_experiment(params.name)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(f"cannot read the MLflow store {shown(uri)}: {shown(str(error))}") from error
    if found is None:
        raise UserError(f"MLflow at {shown(uri)} has no experiment {params.name!r} yet: run `dvc repro` first")
    return found
