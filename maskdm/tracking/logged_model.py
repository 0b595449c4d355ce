"""An arm's final weights as a folder that `mlflow.pyfunc.load_model` understands: code and plain files, no pickle."""

from __future__ import annotations

import json
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from maskdm import __version__
from maskdm.config import Params

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

SCRIPT = Path(__file__).with_name("drawing_model.py")
README = """\
# Images from {name}

    import mlflow, pandas as pd

    model = mlflow.pyfunc.load_model(PLACE)
    images = model.predict(pd.DataFrame({{"seed": [0], "num_images": [4]}}))  # uint8 (4, {height}, {width}, {channels})

Image i depends on (seed, i), as in the stage `sample`. Needs maskdm {version} to be installed;
`artifacts/params.json` is the experiment with the values that this arm was trained with.
"""


def save_model(folder: Path, params: Params, weights: Path) -> Path:
    """Write the model.

    Args:
        folder: an existing, empty one.
        params: that it was trained with.
        weights: a checkpoint with a set `ema`; of it only these go along.

    Returns:
        the model's folder.
    """
    from mlflow import pyfunc

    model, (height, width, channels) = folder / "model", params.dataset.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asks for an example: drawing one takes long, and the signature is given
        pyfunc.save_model(
            path=str(model),
            python_model=str(SCRIPT),  # code as it stands here, nothing pickled
            artifacts=_artifacts(folder, params, weights),
            signature=_signature(params.dataset.shape),
            pip_requirements=[f"maskdm=={__version__}", f"torch=={metadata.version('torch')}"],
        )
    facts = {"name": params.name, "height": height, "width": width, "channels": channels, "version": __version__}
    (model / "README.md").write_text(README.format(**facts), encoding="utf-8")
    return model


def _signature(shape: tuple[int, int, int]) -> ModelSignature:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    inputs = Schema([ColSpec(DataType.long, "seed"), ColSpec(DataType.long, "num_images")])
    return ModelSignature(inputs, Schema([TensorSpec(np.dtype(np.uint8), (-1, *shape))]))


def _artifacts(folder: Path, params: Params, weights: Path) -> dict[str, str]:
    from maskdm.base.tensors import load_tensors, save_tensors

    states, info = load_tensors(weights)
    files = {"weights": folder / "weights.safetensors", "params": folder / "params.json"}
    save_tensors(files["weights"], {"ema": states["ema"]}, info)
    content = params.model_dump(mode="json", exclude_unset=True)
    files["params"].write_text(json.dumps(content, indent=2), encoding="utf-8")
    return {name: str(file) for name, file in files.items()}
