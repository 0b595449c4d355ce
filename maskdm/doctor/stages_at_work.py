"""Stages at work, and among them those whose engine is gone."""

from __future__ import annotations

import datetime
import signal
import time
from functools import partial

import psutil

from maskdm.doctor import processes
from maskdm.doctor.findings import Finding, info, ok, problem
from maskdm.doctor.holding import Holder, holders, is_held
from maskdm.errors import UserError
from maskdm.plan.units import duration

STOP_SECONDS = 30.0
LOOK_EVERY_SECONDS = 0.1
BY_ENGINES_ONLY = "--stage-version"  # engines say it in every command, people do not


def check() -> list[Finding]:
    """Look at every lock that is held."""
    return [_judge(holder) for holder in holders()] or [ok("none")]


def _judge(holder: Holder) -> Finding:
    if holder.is_elsewhere:
        return info(f"{holder.what}: process {holder.pid} on {holder.host}, {_since(holder)}; not to be seen from here")
    process = processes.find(holder.pid) if holder.pid is not None else None
    if process is None:
        return _left_behind(holder)
    who = f"{holder.what}: process {process.pid}, {_since(holder)}"
    if _is_stopped(process):
        return problem(
            f"{who}, is suspended (Ctrl-Z): it does nothing, and others wait for it",
            f"let it go on: fg in its terminal, or kill -CONT {process.pid}",
        )
    if engine := processes.engine_above(process):
        return info(f"{who}, run by {processes.shown(engine)} (process {engine.pid})")
    if BY_ENGINES_ONLY not in processes.command_line(process) or processes.terminal_above(process):
        return info(f"{who}, started by hand")
    return problem(
        f"{who}, an orphan: the engine that started it is gone. It works on and will publish its result; the same "
        "stage started again waits for it",
        f"let it finish, or stop it (it saves first, so nothing is lost): kill {process.pid}",
        partial(_stop, holder, process),
    )


def _left_behind(holder: Holder) -> Finding:
    """The lock is held, but not by the process that it names: a child of it has outlived it."""
    others = [f"{process.pid} ({processes.shown(process)})" for process in _having_open(holder)]
    by = f"held by what it left behind: {', '.join(others)}" if others else "held by a process that can't be seen"
    named = "no process that can be read" if holder.pid is None else f"process {holder.pid}, which is gone"
    return problem(
        f"{holder.what}: {holder.lock} names {named}; it is {by}. This stage waits for it forever",
        "end that process" + (f": kill {others[0].split()[0]}" if others else " (on another machine?)"),
    )


def _having_open(holder: Holder) -> list[psutil.Process]:
    """Who has the lock's file open: its holder, and whoever waits for it."""
    lock = str(holder.lock.resolve())
    found = []
    for process in psutil.process_iter():
        try:
            if any(opened.path == lock for opened in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _stop(holder: Holder, process: psutil.Process) -> str:
    """Ask an orphan to save and end.

    Raises:
        UserError: it may not be stopped, or does not stop.
    """
    try:
        process.send_signal(signal.SIGTERM)
    except psutil.AccessDenied:
        raise UserError(f"process {process.pid} is another user's: ask them, or use sudo") from None
    except psutil.NoSuchProcess:
        pass
    deadline = time.monotonic() + STOP_SECONDS
    while is_held(holder.lock):
        if time.monotonic() > deadline:
            raise UserError(f"process {process.pid} has not stopped within {STOP_SECONDS:.0f} s: kill -9 {process.pid}")
        time.sleep(LOOK_EVERY_SECONDS)
    return f"stopped process {process.pid}; what it had saved is used when the stage runs again"


def _since(holder: Holder) -> str:
    if holder.started is None:
        return "since nobody knows when"
    seconds = (datetime.datetime.now(datetime.UTC) - holder.started).total_seconds()
    return f"since {holder.started.astimezone():%Y-%m-%d %H:%M}" + (f" ({duration(seconds)})" if seconds >= 0 else "")


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
