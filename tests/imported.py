"""What a command imports, seen in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

AFTER = """
import sys
from maskdm.cli import main
try:
    code = main({words!r})
except SystemExit as leaving:
    code = leaving.code
assert not code, code
print("MODULES", *sys.modules)
{more}
"""


def run_python(code: str, folder: Path) -> list[str]:
    """The lines that a process prints in a folder; warnings are errors."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def after(folder: Path, *words: str, more: str = "") -> list[str]:
    """What `more` prints in a process in which a command has ended well; before it, a line with its modules."""
    lines = run_python(AFTER.format(words=list(words), more=more), folder)
    return lines[next(i for i, line in enumerate(lines) if line.startswith("MODULES ")) :]


def modules_after(folder: Path, *words: str) -> set[str]:
    """The modules that are imported when a command has ended well."""
    return set(after(folder, *words)[0].split()[1:])
