"""The benchmarks: fair turns, right numbers, whole records; how fast anything is, is not looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import data, gpu, machine, reference, sampling, shapes, train_step, workflow_default
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.data import Decoded, write_jpegs
from benchmarks.kernels import OTHER, kind_of
from benchmarks.machine import slug
from benchmarks.outcome import Outcome, Table, Target, render, show
from benchmarks.record import FORMAT, create_record, header, path_for, read_record, replace_record, summary
from benchmarks.scaling import exponent, exponents
from benchmarks.settings import Settings
from benchmarks.shapes import RATES, SHAPES, SMALL, TINY, Shape
from benchmarks.steps import StepMaker, random_arrays
from benchmarks.timing import Rounds, Spread, Task, interleave
from maskdm.base.errors import UserError
from maskdm.method.backbones import count_image_flops
from tests.factories import CPU

NANO = Shape("tiny", 8, 1, {"patch_size": 2, "dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0}, 4)
MACHINE_KEYS = {"cpu", "cores", "threads", "memory_gib", "versions", "git_commit", "git_dirty", "date"}
TARGET_KEYS = {"what", "value", "bound", "sense", "is_met"}
ABOUT = {
    "gpu": None,
    "cpu": "AMD EPYC (Zen 4)",
    "cores": 2,
    "threads": 1,
    "date": "2030-01-02T03:04:05+00:00",
    "git_commit": "0123456789abcdef",
    "git_dirty": False,
}


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def a_record(**changes: Any) -> dict[str, Any]:
    """A record of nothing."""
    record = {
        "format": FORMAT,
        "machine": ABOUT,
        "rounds": 7,
        "is_quick": False,
        "is_complete": True,
        "benchmarks": {},
        "not_measured": [],
    }
    return {**record, **changes}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, rounds=1, is_quick=True, shapes=(NANO,), threads=1)


# --- timing


def test_tasks_take_turns_after_warming_up_each() -> None:
    done: list[str] = []
    tasks = {name: Task(lambda _, name=name: done.append(name) or 1.0) for name in "abc"}
    rounds = interleave(tasks, 3, "test")
    assert "".join(done) == "abc" + "abc" + "cba" + "abc"
    assert rounds.seconds == {name: [1.0] * 3 for name in "abc"}


def test_rounds_that_go_backwards_keep_every_measurement_with_its_task() -> None:
    done: list[str] = []
    tasks = {name: Task(lambda _, name=name: done.append(name) or float(len(done))) for name in "ab"}
    rounds = interleave(tasks, 3, "test")
    assert "".join(done) == "ab" + "ab" + "ba" + "ab"
    assert rounds.seconds == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_a_short_task_is_repeated_until_its_measurement_is_long_enough() -> None:
    asked: list[int] = []
    task = Task(lambda times: asked.append(times) or 0.3 * times, least_seconds=1.0)
    task.warm_up()
    assert task.repetitions == 4
    assert task.measure() == pytest.approx(0.3)
    assert asked == [1, 1, 4]


def test_median_and_quartiles_are_those_of_the_definition() -> None:
    spread = Spread((5.0, 1.0, 3.0, 2.0, 4.0))
    assert spread.as_dict() == {"median": 3.0, "low": 2.0, "high": 4.0, "raw": [5.0, 1.0, 3.0, 2.0, 4.0]}
    assert Spread((7.0,)).quartiles == (7.0, 7.0)


def test_ratios_are_taken_round_by_round() -> None:
    rounds = Rounds({"a": [2.0, 8.0, 30.0], "b": [1.0, 2.0, 3.0]})
    assert rounds.ratio("a", "b").raw == (2.0, 4.0, 10.0)
    assert rounds.ratio("a", "b", 0.5).raw == (1.0, 2.0, 5.0)
    assert rounds.rate("a", 16).raw == (8.0, 2.0, 16 / 30)
    assert rounds.of("b", 1e3).raw == (1e3, 2e3, 3e3)


# --- numbers


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_exponents_of_power_laws_are_found(power: float) -> None:
    sizes = [16, 64, 256]
    assert exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_every_round_has_its_own_exponent() -> None:
    rounds = Rounds({"2": [4.0, 2.0], "4": [16.0, 4.0], "8": [64.0, 8.0]})
    assert exponents(rounds, {"2": 2, "4": 4, "8": 8}).raw == pytest.approx((2.0, 1.0))


@pytest.mark.parametrize(
    ("value", "sense", "is_met"),
    [
        (1.0, "at most", True),
        (1.01, "at most", False),
        (1.0, "at least", True),
        (0.99, "at least", False),
        (math.nan, "at most", False),
        (math.nan, "at least", False),
    ],
)
def test_targets_hold_up_to_their_bound(value: float, sense: str, is_met: bool) -> None:
    assert Target("a number", value, 1.0, sense).is_met is is_met


def test_a_promise_without_a_number_does_not_hold() -> None:
    promise = Target("a number", None, 2.0)
    assert not promise.is_met
    assert promise.measured(1.0) == Target("a number", 1.0, 2.0)
    assert Target("a number", None, None, "at least").measured(2.0, 1.0) == Target("a number", 2.0, 1.0, "at least")
    assert not Target("a number", 1.0, None).is_met


def test_a_target_knows_two_senses() -> None:
    with pytest.raises(ValueError, match="'at most' or 'at least', got 'above'"):
        Target("a number", 1.0, 1.0, "above")


@pytest.mark.parametrize(("seconds", "are_met"), [(0.55, [True, True]), (0.65, [False, True]), (1.0, [False, False])])
def test_time_must_fall_as_flops_do(seconds: float, are_met: list[bool]) -> None:
    rounds = Rounds(
        {
            "maskdm bf16": [1.0, 10.0, 2.0],
            "maskdm bf16 at 0.5": [seconds, 10 * seconds, 2 * seconds],
            "maskdm bf16 at 0.9": [seconds / 5, 1e9, seconds / 2.5],
        }
    )
    targets = train_step.rate_targets("celeba", rounds, {0.0: 200, 0.5: 100, 0.75: 1, 0.9: 20}, "bf16")
    assert [target.what for target in targets] == [f"celeba: time ÷ FLOPs at mask rate {rate}" for rate in (0.5, 0.9)]
    assert [target.value for target in targets] == pytest.approx([2 * seconds, 2 * seconds])
    assert [target.bound for target in targets] == [1.25, 1.6]
    assert [target.is_met for target in targets] == are_met
    assert train_step.rate_targets("tiny", rounds, {}, "bf16") == []


@pytest.mark.parametrize("shape", [NANO, TINY, SMALL], ids=["nano", "tiny", "small"])
def test_the_reference_does_our_flops(shape: Shape) -> None:
    assert count_image_flops(shape.params(0.0, threads=1), shape.num_patches) == reference.count_flops(shape)


def test_the_tiny_shape_is_the_default_experiment() -> None:
    from maskdm.config import load_params

    default = load_params(shapes.ROOT / "params.yaml")
    params = TINY.params(0.0, threads=1)
    assert params.model == default.model
    assert params.dataset.image_size == default.dataset.image_size
    assert default.pretrain.batch_size == TINY.batch_size


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "linear layers"),
        ("mkldnn::_linear_pointwise", "linear layers"),
        ("aten::bmm", "attention products"),
        ("aten::_softmax", "softmax"),
        ("aten::_softmax_backward_data", "softmax"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_foreach_lerp_", "averaged weights"),
        ("aten::copy_", "casts and copies"),
        ("aten::cat", "casts and copies"),
        ("aten::scatter_", OTHER),
        ("aten::gelu_backward", "GELU"),
        ("aten::randint", OTHER),
    ],
)
def test_operators_are_of_their_kind(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (None, "–"),
        ("plain", "plain"),
        (12, "12"),
        (0.1234, "0.123"),
        (1234.5, "1,234"),
        ({"median": 2.0, "low": 1.5, "high": 2.25, "raw": []}, "2.00 [1.50, 2.25]"),
        ({"median": 2.0, "low": 2.0, "high": 2.001, "raw": []}, "2.00"),
    ],
)
def test_cells_show_what_can_be_seen(cell: Any, shown: str) -> None:
    assert show(cell) == shown


# --- real steps


@pytest.mark.parametrize("rate", RATES)
def test_steps_are_real_training_steps(rate: float, settings: Settings) -> None:
    steps = StepMaker(NANO, settings).steps(rate)
    state = steps.trainer.state
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    assert steps.run(3) > 0
    assert state.step == 3
    assert all(not torch.equal(old, new) for old, new in zip(before, state.model.parameters(), strict=True))
    assert steps.num_visible == round((1 - rate) * NANO.num_patches)
    steps.run(2)
    assert state.step == 5
    assert 0 < steps.waited < state.device_seconds


def test_the_update_alone_moves_weights_and_averages(settings: Settings) -> None:
    steps = StepMaker(NANO, settings, grad_clip=1.0).steps(0.0)
    steps.run(1)
    steps.fill_gradients()
    state = steps.trainer.state
    assert state.ema is not None
    averages = {name: tensor.clone() for name, tensor in state.ema.state_dict().items()}
    steps.update()
    assert all(not torch.equal(averages[name], tensor) for name, tensor in state.ema.state_dict().items())


@pytest.mark.parametrize("is_tuned", [False, True])
def test_the_reference_trains(is_tuned: bool, settings: Settings) -> None:
    images = torch.from_numpy(random_arrays(settings.folder, 8, 1, 16).all())
    steps = reference.TimmSteps(NANO, images, "fp32", CPU, is_tuned)
    before = [parameter.detach().clone() for parameter in steps.model.parameters()]
    assert steps.run(2) > 0
    assert all(not torch.equal(old, new) for old, new in zip(before, steps.model.parameters(), strict=True))


@pytest.mark.parametrize("is_plain", [False, True])
def test_the_reference_attends_as_it_is_told(is_plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, calls = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or kernel(*a, **k)
    )
    model = reference.TimmUViT(NANO)
    model.use_plain_attention(is_plain)
    model(torch.randn(2, NANO.num_patches, 4), torch.zeros(2))
    assert len(calls) == (0 if is_plain else NANO.model["depth"])


def test_waiting_has_a_share_for_every_round_and_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_loaders", lambda _: Table("loaders", []))
    settings = Settings(tmp_path, rounds=3, is_quick=True, shapes=(NANO,), threads=1)
    outcome = data.run(settings)
    shares = [row["share of a step"] for row in outcome.tables[1].rows]
    assert len(shares) == len(RATES)
    assert all(isinstance(share, Spread) and len(share.raw) == 3 for share in shares)
    assert all(0 < part < 1 for share in shares for part in share.raw)
    assert [target.value for target in outcome.targets] == [max(share.median for share in shares)]


def test_random_arrays_are_made_once(tmp_path: Path) -> None:
    first, again = (random_arrays(tmp_path, 8, 3, 10) for _ in range(2))
    assert first.shape == (8, 8, 3)
    assert len(first) == 10
    assert first.sha256 == again.sha256


def test_what_the_dataloader_decodes_are_the_images(tmp_path: Path) -> None:
    files = sorted(write_jpegs(tmp_path / "jpegs", 3, 16).iterdir())
    decoded = Decoded(files)
    assert len(decoded) == 3
    assert decoded[0].shape == (16, 16, 3)
    assert not torch.equal(decoded[0], decoded[1])


def test_the_gpu_benchmark_measures_every_variant(settings: Settings) -> None:
    outcome = gpu.measure(settings, (gpu.Case(NANO, (0.0, 0.5), 0.5, 0.4),))
    assert [row["what"] for row in outcome.tables[0].rows] == [
        "rate 0.0",
        "rate 0.5",
        "rate 0.5, eager",
        "rate 0.5, streamed",
    ]
    assert [target.bound for target in outcome.targets] == [0.4]


def test_compiling_too_often_is_an_error_not_an_eager_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[bool] = []
    monkeypatch.setattr(
        gpu._CaseRun,
        "outcome",
        lambda _: limits.append(torch._dynamo.config.fail_on_recompile_limit_hit) or Outcome(),
    )
    gpu.measure(settings, (gpu.Case(NANO, (0.0,), 0.0, 0.4),))
    assert limits == [True]
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


def test_on_a_gpu_products_of_fp32_are_called_what_they_are() -> None:
    rounds = Rounds({"matmul fp32": [1.0], "matmul bf16": [1.0], "copy": [1.0]})
    columns = {
        kind: list(machine.ceiling_row(rounds, torch.device(kind), ("fp32", "bf16"))) for kind in ("cpu", "cuda")
    }
    assert columns["cpu"] == ["matmul fp32 GFLOP/s", "matmul bf16 GFLOP/s", "copy GB/s"]
    assert columns["cuda"] == ["matmul TF32 GFLOP/s", "matmul bf16 GFLOP/s", "copy GB/s"]


def test_without_a_gpu_the_record_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.run(settings).notes == ["no CUDA device: not measured"]


# --- quality


def a_quality(sampler: str, num_steps: int, *fid: float) -> sampling.Quality:
    return sampling.Quality(sampler, num_steps, fid, (0.0,) * len(fid))


QUALITIES = [
    a_quality("ddim", 250, 1.0, 1.1, 1.2),
    a_quality("ddpm", 20, 9.0, 9.0, 9.0),
    a_quality("dpmsolver++", 20, 1.2, 1.3, 1.2),
    a_quality("unipc", 20, 0.8, 0.9, 0.7),
    a_quality("unipc", 50, 3.0, 1.0, 5.0),
]


def test_quality_is_judged_against_the_range_of_the_reference_s_seeds() -> None:
    targets = sampling.quality_targets(QUALITIES)
    assert [target.what for target in targets] == [
        "FID of dpmsolver++ with 20 evaluations, from that of ddim with 250",
        "FID of unipc with 20 evaluations, from that of ddim with 250",
        "FID of unipc with 50 evaluations, from that of ddim with 250",
    ]
    assert [target.value for target in targets] == pytest.approx([3.7 / 3 - 1.1, 0.3, 1.9])
    assert [target.bound for target in targets] == pytest.approx([0.2] * 3)
    assert [target.is_met for target in targets] == [True, False, False]


def test_every_seed_s_quality_is_kept() -> None:
    table = sampling.quality_table(QUALITIES, "a machine, bf16")
    seeds = [row["FID of the seeds"] for row in table.rows]
    assert seeds == [Spread(quality.fid) for quality in QUALITIES]
    assert "trained on a machine, bf16" in table.note


@pytest.mark.parametrize(
    ("state", "place"),
    [
        (("0123456789ab", False), sampling.WORK / "quality-0123456"),
        (("0123456789ab", True), Path("run/quality")),
        ((None, None), Path("run/quality")),
    ],
)
def test_a_model_is_used_again_only_for_the_same_commit(
    state: tuple[str | None, bool | None], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "git_state", lambda folder: state)
    assert sampling.quality_folder(Settings(Path("run"))) == place


def test_another_sampler_leaves_the_rest_of_the_experiment() -> None:
    params = NANO.params(0.0, threads=1)
    changed = sampling.with_sampler(params, "ddpm", 7, 3)
    assert (changed.sampling.sampler, changed.sampling.num_steps, changed.sampling.batch_size) == ("ddpm", 7, 3)
    assert changed.model_copy(update={"sampling": params.sampling}) == params


# --- the command


@pytest.mark.parametrize(
    "name",
    [
        "train_step",
        "data",
        "sampling",
        "ema_optimizer",
        "scaling",
        "attention",
        pytest.param("workflow", marks=pytest.mark.workflow),
    ],
)
def test_every_benchmark_writes_a_record(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "tiny", NANO)
    out = tmp_path / "record.json"
    words = ["--quick", "--rounds", "1", "--threads", "1", "--only", name, "--shapes", "tiny", "--out", str(out)]
    assert main(words) == 0
    record = read_record(out)
    assert record["format"] == FORMAT
    assert record["rounds"] == 1
    assert record["is_quick"] is True
    assert set(record["machine"]) >= MACHINE_KEYS
    assert record["is_complete"] is True
    assert record["machine"]["threads"] == 1
    assert set(record["benchmarks"]) == {name}
    outcome = record["benchmarks"][name]
    assert outcome["tables"]
    assert 0 < outcome["seconds"] <= record["seconds"] + 0.1
    for table in outcome["tables"]:
        assert table["rows"], table["title"]
        for row in table["rows"]:
            assert row.keys() == table["rows"][0].keys()
    assert all(set(target) == TARGET_KEYS for target in outcome["targets"])
    measured = {target["what"] for target in outcome["targets"]}
    missing = [target["what"] for target in record["not_measured"]]
    assert measured.isdisjoint(missing)
    assert workflow_default.TARGETS["speedup"].what in missing
    said = capsys.readouterr().out
    assert str(out) in said
    assert "QUICK: proves nothing" in said
    assert "holds" not in said


def test_a_record_is_shown_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("speed", [{"what": "a", "s": Spread((1.0, 2.0, 3.0))}], "a note")
    outcome = Outcome([table], [Target("speed", 2.0, 1.0)], ["why"])
    benchmarks = {"data": outcome.as_dict(), "workflow-default": Outcome(notes=["only when asked for"]).as_dict()}
    file = tmp_path / "record.json"
    create_record(a_record(benchmarks=benchmarks, not_measured=[Target("lost", None, 3.0).as_dict()]), file)
    assert main(["--table", str(file)]) == 0
    lines = [line.replace(" ", "") for line in capsys.readouterr().out.splitlines()]
    assert "|a|2.00[1.50,2.50]|" in lines
    assert "|speed|2.00|atmost1.00|NO|" in lines
    assert "|lost|notmeasured|atmost3.00|–|" in lines
    assert {"anote", "why", "onlywhenaskedfor", "0of1targetshold;1notmeasured"} <= set(lines)
    assert lines[0].startswith("AMDEPYC(Zen4),2cores,1threads,7rounds,commit0123456,")
    assert main(["--table", str(file), "--only", "workflow-default"]) == 0
    said = capsys.readouterr().out
    assert "only when asked for" in said
    assert "speed" not in said


def test_the_summary_counts_the_targets_that_hold() -> None:
    outcome = Outcome(targets=[Target("good", 0.5, 1.0), Target("bad", 2.0, 1.0)])
    missing = [Target("unknown", None, 1.0).as_dict()]
    text = summary(a_record(benchmarks={"one": outcome.as_dict()}, not_measured=missing))
    assert "1 of 2 targets hold; 1 not measured" in text
    assert text.count("not measured") == 2
    assert "0 of 0 targets hold" in summary(a_record())


def test_a_quick_run_has_no_verdicts() -> None:
    outcome = Outcome(targets=[Target("good", 0.5, 1.0), Target("bad", 2.0, 1.0)])
    text = summary(a_record(benchmarks={"one": outcome.as_dict()}, is_quick=True))
    assert "proves nothing" in text
    assert not {"yes", "NO", "holds", "hold"} & set(text.split())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "commit 0123456, 2030"),
        ({"machine": {**ABOUT, "git_dirty": True}}, "commit 0123456 DIRTY, 2030"),
        ({"machine": {**ABOUT, "gpu": "NVIDIA H100"}}, "AMD EPYC (Zen 4), NVIDIA H100, 2 cores"),
        ({"is_quick": True}, "\nQUICK: proves nothing"),
        ({"is_complete": False}, "\nINCOMPLETE"),
    ],
)
def test_the_header_says_what_is_amiss(changes: dict[str, Any], said: str) -> None:
    assert said in header(a_record(**changes))


def test_full_records_are_named_after_day_machine_and_commit() -> None:
    assert path_for(ABOUT, is_full=True).name == "2030-01-02-amd-epyc-zen-4-2-cores-0123456.json"
    assert path_for(ABOUT, is_full=True).parent == Path(shapes.ROOT, "benchmarks", "records")
    assert slug({**ABOUT, "gpu": "NVIDIA H100"}) == "nvidia-h100"


@pytest.mark.parametrize(
    ("words", "is_kept"),
    [
        ([], True),
        (["--rounds", "9"], True),
        (["--quick"], False),
        (["--only", "data"], False),
        (["--shapes", "tiny"], False),
        (["--rounds", "3"], False),
    ],
)
def test_only_full_runs_are_kept(
    words: list[str], is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.record.FOLDER", tmp_path / "records")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("benchmarks.__main__._measure", lambda *_: None)
    assert main(words) == 0
    assert (tmp_path / "records").exists() is is_kept
    (file,) = tmp_path.rglob("*.json")
    assert f"record: {file}" in capsys.readouterr().out


def test_a_record_grows_with_every_benchmark_and_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "record.json"

    def fail(_: Settings) -> Outcome:
        raise UserError("it broke")

    monkeypatch.setattr("benchmarks.attention.run", lambda _: Outcome(notes=["done"]))
    monkeypatch.setattr("benchmarks.scaling.run", fail)
    words = ["--only", "attention,scaling", "--out", str(out)]
    assert main(words) == 2
    assert "benchmarks: error: it broke\n" in capsys.readouterr().err
    record = read_record(out)
    assert list(record["benchmarks"]) == ["attention"]
    assert record["is_complete"] is False
    assert main(words) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert read_record(out) == record
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_nothing_is_measured_where_the_record_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[Settings] = []
    monkeypatch.setattr("benchmarks.attention.run", lambda settings: measured.append(settings) or Outcome())
    (tmp_path / "file").touch()
    assert main(["--only", "attention", "--out", str(tmp_path / "file" / "record.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks: error: cannot write the record")
    assert error.count("\n") == 1
    assert measured == []


def test_what_is_no_number_is_null_in_a_record(tmp_path: Path) -> None:
    table = Table("t", [{"a": math.inf, "b": Spread((math.nan, 1.0)), "c": 1.0}])
    file = tmp_path / "record.json"
    create_record(a_record(), file)
    replace_record(a_record(benchmarks={"x": Outcome([table], [Target("t", math.nan, 1.0)]).as_dict()}), file)
    outcome = read_record(file)["benchmarks"]["x"]
    (row,) = outcome["tables"][0]["rows"]
    assert (row["a"], row["b"]["raw"], row["c"]) == (None, [None, 1.0], 1.0)
    assert (outcome["targets"][0]["value"], outcome["targets"][0]["is_met"]) == (None, False)
    assert "NaN" not in file.read_text(encoding="utf-8")
    assert "1.00" in render(outcome, "simple")


def test_the_machine_is_described_without_its_kernel() -> None:
    about = machine.describe(threads=3)
    assert about["threads"] == 3
    assert len(about["system"].split()) == 2
    assert set(about) >= MACHINE_KEYS


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--rounds", "-1"], ["--threads", "0"], ["--threads", "two"]])
def test_counts_are_whole_numbers_above_zero(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2
    assert f"expected a whole number above 0, got '{words[1]}'" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", '{"format": "another"}'])
def test_what_is_no_record_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"record\.json"):
        read_record(file)
    assert main(["--table", str(file)]) == 2
    assert "record.json" in capsys.readouterr().err


def test_unknown_names_are_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "train_step,speed"])
    assert "unknown: speed; expected some of train_step, data" in capsys.readouterr().err


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in BENCHMARKS)


def test_plain_and_markdown_show_the_same_cells() -> None:
    outcome = Outcome([Table("t", [{"a": 1, "b": None}])]).as_dict()
    assert render(outcome, "simple").split()[0] == "t"
    assert "| 1" in render(outcome, "github")
