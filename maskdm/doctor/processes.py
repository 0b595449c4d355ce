"""Processes of this machine: which one is an engine, and what stands above a stage."""

from __future__ import annotations

from pathlib import Path, PurePath

import psutil

ENGINES = ("dvc", "snakemake")
INIT_PID = 1  # takes the children of the dead, so its terminal says nothing about who started them


def find(pid: int) -> psutil.Process | None:
    """The process of this pid; None where there is none, or only what its parent has not buried yet (a zombie)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.Error:
        return None


def command_line(process: psutil.Process) -> list[str]:
    """Its words; empty where they can't be seen."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def shown(process: psutil.Process) -> str:
    """A short name of a process: `dvc repro`, `sleep 100`."""
    words = command_line(process)
    if len(words) > 1 and PurePath(words[0]).name.startswith("python") and not words[1].startswith("-"):
        words = words[1:]
    if not words:
        return _name(process)
    text = " ".join([PurePath(words[0]).name, *words[1:]])
    return text if len(text) <= 60 else f"{text[:59]}…"


def engine_of(process: psutil.Process) -> str | None:
    """`dvc` or `snakemake` where the process is one of them."""
    words = command_line(process)[:3]  # python, its script, or -m and the module
    names = [PurePath(word).name for word in words]
    return next((engine for engine in ENGINES if engine in names), None)


def engine_above(process: psutil.Process) -> psutil.Process | None:
    """The engine that runs a stage; None where it runs without one."""
    return next((above for above in _parents(process) if engine_of(above)), None)


def terminal_above(process: psutil.Process) -> bool:
    """Whether what started a process sits at a terminal: a shell that somebody types in."""
    return any(_terminal(above) is not None for above in _parents(process) if above.pid != INIT_PID)


def engines_at_work(root: Path) -> list[psutil.Process]:
    """The engines that work in a project's folder or below it."""
    return [process for process in psutil.process_iter() if engine_of(process) and _works_below(process, root)]


def _works_below(process: psutil.Process, root: Path) -> bool:
    try:
        folder = Path(process.cwd())
    except psutil.Error:
        return False
    return folder == root or root in folder.parents


def _parents(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.parents())
    except psutil.Error:
        return []


def _terminal(process: psutil.Process) -> str | None:
    try:
        return process.terminal()
    except psutil.Error:
        return None


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return "a process that has just ended"
