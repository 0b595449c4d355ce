"""The training loop: accumulation, resuming, determinism, bad losses, precision, and golden loss curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from maskdm.base.errors import NonFiniteLossError
from maskdm.config import ComputeConfig, Params, StageConfig, Training
from maskdm.data.batches import Batches
from maskdm.training.devices import Compute, resolve
from maskdm.training.loop import Watcher, train
from maskdm.training.objective import Objective
from maskdm.training.optimizer import Ema, clip_gradients, lr_at, make_optimizer
from maskdm.training.state import StateStore, TrainState
from tests.factories import BF16, CPU, FP32, digits, tiny_model, tiny_params

CUDA = Compute(torch.device("cuda"), autocast=False, threads=1)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_bf16 = pytest.mark.skipif(
    not resolve(ComputeConfig(device="cpu", precision="auto")).autocast, reason="this CPU computes no bfloat16"
)
Change = Callable[[int, Tensor], Tensor]


def fresh_state(params: Params, seed: int = 0, device: torch.device = CPU) -> TrainState:
    model = tiny_model(params, seed).to(device)
    return TrainState(model, Ema(model, params.training.ema_decay), make_optimizer(model, params.training, 1e-3))


def run_of(params: Params, num_steps: int, arm: str = "patch-m50") -> Training:
    return Training(
        stage="pretrain",
        params=params,
        arm=arm,
        seed=0,
        config=params.pretrain,
        num_steps=num_steps,
        mask=params.mask_of(arm),
    )


def batches_of(run: Training, labelled: bool = False, device: torch.device = CPU) -> Batches:
    return Batches(digits(), run.batch_size, run.seed, run.stage, device, labelled)


class ChangedBatches(Batches):
    """Batches whose images are changed, step by step."""

    def __init__(self, run: Training, change: Change) -> None:
        super().__init__(digits(), run.batch_size, run.seed, run.stage, CPU)
        self._change = change

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        x_0, labels = super().__call__(step)
        return self._change(step, x_0), labels


class Watch(Watcher):
    """Gets rows and states."""

    def __init__(
        self,
        log: Callable[[dict[str, float]], Any] = lambda row: None,
        save: Callable[[TrainState], Any] = lambda good: None,
        should_save: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.log, self.save, self.should_save = log, save, should_save  # type: ignore[method-assign]


def train_watched(state: TrainState, run: Training, batches: Batches, compute: Compute, watch: Watch) -> None:
    train(state, batches, Objective(state.model, run, compute), watch)


def train_quietly(
    state: TrainState, run: Training, compute: Compute = FP32, batches: Batches | None = None, labelled: bool = False
) -> TrainState:
    batches = batches or batches_of(run, labelled, compute.device)
    train_watched(state, run, batches, compute, Watch())
    return state


def losses(state: TrainState) -> list[float]:
    return [row["loss"] for row in state.curve]


def frozen(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """All tensors of a state as they are now."""
    return {kind: {n: t.detach().clone() for n, t in ts.items()} for kind, ts in state.tensors().items()}


def assert_same_tensors(got: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    """Bit for bit, kind by kind."""
    assert got.keys() == expected.keys()
    for kind, tensors in expected.items():
        assert got[kind].keys() == tensors.keys()
        assert len(tensors) > 0
        for name, tensor in tensors.items():
            assert torch.equal(got[kind][name].cpu(), tensor.cpu()), f"{kind} {name}"


# --- gradient accumulation


def gradients(params: Params, micro_batch_size: int | None) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one batch of 8, in micro-batches."""
    config = params.pretrain.model_copy(update={"micro_batch_size": micro_batch_size})
    run, state = replace(run_of(params, num_steps=1), config=config), fresh_state(params)
    objective = Objective(state.model, run, FP32)
    state.optimizer.zero_grad = lambda **_: None  # type: ignore[method-assign]  # so that the gradients stay
    train(state, batches_of(run, labelled=params.model.class_conditional), objective, Watcher())
    return torch.tensor(losses(state)), [p.grad for p in state.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("conditional", [False, True])
def test_accumulated_gradients_are_those_of_one_big_batch(micro_batch_size: int, conditional: bool) -> None:
    params = tiny_params(model={"class_conditional": conditional}, training={"flip": 0.5})
    loss, whole = gradients(params, None)
    same_loss, parts = gradients(params, micro_batch_size)
    assert len(whole) == len(list(tiny_model(params).parameters()))
    torch.testing.assert_close(same_loss, loss, rtol=1e-6, atol=0)
    for part, gradient in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, gradient, rtol=0, atol=1e-6 * max(1.0, float(gradient.abs().max())))


