"""The diffusion process and its loss, against oracles in float64 numpy written from the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskdm.config.geometry import Grid
from maskdm.method.backbones.uvit import UViT
from maskdm.method.diffusion import Denoiser, Diffusion, Draws, Prediction, draw_step, make_betas, masked_dsm_loss
from maskdm.method.masks import Masking, patchify, to_mask, unpatchify
from maskdm.method.sampling import on_images
from tests.factories import tiny_model, tiny_params

PATCH_SIZE, GRID, CHANNELS = 2, Grid(4, 4), 1
PATCH_DIM = PATCH_SIZE**2 * CHANNELS
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "x_0", "v")
SCHEDULES = ("linear", "cosine")
NUM_TIMESTEPS = 1000


def oracle_alphas_cumprod(schedule: str, num_timesteps: int) -> np.ndarray:
    """ᾱ_t of DDPM (linear, rescaled as ADM does) and of Nichol & Dhariwal, equation 17."""
    if schedule == "linear":
        scale = 1000 / num_timesteps
        betas = [
            scale * (1e-4 + (0.02 - 1e-4) * i / (num_timesteps - 1)) for i in range(num_timesteps)
        ]  # β_1 … β_T on a line
    else:
        f = [np.cos((t / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2 for t in range(num_timesteps + 1)]
        betas = [1 - f[t] / f[t - 1] for t in range(1, num_timesteps + 1)]
    return np.cumprod(1 - np.minimum(betas, 0.999))


def images(count: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(count, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def draws_of(masking: Masking, count: int = 5, flip: float = 0.0, seed: int = 0) -> Draws:
    return draw_step(count, PATCH_DIM, masking, NUM_TIMESTEPS, flip, torch.Generator().manual_seed(seed))


def diffusion_of(prediction: Prediction = "epsilon") -> Diffusion:
    return Diffusion(NUM_TIMESTEPS, "cosine", prediction)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network() -> UViT:
    return tiny_model(tiny_params())


# --- schedules


@pytest.mark.parametrize("num_timesteps", [1000, 100, 4000, 25])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_the_papers(schedule: str, num_timesteps: int) -> None:
    got = Diffusion(num_timesteps, schedule, "epsilon").alphas_cumprod.numpy()
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, oracle_alphas_cumprod(schedule, num_timesteps), rtol=1e-9, atol=0)


def test_linear_schedule_of_1000_steps_is_ddpms() -> None:
    betas = make_betas("linear", 1000)
    assert betas[0] == pytest.approx(1e-4, rel=1e-12)
    assert betas[-1] == pytest.approx(0.02, rel=1e-12)


@given(st.sampled_from(SCHEDULES), st.integers(2, 3000))
@settings(deadline=None, max_examples=50)
def test_the_signal_only_ever_falls(schedule: str, num_timesteps: int) -> None:
    alphas_cumprod = Diffusion(num_timesteps, schedule, "epsilon").alphas_cumprod
    assert alphas_cumprod.shape == (num_timesteps,)
    assert (alphas_cumprod.diff() < 0).all()
    assert 0 < alphas_cumprod[-1] < alphas_cumprod[0] < 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_another_number_of_timesteps_has_the_same_total_noise(schedule: str) -> None:
    coarse, fine = (Diffusion(n, schedule, "epsilon").alphas_cumprod for n in (250, 1000))
    torch.testing.assert_close(coarse[24::25].sqrt(), fine[99::100].sqrt(), rtol=0, atol=0.01)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'sigmoid'; expected 'linear' or 'cosine'"):
        make_betas("sigmoid", 10)


# --- noising and conversions


@pytest.mark.parametrize("t", [0, 300, 999])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noised_data_has_the_moments_of_q(schedule: str, t: int) -> None:
    count, alpha = 100_000, oracle_alphas_cumprod(schedule, NUM_TIMESTEPS)[t]
    x_0 = torch.full((1, count), 0.7)
    x_t = Diffusion(NUM_TIMESTEPS, schedule, "epsilon").add_noise(x_0, normal(1, count), torch.tensor([t]))
    assert float(x_t.mean()) == pytest.approx(0.7 * alpha**0.5, abs=5 * ((1 - alpha) / count) ** 0.5)
    assert float(x_t.var()) == pytest.approx(1 - alpha, rel=5 * (2 / count) ** 0.5)


def test_every_image_is_noised_at_its_own_timestep() -> None:
    diffusion, t = diffusion_of(), torch.tensor([3, 500, 990])
    x_0, noise = images(3), normal(3, CHANNELS, 8, 8)
    together = diffusion.add_noise(x_0, noise, t)
    for i in range(3):
        torch.testing.assert_close(together[i], diffusion.add_noise(x_0[[i]], noise[[i]], t[[i]])[0])


@given(st.sampled_from(PREDICTIONS), st.sampled_from(SCHEDULES), st.integers(0, NUM_TIMESTEPS - 1))
@settings(deadline=None)
def test_a_perfect_prediction_gives_x_0_back(prediction: Prediction, schedule: str, t: int) -> None:
    diffusion, t_batch = Diffusion(NUM_TIMESTEPS, schedule, prediction), torch.full((5,), t)
    alpha = float(diffusion.alphas_cumprod[t])
    x_0, noise = images(), normal(5, CHANNELS, 8, 8)
    x_t = diffusion.add_noise(x_0, noise, t_batch)
    recovered = diffusion.to_x_0(diffusion.target(x_0, noise, t_batch), x_t, t_batch)
    # float32 rounding of x_t, divided by √ᾱ_t
    torch.testing.assert_close(recovered, x_0, rtol=0, atol=2e-6 / alpha**0.5)


def test_targets_are_the_papers() -> None:
    x_0, noise, t = images(3), normal(3, CHANNELS, 8, 8), torch.tensor([10, 400, 900])
    alpha = oracle_alphas_cumprod("cosine", NUM_TIMESTEPS)[t.numpy()].reshape(3, 1, 1, 1)
    v = np.sqrt(alpha) * noise.double().numpy() - np.sqrt(1 - alpha) * x_0.double().numpy()
    np.testing.assert_allclose(diffusion_of("v").target(x_0, noise, t), v, atol=1e-6)
    assert torch.equal(diffusion_of("epsilon").target(x_0, noise, t), noise)
    assert torch.equal(diffusion_of("x_0").target(x_0, noise, t), x_0)


# --- draws of a step


def test_draws_of_a_step_are_of_the_visible_patches_alone() -> None:
    draws = draws_of(Masking("patch", GRID, 0.75))
    assert draws.t.shape == (5,)
    assert draws.visible_idx.shape == (5, 4)
    assert draws.noise.shape == (5, 4, PATCH_DIM)
    assert draws.flip.shape == (5,)
    assert draws.flip.dtype == torch.bool


def test_draws_are_uniform_in_time_and_standard_normal_and_flip_as_often_as_asked() -> None:
    count = 20_000
    draws = draw_step(count, PATCH_DIM, Masking("patch", GRID, 0.9), 10, 0.3, torch.Generator().manual_seed(0))
    times = np.bincount(draws.t, minlength=10) / count
    assert abs(times - 0.1).max() < 5 * (0.09 / count) ** 0.5
    assert abs(draws.noise.mean()) < 5 / draws.noise.numel() ** 0.5
    assert abs(draws.noise.var() - 1) < 5 * (2 / draws.noise.numel()) ** 0.5
    assert abs(draws.flip.double().mean() - 0.3) < 5 * (0.21 / count) ** 0.5


def test_micro_batches_share_the_draws_of_their_batch() -> None:
    draws = draws_of(Masking("patch", GRID, 0.5), count=6, flip=0.5)
    parts = [draws.chunk(slice(start, start + 2)) for start in (0, 2, 4)]
    for whole, *cut in zip(draws, *parts, strict=True):
        assert torch.equal(whole, torch.cat(cut))


# --- the loss


def linear_denoiser(weight: np.ndarray, position: np.ndarray) -> Denoiser:
    """f(x, t, idx) = x W + t/1000 + H[idx]."""
    w, h = (torch.from_numpy(a).float() for a in (weight, position))
    return lambda x, t, idx, _: x @ w + t[:, None, None] / 1000 + h[idx]


def oracle_loss(x_0: np.ndarray, draws: Draws, weight: np.ndarray, position: np.ndarray, target: str) -> float:
    """L_mdsm of the linear denoiser, image by image and patch by patch."""
    alphas_cumprod, errors = oracle_alphas_cumprod("cosine", NUM_TIMESTEPS), []
    for image, t, visible, noise, flip in zip(x_0, *(field.numpy() for field in draws), strict=True):
        signal, sigma = np.sqrt(alphas_cumprod[t]), np.sqrt(1 - alphas_cumprod[t])
        for patch, epsilon in zip(visible, noise.astype(np.float64), strict=True):
            row, col = divmod(int(patch), GRID.cols)
            pixels = (image[:, :, ::-1] if flip else image)[
                :, row * PATCH_SIZE : (row + 1) * PATCH_SIZE, col * PATCH_SIZE : (col + 1) * PATCH_SIZE
            ]
            clean = pixels.transpose(1, 2, 0).ravel()
            noised = signal * clean + sigma * epsilon
            wanted = {"epsilon": epsilon, "x_0": clean, "v": signal * epsilon - sigma * clean}[target]
            errors.append((noised @ weight + t / 1000 + position[patch] - wanted) ** 2)
    return float(np.mean(errors))


@pytest.mark.parametrize(
    "masking",
    [Masking("none", GRID), Masking("patch", GRID, 0.5), Masking("block", GRID, 0.6, 2), Masking("crop", GRID, 0.4)],
    ids=lambda m: m.strategy,
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_papers(prediction: Prediction, masking: Masking) -> None:
    numbers = np.random.default_rng(0)
    weight, position = numbers.normal(size=(PATCH_DIM, PATCH_DIM)), numbers.normal(size=(GRID.num_patches, PATCH_DIM))
    x_0, draws = images(), draws_of(masking, flip=0.5)
    loss = masked_dsm_loss(linear_denoiser(weight, position), diffusion_of(prediction), x_0, draws, PATCH_SIZE)
    expected = oracle_loss(x_0.double().numpy(), draws, weight, position, prediction)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def loss_and_gradients(network: UViT, x_0: Tensor, draws: Draws) -> tuple[Tensor, list[Tensor]]:
    loss = masked_dsm_loss(network, diffusion_of("x_0"), x_0, draws, PATCH_SIZE)
    return loss.detach(), list(torch.autograd.grad(loss, list(network.parameters())))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_masked_pixels_change_neither_loss_nor_gradients(network: UViT, rate: float) -> None:
    x_0, draws = images(), draws_of(Masking("patch", GRID, rate))
    patches = patchify(x_0, PATCH_SIZE)
    patches[to_mask(draws.visible_idx, GRID.num_patches)] = float("nan")
    loss, gradients = loss_and_gradients(network, x_0, draws)
    same_loss, same_gradients = loss_and_gradients(network, unpatchify(patches, PATCH_SIZE, GRID), draws)
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same_gradients, strict=True))


def test_every_visible_pixel_and_no_masked_one_reaches_the_loss(network: UViT) -> None:
    x_0, draws = images().requires_grad_(), draws_of(Masking("block", GRID, 0.5, 2))
    masked_dsm_loss(network, diffusion_of("x_0"), x_0, draws, PATCH_SIZE).backward()
    assert x_0.grad is not None
    reached = patchify(x_0.grad, PATCH_SIZE) != 0
    mask = to_mask(draws.visible_idx, GRID.num_patches)[:, :, None].expand_as(reached)
    assert torch.equal(reached, ~mask)


@pytest.mark.parametrize("strategy", ["none", "patch", "crop"])
def test_rate_0_is_ordinary_denoising_score_matching(network: UViT, strategy: str) -> None:
    diffusion, x_0, draws = diffusion_of("v"), images(), draws_of(Masking(strategy, GRID, 0.0))  # type: ignore[arg-type]
    noise = unpatchify(draws.noise, PATCH_SIZE, GRID)
    alpha = diffusion.alphas_cumprod[draws.t].float().reshape(-1, 1, 1, 1)
    x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise
    v = alpha.sqrt() * noise - (1 - alpha).sqrt() * x_0
    l_simple = (on_images(network, PATCH_SIZE, GRID)(x_t, draws.t) - v).square().mean()
    torch.testing.assert_close(masked_dsm_loss(network, diffusion, x_0, draws, PATCH_SIZE), l_simple)


def test_flipped_draws_train_on_flipped_images(network: UViT) -> None:
    x_0, masking = images(), Masking("patch", GRID, 0.5)
    flipped, plain = draws_of(masking, flip=1.0), draws_of(masking, flip=0.0)
    diffusion = diffusion_of()
    mirror = masked_dsm_loss(network, diffusion, x_0.flip(-1), plain, PATCH_SIZE)
    assert torch.equal(masked_dsm_loss(network, diffusion, x_0, flipped, PATCH_SIZE), mirror)
    assert not torch.equal(masked_dsm_loss(network, diffusion, x_0, plain, PATCH_SIZE), mirror)


# --- patches


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_unpatchify_is_the_inverse_of_patchify(batch: int, rows: int, cols: int, size: int, channels: int) -> None:
    x = normal(batch, channels, rows * size, cols * size)
    patches = patchify(x, size)
    assert patches.shape == (batch, rows * cols, size * size * channels)
    assert torch.equal(unpatchify(patches, size, Grid(rows, cols)), x)


def test_patches_are_row_major_and_pixels_channel_last() -> None:
    x = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    second_of_second_row = patchify(x, 2)[0, 4]
    assert second_of_second_row.tolist() == [x[0, c, r, q].item() for r in (2, 3) for q in (2, 3) for c in (0, 1)]
