"""`maskdm ui`: MLflow's UI on this project's store, at the comparison of arms."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from urllib.parse import urlencode

from maskdm.base.errors import UserError
from maskdm.config import Params, paths
from maskdm.config.jobs import Jobs
from maskdm.tracking.publishing import explaining, track
from maskdm.tracking.saved_view import TRIALS_VIEW_NAME, VIEW_NAME
from maskdm.tracking.store import Store, artifacts_folder, store_uri

HOST = "127.0.0.1"
START_SECONDS = 90.0
LOG = paths.WORK / "mlflow-ui.log"
# Only where the user has set nothing. Job execution is for judges by language models: seven processes of 240 MB each.
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def open_ui(params: Params, port: int = 5000) -> None:
    """Publish results/, and serve MLflow's UI until Ctrl-C or SIGTERM; for a tracking server, only print where to look.

    Args:
        params: their `name` is the experiment to show.
        port: where to serve it on this machine.

    Raises:
        UserError: there are no results yet, the port is taken, or the server does not start.
    """
    uri = store_uri()
    if not uri.startswith("http"):
        _check_port(port)
    try:
        published = track(Jobs(params)).runs
    except UserError as error:
        print(f"warning: tracking: {error}: what is shown may be older than results/", file=sys.stderr, flush=True)
        published = 1
    if not published:
        raise UserError(f"there are no results of experiment {params.name!r} yet: run `dvc repro` first")
    addresses = urls(params, uri if uri.startswith("http") else f"http://{HOST}:{port}")
    lines = [f"{f'{what}:':<23}{url}" for what, url in addresses.items()]
    if uri.startswith("http"):
        print(*lines, sep="\n", flush=True)
    else:
        _serve(uri, port, [*lines, "Ctrl-C stops it."])


def urls(params: Params, base: str) -> dict[str, str]:
    """The addresses of the comparisons in MLflow's UI, by what they show.

    Args:
        params: their `name` is the experiment.
        base: where the UI is served.

    Raises:
        UserError: the store can't be read.
    """
    with explaining():
        experiment = Store(params.name).experiment_id
    views = {"arms, the best first": {"viewStateShareKey": VIEW_NAME}}
    views["charts of the arms"] = {"compareRunsMode": "CHART", "viewStateShareKey": VIEW_NAME}
    if params.tuning.enabled:
        views["trials of the tuning"] = {"viewStateShareKey": TRIALS_VIEW_NAME}
    page = f"{base.rstrip('/')}/#/experiments/{experiment}/runs"
    # Without the workflow type, MLflow shows its page for traces of chats.
    return {what: f"{page}?{urlencode({**view, 'workflowType': 'machine_learning'})}" for what, view in views.items()}


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} can't be used ({error}): give another one with --port") from error


def _serve(uri: str, port: int, lines: list[str]) -> None:
    """Run `mlflow ui`, print the lines once it answers, and wait for its end; MLflow passes signals on to its own."""
    options = {"--backend-store-uri": uri, "--artifacts-destination": artifacts_folder().as_uri()}
    options |= {"--host": HOST, "--port": str(port), "--workers": "1"}
    command = [sys.executable, "-m", "mlflow", "ui", *(word for option in options.items() for word in option)]
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with LOG.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**ENVIRONMENT, **os.environ})
    try:
        _wait_until_it_answers(server, port)
        print(*lines, sep="\n", flush=True)
        server.wait()
    finally:  # Ctrl-C and SIGTERM raise, and the terminal sends Ctrl-C to the server, too
        server.terminate()
        server.wait()
    raise UserError(f"MLflow's UI stopped by itself; see {LOG}")


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise UserError(f"MLflow's UI did not start within {START_SECONDS:.0f} s; see {LOG}")
