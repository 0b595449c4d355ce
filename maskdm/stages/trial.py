"""What a trial of tuning does: the whole arm with other values, at a fraction of the budget, scored."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from maskdm import device
from maskdm.company import is_follower
from maskdm.compute import build_model, plan_arm
from maskdm.config import Params
from maskdm.data.arrays import ImageArrays
from maskdm.drawing import draw_images, load_model
from maskdm.parallel import Ranks
from maskdm.publishing import replace_file
from maskdm.resume import Pieces
from maskdm.stages import finetune, pretrain
from maskdm.stages.inputs import open_data, open_pretraining_data
from maskdm.stages.scoring import Scorer
from maskdm.stages.session import Session
from maskdm.stages.training import Spent, Trainer, TrainingJob
from maskdm.stages.versions import STAGE_VERSIONS
from maskdm.training import NonFiniteLossError


class Trial:
    """One trial of one arm.

    Args:
        params: of the trial (`Params.for_trial`).
        arm: its key.
        name: the trial's.

    Attributes:
        inputs: all that its result depends on.

    Raises:
        UserError: data or features are missing or do not fit.
    """

    def __init__(self, params: Params, arm: str, name: str) -> None:
        self._params, self._arm, self._name = params, arm, name
        self._seed = params.seeds[0]
        self._compute, self._images = (
            device.resolve(params.compute, params.training.devices),
            open_data(params, verify=not is_follower()),
        )
        self._pretraining_images = open_pretraining_data(params, arm, verify=not is_follower())
        self._scorer = Scorer(params, self._compute, self._images.sha256)
        self.inputs = {
            "pretrain": self._pretraining_job().inputs(self._pretraining_images.sha256),
            "finetune": {
                "config": params.finetune_of(arm),
                "steps": plan_arm(params, arm).finetune.num_steps,
                "data_sha256": self._images.sha256,
            },
            "sampling": params.sampling,
            "evaluation": params.evaluation,
            "features": {**self._scorer.origin, "reference_sha256": self._scorer.reference_sha256},
            "stage_versions": {stage: STAGE_VERSIONS[stage] for stage in ("finetune", "sample", "evaluate")},
        }

    def run(self, session: Session, ranks: Ranks) -> dict[str, Any]:
        """Train, draw and score; what came out.

        A loss that becomes non-finite is a result too: the trial has `failed`, and says why.

        Args:
            session: keeps what a killed trial goes on from; gets curves, scores and the accounts of both stages.
            ranks: that train together; what came out, only the first one knows.
        """
        plan = plan_arm(self._params, self._arm)
        spent = Spent().after(plan.pretrain.num_steps, plan.pretrain).after(plan.finetune.num_steps, plan.finetune)
        result: dict[str, Any] = {**spent.as_dict(), **self._scorer.origin}
        title = f"{self._arm} trial {self._name}"
        try:
            weights = self._train(session, ranks)
        except NonFiniteLossError as error:
            if ranks.is_first:
                print(f"{title} has failed, {error.reason}: the arm is tuned over the others", file=sys.stderr)
            return {**result, "failed": error.reason}
        drawn = self._draw(weights, session, f"sample {title}", ranks)
        if not ranks.is_first:
            return result
        scores = self._scorer.score(drawn, f"score {title}").as_dict()
        session.tracked.log(100, **scores)
        return {**result, **scores}

    def _pretraining_job(self) -> TrainingJob:
        num_classes = self._pretraining_images.num_classes
        return pretrain.pretraining_job(self._params, self._arm, self._seed, num_classes)

    def _train(self, session: Session, ranks: Ranks) -> Path | None:
        """Pretrain and finetune; the file of the finetuned weights, on the first rank."""
        params, arm, seed = self._params, self._arm, self._seed
        pretrained = self._run(self._pretraining_job(), self._pretraining_images, session, ranks)
        job = finetune.finetuning_job(params, arm, seed, self._images.num_classes, pretrained)
        return self._run(job, self._images, session, ranks)

    def _run(self, job: TrainingJob, images: ImageArrays, session: Session, ranks: Ranks) -> Path | None:
        """Run one training stage of the trial; the file of its weights, on the first rank."""
        trainer = Trainer(replace(job, trial=self._name), images, session.folder / job.stage, ranks)
        own: dict[str, Any] = {}
        trainer.run(session.tracked, own, prefix=f"{job.stage}/")
        if not ranks.is_first:
            return None
        weights = trainer.folder / "weights.safetensors"
        with replace_file(weights) as building:
            trainer.save_weights(building)
        session.record[job.stage] = own
        return weights

    def _draw(self, weights: Path | None, session: Session, title: str, ranks: Ranks) -> np.ndarray:
        """Samples, on the first rank; it gives the others its weights."""
        params, num_classes, compute = self._params, self._images.num_classes, self._compute
        if weights is None:
            model = build_model(params, num_classes).eval().to(compute.device)
        else:
            model = load_model(params, weights, num_classes, compute)
        ranks.share_weights(model)
        kept = Pieces(session.folder / "samples") if ranks.is_first else None
        count = params.sampling.num_samples
        return draw_images(params, model, num_classes, self._seed, count, compute, title, kept, ranks)
