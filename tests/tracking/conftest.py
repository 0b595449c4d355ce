"""An empty project and its MLflow store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from maskdm.tracking.store import Store
from tests.conftest import Once
from tests.tracking.tracked import CONTENT, PARAMS


@pytest.fixture(scope="session")
def empty_database(once: Once) -> Path:
    """A database with MLflow's tables: creating them takes seconds, copying does not."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
            Store("other")

    return once("mlflow", make) / "mlflow.db"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with a params.yaml, the working directory."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.setenv(name, "")  # so that it is put back at the end, too: MLflow sets the first
        monkeypatch.delenv(name)
    (tmp_path / ".dvc").mkdir()
    if not (tmp_path / "params.yaml").exists():  # there is one where a test takes a finished experiment, too
        (tmp_path / "params.yaml").write_text(json.dumps(CONTENT), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def store(project: Path, empty_database: Path) -> Store:
    """The project's store, to look at what was logged."""
    shutil.copy(empty_database, project / "mlflow.db")
    return Store(PARAMS.name)
