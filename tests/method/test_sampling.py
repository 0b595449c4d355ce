"""Samplers against the best denoiser of Gaussian data, which is known in closed form, and against diffusers'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskdm.config import SamplingConfig
from maskdm.config.geometry import Grid
from maskdm.data.batches import to_uint8
from maskdm.method.diffusion import Diffusion, Prediction
from maskdm.method.sampling import ImageDenoiser, ImageNoise, batches_of, on_images, sample, sample_timesteps
from maskdm.models.drawing import draw_images
from maskdm.training.devices import Compute
from tests.factories import CPU, FP32, tiny_model, tiny_params

MEAN, STD = 0.2, 0.12  # of the data; 1 is more than six standard deviations away
SHAPE = (1, 64, 64)
SAMPLERS = ["ddim", "ddpm", "dpmsolver++", "unipc"]
MULTISTEP = ["dpmsolver++", "unipc"]


def config(**changes: Any) -> SamplingConfig:
    return SamplingConfig(**changes)


def best_x_0(diffusion: Diffusion, x_t: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t] where every pixel of x_0 ~ N(MEAN, STD²)."""
    alpha = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    gain = alpha.sqrt() * STD**2 / (alpha * STD**2 + 1 - alpha)
    return MEAN + gain * (x_t.double() - alpha.sqrt() * MEAN)


