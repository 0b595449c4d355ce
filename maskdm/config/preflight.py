"""Mistakes that would make an experiment fail only after hours of work; imports no torch."""

from __future__ import annotations

from pathlib import Path

from maskdm.base.errors import ParamsError, UserError
from maskdm.config.exported_config import check_fits
from maskdm.config.image_counts import MIN_REAL, most_real
from maskdm.config.schema import Params


def check(params: Params) -> None:
    """Check the number of real images, as far as it is known, and the folders of weights that training starts from.

    Folders that do not exist yet are skipped; `Params.missing_files` names them.

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
    if (most := most_real(params)) is not None and most < MIN_REAL:
        lines.append(
            f"evaluation.reference {params.evaluation.reference}: {most} real images are too few to score samples "
            f"against; use {MIN_REAL} or more (dataset.limit, fraction, held_out)"
        )
    try:
        check_num_real(params, most_real(params))
    except UserError as error:
        lines.append(str(error))
    if lines:
        raise ParamsError("\n".join(lines))


def check_num_real(params: Params, num_real: int | None) -> None:
    """Check whether there are enough real images to score samples.

    Args:
        params: the experiment.
        num_real: the number of real images, at most; None if it is not known.

    Raises:
        UserError: there are too few.
    """
    config = params.evaluation
    if num_real is not None and (shortage := config.shortage(num_real, "real images")):
        raise UserError(
            f"evaluation.reference {config.reference}: {shortage}; lower kid_subset_size, or use more images "
            "(dataset.limit, fraction, held_out)"
        )
