"""Makes torchvision importable with a PyTorch build that its compiled operators do not match.

torch-fidelity imports torchvision, which registers fake implementations of the operators `nms` and `qnms` at import.
If its compiled library does not match PyTorch (for example torchvision of PyPI with a CPU-only PyTorch), these
operators do not exist, and the import fails with "operator torchvision::nms does not exist". It is enough to declare
their schemas: maskdm never calls them, and calling them still raises an error.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


@cache
def declare_missing_operators() -> torch.library.Library | None:
    """Import torchvision, after declaring the operators if that is necessary; it may be called repeatedly.

    Returns:
        the library of the declarations, which end when it is deleted; None if none were necessary.
    """
    try:
        _import_torchvision()
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _import_torchvision()
    return library


def _import_torchvision() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        import torchvision  # noqa: F401
