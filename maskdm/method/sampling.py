"""Samplers: DDPM, DDIM, DPM-Solver++ (2M) and UniPC, for any denoiser, with one generator for each image.

Source: Ho et al. 2020 (DDPM, arXiv 2006.11239), equations 6–7; Song et al. 2021 (DDIM, arXiv 2010.02502),
equations 12 and 16; Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), algorithm 2; Zhao et al. 2023 (UniPC,
arXiv 2302.04867), theorem 3.1 for data prediction, with p = 2 and B(h) = e^h − 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskdm.base import rng
from maskdm.config import SamplingConfig
from maskdm.config.geometry import Grid
from maskdm.method.diffusion import Denoiser, Diffusion
from maskdm.method.masks import all_visible, patchify, unpatchify

# A network on whole images: (x_t (B, C, H, W), t (B,)) → prediction (B, C, H, W).
ImageDenoiser = Callable[[Tensor, Tensor], Tensor]


def sample_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """The timesteps at which the network is evaluated: evenly spaced, from T−1 down to 0.

    Args:
        num_timesteps: T.
        num_steps: how many evaluations, in [1, T].

    Raises:
        ValueError: there are more steps than timesteps, or none.

    Source: Nichol & Dhariwal 2021, section 4.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps {num_steps} is outside [1, {num_timesteps}]")
    if num_steps == 1:
        return [num_timesteps - 1]
    return [round(i * (num_timesteps - 1) / (num_steps - 1)) for i in reversed(range(num_steps))]


