"""`maskdm new`: a new experiment from another one, with some values changed and comments kept."""

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
PATHS = ("root", "weights", "checkpoint")  # keys whose values are paths relative to params.yaml
WIDTH = 4096  # columns, so that no line is wrapped


def new_experiment(folder: Path, source: Path, changes: Sequence[str], arms: Sequence[str]) -> None:
    """Make the folder of an experiment: a changed copy of a params.yaml, and a link to the pipeline for DVC.

    Relative paths are adapted, so that they lead to the same files. The experiment is named after its folder, unless
    `changes` contain `name`.

    Args:
        folder: the folder to make.
        source: a params.yaml, or its folder.
        changes: `path.to.key=value`, with the value in YAML; missing sections are added.
        arms: the keys of the arms to keep; empty keeps all.

    Raises:
        ParamsError: the source or the changed params are not valid, or a change is malformed.
        UserError: the folder exists and is not empty, or the source is not in a maskdm project.
    """
    source = source / PARAMS_FILE if source.is_dir() else source
    load_params(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a folder that does not exist")
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
    origin = f"# From {printable(str(source))}{changed}; the comment below describes that one.\n"
    publish_text(folder / PARAMS_FILE, origin + _dumped(content))
    try:
        (folder / PIPELINE).symlink_to(os.path.relpath(pipeline, folder.resolve()))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error


def next_steps(folder: Path) -> str:
    """What to do with a new experiment, as text for people."""
    quoted = shlex.quote(str(folder))
    with_dvc = "" if project_root(folder) == folder.resolve() else f"     or     dvc repro {quoted}/{PIPELINE}"
    return (
        f"made {folder}; check {folder / PARAMS_FILE}, then\n"
        f"  (cd {quoted} && maskdm validate && maskdm plan)\n"
        f"  snakemake -d {quoted} --cores 2{with_dvc}"
    )


def _project(source: Path) -> Path:
    """The folder of the project that an experiment belongs to."""
    linked = (source.parent / PIPELINE).resolve()  # if `maskdm new` made the source outside the project
    for folder in (*source.resolve().parents, linked.parent):
        if (folder / PIPELINE).is_file() and (folder / "Snakefile").is_file():
            return folder
    raise UserError(f"{source} is not in a maskdm project: no folder above it has both {PIPELINE} and a Snakefile")


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()  # keeps comments
    yaml.width = WIDTH
    return yaml


def _dumped(content: Any) -> str:
    out = io.StringIO()
    _yaml().dump(content, out)
    return out.getvalue()


def _checked(content: Any) -> Params:
    """The params as commands will read them."""
    return parse_params(read_yaml(_dumped(content).encode(), "the new params.yaml"), source="the new params.yaml")


def _move_paths(content: Any, before: Path, after: Path, seen: set[int]) -> None:
    """Make relative paths lead to the same files from another folder; a section that aliases repeat is changed once."""
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
    """Add `root` to datasets that do not have it and whose files are searched beside params.yaml."""
    params = _checked(content)
    datasets = [(content["dataset"], params.dataset)]
    datasets += [(content["datasets"][name], dataset) for name, dataset in params.datasets.items()]
    for own, dataset in datasets:
        if dataset.root is None and dataset.source in {*SOURCES} - {*EMBEDDED}:
            own["root"] = os.path.relpath((before / root_of(dataset)).resolve(), after.resolve())


def _change(content: Any, change: str) -> None:
    """Set one value, given as `path.to.key=YAML`."""
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
    """Remove all arms but these."""
    if not isinstance(content["arms"], dict):
        return  # validation reports this
    if unknown := [arm for arm in arms if arm not in content["arms"]]:
        raise ParamsError(f"--arms: there is no arm {unknown[0]!r}; expected some of {', '.join(content['arms'])}")
    for arm in [arm for arm in content["arms"] if arms and arm not in arms]:
        del content["arms"][arm]
