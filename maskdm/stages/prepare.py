"""Stage `prepare`: the dataset as sharded uint8 arrays."""

from __future__ import annotations

from maskdm import paths
from maskdm.config import Params
from maskdm.data.prepare import prepare
from maskdm.records import stage_record
from maskdm.tracking import stage_run


def run(params: Params) -> None:
    """Prepare the dataset of params into results/data.

    Raises:
        UserError: the images can't be read.
    """
    with stage_run(params, "prepare") as tracked, stage_record(params, "prepare") as record:
        manifest = prepare(params)
        facts = {
            "data_sha256": manifest["sha256"],
            "num_images": manifest["count"],
            "shape": manifest["shape"],
        }
        record.update(facts)
        tracked.params(**facts)
        tracked.figure(paths.DATA / "preview.png")
