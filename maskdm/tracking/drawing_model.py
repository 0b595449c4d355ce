"""The logged model: MLflow copies this file beside the weights and runs it when the model is loaded.

`mlflow.pyfunc.load_model(...).predict(pd.DataFrame({"seed": [0], "num_images": [4]}))` draws 4 images from seed 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # MLflow reads the types of `predict` when it loads this
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class Drawer(PythonModel):
    """Draws images from the averaged weights of an arm, as its stage `sample` does."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights; where they were trained with CUDA and there is none, the CPU draws."""
        from maskdm.base.tensors import load_tensors
        from maskdm.config import parse_params
        from maskdm.models.drawing import load_model
        from maskdm.training import devices

        weights, params = (Path(context.artifacts[name]) for name in ("weights", "params"))
        self._params = parse_params(json.loads(params.read_text(encoding="utf-8")), source=str(params))
        asked = self._params.compute
        self._compute = devices.resolve(asked if asked.device == "cpu" else asked.model_copy(update={"device": "auto"}))
        self._num_classes = int(load_tensors(weights)[1]["architecture"]["num_classes"])
        self._model = load_model(self._params, weights, self._num_classes, self._compute)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Draw images.

        Args:
            context: of MLflow; not used.
            model_input: columns `seed` and `num_images`; the images of its rows follow each other.
            params: of MLflow; there are none.

        Returns:
            uint8 (sum of num_images, H, W, C).

        Raises:
            ValueError: no row, or one that asks for less than one image.
        """
        if len(model_input) == 0 or model_input["num_images"].min() < 1:
            raise ValueError(f"expected rows with num_images of 1 or more, got {model_input.to_dict('list')}")
        rows = zip(model_input["seed"], model_input["num_images"], strict=True)
        return np.concatenate([self._draw(int(seed), int(num_images)) for seed, num_images in rows])

    def _draw(self, seed: int, num_images: int) -> np.ndarray:
        from maskdm.models.drawing import draw_images

        title = f"seed {seed}"
        return draw_images(self._params, self._model, self._num_classes, seed, num_images, self._compute, title)


set_model(Drawer())
