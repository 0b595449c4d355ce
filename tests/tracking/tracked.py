"""What the tests of tracking share: results as the stages leave them, and what is in the store."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maskdm.base import publishing
from maskdm.config import Params, parse_params, paths, resolve
from maskdm.config.jobs import ARM_STAGES, Jobs
from maskdm.tracking.publishing import Published, track
from maskdm.tracking.store import Store
from tests.report.made_up_results import stamp_outputs

ROOT = Path(__file__).parents[2]
ARM, SEED = "patch-m50", 0
IMAGES = 12800  # from one row of a curve to the next
CONTENT: dict[str, Any] = {
    "name": "tracking-test",
    "seeds": [0, 1],
    "dataset": {"source": "digits", "image_size": 8, "channels": 1},
    "datasets": {},
    "model": {"patch_size": 2, "dim": 64, "depth": 5, "num_heads": 4},
    "diffusion": {"num_timesteps": 1000, "schedule": "cosine", "prediction": "x_0"},
    "budget": {"match": "flops", "unmasked_steps": 1000, "milestones": [0.5, 1.0]},
    "training": {},
    "pretrain": {"share": 0.3, "lr": 2e-3, "batch_size": 128},
    "finetune": {"lr": 2e-3, "batch_size": 128},
    "sampling": {},
    "evaluation": {},
    "compute": {"device": "cpu", "precision": "fp32"},
    "tuning": {"seed": 1000, "budget_fraction": 0.3, "trials": {}},
    "arms": {"scratch": {"strategy": "none"}, ARM: {"strategy": "patch", "mask_rate": 0.5}},
}


def params_with(**sections: Any) -> Params:
    return parse_params({**CONTENT, **sections})


PARAMS = params_with()
RUN = resolve(PARAMS, ARM, SEED)


def write_results(arm: str = ARM, seed: int = SEED, fid: float = 20.0, losses: int = 30, work: str = "1") -> None:
    """What the stages leave of an arm; `scratch` has no curve of pretraining. `work` tells one try from another."""
    for stage, folder in (("pretrain", paths.pretrain(arm, seed)), ("finetune", paths.finetune(arm, seed))):
        if (stage, arm) != ("pretrain", "scratch"):
            rows = [f"{100 * i},{1 / i:.6f},0.002,{IMAGES * i},{51200 * i},{1e9 * i}" for i in range(1, losses + 1)]
            text = "\n".join(["step,loss,lr,images_seen,tokens_seen,flops", *rows]) + "\n"
            publishing.publish_text(folder / "curve.csv", text)
    write_metrics(arm, seed, fid)
    for number, stage in enumerate(ARM_STAGES, start=1):
        write_record(stage, arm, seed, 10.0 * number, losses, work)
    paths.samples(arm, seed).mkdir(parents=True, exist_ok=True)
    (paths.samples(arm, seed) / "grid-1.000.png").write_bytes(b"PNG")


def write_metrics(
    arm: str = ARM, seed: int = SEED, fid: float = 20.0, sliced: float | None = None, **changes: Any
) -> None:
    """What `evaluate` leaves of an arm; with a sliced Wasserstein distance it is of points."""
    scores = {"kid": 0.01, "kid_std": 0.001, "precision": 0.7, "recall": 0.6, "images_seen": 1, "step": 1}
    milestones: dict[str, dict[str, Any]] = {
        "0.500": {"fid": fid + 5, "flops": 5e11, **scores},
        "1.000": {"fid": fid, "flops": 1e12, **scores},
    }
    if sliced is not None:
        for scored, more in zip(milestones.values(), (0.1, 0.0), strict=True):
            scored["distances"] = {"marginal_0": 0.02, "sliced_wasserstein": sliced + more, "energy": sliced / 10}
    scales = {"fid_floor": 1.5, "kid_floor": 1e-4, "fid_untrained": 300.0, "kid_untrained": 0.5}
    metrics = {"milestones": milestones, **scales, "num_samples": 1000, "extractor": "classifier"}
    publishing.publish_json(paths.metrics(arm, seed), {**metrics, "data_sha256": "ab12", **changes})


def write_record(
    stage: str,
    arm: str | None = ARM,
    seed: int | None = SEED,
    seconds: float = 10.0,
    rows: int = 30,
    work: str = "1",
    **changes: Any,
) -> None:
    """What a stage leaves in results/records; a row of the curve takes as many seconds as it has steps, over 50."""
    record: dict[str, Any] = {"id": f"{stage}-{arm}-{seed}-{work}", "started": "2026-11-30T12:00:00+00:00"}
    record |= {"wall_seconds": seconds, "peak_memory_gib": seconds / 20, "git_commit": "c0ffee", "starts": 1}
    if stage in ("pretrain", "finetune"):
        timings = [
            {"step": 100 * i, "device_seconds": 2.0 * i, "data_wait_seconds": 0.1 * i, "peak_memory_gib": 0.25}
            for i in range(1, (0 if (stage, arm) == ("pretrain", "scratch") else rows) + 1)
        ]
        record |= {"device_seconds": seconds, "data_wait_seconds": seconds / 4, "timings": timings}
    record |= {"versions": {"torch": "2.7"}, "device": "cpu", **changes}
    publishing.publish_description(paths.record(stage, arm, seed), record)


def write_data(sha256: str = "ab" * 32, root: str | None = None) -> None:
    """What `prepare` leaves beside the shards."""
    labels = {"file": "labels.npy", "sha256": sha256, "class_names": ["0", "1"]}
    source = {"kind": "image_folder" if root else "digits", "root": root, "limit": None}
    manifest = {"count": 20, "shape": [8, 8, 1], "dtype": "uint8", "labels": labels, "source": source, "skipped": []}
    publishing.publish_json(paths.DATA / "manifest.json", {**manifest, "sha256": sha256})


def write_verdicts(**compute_ratios: float | None) -> None:
    """What `report` leaves of the arms (their names with _ for -); None stands for never."""
    rows = [
        f"{arm.replace('_', '-')},-1.5,{ratio},{ratio * 1e12},{ratio * 30},as told"
        if ratio is not None
        else f"{arm.replace('_', '-')},2.5,,,,no better"
        for arm, ratio in compute_ratios.items()
    ]
    columns = "arm,delta_fid,compute_ratio,flops_at_equal_fid,device_seconds_at_equal_fid,verdict"
    publishing.publish_text(paths.REPORT / "verdicts.csv", "\n".join([columns, *rows]) + "\n")


def stamp(params: Params) -> None:
    """Stamp what the stages have left in results/, and with it what they read: empty where it is not there."""
    for folder in (paths.DATA, paths.FEATURES):
        folder.mkdir(parents=True, exist_ok=True)
    for arm in params.arms:
        if not paths.chosen(arm).exists():
            publishing.publish_description(paths.chosen(arm), {"arm": arm, "trial": "given", "values": {}})
        for seed in params.seeds:
            paths.pretrain(arm, seed).mkdir(parents=True, exist_ok=True)
    if not paths.SCALE.exists():
        publishing.publish_json(paths.SCALE, {})
    for job in Jobs(params).all():
        if not job.record.exists():
            publishing.publish_json(job.record, {})
    stamp_outputs(params)
    stamp_outputs(params, "report")


def publish(params: Params = PARAMS, made_with: Params | None = None) -> Published:
    """Stamp what is in results/, as made with these params unless others are given, and publish it."""
    stamp(made_with or params)
    return track(Jobs(params))


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs_of(store: Store, **slot: str) -> list[Any]:
    """The runs of a slot (kind, arm, stage, …) that are current."""
    found = [run for run in all_runs(store) if run.data.tags["maskdm.superseded"] == "false"]
    return [run for run in found if all(run.data.tags.get(f"maskdm.{k}") == v for k, v in slot.items())]


def arm_run(store: Store, arm: str = ARM, seed: int = SEED) -> Any:
    """The one current run of an arm."""
    (run,) = runs_of(store, kind="arm", arm=arm, seed=str(seed))
    return run


def all_runs(store: Store) -> list[Any]:
    return store._search("")


def history(store: Store, run: Any, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in store.client.get_metric_history(run.info.run_id, key)]


def snapshot(store: Store) -> dict[str, Any]:
    """Everything that could change."""
    return {
        run.info.run_id: (
            run.to_dictionary(),
            {
                key: [m.to_dictionary() for m in store.client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            },
        )
        for run in all_runs(store)
    }


def run_python(
    code: str, *arguments: str, before: Callable[[], None] | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start code in a process of its own, with PARAMS as `params`; `before` is called in it first."""
    preamble = """
        import json, sys
        from maskdm.config import parse_params, resolve
        params = parse_params(json.loads(sys.argv[1]))
    """
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(preamble) + textwrap.dedent(code),
            json.dumps(CONTENT),
            *arguments,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )


