"""The model card of a network, `card.md.j2`: what it is, was trained on, cost, how good it is, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from maskdm.base.errors import printable
from maskdm.config import Params
from maskdm.config.paths import WeightSet


def model_card(name: str, params: Params, num_classes: int, which: WeightSet, **facts: Any) -> str:
    """The text of a card.

    Args:
        name: of the folder.
        params: that describe the network, and what it was trained with.
        num_classes: of its class token; 0 without one.
        which: the set of weights in model.safetensors.
        facts: of a checkpoint of an experiment those of `exporting`; of an imported network `source`, `sets` and
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
    """The last part of a path, which says enough to strangers."""
    return printable(path.rstrip("/").rsplit("/", 1)[-1])


def _listed(values: Mapping[str, Any]) -> str:
    """Plain values as text."""
    given = {key: value for key, value in values.items() if value is not None}
    return ", ".join(
        f"{key} {_last(value) if key == 'root' else printable(str(value))}" for key, value in given.items()
    )
