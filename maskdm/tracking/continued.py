"""What a run carries that a later process goes on with: it is not logged again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from maskdm.tracking.store import Point


class ContinuedRun:
    """The points and params of a run. MLflow is asked once for the run, and once for each of its metrics.

    A killed process had logged rows that the one after it logs once more: the first of a step stays.

    Args:
        client: mlflow's.
        run_id: the run; only this process logs to it.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        data = client.get_run(run_id).data
        self._params, self._metrics = set(data.params), set(data.metrics)
        self._steps: dict[str, set[int]] = {}

    def missing_points(self, points: Sequence[Point]) -> list[Point]:
        """The first point of every metric and step that the run has none of."""
        found: dict[tuple[str, int], Point] = {}
        for point in points:
            if point.step not in self._steps_of(point.key):
                found.setdefault((point.key, point.step), point)
        return list(found.values())

    def missing_params(self, params: Mapping[str, str]) -> dict[str, str]:
        """The params that the run has no value of: mlflow refuses another value."""
        return {key: value for key, value in params.items() if key not in self._params}

    def add(self, points: Sequence[Point] = (), params: Iterable[str] = ()) -> None:
        """Note what has been logged."""
        for point in points:
            self._steps_of(point.key).add(point.step)
        self._params.update(params)

    def _steps_of(self, key: str) -> set[int]:
        if key not in self._steps:
            history = self._client.get_metric_history(self._run_id, key) if key in self._metrics else ()
            self._steps[key] = {point.step for point in history}
        return self._steps[key]
