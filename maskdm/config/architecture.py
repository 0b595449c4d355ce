"""What two networks must share so that weights of the one can be put into the other."""

from __future__ import annotations

from typing import Any

from maskdm.config import Params


def architecture_of(params: Params, num_classes: int) -> dict[str, Any]:
    """What two checkpoints must share to be exchangeable."""
    return {
        **params.model.model_dump(),
        "image_size": params.dataset.image_size,
        "channels": params.dataset.channels,
        "num_classes": num_classes if params.model.class_conditional else 0,
        **params.diffusion.model_dump(),
    }