def run_track(before: Callable[[], None] | None = None) -> tuple[int, str, str]:
    """What `maskdm track` ends with, in a process of its own: exit code, output and errors."""
    process = run_python('from maskdm.cli import main\nsys.exit(main(["track"]))', before=before)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def without_root_rights() -> None:
    """Make permissions bind root, too, from the next program on: for `before` of `run_python`."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) == 0  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def run_ui(folder: Path, port: int) -> Iterator[None]:
    """Serve `maskdm ui` in a folder, until the end of the block."""
    command = [sys.executable, "-m", "maskdm", "ui", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("Ctrl-C") for line in lines), "the UI did not start"
        yield
    finally:
        process.terminate()
        process.communicate(timeout=60)


@contextmanager
def mlflow_server(database: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A tracking server, which answers; killed with all its processes at the end of the block."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(database.parent / "a")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    null = subprocess.DEVNULL
    server = subprocess.Popen(command, env=environment, stdout=null, stderr=null, start_new_session=True)
    try:
        wait_until(lambda: _answers(port))
        yield server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class SlowProxy:
    """Passes everything on to a port of this machine, and what comes back after a delay.

    Args:
        port: of the server.
        delay_seconds: before every piece of an answer.

    Attributes:
        port: of the proxy.
        num_delays: how often somebody had to wait.
    """

    def __init__(self, port: int, delay_seconds: float) -> None:
        self._server_port, self._delay, self.num_delays = port, delay_seconds, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> SlowProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                for source, target, delay in ((client, server, 0.0), (server, client, self._delay)):
                    threading.Thread(target=self._pass_on, args=(source, target, delay), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, delay: float) -> None:
        with source, suppress(OSError):
            while piece := source.recv(2**16):
                self.num_delays += delay > 0
                time.sleep(delay)
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
