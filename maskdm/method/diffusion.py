"""The diffusion process and its objective: noise schedule, targets, (masked) denoising score matching.

Source: Ho et al. 2020 (DDPM, arXiv 2006.11239); Nichol & Dhariwal 2021 (cosine schedule, arXiv 2102.09672);
Salimans & Ho 2022 (v-prediction, arXiv 2202.00512); MaskDM (arXiv 2306.11363), equations 1 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from maskdm.config.schema import Prediction
from maskdm.method.masks import Masking, gather_patches, patchify

# A network: (noised visible patches (B, S, P), t (B,), visible_idx (B, S), labels (B,) or None) → prediction (B, S, P).
Denoiser = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def make_betas(schedule: str, num_timesteps: int) -> Tensor:
    """The variances β_t of the forward process, (T,) float64.

    Args:
        schedule: `linear`: from 1e-4 to 0.02 for T = 1000, for another T scaled to the same total noise; or `cosine`.
        num_timesteps: T.

    Raises:
        ValueError: the schedule is unknown.

    Source: DDPM, section 4 (linear); Nichol & Dhariwal 2021, equation 17 (cosine, with betas of at most 0.999).
    """
    if schedule == "linear":
        scale = 1000.0 / num_timesteps
        return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64).clamp(max=0.999)
    if schedule == "cosine":
        s = 0.008
        u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        alphas_cumprod = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown schedule {schedule!r}; expected 'linear' or 'cosine'")


class Diffusion:
    """The forward process q(x_t | x_0), and the conversions between what a network can predict.

    Args:
        num_timesteps: T.
        schedule: `linear` or `cosine`.
        prediction: what the network predicts: `epsilon`, `x_0` or `v`.
        device: where the tables of coefficients live.

    Attributes:
        alphas_cumprod: ᾱ_t, (T,) float64 on the CPU.
    """

    def __init__(
        self, num_timesteps: int, schedule: str, prediction: Prediction, device: torch.device | str = "cpu"
    ) -> None:
        self.num_timesteps = num_timesteps
        self.prediction = prediction
        self.alphas_cumprod = torch.cumprod(1 - make_betas(schedule, num_timesteps), dim=0)
        # built in float64, rounded once
        self._signal = self.alphas_cumprod.sqrt().float().to(device)  # √ᾱ_t, (T,)
        self._noise = (1 - self.alphas_cumprod).sqrt().float().to(device)  # √(1 − ᾱ_t), (T,)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε: x_0 and ε (B, …), t (B,) → (B, …).

        Source: DDPM, equation 4.
        """
        return self._at(self._signal, t, x_0) * x_0 + self._at(self._noise, t, x_0) * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict: ε, x_0 or v = √ᾱ_t ε − √(1−ᾱ_t) x_0; x_0 and ε (B, …), t (B,) → (B, …).

        Source: DDPM, equation 14 (ε); Salimans & Ho 2022, section 4 (x_0, v).
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x_0":
            return x_0
        return self._at(self._signal, t, x_0) * noise - self._at(self._noise, t, x_0) * x_0

    def to_x_0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 that follows from a prediction at x_t: prediction and x_t (B, …), t (B,) → (B, …).

        Source: add_noise and target, solved for x_0.
        """
        signal, sigma = self._at(self._signal, t, x_t), self._at(self._noise, t, x_t)
        if self.prediction == "epsilon":
            return (x_t - sigma * prediction) / signal
        if self.prediction == "x_0":
            return prediction
        return signal * x_t - sigma * prediction

    @staticmethod
    def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        return table[t].reshape(-1, *[1] * (like.dim() - 1))


class Draws(NamedTuple):
    """All random numbers of one step, drawn at once for the whole batch.

    Attributes:
        t: timesteps, (B,) int64, uniform in [0, T).
        visible_idx: indices of the visible patches, (B, S) int64.
        noise: ε̂ of the visible patches, (B, S, P), standard normal.
        flip: which images to flip left to right, (B,) bool.
    """

    t: Tensor
    visible_idx: Tensor
    noise: Tensor
    flip: Tensor

    def chunk(self, part: slice) -> Draws:
        """The draws of a slice of the batch."""
        return Draws(*(field[part] for field in self))


def draw_step(
    batch_size: int,
    patch_dim: int,
    masking: Masking,
    num_timesteps: int,
    flip: float,
    generator: torch.Generator,
) -> Draws:
    """Draw a step's timesteps, masks, noise and flips on the generator's device.

    Args:
        batch_size: B.
        patch_dim: P = p·p·C, the values of a patch.
        masking: how masks are drawn.
        num_timesteps: T.
        flip: probability of a left-right flip, in [0, 1].
        generator: seeded for this step.

    Source: MaskDM, section 3.2 (mask M, noise ε̂ of the visible patches); DDPM, algorithm 1 (t, ε).
    """
    device = generator.device
    return Draws(
        t=torch.randint(num_timesteps, (batch_size,), generator=generator, device=device),
        visible_idx=masking.draw(batch_size, generator),
        noise=torch.randn(batch_size, masking.num_visible, patch_dim, generator=generator, device=device),
        flip=torch.rand(batch_size, generator=generator, device=device) < flip,
    )


def masked_dsm_loss(
    denoiser: Denoiser,
    diffusion: Diffusion,
    x_0: Tensor,
    draws: Draws,
    patch_size: int,
    labels: Tensor | None = None,
) -> Tensor:
    """The masked denoising score matching loss: L = E ‖target − f_θ(x̂_t, t; M, H)‖² over the visible patches.

    At mask rate 0 every patch is visible, and this is the usual loss L_simple.

    Args:
        denoiser: the network f_θ.
        diffusion: the forward process.
        x_0: clean images in [−1, 1], (B, C, H, W).
        draws: timesteps, masks, noise and flips of these B images.
        patch_size: p, in pixels.
        labels: classes, (B,) int64, for a class-conditional model.

    Returns:
        the squared error, averaged over images, visible patches and their values; a scalar.

    Source: MaskDM, equation 4 (L_mdsm); at mask rate 0, equation 1.
    """
    x_0 = torch.where(draws.flip[:, None, None, None], x_0.flip(-1), x_0)
    visible = gather_patches(patchify(x_0, patch_size), draws.visible_idx)  # (B, S, P)
    x_t = diffusion.add_noise(visible, draws.noise, draws.t)
    prediction = denoiser(x_t, draws.t, draws.visible_idx, labels)  # (B, S, P)
    return (prediction.float() - diffusion.target(visible, draws.noise, draws.t)).square().mean()
