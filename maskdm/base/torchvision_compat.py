"""Let torchvision be imported beside a PyTorch build that lacks its compiled operators.

torch-fidelity imports torchvision, whose Python code registers fake implementations of the operators `nms` and
`qnms` at import. Where torchvision's compiled library does not match PyTorch (the registry's torchvision beside a
CPU-only PyTorch), those operators do not exist and the import fails with "operator torchvision::nms does not
exist". Declaring their schemas is enough; nothing of ours calls them, and calling them still fails loudly.
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
    """Import torchvision, declaring the operators first if the import needs it; harmless to call again.

    Returns:
        the library that holds the declarations (they vanish with it), or None if torchvision needs no help.
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
