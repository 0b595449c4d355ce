"""Work folders: what unfinished stages go on from, what is damaged, what was set aside."""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from maskdm import paths
from maskdm.doctor.findings import Finding, counted, files_below, info, ok, problem, size_of
from maskdm.doctor.holding import at_work
from maskdm.plan.units import duration, size
from maskdm.work import DIFFERENCES_SHOWN, FINISHED, MANIFEST, OWNER, differences

SET_ASIDE = paths.set_aside(paths.RESULTS).parent
NOT_WORK = ("tracking", "locks", SET_ASIDE.name)  # the other folders in .work
STATE = re.compile(r"state-(\d+)\.safetensors")


def check() -> list[Finding]:
    """Look at every work folder of this experiment."""
    found = [*_unfinished(), *_damaged(), *_set_aside()]
    kept = [finished for folder in _folders() if (finished := folder / FINISHED).joinpath(MANIFEST).is_file()]
    if kept:
        found.insert(
            0, ok(f"{counted(len(kept), 'finished stage')} can be brought back in a second ({_own_room(kept)})")
        )
    return found or [ok("none")]


def states(folder: Path) -> list[Path]:
    """The saved training states below a folder, the newest last; a trial finetunes after it has pretrained."""
    found = (file for file in folder.rglob("state-*") if STATE.fullmatch(file.name))
    return sorted(found, key=lambda file: (file.parent.name == "finetune", file.name))


def _folders() -> Iterator[Path]:
    """Every work folder but those set aside."""
    owners = sorted(paths.WORK.rglob(OWNER))
    return (file.parent for file in owners if file.relative_to(paths.WORK).parts[0] not in NOT_WORK)


def _unfinished() -> Iterator[Finding]:
    busy = at_work()
    for folder in _folders():
        if (folder / FINISHED / MANIFEST).is_file():
            continue
        owner = _owner(folder)
        if owner is None:
            yield problem(
                f"{folder}: its {OWNER} can't be read, so nobody knows what the {_room(folder)} in it belong to. "
                "Its stage will put it aside and start over",
                f"nothing; or, to have the room back: rm -r {folder}",
            )
            continue
        then = "at work now" if owner["what"] in busy else "goes on from there when it is run again"
        yield info(f"{owner['what']}: {_progress(folder)}; {then} ({folder}, {_room(folder)})")


def _progress(folder: Path) -> str:
    """How far the work in a folder has come."""
    if (folder / FINISHED / MANIFEST).is_file():
        return "finished"
    if saved := states(folder):
        return f"{_step(folder, saved[-1])}, saved {_when(saved[-1])}"
    pieces = list(folder.rglob("*.safetensors"))
    return f"{counted(len(pieces), 'part')} finished" if pieces else "begun, nothing saved yet"


def _step(folder: Path, state: Path) -> str:
    number = STATE.fullmatch(state.name)
    assert number is not None
    phase = "" if state.parent == folder else f"{state.parent.name} "
    return f"{phase}step {int(number[1]):,}"


def _when(file: Path) -> str:
    try:
        saved = file.stat().st_mtime
    except FileNotFoundError:  # a stage at work has just replaced it
        return "just now"
    ago = time.time() - saved  # negative where the clock was set back
    return f"{datetime.datetime.fromtimestamp(saved):%Y-%m-%d %H:%M}" + (f" ({duration(ago)} ago)" if ago >= 1 else "")


def _damaged() -> Iterator[Finding]:
    for file in sorted(paths.WORK.rglob("*.damaged")):
        before = states(file.parent)
        instead = f"the state before it ({_step(file.parent, before[-1])})" if before else "what else is whole, or anew"
        yield problem(
            f"{file} is not what was saved: its checksum is wrong (a failing disk, a crash of the machine while it "
            f"was written, or somebody changed it). It is not used: the stage goes on from {instead}",
            f"nothing is lost but the time since then; if it happens again, check the disk. To remove it: rm {file}",
            partial(_remove, file),
        )


def _remove(file: Path) -> str:
    file.unlink(missing_ok=True)
    return "removed it"


def _set_aside() -> Iterator[Finding]:
    for folder in sorted(path for path in SET_ASIDE.rglob("*") if _is_set_aside(path)):
        output = folder.parent.relative_to(SET_ASIDE)
        owner = _owner(folder)
        remove = f"to have the room back: rm -r {folder}"
        if owner is None:
            yield info(f"{output}: set aside, nobody knows whose work it is ({_room(folder)}); it is not used", remove)
            continue
        yield info(
            f"{owner['what']}, {_progress(folder)}: set aside, because {_why(owner, _owner(paths.work(output)))} "
            f"({_room(folder)}). It is taken up again when the inputs are those again",
            remove,
        )


def _is_set_aside(path: Path) -> bool:
    if not path.is_dir():
        return False
    return path.name.startswith("unknown-") or (
        re.fullmatch("[0-9a-f]{16}", path.name) is not None and (path / OWNER).exists()
    )


def _why(owner: dict[str, Any], now: dict[str, Any] | None) -> str:
    """What differs between the inputs of work set aside and those of the work in its place."""
    changed = [] if now is None else list(differences(owner.get("inputs"), now.get("inputs")))
    if not changed:
        return "it was begun with other inputs"
    more = f" and {len(changed) - DIFFERENCES_SHOWN} more" if len(changed) > DIFFERENCES_SHOWN else ""
    return f"its inputs changed: {'; '.join(changed[:DIFFERENCES_SHOWN])}{more}"


def _owner(folder: Path) -> dict[str, Any] | None:
    """Whose a work folder is; None where that can't be read."""
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) and isinstance(owner.get("what"), str) else None


def _room(folder: Path) -> str:
    return size(size_of(folder))


def _own_room(folders: list[Path]) -> str:
    """What folders take beyond the files that they share with results."""
    files = (Path(entry.path) for folder in folders for entry in files_below(folder))
    own = sum(file.stat().st_size for file in files if file.is_file() and file.stat().st_nlink == 1)
    return f"taking {size(own)} of their own"
