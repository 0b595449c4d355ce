"""From the file params.yaml to valid `Params`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from maskdm.base.checksums import short_hash
from maskdm.base.errors import ParamsError, printable
from maskdm.config.runs import Run, resolve
from maskdm.config.schema import PARAMS_FILE, Params, validated

MAX_BYTES = 2**18  # of params.yaml: this is enough for a thousand arms
MAX_MISTAKES = 20  # shown at once
KEY = re.compile(r"[a-z0-9][a-z0-9-]*")  # of an arm, a trial, a dataset: it is part of the names of files and stages
# What PyYAML raises for values that do not fit their tags, such as a date with a thirteenth month.
NOT_PLAIN_YAML = (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate params.yaml; nothing in it is executed.

    Raises:
        ParamsError: it is missing, too large, not plain YAML, or does not satisfy the schema; one line per mistake.
    """
    if not path.is_file():
        what = f"{path} is not a file" if path.exists() else f"no {path}"
        raise ParamsError(
            f"{what} in {Path.cwd()}: run this in a folder with a params.yaml (the project's root or "
            "experiments/<name>)"
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ParamsError(f"{path} is larger than {MAX_BYTES} bytes: is it another file?")
        text = path.read_bytes()
    except OSError as error:
        raise ParamsError(f"cannot read {path}: {error.strerror}") from None
    return parse_params(read_yaml(text, str(path)), source=str(path))


def read_yaml(text: bytes, source: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ParamsError: it is not plain YAML; the message begins with `source`.
    """
    try:
        return yaml.load(text.decode("utf-8"), _Loader)
    except RecursionError:
        raise ParamsError(f"{source} is nested too deeply") from None
    except NOT_PLAIN_YAML as error:
        raise ParamsError(f"{source} is not plain YAML: {printable(' '.join(str(error).split()))}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML takes the last, and one that it does not read as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = key_node.value if is_merge else self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                what = f"YAML reads the key {key_node.value} as {json.dumps(key, default=str)}: write it in quotes"
                raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_params(content: Any, source: str = "params.yaml") -> Params:
    """Validate the content of a params.yaml.

    Raises:
        ParamsError: one line per mistake; each begins with `source`.
    """
    if not isinstance(content, dict):
        raise ParamsError(f"{source}: expected a mapping of sections, got {type(content).__name__}")
    try:
        _check_keys(content)
        params = validated(content)
        _check_sections(params)
        for arm in params.arms:
            if not KEY.fullmatch(arm):
                raise ParamsError(
                    f"arms.{arm}: an arm's key may hold only a-z, 0-9 and '-', and not start with '-' "
                    "(files and stages are named after it)"
                )
            resolve(params, arm, params.seeds[0])
        _check_trials(params)
    except ParamsError as error:
        lines = str(error).splitlines()
        more = [f"and {len(lines) - MAX_MISTAKES} more mistakes"] if len(lines) > MAX_MISTAKES else []
        shown = [f"{source}: {printable(line)}" for line in (*lines[:MAX_MISTAKES], *more)]
        raise ParamsError("\n".join(shown)) from None
    return params


def _check_keys(content: Any, where: str = "") -> None:
    """Check that all keys are text: Snakemake reads the file with a loader of its own.

    Raises:
        ParamsError: one is not.
    """
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if not isinstance(key, str):
            what = f"YAML reads a key as {json.dumps(key, default=str)}: write it in quotes"
            raise ParamsError(f"{where}: {what}" if where else what)
        _check_keys(value, f"{where}.{key}" if where else key)


def _check_sections(params: Params) -> None:
    """Check whether the sections fit each other, except arms and trials.

    Raises:
        ParamsError: they do not.
    """
    if len(set(params.seeds)) != len(params.seeds):
        raise ParamsError(f"seeds: expected different numbers, got {params.seeds}")
    named = {"dataset": params.dataset, **{f"datasets.{name}": each for name, each in params.datasets.items()}}
    for where, dataset in named.items():
        if dataset.height % params.model.patch_size or dataset.width % params.model.patch_size:
            raise ParamsError(
                f"model.patch_size {params.model.patch_size} does not divide {where}.image_size {dataset.image_size}"
            )
        if dataset.channels != params.dataset.channels:
            raise ParamsError(
                f"{where}.channels {dataset.channels} must be equal to dataset.channels {params.dataset.channels}: "
                "the same network sees both"
            )
    for name in params.datasets:
        if not KEY.fullmatch(name):
            raise ParamsError(f"datasets.{name}: a dataset's name may hold only a-z, 0-9 and '-'")
    if params.evaluation.reference == "held_out" and not params.dataset.held_out:
        raise ParamsError("evaluation.reference: held_out needs dataset.held_out, the fraction of images to hold out")
    if params.sampling.num_steps > params.diffusion.num_timesteps:
        raise ParamsError(
            f"sampling.num_steps {params.sampling.num_steps} is more than diffusion.num_timesteps "
            f"{params.diffusion.num_timesteps}"
        )
    if shortage := params.evaluation.shortage(params.sampling.num_samples, "samples"):
        raise ParamsError(f"sampling.num_samples: {shortage}; draw more, or lower kid_subset_size")


def _check_trials(params: Params) -> None:
    """Check whether every arm gets the same number of different trials, and could run with the values of each.

    Raises:
        ParamsError: it does not.
    """
    tuning = params.tuning
    if tuning.seed in params.seeds:
        raise ParamsError(f"tuning.seed {tuning.seed} is one of seeds {params.seeds}: tune on a seed of its own")
    for trial in tuning.trials:
        if not KEY.fullmatch(trial):
            raise ParamsError(f"tuning.trials.{trial}: a trial's name may hold only a-z, 0-9 and '-'")
    runs = {(arm, trial): _resolve_trial(params, arm, trial) for trial in tuning.trials for arm in params.arms}
    for arm in params.arms:
        tried: dict[str, str] = {}
        for trial in tuning.trials:
            run = runs[arm, trial]
            effective = short_hash(run.pretrain.config, run.finetune.config, run.params.training)
            if (twin := tried.setdefault(effective, trial)) != trial:
                raise ParamsError(
                    f"tuning.trials: {twin} and {trial} are the same for arm {arm}; every arm must get the same "
                    "number of different trials (an arm without pretraining ignores pretrain.*)"
                )


def _resolve_trial(params: Params, arm: str, trial: str) -> Run:
    """The run of a trial, after checking that the arm itself could run with the same values."""
    try:
        resolve(params, arm, params.seeds[0], chosen=params.tuning.trials[trial])
        return resolve(params, arm, params.tuning.seed, trial)
    except ParamsError as error:
        lines = [f"tuning.trials.{trial}: {line}" for line in str(error).splitlines()]
        if "budget.unmasked_steps" in lines[-1]:
            lines[-1] += f", or raise tuning.budget_fraction (now {params.tuning.budget_fraction:g})"
        raise ParamsError("\n".join(lines)) from None