def best_denoiser(diffusion: Diffusion) -> ImageDenoiser:
    """`best_x_0` in the form that `diffusion` wants predictions in."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        x_0 = best_x_0(diffusion, x_t, t)
        alpha = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        noise = (x_t - alpha.sqrt() * x_0) / (1 - alpha).sqrt()
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * x_0
        return {"x_0": x_0, "epsilon": noise, "v": v}[diffusion.prediction].float()

    return predict


def diffusion_of(prediction: Prediction = "x_0", schedule: str = "linear", num_timesteps: int = 1000) -> Diffusion:
    return Diffusion(num_timesteps, schedule, prediction)


def gaussian_samples(
    diffusion: Diffusion, sampling: SamplingConfig, ids: range = range(8), shape: tuple[int, int, int] = SHAPE
) -> Tensor:
    return sample(best_denoiser(diffusion), diffusion, sampling, shape, 0, ids, CPU)


def first_noise(ids: range) -> Tensor:
    return ImageNoise(0, ids, SHAPE, CPU).next()


# --- the right distribution


def exact_moments(diffusion: Diffusion, sampling: SamplingConfig) -> tuple[float, float]:
    """Mean and standard deviation of what a sampler makes of `best_denoiser`: every step is linear in x.

    From DDIM's equations 12 and 16; DDPM is η = 1.
    """
    alphas = diffusion.alphas_cumprod.numpy()
    steps = sample_timesteps(diffusion.num_timesteps, sampling.num_steps)
    eta = 1.0 if sampling.sampler == "ddpm" else sampling.eta
    mean, variance = 0.0, 1.0
    for t, t_next in zip(steps, [*steps[1:], None], strict=True):
        a, b = alphas[t], 1.0 if t_next is None else alphas[t_next]
        gain = np.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)
        sigma = eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
        direction = np.sqrt(1 - b - sigma**2) / np.sqrt(1 - a)
        of_x_0 = np.sqrt(b) - direction * np.sqrt(a)
        mean = direction * mean + of_x_0 * (MEAN + gain * (mean - np.sqrt(a) * MEAN))
        variance = (direction + of_x_0 * gain) ** 2 * variance + sigma**2
    return mean, variance**0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    "sampling",
    [
        config(sampler="ddim", num_steps=200),
        config(sampler="ddim", num_steps=500, eta=1.0),
        config(sampler="ddpm", num_steps=1000),
        config(sampler="ddpm", num_steps=250),
    ],
    ids=lambda s: f"{s.sampler}-{s.num_steps}",
)
def test_the_best_denoiser_of_gaussian_data_gives_that_gaussian(sampling: SamplingConfig, schedule: str) -> None:
    diffusion = diffusion_of(schedule=schedule)
    mean, std = exact_moments(diffusion, sampling)
    assert mean == pytest.approx(MEAN, rel=0.01)
    assert std == pytest.approx(STD, rel=0.12)  # finite steps lose some of it
    pixels = gaussian_samples(diffusion, sampling).double()
    count = pixels.numel()
    assert float(pixels.mean()) == pytest.approx(mean, abs=5 * std / count**0.5)
    assert float(pixels.std()) == pytest.approx(std, rel=5 / (2 * count) ** 0.5)
    standard = (pixels - mean) / std
    assert float(standard.pow(3).mean()) == pytest.approx(0, abs=5 * (15 / count) ** 0.5)
    assert float(standard.pow(4).mean()) == pytest.approx(3, abs=5 * (96 / count) ** 0.5)
    # pixels stay independent: of their neighbours, and of the same pixel in other images
    assert abs(float((standard[..., 1:] * standard[..., :-1]).mean())) < 5 / count**0.5
    assert abs(float((standard[1:] * standard[:-1]).mean())) < 5 / pixels[1:].numel() ** 0.5


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_network_predicts_makes_no_difference(sampler: str, prediction: Prediction) -> None:
    sampling = config(sampler=sampler, num_steps=50)
    x_0, other = (gaussian_samples(diffusion_of(p), sampling, range(2)) for p in ("x_0", prediction))
    torch.testing.assert_close(other, x_0, rtol=0, atol=1e-3)


def exact_ddim(diffusion: Diffusion, noise: Tensor) -> Tensor:
    """Where infinitely many DDIM steps take `noise`: the probability-flow ODE of a Gaussian keeps (x_t − m_t) / s_t."""

    def moments(t: int) -> tuple[float, float]:
        alpha = float(diffusion.alphas_cumprod[t])
        return alpha**0.5 * MEAN, (alpha * STD**2 + 1 - alpha) ** 0.5

    (mean_first, std_first), (mean_last, std_last) = moments(diffusion.num_timesteps - 1), moments(0)
    x_last = mean_last + std_last * (noise.double() - mean_first) / std_first
    return best_x_0(diffusion, x_last, torch.zeros(len(noise), dtype=torch.int64))


def test_ddims_error_is_of_first_order_in_the_step() -> None:
    diffusion, counts = diffusion_of(), [25, 50, 100, 200, 400]
    exact = exact_ddim(diffusion, first_noise(range(2)))
    drawn = [gaussian_samples(diffusion, config(num_steps=n, clip_x_0=False), range(2)) for n in counts]
    errors = [float((x - exact).square().mean().sqrt()) for x in drawn]
    assert all(np.diff(errors) < 0)
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.15)
    assert errors[-1] < 0.03 * STD


def even_in_log_snr(num_timesteps: int) -> Diffusion:
    """A process whose λ falls from 5 to −4 evenly in t: with it steps even in t are even in λ."""
    diffusion = diffusion_of(num_timesteps=num_timesteps)
    diffusion.alphas_cumprod = torch.sigmoid(2 * torch.linspace(5, -4, num_timesteps, dtype=torch.float64))
    return diffusion


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmsolver++", 2), ("unipc", 3)])
def test_a_samplers_error_is_of_its_order_in_the_step(sampler: str, order: int) -> None:
    """In float64; DPM-Solver++ (2M) is of second order, and UniC raises the order of its predictor, UniP-2, by one."""
    diffusion, counts = even_in_log_snr(257), np.array([33, 65, 129, 257])

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return best_x_0(diffusion, x_t, t)

    def drawn(num_steps: int) -> Tensor:
        sampling = config(sampler=sampler, num_steps=num_steps, clip_x_0=False)
        return sample(denoise, diffusion, sampling, SHAPE, 0, range(2), CPU)

    exact = exact_ddim(diffusion, first_noise(range(2)))
    errors = [float((drawn(int(n)) - exact).square().mean().sqrt()) for n in counts]
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(counts - 1))
    assert slopes == pytest.approx([order] * 3, abs=0.1)


@pytest.mark.parametrize("sampler", ["ddim", *MULTISTEP])
def test_without_noise_an_image_is_a_function_of_the_first_draw_alone(sampler: str) -> None:
    diffusion = diffusion_of()
    x = gaussian_samples(diffusion, config(sampler=sampler, num_steps=100), range(2)).flatten()
    order = first_noise(range(2)).flatten().argsort()
    assert (x[order].diff() > -1e-5).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_with_eta_1_and_every_step_is_ddpm(schedule: str) -> None:
    diffusion = diffusion_of(schedule=schedule, num_timesteps=60)
    trajectories = {}
    for sampler in ("ddim", "ddpm"):
        seen: list[Tensor] = []
        denoise = best_denoiser(diffusion)
        sampling = config(sampler=sampler, eta=1.0, num_steps=60)
        last = sample(recording(denoise, seen), diffusion, sampling, (1, 8, 8), 0, range(3), CPU)
        trajectories[sampler] = torch.stack([*seen, last])
    assert trajectories["ddim"].shape == (61, 3, 1, 8, 8)
    torch.testing.assert_close(trajectories["ddim"], trajectories["ddpm"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [2, 3, 20])
@pytest.mark.parametrize("sampler", MULTISTEP)
def test_trajectories_are_those_of_diffusers(sampler: str, num_steps: int, schedule: str, clip: bool) -> None:
    diffusion, seen = diffusion_of(schedule=schedule), list[Tensor]()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        """Bends x_t, and in most places beyond 1 where clipping is tried."""
        return (4.0 if clip else 0.7) * torch.cos(t / 900)[:, None, None, None] * torch.tanh(1.3 * x_t).double()

    sampling = config(sampler=sampler, num_steps=num_steps, clip_x_0=clip)
    last = sample(recording(denoise, seen), diffusion, sampling, (1, 8, 8), 0, range(2), CPU)
    theirs = diffusers_scheduler(sampler, diffusion, num_steps)
    x_t = ImageNoise(0, range(2), (1, 8, 8), CPU).next().double()
    for t, ours in zip(sample_timesteps(1000, num_steps), seen, strict=True):
        torch.testing.assert_close(ours.double(), x_t, rtol=0, atol=3e-6)
        x_0 = denoise(x_t, torch.full((2,), t))
        x_t = theirs.step(x_0.clamp(-1, 1) if clip else x_0, t, x_t).prev_sample
    torch.testing.assert_close(last, x_t.clamp(-1, 1), rtol=0, atol=3e-6)


def diffusers_scheduler(sampler: str, diffusion: Diffusion, num_steps: int) -> Any:
    """The scheduler of the same name on the same timesteps, its noise levels unrounded."""
    import diffusers

    scheduler_of = {
        "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }[sampler]
    scheduler = scheduler_of(num_train_timesteps=diffusion.num_timesteps, solver_order=2, prediction_type="sample")
    scheduler.num_inference_steps = num_steps
    timesteps = torch.tensor(sample_timesteps(diffusion.num_timesteps, num_steps))
    alphas_cumprod = diffusion.alphas_cumprod[timesteps]
    scheduler.timesteps = timesteps
    scheduler.sigmas = torch.cat([((1 - alphas_cumprod) / alphas_cumprod).sqrt(), torch.zeros(1)])
    return scheduler


def recording(denoise: ImageDenoiser, seen: list[Tensor]) -> ImageDenoiser:
    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t.clone())
        return denoise(x_t, t)

    return predict


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_gives_the_best_x_0_of_pure_noise(sampler: str) -> None:
    diffusion = diffusion_of()
    expected = best_x_0(diffusion, first_noise(range(2)), torch.full((2,), 999)).float()
    got = gaussian_samples(diffusion, config(sampler=sampler, num_steps=1), range(2))
    torch.testing.assert_close(got, expected)


# --- independence of the batch


@pytest.mark.parametrize(
    "sampling",
    [config(num_steps=20, eta=0.5), *(config(sampler=sampler, num_steps=20) for sampler in SAMPLERS)],
    ids=["ddim-eta", *SAMPLERS],
)
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_images_do_not_depend_on_the_batch_they_are_drawn_in(sampling: SamplingConfig, batch_size: int) -> None:
    diffusion, shape = diffusion_of(), (2, 4, 4)
    together = gaussian_samples(diffusion, sampling, range(10), shape)
    parts = [gaussian_samples(diffusion, sampling, ids, shape) for ids in batches_of(10, batch_size)]
    torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-5)
    assert len(together.flatten(1).unique(dim=0)) == 10


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "unipc"])
def test_a_networks_pixels_do_not_depend_on_the_batch(sampler: str) -> None:
    params = tiny_params(model={"dim": 32, "depth": 5})
    diffusion = diffusion_of(schedule="cosine")
    denoise = on_images(tiny_model(params).eval(), params.model.patch_size, params.grid)
    sampling = config(sampler=sampler, num_steps=20)

    def pixels(ids: range) -> Tensor:
        return to_uint8(sample(denoise, diffusion, sampling, (1, 8, 8), 0, ids, CPU))

    together = pixels(range(40))
    for batch_size in (1, 25):
        apart = torch.cat([pixels(ids) for ids in batches_of(40, batch_size)])
        assert (apart == together).double().mean() >= 0.999
        assert (apart.int() - together.int()).abs().max() <= 1


def test_images_depend_on_the_seed() -> None:
    diffusion = diffusion_of()
    one, two = (
        sample(best_denoiser(diffusion), diffusion, config(num_steps=5), (1, 8, 8), seed, range(3), CPU)
        for seed in (0, 1)
    )
    assert (one != two).double().mean() > 0.99


def test_noise_of_an_image_is_new_at_every_step_and_its_own() -> None:
    noise = ImageNoise(0, range(5), (3, 4, 4), CPU)
    draws = torch.cat([noise.next(), noise.next()])
    assert len(draws.flatten(1).unique(dim=0)) == 10
    assert torch.equal(ImageNoise(0, range(3, 4), (3, 4, 4), CPU).next()[0], draws[3])


@given(st.integers(1, 50), st.integers(1, 60))
def test_batches_hold_every_image_once_and_in_order(count: int, batch_size: int) -> None:
    parts = list(batches_of(count, batch_size))
    assert [i for part in parts for i in part] == list(range(count))
    assert all(len(part) == batch_size for part in parts[:-1])


# --- timesteps


@given(st.integers(1, 2000), st.data())
def test_timesteps_run_evenly_from_the_last_to_0(num_timesteps: int, data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, num_timesteps))
    steps = sample_timesteps(num_timesteps, num_steps)
    assert len(steps) == num_steps
    assert steps[0] == num_timesteps - 1
    assert steps == sorted(set(steps), reverse=True)
    if num_steps > 1:
        assert steps[-1] == 0
        assert np.ptp(np.diff(steps)) <= 1


@pytest.mark.parametrize("num_steps", [0, -1, 11])
def test_an_impossible_number_of_steps_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_steps {num_steps} is outside \[1, 10\]"):
        sample_timesteps(10, num_steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_the_network_is_evaluated_once_a_step_at_the_timesteps(num_steps: int, sampler: str) -> None:
    diffusion, asked, done = diffusion_of(num_timesteps=10), [], []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append(t.tolist())
        return torch.zeros_like(x_t)

    sampling = config(sampler=sampler, num_steps=num_steps)
    sample(denoise, diffusion, sampling, (1, 2, 2), 0, range(3), CPU, lambda: done.append(1))
    assert asked == [[t] * 3 for t in sample_timesteps(10, num_steps)]
    assert len(done) == num_steps


# --- clipping


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("clip", "x_0"), [(True, 1.0), (False, 3.0)])
def test_a_clipped_x_0_has_its_noise_derived_anew(sampler: str, clip: bool, x_0: float) -> None:
    """The denoiser says x_0 = 3: one step later x must be built from the clipped 1 and the noise that goes with it."""
    diffusion, seen = diffusion_of("epsilon", "cosine", 10), []
    signal, sigma = diffusion.alphas_cumprod.sqrt(), (1 - diffusion.alphas_cumprod).sqrt()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return ((x_t - signal[t[0]] * 3) / sigma[t[0]]).float()

    sampling = config(sampler=sampler, num_steps=10, clip_x_0=clip)
    last = sample(recording(denoise, seen), diffusion, sampling, (1, 4, 4), 0, range(2), CPU)
    noise = ImageNoise(0, range(2), (1, 4, 4), CPU)
    x, step_noise = noise.next().double(), noise.next().double()
    if sampler != "ddpm":  # a multistep sampler's first step is DDIM's
        expected = signal[8] * x_0 + sigma[8] * (x - signal[9] * x_0) / sigma[9]
    else:
        beta = 1 - signal[9] ** 2 / signal[8] ** 2
        mean = signal[8] * beta / sigma[9] ** 2 * x_0 + (1 - beta).sqrt() * sigma[8] ** 2 / sigma[9] ** 2 * x
        expected = mean + sigma[8] / sigma[9] * beta.sqrt() * step_noise
    torch.testing.assert_close(seen[1].double(), expected, rtol=0, atol=2e-5)
    assert torch.equal(last, torch.ones_like(last))


# --- networks on whole images


def test_a_network_on_images_gets_every_patch_in_order_and_gives_images_back() -> None:
    seen: list[list[int]] = []

    def denoise(patches: Tensor, t: Tensor, visible_idx: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        seen.extend(visible_idx.tolist())
        return patches + 100 * t[:, None, None] + 10 * labels[:, None, None] + visible_idx[:, :, None]

    x_t = torch.zeros(2, 3, 4, 6)
    predict = on_images(denoise, 2, Grid(2, 3), labels=torch.tensor([1, 2]))
    got = predict(x_t, torch.tensor([5, 7]))
    assert seen == [list(range(6))] * 2
    patch_of_pixel = torch.arange(6).reshape(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    for image, base in zip(got, (510, 720), strict=True):
        assert torch.equal(image, (base + patch_of_pixel).expand(3, -1, -1).float())


# --- batches of a compiled network


class Watched(Compute):
    """Compiles a network as far as to tell how it is called."""

    def compiled(self, function: Any) -> Any:
        def call(*inputs: Tensor) -> Tensor:
            shapes.append(tuple(inputs[0].shape))
            return function(*inputs)

        shapes: list[tuple[int, ...]] = self.__dict__.setdefault("shapes", [])
        return call


@pytest.mark.parametrize("class_conditional", [False, True])
def test_a_compiled_network_sees_batches_of_one_shape_and_draws_the_same_images(class_conditional: bool) -> None:
    params = tiny_params(
        model={"class_conditional": class_conditional}, sampling={"num_steps": 3, "batch_size": 4, "num_samples": 1000}
    )
    model = tiny_model(params).eval()
    watched = Watched(CPU, autocast=False, threads=1, compile_mode="default")
    eager, compiled = (draw_images(params, model, 10, 0, 10, compute, "test") for compute in (FP32, watched))
    assert watched.shapes == [(4, 16, 4)] * 9  # type: ignore[attr-defined]
    assert compiled.shape == eager.shape == (10, 8, 8, 1)
    assert np.abs(compiled.astype(int) - eager).max() <= 1


def test_a_sampler_that_has_a_name_but_no_step_is_an_error() -> None:
    config = SamplingConfig(num_steps=2).model_copy(update={"sampler": "euler"})
    diffusion = Diffusion(10, "linear", "epsilon")
    with pytest.raises(NotImplementedError, match="the step of sampler 'euler' does not exist"):
        sample(lambda x_t, t: x_t, diffusion, config, (1, 4, 4), 0, range(2), torch.device("cpu"))
