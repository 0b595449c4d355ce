"""What lies in the folder of an exported network, as far as it is known without its weights; imports no torch.

The folder:
    model.safetensors        the weights, by the bare names of `UViT.named_parameters`
    model-raw.safetensors    the other set, where there are both: ema here and raw there, or the other way round
    config.json              {"format", "params": a whole params.yaml, "num_classes", "which", "weights", "source"}
    README.md                the model card
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maskdm.base.errors import UserError, printable
from maskdm.config import Params, parse_params
from maskdm.config.paths import WeightSet

FORMAT = "maskdm-model/2"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
SECOND: dict[WeightSet, str] = {"raw": "model-raw.safetensors", "ema": "model-ema.safetensors"}
MAX_HEADER_BYTES = 2**20  # of a weights file: a tensor's entry has a hundred


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _WeightsFile(_Section):
    file: Literal["model.safetensors", "model-raw.safetensors", "model-ema.safetensors"]  # never a path
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Config(_Section):
    """What config.json holds.

    Attributes:
        params: the content of a whole params.yaml.
        num_classes: of the dataset; counts only for a class-conditional network.
        which: the set of weights that model.safetensors holds.
        weights: by set, its file.
        source: where the weights come from, for people.
    """

    format: Literal["maskdm-model/2"]
    params: dict[str, Any]
    num_classes: Annotated[int, Field(ge=0)]
    which: WeightSet
    weights: Annotated[dict[WeightSet, _WeightsFile], Field(min_length=1)]
    source: dict[str, Any]

    def weights_file(self, folder: Path, which: WeightSet | None = None) -> tuple[Path, str]:
        """The file of a set of weights (None: those of model.safetensors), and its sha256.

        Raises:
            UserError: there is no such set.
        """
        if (entry := self.weights.get(which or self.which)) is None:
            raise UserError(f"{folder} has no {which or self.which} weights, only {', '.join(self.weights)}")
        return folder / entry.file, entry.sha256


def read_config(folder: Path) -> tuple[Config, Params]:
    """The config.json of an exported folder, and the params in it.

    Raises:
        UserError: there is none, or it is not what was written.
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
    """Whether training could start from an exported folder, as far as that is known without torch.

    Args:
        folder: of `maskdm export` or `maskdm import-checkpoint`.
        params: of the experiment.
        num_classes: of its dataset; None where they are not known yet, and not compared.

    Raises:
        UserError: it is not such a folder, of another network or diffusion, or its weights are missing or cut off.
    """
    config, own = read_config(folder)
    there = own.architecture(config.num_classes)
    here = params.architecture(config.num_classes if num_classes is None else num_classes)
    differing = [f"{key} is {there[key]!r} there and {here[key]!r} here" for key in here if there[key] != here[key]]
    if differing:
        raise UserError(f"the model in {folder} does not fit the experiment: {'; '.join(differing)}")
    path, _ = config.weights_file(folder)
    try:
        _check_whole(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is cut off or damaged"
        raise UserError(f"{path} can't be used ({reason}): export, import or copy the model again") from None


def _check_whole(path: Path) -> None:
    """Whether a safetensors file is as long as its header says: 8 bytes of the header's length, it, the tensors.

    Raises:
        ValueError: it is not, or its header can't be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("no regular file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise ValueError("cut off")
