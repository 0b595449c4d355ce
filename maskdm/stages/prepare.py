"""Stage `prepare`: the dataset as sharded uint8 arrays."""

from __future__ import annotations

from maskdm import paths
from maskdm.config import Params
from maskdm.data.prepare import prepare
from maskdm.stages.session import stage_session


def run(params: Params) -> None:
    """Prepare the dataset of params into results/data.

    Raises:
        UserError: the images can't be read.
    """
    with stage_session(params, "prepare", output=paths.DATA) as session:
        if session.is_to_do:
            manifest = prepare(params)
            facts = {"num_images": manifest["count"], "shape": manifest["shape"]}
            session.record.update(facts)
            session.tracked.params(**facts)
            session.tracked.figure(paths.DATA / "preview.png")
