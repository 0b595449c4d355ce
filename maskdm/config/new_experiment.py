"""`maskdm new`: an experiment of one's own from another one, some values changed, comments kept."""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskdm.base.errors import ParamsError, UserError, printable
from maskdm.base.publishing import publish_text
from maskdm.config import PARAMS_FILE, Params, load_params, parse_params
from maskdm.config.paths import project_root, root_of
from maskdm.config.reading import read_yaml
from maskdm.config.schema import EMBEDDED, SOURCES

PIPELINE = "dvc.yaml"
PATHS = ("root", "weights", "checkpoint")  # keys whose values are paths, seen from the folder of params.yaml
WIDE = 4096  # columns: no line is broken


def new_experiment(folder: Path, source: Path, changes: Sequence[str], arms: Sequence[str]) -> None:
    """Make an experiment's folder: a changed copy of another one's params.yaml, and a link to the pipeline for DVC.

    Paths in it stay those of the same files. Where `changes` say no `name`, it is that of the folder.

    Args:
        folder: to be made.
        source: a params.yaml, or the folder of one.
        changes: `path.to.key=value`, the value as in YAML; sections that are missing are made.
        arms: the keys of those that are kept; none: all.

    Raises:
        ParamsError: the source or the changed params are not valid, or a change can't be understood.
        UserError: the folder is there already, or does not lie in a maskdm project.
    """
    source = source / PARAMS_FILE if source.is_dir() else source
    load_params(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a folder that is not")
    pipeline = _project(source) / PIPELINE
    content = _yaml().load(source.read_text(encoding="utf-8"))
    _move_paths(content, source.parent, folder, set())
    content["name"] = folder.resolve().name
    for change in changes:
        _change(content, change)
    _keep(content, arms)
    _name_roots(content, source.parent, folder)
    _checked(content)
    given = [*changes, *([f"--arms {','.join(arms)}"] if arms else [])]
    changed = f", changed: {printable(' '.join(given), 2000)}" if given else ""
    origin = f"# From {printable(str(source))}{changed}; the comment below was written of that one.\n"
    publish_text(folder / PARAMS_FILE, origin + _dumped(content))
    try:
        (folder / PIPELINE).symlink_to(os.path.relpath(pipeline, folder.resolve()))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error


def next_steps(folder: Path) -> str:
    """What to do with a new experiment."""
    quoted = shlex.quote(str(folder))
    with_dvc = "" if project_root(folder) == folder.resolve() else f"     or     dvc repro {quoted}/{PIPELINE}"
    return (
        f"made {folder}; look into {folder / PARAMS_FILE}, then\n"
        f"  (cd {quoted} && maskdm validate && maskdm plan)\n"
        f"  snakemake -d {quoted} --cores 2{with_dvc}"
    )


def _project(source: Path) -> Path:
    """The folder of the pipeline that the source belongs to."""
    linked = (source.parent / PIPELINE).resolve()  # where `new` has made the source elsewhere
    for folder in (*source.resolve().parents, linked.parent):
        if (folder / PIPELINE).is_file() and (folder / "Snakefile").is_file():
            return folder
    raise UserError(f"{source} does not lie in a maskdm project: no folder above it holds {PIPELINE} and a Snakefile")


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()  # keeps comments
    yaml.width = WIDE
    return yaml


def _dumped(content: Any) -> str:
    out = io.StringIO()
    _yaml().dump(content, out)
    return out.getvalue()


def _checked(content: Any) -> Params:
    """The params as the commands will read them."""
    return parse_params(read_yaml(_dumped(content).encode(), "the new params.yaml"), source="the new params.yaml")


def _move_paths(content: Any, before: Path, after: Path, seen: set[int]) -> None:
    """Make relative paths lead to the same files from another folder; what an alias repeats, once."""
    if not hasattr(content, "non_merged_items") or id(content) in seen:
        return
    seen.add(id(content))
    for key, value in list(content.non_merged_items()):
        if str(key).rpartition(".")[2] in PATHS and isinstance(value, str) and not Path(value).is_absolute():
            content[key] = os.path.relpath((before / value).resolve(), after.resolve())
        else:
            _move_paths(value, before, after, seen)
    for merged in content.merge:
        _move_paths(merged, before, after, seen)


def _name_roots(content: Any, before: Path, after: Path) -> None:
    """Say where the files of a dataset are if they are looked for beside params.yaml because it does not say."""
    params = _checked(content)
    datasets = [(content["dataset"], params.dataset)]
    datasets += [(content["datasets"][name], dataset) for name, dataset in params.datasets.items()]
    for own, dataset in datasets:
        if dataset.root is None and dataset.source in {*SOURCES} - {*EMBEDDED}:
            own["root"] = os.path.relpath((before / root_of(dataset)).resolve(), after.resolve())


def _change(content: Any, change: str) -> None:
    """Set one value; what it is, YAML says."""
    from ruamel.yaml.error import YAMLError

    path, is_given, text = change.partition("=")
    *sections, key = path.split(".")
    if not is_given or not all([*sections, key]):
        raise ParamsError(f"--set {change}: expected path.to.key=value, such as budget.unmasked_steps=1000")
    try:
        value = _yaml().load(text)
    except (YAMLError, ValueError, AttributeError):
        raise ParamsError(f"--set {path}: {printable(text)!r} is not a YAML value") from None
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ParamsError(f"--set {change}: {section} is a value, not a section")
    content[key] = value


def _keep(content: Any, arms: Sequence[str]) -> None:
    """Leave out all arms but these."""
    if not isinstance(content["arms"], dict):
        return  # the schema will say so
    if unknown := [arm for arm in arms if arm not in content["arms"]]:
        raise ParamsError(f"--arms: there is no arm {unknown[0]!r}; expected some of {', '.join(content['arms'])}")
    for arm in [arm for arm in content["arms"] if arms and arm not in arms]:
        del content["arms"][arm]
