"""What lies in the folder of an exported network, as far as it is known without its weights; imports no torch.

The folder:
    model.safetensors        the weights, by the bare names of `UViT.named_parameters`
    model-raw.safetensors    the other set, where there are both: ema here and raw there, or the other way round
    config.json              {"format", "params": a whole params.yaml, "num_classes", "which", "weights", "source"}
    README.md                the model card
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maskdm.base.errors import UserError
from maskdm.base.printable import printable
from maskdm.config import Params, parse_params
from maskdm.config.architecture import architecture_of
from maskdm.config.formats import WeightSet

FORMAT = "maskdm-model/2"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
SECOND: dict[WeightSet, str] = {"raw": "model-raw.safetensors", "ema": "model-ema.safetensors"}
NAMES = {WEIGHTS, CONFIG, CARD, *SECOND.values()}
MOST_BYTES = 2**20  # of config.json
MOST_HEADER_BYTES = 2**20  # of a weights file: a tensor's entry has a hundred


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _WeightsFile(_Entry):
    file: Literal["model.safetensors", "model-raw.safetensors", "model-ema.safetensors"]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Config(_Entry):
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


def read_config(folder: Path) -> Config:
    """The config.json of an exported folder.

    Raises:
        UserError: there is none, or it is not what was written.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is no folder of maskdm export or maskdm import-checkpoint: it has no {CONFIG}")
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES} bytes")
        return Config.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"{path} does not describe a model in the format {FORMAT} ({printable(reason)}); export it again")


def misfits(config: Config, own: Params, params: Params, num_classes: int | None) -> Iterator[str]:
    """Why the network of an exported folder can't be trained on in an experiment, as `patch_size is 4 there …`.

    Args:
        config: its config.json.
        own: the params in it.
        params: of the experiment.
        num_classes: of its dataset; None where they are not known yet, and not compared.
    """
    known = config.num_classes if num_classes is None else num_classes
    there, here = architecture_of(own, config.num_classes), architecture_of(params, known)
    for key in here:
        if there[key] != here[key]:
            yield f"{key} is {there[key]!r} there and {here[key]!r} here"


def check_fits(folder: Path, params: Params) -> None:
    """Whether training could start from an exported folder, as far as that is known without torch and the dataset.

    Raises:
        UserError: it is no such folder, of another network or diffusion, or its weights are missing or cut off.
    """
    config = read_config(folder)
    own = parse_params(config.params, source=f"{folder / CONFIG}: params")
    if differing := list(misfits(config, own, params, None)):
        raise UserError(f"the model in {folder} does not fit the experiment: {'; '.join(differing)}")
    path = folder / config.weights[config.which].file
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
        if length > MOST_HEADER_BYTES:
            raise ValueError("no header of safetensors")
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if path.stat().st_size != 8 + length + max(ends, default=0):
        raise ValueError("cut off")
