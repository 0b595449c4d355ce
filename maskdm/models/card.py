"""The model card of a network, from the template `card.md.j2`: data, masking, cost, quality, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from maskdm.base.errors import printable
from maskdm.config import Params
from maskdm.config.paths import WeightSet


def model_card(name: str, params: Params, num_classes: int, which: WeightSet, **facts: Any) -> str:
    """The text of a model card.

    Args:
        name: the name of the exported folder.
        params: the params that describe the network and its training.
        num_classes: the number of classes of its class token; 0 without one.
        which: the set of weights in model.safetensors.
        facts: for a checkpoint of an experiment the facts of `exporting`; for an imported network `source`, `sets` and
            `ignored` of `importing`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "commas": "{:,}".format,
        "g": lambda value, digits=6: f"{value:.{digits}g}",
        "last": _last,
        "listed": _listed,
    }
    template = environment.get_template("card.md.j2")
    known = {"name": name, "params": params, "num_classes": num_classes, "which": which, "source": None}
    return template.render({**known, **facts}) + "\n"


def _last(path: str) -> str:
    """The last part of a path: the folders above it mean nothing to other people."""
    return printable(path.rstrip("/").rsplit("/", 1)[-1])


def _listed(values: Mapping[str, Any]) -> str:
    """Plain values as text, without those that are None."""
    given = {key: value for key, value in values.items() if value is not None}
    return ", ".join(
        f"{key} {_last(value) if key == 'root' else printable(str(value))}" for key, value in given.items()
    )
