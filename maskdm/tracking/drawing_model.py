"""The logged model: MLflow copies this file beside the weights and runs it when the model is loaded.

`mlflow.pyfunc.load_model(...).predict(pd.DataFrame({"seed": [0], "num_images": [4]}))` draws 4 images from seed 0.
"""

from __future__ import annotations

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
        from maskdm.models.loading import open_model

        self._model = open_model(Path(context.artifacts["weights"]).parent)

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
        return np.concatenate([self._model.draw(int(num_images), int(seed)) for seed, num_images in rows])


set_model(Drawer())