@torch.inference_mode()
def sample(
    denoiser: ImageDenoiser,
    diffusion: Diffusion,
    config: SamplingConfig,
    shape: tuple[int, int, int],
    seed: int,
    image_ids: range,
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw images.

    Args:
        denoiser: the network on whole images; the samplers compute in the dtype that it returns.
        diffusion: the forward process.
        config: sampler, number of steps, η, clipping.
        shape: (C, H, W).
        seed: of the experiment; image i depends on (seed, i), not on the batch it is drawn in.
        image_ids: the numbers i of the images to draw.
        device: where to compute.
        on_step: called after each evaluation of the network.

    Returns:
        images in [−1, 1], (B, C, H, W).

    Source: that of the step functions below.
    """
    noise = ImageNoise(seed, image_ids, shape, device)
    steps = sample_timesteps(diffusion.num_timesteps, config.num_steps)
    x_t, past = noise.next(), list[Evaluation]()
    for t, t_next in zip(steps, [*steps[1:], -1], strict=True):
        t_batch = torch.full((len(image_ids),), t, device=device)
        x_0 = diffusion.to_x_0(denoiser(x_t, t_batch), x_t, t_batch)
        now = Evaluation(t, x_t, x_0.clamp(-1, 1) if config.clip_x_0 else x_0)
        if config.sampler == "unipc":
            now = unipc_correction(diffusion, now, past)
        x_t = _step(diffusion, config, now, t_next, past, noise)
        past = [*past[-1:], now]
        on_step()
    return x_t.clamp(-1, 1)


class Evaluation(NamedTuple):
    """One evaluation of the network, which multistep samplers use again.

    Attributes:
        t: the timestep.
        x_t: the noised images, (B, C, H, W).
        x_0: the network's estimate of the clean images, clipped if asked for, (B, C, H, W).
    """

    t: int
    x_t: Tensor
    x_0: Tensor


def _step(
    diffusion: Diffusion,
    config: SamplingConfig,
    now: Evaluation,
    t_next: int,
    past: Sequence[Evaluation],
    noise: ImageNoise,
) -> Tensor:
    """The step of the sampler that `config` names: x_t at t → x_t at t_next, (B, C, H, W)."""
    if config.sampler == "ddpm":
        return ddpm_step(diffusion, now.x_0, now.x_t, now.t, t_next, noise)
    if config.sampler == "ddim":
        return ddim_step(diffusion, now.x_0, now.x_t, now.t, t_next, config.eta, noise)
    if config.sampler in ("dpmsolver++", "unipc"):
        return dpmsolver_step(diffusion, now, t_next, past)
    raise NotImplementedError(f"the step of sampler {config.sampler!r} does not exist")


class ImageNoise:
    """Standard normal noise, with a separate generator for every image.

    It is drawn on the CPU, so that images do not depend on the device, while a GPU still computes earlier steps.

    Args:
        seed: of the experiment.
        image_ids: the numbers of the images.
        shape: (C, H, W).
        device: where the noise is needed.
    """

    def __init__(self, seed: int, image_ids: range, shape: tuple[int, int, int], device: torch.device) -> None:
        self._generators = [rng.generator(seed, "sample", i) for i in image_ids]
        self._shape, self._device = shape, device

    def next(self) -> Tensor:
        """The next noise of every image, (B, C, H, W)."""
        draws = torch.empty(len(self._generators), *self._shape, pin_memory=self._device.type == "cuda")
        for image, generator in zip(draws, self._generators, strict=True):
            image.normal_(generator=generator)
        return draws.to(self._device, non_blocking=True)


def ddim_step(
    diffusion: Diffusion, x_0: Tensor, x_t: Tensor, t: int, t_next: int, eta: float, noise: ImageNoise
) -> Tensor:
    """The DDIM step from t to t_next < t; t_next = −1 gives x_0: x_0 and x_t (B, C, H, W) → (B, C, H, W).

    ε is computed again from x_t and the (clipped) x_0, so that the two are consistent. `eta` is in [0, 1]; 0 adds no
    noise.

    Source: DDIM, equations 12 and 16.
    """
    if t_next < 0:
        return x_0
    alpha, alpha_next = _alphas(diffusion, t, t_next)
    sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
    direction = (x_t - alpha**0.5 * x_0) / (1 - alpha) ** 0.5  # ε
    x_next = alpha_next**0.5 * x_0 + max(1 - alpha_next - sigma**2, 0.0) ** 0.5 * direction
    return x_next + sigma * noise.next() if eta > 0 else x_next


def ddpm_step(diffusion: Diffusion, x_0: Tensor, x_t: Tensor, t: int, t_next: int, noise: ImageNoise) -> Tensor:
    """A draw from the posterior q(x_{t_next} | x_t, x_0), t_next < t: x_0 and x_t (B, C, H, W) → (B, C, H, W).

    t_next = −1 gives x_0. With t_next < t − 1 it is the posterior of the process respaced to the timesteps in use.

    Source: DDPM, equations 6 and 7, with β̃_t as the variance.
    """
    if t_next < 0:
        return x_0
    alpha, alpha_next = _alphas(diffusion, t, t_next)
    beta = 1 - alpha / alpha_next
    mean = (alpha_next**0.5 * beta * x_0 + (alpha / alpha_next) ** 0.5 * (1 - alpha_next) * x_t) / (1 - alpha)
    variance = (1 - alpha_next) / (1 - alpha) * beta
    return mean + variance**0.5 * noise.next()


def dpmsolver_step(diffusion: Diffusion, now: Evaluation, t_next: int, past: Sequence[Evaluation]) -> Tensor:
    """The DPM-Solver++ (2M) step from now.t to t_next < now.t: x_t at t_next, (B, C, H, W); t_next = −1 gives x_0.

    It treats x_0 as linear in λ through the last two evaluations; without `past` as constant, which is DDIM with η = 0.

    Source: DPM-Solver++, algorithm 2.
    """
    if t_next < 0:
        return now.x_0
    (_, sigma), (alpha_next, sigma_next) = _scales(diffusion, now.t), _scales(diffusion, t_next)
    h, x_0 = _log_snr(diffusion, t_next) - _log_snr(diffusion, now.t), now.x_0
    if past:
        r = (_log_snr(diffusion, now.t) - _log_snr(diffusion, past[-1].t)) / h
        x_0 = x_0 + (x_0 - past[-1].x_0) / (2 * r)
    return sigma_next / sigma * now.x_t - alpha_next * math.expm1(-h) * x_0


def unipc_correction(diffusion: Diffusion, now: Evaluation, past: Sequence[Evaluation]) -> Evaluation:
    """Correct the x_t of an evaluation: repeat the step that led to it with the x_0 now known at its end.

    It treats x_0 as quadratic in λ through this evaluation and the last two; with only one before it, it uses the mean
    of the two. The network is not evaluated again.

    Source: UniPC, theorem 3.1 (UniC-2, for data prediction); its predictor, UniP-2, is `dpmsolver_step`.
    """
    if not past:
        return now
    before = past[-1]
    (alpha, sigma), (_, sigma_before) = _scales(diffusion, now.t), _scales(diffusion, before.t)
    log_snr = _log_snr(diffusion, before.t)
    h, change = _log_snr(diffusion, now.t) - log_snr, now.x_0 - before.x_0
    phi_1 = math.expm1(-h)
    if len(past) == 1:
        x_0 = before.x_0 + 0.5 * change
    else:
        r = (_log_snr(diffusion, past[-2].t) - log_snr) / h  # < 0
        phi_2 = -phi_1 / h - 1
        phi_3 = 2 * (-phi_2 / h - 0.5)
        weight = (phi_2 - phi_3) / (1 - r) / phi_1
        x_0 = before.x_0 + weight / r * (past[-2].x_0 - before.x_0) + (phi_2 / phi_1 - weight) * change
    return now._replace(x_t=sigma / sigma_before * before.x_t - alpha * phi_1 * x_0)


def on_images(denoiser: Denoiser, patch_size: int, grid: Grid, labels: Tensor | None = None) -> ImageDenoiser:
    """Turn a network on visible patches into one on whole images, all of whose patches are visible.

    Args:
        denoiser: the network.
        patch_size: p, in pixels.
        grid: the token grid of the images.
        labels: classes, (B,) int64, for a class-conditional model.
    """

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        visible_idx = all_visible(len(x_t), grid, x_t.device)
        return unpatchify(denoiser(patchify(x_t, patch_size), t, visible_idx, labels).float(), patch_size, grid)

    return predict


def batches_of(count: int, batch_size: int) -> Iterator[range]:
    """The numbers 0 … count−1 of images, in batches of at most `batch_size`."""
    for start in range(0, count, batch_size):
        yield range(start, min(start + batch_size, count))


def _alphas(diffusion: Diffusion, t: int, t_next: int) -> tuple[float, float]:
    return float(diffusion.alphas_cumprod[t]), float(diffusion.alphas_cumprod[t_next])


def _scales(diffusion: Diffusion, t: int) -> tuple[float, float]:
    """The α_t = √ᾱ_t and σ_t = √(1 − ᾱ_t) of x_t = α_t x_0 + σ_t ε."""
    alphas_cumprod = float(diffusion.alphas_cumprod[t])
    return math.sqrt(alphas_cumprod), math.sqrt(1 - alphas_cumprod)


def _log_snr(diffusion: Diffusion, t: int) -> float:
    """λ_t = log(α_t / σ_t)."""
    alpha, sigma = _scales(diffusion, t)
    return math.log(alpha / sigma)
