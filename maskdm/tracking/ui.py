"""`maskdm ui`: MLflow's UI on this project's store, opened at the comparison of arms."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from maskdm.base.errors import UserError
from maskdm.config import Params, paths
from maskdm.tracking import chart_url, compare_url, flush, store_uri, trials_url, unsent_note
from maskdm.tracking.store import artifacts_folder, sqlite_file

HOST = "127.0.0.1"
START_SECONDS = 90.0
STOP_SECONDS = 10.0
# Only where the user set nothing. Job execution is for LLM judges: seven more processes of 240 MB each.
ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def open_ui(params: Params, port: int = 5000) -> None:
    """Serve MLflow's UI until Ctrl-C or SIGTERM; for a tracking server, only print where to look.

    Args:
        params: their `name` is the experiment to show.
        port: where to serve it on this machine.

    Raises:
        UserError: there is no store yet, the port is taken, or the server does not start.
    """
    uri = store_uri()
    if not flush():
        print(f"warning: tracking: {unsent_note()}", file=sys.stderr, flush=True)
    if uri.startswith("http"):
        print(_where_to_look(params, uri), flush=True)
        return
    _check_store(uri)
    _check_port(port)
    where = _where_to_look(params, f"http://{HOST}:{port}")  # before the server: there may be nothing to see
    try:
        with _sigterm_as_exit(), _server(uri, port) as server:
            print(f"{where}\nCtrl-C stops it.", flush=True)
            server.wait()
    except KeyboardInterrupt:
        return
    raise UserError(f"MLflow's UI stopped by itself; see {_log_file()}")


def _where_to_look(params: Params, base: str) -> str:
    lines = [
        f"arms, the best first:  {compare_url(params, base)}",
        f"charts of the arms:    {chart_url(params, base)}",
    ]
    if params.tuning.enabled:
        lines.append(f"trials of the tuning:  {trials_url(params, base)}")
    return "\n".join(lines)


def _check_store(uri: str) -> None:
    database = sqlite_file(uri)
    if database is not None and not database.is_file():
        raise UserError(f"there is no MLflow store {database} yet: run `dvc repro` first")


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} can't be used ({error}): give another one with --port") from error


@contextmanager
def _server(uri: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run `mlflow ui` in a session of its own and wait until it answers; stop all of it at the end."""
    root = paths.project_root()
    options = {"--backend-store-uri": uri, "--artifacts-destination": artifacts_folder(root).as_uri()}
    options |= {"--host": HOST, "--port": str(port), "--workers": "1"}
    command = [sys.executable, "-m", "mlflow", "ui", *(word for option in options.items() for word in option)]
    _log_file().parent.mkdir(parents=True, exist_ok=True)
    with _log_file().open("wb") as log:
        environment = {**ENVIRONMENT, **os.environ}
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=root, env=environment, start_new_session=True)
    try:
        _wait_until_it_answers(server, port)
        yield server
    finally:
        _stop(server)


def _log_file() -> Path:
    return paths.project_root() / paths.WORK / "mlflow-ui.log"


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UserError(f"MLflow's UI did not start within {START_SECONDS:.0f} s; see {_log_file()}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server and its helpers, those that started sessions of their own too."""
    family = _family(server)
    for process in family:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for process in alive:
        _signal(process, signal.SIGKILL)
    server.wait()


def _family(server: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The server's session and its descendants: a helper that lost its parent is still in the session."""
    try:
        leader = psutil.Process(server.pid)
        descendants = {leader, *leader.children(recursive=True)}
    except psutil.NoSuchProcess:
        descendants = set()
    return [p for p in psutil.process_iter() if p in descendants or _session(p.pid) == server.pid]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that the server is stopped."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