def test_training_in_micro_batches_follows_training_in_big_ones() -> None:
    params = tiny_params(training={"log_every": 1})
    curves = []
    for micro in (None, 2):
        config = StageConfig(lr=1e-3, batch_size=8, micro_batch_size=micro)
        curves.append(losses(train_quietly(fresh_state(params), replace(run_of(params, 6), config=config))))
    np.testing.assert_allclose(*curves, rtol=1e-4)


def test_micro_batches_found_automatically_shrink_to_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that runs out of memory above two images at a time."""
    params = tiny_params(pretrain={"lr": 1e-3, "batch_size": 8, "micro_batch_size": "auto"})
    run, state = run_of(params, num_steps=2), fresh_state(params)
    objective, sizes = Objective(state.model, run, FP32), list[int]()
    real = objective.masked_dsm_loss

    def loss(x_0: Tensor, *rest: Any, **more: Any) -> Tensor:
        sizes.append(len(x_0))
        if len(x_0) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x_0, *rest, **more)

    objective.masked_dsm_loss = loss
    monkeypatch.setattr(Objective, "finds_size", property(lambda _: True))
    assert objective.micro_batch_size == 8
    objective.rehearse(0, batches_of(run))
    assert objective.micro_batch_size == 2 and sizes[:3] == [8, 4, 2]
    assert all(p.grad is None for p in state.model.parameters())
    train(state, batches_of(run), objective, Watcher())
    given = replace(run, config=params.pretrain.model_copy(update={"micro_batch_size": 2}))
    assert losses(state) == losses(train_quietly(fresh_state(params), given))


@pytest.mark.parametrize(("size", "used"), [(12, 12), (99, 12), (11, 6), (5, 4), (1, 1)])
def test_micro_batches_divide_the_batch(size: int, used: int) -> None:
    params = tiny_params(pretrain={"lr": 1e-3, "batch_size": 12})
    objective = Objective(tiny_model(params), run_of(params, num_steps=1), FP32)
    objective.micro_batch_size = size
    assert objective.micro_batch_size == used
    assert [part.stop - part.start for part in objective.micro_batches] == [used] * (12 // used)
    assert objective.share == used / 12


# --- resuming and determinism


class Interrupted(Exception):  # noqa: N818  (no error: what a killed process looks like)
    """Training stops here."""


def train_in_two_parts(params: Params, run: Training, at_step: int, folder: Path, compute: Compute) -> TrainState:
    """Train until the state of `at_step` is on disk, then resume in another network."""
    store = StateStore(folder, every_seconds=0.0)

    def save(good: TrainState) -> None:
        if good.step == at_step:
            store.save(good.tensors(), good.plain())
            raise Interrupted

    labelled = params.model.class_conditional
    state, batches = fresh_state(params, device=compute.device), batches_of(run, labelled, compute.device)
    with pytest.raises(Interrupted):
        train_watched(state, run, batches, compute, Watch(save=save, should_save=lambda step: step == at_step))
    saved = StateStore(folder, every_seconds=0.0).load()
    assert saved is not None
    resumed = fresh_state(params, seed=99, device=compute.device)
    resumed.restore(*saved)
    assert resumed.step == at_step
    return train_quietly(resumed, run, compute, labelled=labelled)


@pytest.mark.parametrize(
    ("changes", "compute"),
    [
        ({}, FP32),
        ({"training": {"decay": "weights", "grad_clip": 0.1, "flip": 0.5}}, FP32),
        ({"pretrain": {"warmup_steps": 5, "lr_decay": "cosine", "micro_batch_size": 4}}, FP32),
        ({"model": {"class_conditional": True}}, FP32),
        pytest.param({}, BF16, marks=needs_bf16),
        pytest.param({}, CUDA, marks=needs_cuda),
    ],
    ids=["plain", "clip-flip", "schedule-micro", "conditional", "bf16", "cuda"],
)
def test_a_resumed_run_is_that_of_one_process_bit_for_bit(
    changes: dict[str, Any], compute: Compute, tmp_path: Path
) -> None:
    params = tiny_params(**{**changes, "training": {"log_every": 3, **changes.get("training", {})}})
    run = replace(run_of(params, num_steps=10), milestones=(4,))
    labelled = params.model.class_conditional
    whole = train_quietly(fresh_state(params, device=compute.device), run, compute, labelled=labelled)
    for at_step in (3, 4, 8, 9):  # 4 is a milestone, and after 8 steps a row is half full
        resumed = train_in_two_parts(params, run, at_step, tmp_path / str(at_step), compute)
        assert_same_tensors(frozen(resumed), frozen(whole))
        assert resumed.curve == whole.curve
        assert resumed.step == whole.step == 10
    assert [row["step"] for row in whole.curve] == [3, 4, 6, 9, 10]


def test_equal_runs_are_equal_and_other_seeds_are_not() -> None:
    params = tiny_params(training={"log_every": 2, "flip": 0.5})
    run = run_of(params, num_steps=4)
    first, second = (train_quietly(fresh_state(params), run) for _ in range(2))
    other_init = train_quietly(fresh_state(params, seed=1), run)
    other_draws = train_quietly(fresh_state(params), replace(run, seed=1))
    other_stage = train_quietly(fresh_state(params), replace(run, stage="finetune"))
    assert_same_tensors(frozen(first), frozen(second))
    assert first.curve == second.curve
    for other in (other_init, other_draws, other_stage):
        assert losses(other) != losses(first)
        weights = [state.model.get_parameter("decoder_pred.weight") for state in (first, other)]
        assert not torch.equal(*weights)


def test_training_neither_reads_nor_moves_the_global_generator() -> None:
    params = tiny_params()
    run, results = run_of(params, num_steps=2), []
    for seed in (1, 2):
        state = fresh_state(params)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(frozen(train_quietly(state, run)))
        assert torch.equal(torch.get_rng_state(), before)
    assert_same_tensors(*results)


def test_rows_come_at_intervals_milestones_and_the_end_and_states_are_taken_when_wanted() -> None:
    params = tiny_params(training={"log_every": 4})
    run, events = replace(run_of(params, num_steps=10), milestones=(5,)), []
    state, asked = fresh_state(params), []
    watch = Watch(
        log=lambda row: events.append(("log", row["step"])),
        save=lambda good: events.append(("save", good.step)),
        should_save=lambda step: asked.append(step) or step in (3, 8),
    )
    train_watched(state, run, batches_of(run), FP32, watch)
    assert events == [
        ("save", 3),
        ("log", 4),
        ("log", 5),
        ("save", 5),
        ("log", 8),
        ("save", 8),
        ("log", 10),
    ]
    assert asked == [1, 2, 3, 4, 6, 7, 8, 9, 10], "at every step, but at milestones it is taken anyhow"
    every_step = train_quietly(fresh_state(params), replace(run, params=tiny_params(training={"log_every": 1})))
    means = [np.mean(losses(every_step)[a:b]) for a, b in ((0, 4), (4, 5), (5, 8), (8, 10))]
    np.testing.assert_allclose(losses(state), means, rtol=1e-6)


# --- time


class FakeTime:
    """A clock that stands still, but where the test says that something takes so long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("maskdm.training.loop.time.perf_counter", lambda: self.now)

    def taking(self, seconds: float, what: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
        """The same function, as slow."""

        def slow(*arguments: Any, **keywords: Any) -> Any:
            self.now += seconds
            return what(*arguments, **keywords)

        return slow


def train_timed(clock: FakeTime, state: TrainState, run: Training) -> list[dict[str, float]]:
    """Train where a step takes 1 s and its data 0.25 s, logging 100 s and saving 1000 s (three times); its rows."""
    rows: list[dict[str, float]] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("maskdm.training.loop.clip_gradients", clock.taking(1.0, clip_gradients))
        batches: Any = clock.taking(0.25, batches_of(run))
        watch = Watch(clock.taking(100.0, rows.append), clock.taking(1000.0), lambda step: step in (3, 7, 8))
        train_watched(state, run, batches, FP32, watch)
    return rows


def test_device_seconds_hold_steps_and_data_but_neither_logging_nor_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    params = tiny_params(training={"log_every": 4})
    clock, run, state = (
        FakeTime(monkeypatch),
        replace(run_of(params, num_steps=10), milestones=(5,)),
        fresh_state(params),
    )
    rows = train_timed(clock, state, run)
    steps = [4, 5, 8, 10]
    assert [row["step"] for row in state.timings] == [row["step"] for row in state.curve] == steps
    assert [row["device_seconds"] for row in state.timings] == [1.25 * step for step in steps]
    assert [row["data_wait_seconds"] for row in state.timings] == [0.25 * step for step in steps]
    assert all(0.01 < row["peak_memory_gib"] < 1000 for row in state.timings)
    assert (state.device_seconds, state.data_wait_seconds) == (12.5, 2.5)
    assert rows == [row | timing for row, timing in zip(state.curve, state.timings, strict=True)], "both are logged"
    assert clock.now == 1000 + 12.5 + 4 * 100 + 4 * 1000, "the milestone is taken too"


def test_seconds_of_a_resumed_run_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    params = tiny_params(training={"log_every": 4})
    clock, whole, first = FakeTime(monkeypatch), fresh_state(params), fresh_state(params)
    train_timed(clock, whole, run_of(params, num_steps=10))
    train_timed(clock, first, run_of(params, num_steps=8))
    saved = frozen(first), first.plain()
    clock.now += 1e6  # nothing ran in between
    resumed = fresh_state(params, seed=99)
    resumed.restore(*saved)
    assert (resumed.device_seconds, resumed.data_wait_seconds) == (10.0, 2.0)
    train_timed(clock, resumed, run_of(params, num_steps=10))
    without_memory = [[{**row, "peak_memory_gib": 0} for row in state.timings] for state in (resumed, whole)]
    assert without_memory[0] == without_memory[1]
    assert resumed.curve == whole.curve
    assert len(first.timings) == 2, "the list that was saved is not the one that grows"


def test_the_curve_does_not_depend_on_the_time_that_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    params = tiny_params(training={"log_every": 3})
    run = run_of(params, num_steps=7)
    timed, real = fresh_state(params), fresh_state(params)
    train_quietly(real, run)
    train_timed(FakeTime(monkeypatch), timed, run)
    assert timed.curve == real.curve
    assert timed.timings != real.timings
    assert all(not {"device_seconds", "data_wait_seconds", "peak_memory_gib"} & set(row) for row in real.curve)


# --- losses that are not finite


def spoil(bad_step: int, value: float, images: slice = slice(None)) -> Change:
    def change(step: int, x_0: Tensor) -> Tensor:
        if step == bad_step:
            x_0[images] = value
        return x_0

    return change


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("grad_clip", [None, 1.0])
@pytest.mark.parametrize(("value", "images"), [(math.nan, slice(None)), (math.inf, slice(None)), (math.nan, slice(1))])
def test_a_bad_loss_stops_training_before_its_update(
    value: float, images: slice, grad_clip: float | None, micro_batch_size: int | None
) -> None:
    params = tiny_params(
        training={"log_every": 10, "grad_clip": grad_clip},
        pretrain={"lr": 2e-3, "batch_size": 8, "micro_batch_size": micro_batch_size},
    )
    run, events, state = run_of(params, num_steps=30), [], fresh_state(params)
    batches = ChangedBatches(run, spoil(3, value, images))
    with pytest.raises(NonFiniteLossError) as caught:
        train_watched(state, run, batches, FP32, Watch(events.append, events.append))
    for part in ("pretrain patch-m50 seed 0", "not finite at step 3 ", "learning rate 0.002"):
        assert part in str(caught.value)
    assert caught.value.reason == "the loss is not finite at step 3 (learning rate 0.002)"
    assert events == []
    good = train_quietly(fresh_state(params), replace(run, num_steps=3))
    after, before = frozen(state), frozen(good)
    for kind in ("raw", "exp_avg", "exp_avg_sq", "step"):
        assert_same_tensors({kind: after[kind]}, {kind: before[kind]})
    assert all(t.isfinite().all() for t in after["ema"].values())


def test_a_bad_loss_names_the_first_bad_step_and_its_learning_rate_and_keeps_what_was_logged() -> None:
    params = tiny_params(training={"log_every": 5}, pretrain={"lr": 1e-3, "warmup_steps": 20})
    run, saved, state = run_of(params, num_steps=30), [], fresh_state(params)

    def change(step: int, x_0: Tensor) -> Tensor:
        return x_0 * math.nan if step in (7, 8) else x_0

    batches = ChangedBatches(run, change)
    with pytest.raises(NonFiniteLossError, match=r"at step 7 \(learning rate 0\.0004\)"):
        train_watched(
            state,
            run,
            batches,
            FP32,
            Watch(save=lambda good: saved.append(good.step), should_save=lambda step: step != 8),
        )
    assert saved == [1, 2, 3, 4, 5, 6, 7], "after the step with index 7 nothing is good"
    assert [row["step"] for row in state.curve] == [5]


def test_gradients_that_overflow_under_a_finite_loss_are_never_saved() -> None:
    params = tiny_params(training={"log_every": 2})
    run, saved, state = run_of(params, num_steps=4), [], fresh_state(params)
    weight, steps = state.model.get_parameter("norm.weight"), iter(range(4))
    weight.register_hook(lambda gradient: gradient * math.inf if next(steps) == 3 else gradient)
    with pytest.raises(NonFiniteLossError, match=r"pretrain patch-m50 seed 0: .* not finite after step 3") as caught:
        train_watched(
            state,
            run,
            batches_of(run),
            FP32,
            Watch(save=lambda good: saved.append(good.step), should_save=lambda _: True),
        )
    assert caught.value.reason == "the weights are not finite after step 3 (learning rate 0.001)"
    assert saved == [1, 2, 3]


# --- averages, schedules, optimizer


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_ema_is_its_closed_form(decay: float) -> None:
    numbers, num_updates = np.random.default_rng(0), 40
    weights = numbers.normal(size=(num_updates + 1, 4, 3))
    model = nn.Linear(3, 4, bias=False)
    model.weight.data = torch.from_numpy(weights[0]).float()
    ema = Ema(model, decay)
    for step, weight in enumerate(weights[1:]):
        model.weight.data.copy_(torch.from_numpy(weight))
        ema.update(step)
    decays = np.array([min(decay, (1 + step) / (10 + step)) for step in range(num_updates)])
    left = np.append(np.cumprod(decays[::-1])[::-1], 1.0)  # what is left of each at the end
    expected = left[0] * weights[0] + np.einsum("i,ijk->jk", left[1:] * (1 - decays), weights[1:])
    np.testing.assert_allclose(ema.state_dict()["weight"], expected, atol=1e-5)
    torch.testing.assert_close(model.weight.detach(), torch.from_numpy(weights[-1]).float())


def test_training_averages_the_weights_after_every_update() -> None:
    params = tiny_params(training={"log_every": 1, "ema_decay": 0.999})
    run, state, weights = run_of(params, num_steps=4), fresh_state(params), []
    expected = state.model.get_parameter("norm.weight").detach().clone()
    watch = Watch(save=lambda good: weights.append(frozen(good)["raw"]), should_save=lambda step: True)
    train_watched(state, run, batches_of(run), FP32, watch)
    for decay, raw in zip((1 / 10, 2 / 11, 3 / 12, 4 / 13), weights, strict=True):
        expected = decay * expected + (1 - decay) * raw["norm.weight"]
    torch.testing.assert_close(state.ema.state_dict()["norm.weight"], expected, rtol=0, atol=1e-6)


def test_ema_starts_at_the_weights_and_can_be_continued() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    ema, copy = Ema(model, 0.9), Ema(other, 0.9)
    assert torch.equal(ema.state_dict()["weight"], model.weight)
    copy.load_state_dict(ema.state_dict())
    assert torch.equal(copy.state_dict()["bias"], model.bias)
    assert not torch.equal(other.bias, model.bias)


@pytest.mark.parametrize(
    ("step", "constant", "cosine"),
    [(0, 0.25, 0.25), (3, 1.0, 1.0), (4, 1.0, 1.0), (8, 1.0, 0.5), (11, 1.0, 0.5 + 0.5 * math.cos(math.pi * 7 / 8))],
)
def test_the_learning_rate_warms_up_and_then_stays_or_falls(step: int, constant: float, cosine: float) -> None:
    for decay, factor in (("constant", constant), ("cosine", cosine)):
        stage = StageConfig(lr=2e-4, batch_size=1, warmup_steps=4, lr_decay=decay)  # type: ignore[arg-type]
        assert lr_at(step, 12, stage) == pytest.approx(2e-4 * factor, rel=1e-12)


@given(st.integers(1, 300), st.integers(0, 400), st.sampled_from(["constant", "cosine"]))
def test_the_learning_rate_is_positive_and_never_above_its_peak(num_steps: int, warmup: int, decay: Any) -> None:
    stage = StageConfig(lr=1e-3, batch_size=1, warmup_steps=warmup, lr_decay=decay)
    rates = [lr_at(step, num_steps, stage) for step in range(num_steps)]
    assert all(0 < rate <= 1e-3 for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


def test_training_uses_the_learning_rate_of_the_step() -> None:
    params = tiny_params(training={"log_every": 1}, pretrain={"warmup_steps": 3, "lr_decay": "cosine"})
    run = run_of(params, num_steps=5)
    rates = [row["lr"] for row in train_quietly(fresh_state(params), run).curve]
    assert rates == [lr_at(step, 5, params.pretrain) for step in range(5)]


def test_decay_of_weights_spares_biases_norms_and_embeddings() -> None:
    params = tiny_params(
        model={"class_conditional": True, "qkv_bias": True, "mlp_time_embed": True}, training={"decay": "weights"}
    )
    model = tiny_model(params)
    decayed, free = make_optimizer(model, params.training, 1e-3).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.03
    assert free["weight_decay"] == 0.0
    assert {names[p] for p in decayed["params"]} == {
        name
        for name in names.values()
        if name.endswith("weight") and "norm" not in name and not name.startswith("label_emb")
    }
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_decay_of_all_is_one_group() -> None:
    params = tiny_params(training={"betas": [0.9, 0.95], "weight_decay": 0.1})
    (group,) = make_optimizer(tiny_model(params), params.training, 3e-4).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (3e-4, (0.9, 0.95), 0.1, True)


def test_clipping_scales_the_whole_gradient_to_its_norm() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))]
    wanted = [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])]

    def clipped(max_norm: float | None) -> list[Tensor]:
        for parameter, gradient in zip(parameters, wanted, strict=True):
            parameter.grad = gradient.clone()
        clip_gradients(parameters, max_norm)
        return [p.grad for p in parameters if p.grad is not None]

    for max_norm, scale in ((None, 1.0), (6.0, 1.0), (1.0, 0.2)):
        for got, gradient in zip(clipped(max_norm), wanted, strict=True):
            torch.testing.assert_close(got, gradient * scale, rtol=1e-5, atol=0)


