"""Metrics between two sets of features, by torch-fidelity: FID, KID, precision, recall.

Source: Heusel et al. 2017 (FID), Bińkowski et al. 2018 (KID), Kynkäänniemi et al. 2019 (precision, recall).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch

from maskdm import rng
from maskdm.config import EvaluationConfig
from maskdm.errors import UserError

PRC_BLOCK = 1000  # rows of the distance matrix held at a time: 8 MB per 1,000 real images


@dataclass(frozen=True)
class Metrics:
    """Scores of samples against real images.

    Attributes:
        fid: Fréchet distance; biased: it falls as the number of samples grows.
        kid: mean of the unbiased estimates over random subsets; may be slightly negative.
        kid_std: standard deviation over the subsets.
        precision: share of samples within the real images' manifold.
        recall: share of real images within the samples' manifold.
        num_samples: how many samples were scored.
    """

    fid: float
    kid: float
    kid_std: float
    precision: float
    recall: float
    num_samples: int

    def as_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def compute_metrics(samples: np.ndarray, real: np.ndarray, config: EvaluationConfig) -> Metrics:
    """Score features of samples against features of real images.

    Args:
        samples: (N, D).
        real: (M, D).
        config: KID's subsets, the manifold's neighbourhood.

    Raises:
        UserError: either set is smaller than a metric needs.
    """
    check_counts(len(samples), len(real), config)
    from maskdm.torchvision_compat import declare_missing_operators

    declare_missing_operators()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    generated, reference = (torch.from_numpy(f.astype(np.float64)) for f in (samples, real))
    statistics = (fid_features_to_statistics(generated), fid_features_to_statistics(reference))
    fid = fid_statistics_to_metric(*statistics, verbose=False)
    kid = kid_features_to_metric(
        generated,
        reference,
        kid_subsets=config.kid_subsets,
        kid_subset_size=config.kid_subset_size,
        verbose=False,
    )
    prc = prc_features_to_metric(
        generated,
        reference,
        prc_neighborhood=config.prc_neighborhood,
        prc_batch_size=PRC_BLOCK,
        save_cpu_ram=True,
        verbose=False,
    )
    return Metrics(
        fid=fid["frechet_inception_distance"],
        kid=kid["kernel_inception_distance_mean"],
        kid_std=kid["kernel_inception_distance_std"],
        precision=prc["precision"],
        recall=prc["recall"],
        num_samples=len(samples),
    )


def floor_metrics(real: np.ndarray, num_samples: int, config: EvaluationConfig) -> Metrics:
    """Real images in the place of samples, against the other real images: about what a perfect model would get.

    As many of them as samples are scored, at most half, for both sides need some. Samples are scored against all real
    images and these only against the others, so that the floor's bias is the larger one: where the others are few, the
    floor of FID is rather too high. KID's subsets shrink with them where they must.

    Args:
        real: features of the real images, (M, D).
        num_samples: of the samples that it is the scale for.
        config: as for the samples.
    """
    order = torch.randperm(len(real), generator=rng.generator(0, "floor")).numpy()
    count = min(num_samples, len(real) // 2)
    fitting = config.model_copy(update={"kid_subset_size": min(config.kid_subset_size, count)})
    return compute_metrics(real[order[:count]], real[order[count:]], fitting)


def check_counts(num_samples: int, num_real: int, config: EvaluationConfig) -> None:
    """Raises: UserError, if there are fewer samples or real images than the metrics need."""
    needed = max(config.kid_subset_size, config.prc_neighborhood + 1)
    for what, count in (("samples", num_samples), ("real images", num_real)):
        if count < needed:
            raise UserError(
                f"{count} {what} are fewer than the metrics need: {needed} (evaluation.kid_subset_size "
                f"{config.kid_subset_size}, and prc_neighborhood + 1); lower kid_subset_size or use more {what}"
            )
