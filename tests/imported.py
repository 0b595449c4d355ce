"""What commands import, seen in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

COMMANDS = """
import sys
from maskdm.cli import main
for words in {commands!r}:
    try:
        code = main(words)
    except SystemExit as leaving:
        code = leaving.code
    assert not code, (words, code)
    print("MODULES", *sys.modules)
{more}
"""


def run_python(code: str, folder: Path) -> list[str]:
    """The lines that a process prints in a folder; warnings are errors."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def modules_after_each(folder: Path, commands: list[list[str]], more: str = "") -> Iterator[set[str]]:
    """The modules that one process has imported after each of its commands; then it runs `more`."""
    for line in run_python(COMMANDS.format(commands=commands, more=more), folder):
        if line.startswith("MODULES "):
            yield set(line.split()[1:])


def modules_after(folder: Path, *words: str) -> set[str]:
    """The modules that are imported when a command has succeeded."""
    (modules,) = modules_after_each(folder, [list(words)])
    return modules
