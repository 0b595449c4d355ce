"""Fixtures of the tests of tracking, a pytest plugin: a project, with senders or without, and its store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskdm import tracking
from maskdm.tracking import background
from maskdm.tracking.store import Store, open_store
from tests.tracking.tracked import stop_sender

START_SENDER = background.start_sender


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with mlflow's tables: creating them takes seconds, copying does not."""
    root = tmp_path_factory.mktemp("store")
    open_store(f"sqlite:///{root / 'mlflow.db'}", root)
    return root / "mlflow.db"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty project, the working directory. No sender starts in the background: `send` does its work here."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(background, "start_sender", lambda root: False)
    yield tmp_path
    stop_sender(tmp_path)


@pytest.fixture
def senders(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, with senders in the background; the last one is stopped."""
    monkeypatch.setattr(background, "start_sender", START_SENDER)
    return project


@pytest.fixture
def store(project: Path, empty_database: Path) -> Store:
    """The project's store, for looking at what was logged."""
    shutil.copy(empty_database, project / "mlflow.db")
    return open_store(tracking.store_uri(), project)
