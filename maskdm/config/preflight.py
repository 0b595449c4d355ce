"""What would make an experiment fail after hours of work, and can be told before; imports no torch."""

from __future__ import annotations

from pathlib import Path

from maskdm.base.errors import ParamsError, UserError
from maskdm.config import Params
from maskdm.config.exported_config import check_fits
from maskdm.config.image_counts import most_real


def check(params: Params) -> None:
    """Look at what params alone do not tell: known numbers of images, and the folders that training starts from.

    A folder that is not there yet is not looked at (`Params.missing_files` names it).

    Raises:
        ParamsError: one line per mistake.
    """
    mistakes: dict[str, list[str]] = {}
    for key, arm, checkpoint in params.checkpoints():
        folder = Path(checkpoint)
        try:
            if folder.exists():
                check_fits(folder, params.for_pretraining(arm))
        except UserError as error:
            mistakes.setdefault(str(error), []).append(key)
    lines = [f"{', '.join(keys)}: {line}" for text, keys in mistakes.items() for line in text.splitlines()]
    try:
        check_num_real(params, most_real(params))
    except UserError as error:
        lines.append(str(error))
    if lines:
        raise ParamsError("\n".join(lines))


def check_num_real(params: Params, num_real: int | None) -> None:
    """Whether samples can be scored against so many real images.

    Args:
        params: the experiment.
        num_real: how many there are at most; None where that is not known.

    Raises:
        UserError: they are too few.
    """
    config = params.evaluation
    if num_real is not None and (shortage := config.shortage(num_real, "real images")):
        raise UserError(
            f"evaluation.reference {config.reference}: {shortage}; lower kid_subset_size, or use more images "
            "(dataset.limit, fraction, held_out)"
        )