# --- learning


def learning_params(**changes: Any) -> Params:
    stage = {"lr": 2e-3, "batch_size": 32}
    return tiny_params(
        **{
            "model": {"dim": 32, "num_heads": 4},
            "training": {"log_every": 10},
            "pretrain": stage,
            "diffusion": {"schedule": "cosine", "prediction": "x_0"},
            "arms": {
                "scratch": {"strategy": "none"},
                "block2-m50": {"strategy": "block", "block_size": 2, "mask_rate": 0.5},
            },
            **changes,
        }
    )


@pytest.mark.parametrize("arm", ["scratch", "block2-m50"])
def test_the_loss_falls_on_digits(arm: str) -> None:
    params = learning_params()
    curve = losses(train_quietly(fresh_state(params), run_of(params, 100, arm)))
    assert curve[-1] < 0.6 * curve[0]


@needs_bf16
def test_bfloat16_follows_float32() -> None:
    """Autocast that keeps its bfloat16 copies of the weights would not see them change: its loss would not fall."""
    params = learning_params()
    run = run_of(params, 60, "block2-m50")
    full, half = (losses(train_quietly(fresh_state(params), run, compute)) for compute in (FP32, BF16))
    assert full[-1] < 0.7 * full[0]
    assert full != half
    np.testing.assert_allclose(half, full, rtol=0.1)


GOLDEN = {
    "scratch": [0.545805549621582, 0.34459409713745115, 0.25229721069335936, 0.2550521373748779],
    "block2-m50": [0.5491569519042969, 0.3687957525253296, 0.2847685575485229, 0.2661349058151245],
}


@pytest.mark.parametrize("arm", GOLDEN)
def test_the_loss_curve_is_golden(arm: str) -> None:
    """A refactoring keeps these numbers; whoever means to change what is computed changes them and says why."""
    params = learning_params(training={"log_every": 5, "flip": 0.5, "grad_clip": 1.0})
    curve = losses(train_quietly(fresh_state(params), run_of(params, 20, arm)))
    np.testing.assert_allclose(curve, GOLDEN[arm], rtol=1e-4)
