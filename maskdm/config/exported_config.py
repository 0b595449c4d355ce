"""The folder of an exported network, as far as it can be read without torch.

The folder:
    model.safetensors        the weights, by the names of `UViT.named_parameters`
    model-raw.safetensors    the other set of weights, if there are two (or model-ema.safetensors)
    config.json              {"format", "params": a whole params.yaml, "num_classes", "which", "weights", "source"}
    README.md                the model card
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maskdm.base.errors import UserError, printable
from maskdm.config.paths import WeightSet
from maskdm.config.reading import parse_params
from maskdm.config.schema import Params

FORMAT = "maskdm-model/2"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
SECOND: dict[WeightSet, str] = {"raw": "model-raw.safetensors", "ema": "model-ema.safetensors"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _WeightsFile(_Section):
    file: Literal["model.safetensors", "model-raw.safetensors", "model-ema.safetensors"]  # so it is never another path
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Config(_Section):
    """The content of config.json.

    Attributes:
        params: the content of a whole params.yaml.
        num_classes: number of classes of the dataset; ignored unless the network is class-conditional.
        which: the set of weights in model.safetensors.
        weights: the file of every set of weights.
        source: where the weights come from, for people.
    """

    format: Literal["maskdm-model/2"]
    params: dict[str, Any]
    num_classes: Annotated[int, Field(ge=0)]
    which: WeightSet
    weights: Annotated[dict[WeightSet, _WeightsFile], Field(min_length=1)]
    source: dict[str, Any]

    def weights_file(self, folder: Path, which: WeightSet | None = None) -> tuple[Path, str]:
        """The file of a set of weights, and its sha256; None takes the set in model.safetensors.

        Raises:
            UserError: there is no such set.
        """
        if (entry := self.weights.get(which or self.which)) is None:
            raise UserError(f"{folder} has no {which or self.which} weights, only {', '.join(self.weights)}")
        return folder / entry.file, entry.sha256


def read_config(folder: Path) -> tuple[Config, Params]:
    """Read the config.json of an exported folder, and the params in it.

    Raises:
        UserError: there is none, or it is not valid.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a folder of maskdm export or maskdm import-checkpoint: it has no {CONFIG}")
    try:
        config = Config.model_validate(json.loads(path.read_bytes()))
        return config, parse_params(config.params, source=f"{path}: params")
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"{path} does not describe a model in the format {FORMAT} ({printable(reason)}); export it again")


def check_fits(folder: Path, params: Params, num_classes: int | None = None) -> None:
    """Check whether training could start from an exported folder, as far as it can be told without torch.

    Args:
        folder: a folder of `maskdm export` or `maskdm import-checkpoint`.
        params: the experiment.
        num_classes: number of classes of its dataset; None if it is not known yet: it is not compared.

    Raises:
        UserError: it is not such a folder, has another network or diffusion, or its weights are missing or damaged.
    """
    from safetensors import SafetensorError, safe_open  # imports NumPy, not torch

    config, own = read_config(folder)
    there = own.architecture(config.num_classes)
    here = params.architecture(config.num_classes if num_classes is None else num_classes)
    differing = [f"{key} is {there[key]!r} there and {here[key]!r} here" for key in here if there[key] != here[key]]
    if differing:
        raise UserError(f"the model in {folder} does not fit the experiment: {'; '.join(differing)}")
    path, _ = config.weights_file(folder)
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        safe_open(path, framework="np")  # compares the length of the file with its header
    except (OSError, SafetensorError) as error:
        reason = "it is cut off or damaged" if isinstance(error, SafetensorError) else str(error)
        raise UserError(f"{path} can't be used ({reason}): export, import or copy the model again") from None
