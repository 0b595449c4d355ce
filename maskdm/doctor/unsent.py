"""What stages have logged and MLflow has not got."""

from __future__ import annotations

from pathlib import Path

from maskdm import paths
from maskdm.doctor import processes
from maskdm.doctor.findings import Finding, info, ok, problem
from maskdm.errors import UserError
from maskdm.tracking import flush, unsent_note
from maskdm.tracking.background import ERROR, LOCK
from maskdm.tracking.spool import SpoolReader, spools, tracking_folder

SENDER = "maskdm.tracking.sender"
FLUSH_SECONDS = 60.0


def check() -> list[Finding]:
    """Look at the project's spools."""
    root = paths.project_root()
    left = [spool for spool in spools(root) if not _is_live(spool)]
    failed = (tracking_folder(root) / ERROR).exists()
    if not left and not (failed and spools(root)):
        return [ok("nothing waits to be sent")]
    if failed:
        return [problem(unsent_note(), "your results are complete without it; when MLflow is back: maskdm sync", _send)]
    if _has_sender(root):
        return [info("what stages have logged is being sent to MLflow at this moment")]
    return [problem(unsent_note(), "nobody is sending it: maskdm sync", _send)]


def _is_live(spool: Path) -> bool:
    """Whether its stage is at work; one that can't be read is somebody's who is not."""
    try:
        return SpoolReader(spool).is_live
    except OSError:
        return False


def _has_sender(root: Path) -> bool:
    """Whether the project's sender lives; its lock is not touched, for a probe could turn a starting one away."""
    try:
        pid = int((tracking_folder(root) / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    process = processes.find(pid)
    return process is not None and SENDER in processes.command_line(process)


def _send() -> str:
    """Send it now.

    Raises:
        UserError: MLflow can't be reached.
    """
    if not flush(FLUSH_SECONDS):
        raise UserError(unsent_note())
    return "sent: everything is in MLflow"
