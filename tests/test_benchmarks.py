"""The benchmarks: alternating order, right numbers, whole records. How fast anything is, is not tested."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, machine, reference, sampling, shapes, train_step
from benchmarks.__main__ import main
from benchmarks.outcome import Outcome, Table, Target, show
from benchmarks.record import FORMAT, create_record, header, path_for, read_record, replace_record, summary
from benchmarks.shapes import RATES, SHAPES, SMALL, TINY, Settings, Shape
from benchmarks.steps import make_steps, random_arrays
from benchmarks.timing import Rounds, Spread, Task, interleave
from maskdm.base.errors import UserError
from maskdm.config import load_params
from maskdm.method.backbones import count_image_flops
from tests.factories import CPU

NANO = Shape("tiny", 8, 1, {"patch_size": 2, "dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0}, 4)
MACHINE_KEYS = {"cpu", "cores", "threads", "memory_gib", "versions", "git_commit", "git_dirty", "date"}
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


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, rounds=1, is_quick=True, shapes=(NANO,), threads=1)


def a_record(**changes: Any) -> dict[str, Any]:
    """A record without measurements."""
    record = {
        "format": FORMAT,
        "machine": ABOUT,
        "rounds": 7,
        "is_quick": False,
        "is_complete": True,
        "benchmarks": {},
    }
    return {**record, **changes}


# --- timing


def test_tasks_alternate_after_warming_up_and_keep_their_measurements() -> None:
    done: list[str] = []
    tasks = {name: Task(lambda _, name=name: done.append(name) or float(len(done))) for name in "ab"}
    rounds = interleave(tasks, 3, "test")
    assert "".join(done) == "ab" + "ab" + "ba" + "ab"
    assert rounds.seconds == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_a_short_task_is_repeated_until_its_measurement_is_long_enough() -> None:
    asked: list[int] = []
    task = Task(lambda times: asked.append(times) or 0.3 * times, least_seconds=1.0)
    task.warm_up()
    assert task.measure() == pytest.approx(0.3)
    assert asked == [1, 1, 4]


def test_median_and_quartiles_are_those_of_the_definition() -> None:
    spread = Spread((5.0, 1.0, 3.0, 2.0, 4.0))
    assert spread.as_dict() == {"median": 3.0, "low": 2.0, "high": 4.0, "raw": [5.0, 1.0, 3.0, 2.0, 4.0]}
    assert Spread((7.0,)).quartiles == (7.0, 7.0)


def test_comparisons_are_within_a_round() -> None:
    rounds = Rounds({"a": [2.0, 8.0, 30.0], "b": [1.0, 2.0, 3.0]})
    assert rounds.ratio("a", "b", 0.5).raw == (1.0, 2.0, 5.0)
    assert rounds.difference("a", "b").raw == (1.0, 6.0, 27.0)
    assert rounds.rate("a", 16).raw == (8.0, 2.0, 16 / 30)
    assert rounds.of("b", 1e3).raw == (1e3, 2e3, 3e3)


# --- numbers


@pytest.mark.parametrize(("value", "at_most", "at_least"), [(0.9, True, False), (1, True, True), (math.nan, 0, 0)])
def test_targets_hold_up_to_their_bound(value: float, at_most: bool, at_least: bool) -> None:
    assert Target("a number", 1.0).measured(value).is_met == at_most
    assert Target("a number", 1.0, "at least").measured(value).is_met == at_least
    assert not Target("a number", math.nan).measured(value).is_met
    assert Target("a number", math.nan).measured(value, bound=value).is_met == (value == value)


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
    assert [target.value for target in targets] == pytest.approx([2 * seconds, 2 * seconds])
    assert [target.bound for target in targets] == [1.25, 1.6]
    assert [target.is_met for target in targets] == are_met
    assert train_step.rate_targets("tiny", rounds, {}, "bf16") == []


@pytest.mark.parametrize("shape", [NANO, TINY, SMALL], ids=["nano", "tiny", "small"])
def test_the_reference_has_our_flops(shape: Shape) -> None:
    assert count_image_flops(shape.params(0.0, threads=1), shape.num_patches) == reference.count_flops(shape)


def test_the_tiny_shape_is_the_default_experiment() -> None:
    default, params = load_params(shapes.ROOT / "params.yaml"), TINY.params(0.0, threads=1)
    assert params.model == default.model
    assert params.dataset.image_size == default.dataset.image_size
    assert default.pretrain.batch_size == TINY.batch_size


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
def test_cells_show_visible_differences(cell: Any, shown: str) -> None:
    assert show(cell) == shown


def test_on_a_gpu_products_of_fp32_are_called_tf32() -> None:
    rounds = Rounds({"matmul fp32": [1.0], "copy": [1.0]})
    for kind, column in (("cpu", "matmul fp32 GFLOP/s"), ("cuda", "matmul TF32 GFLOP/s")):
        assert list(machine.ceiling_row(rounds, torch.device(kind), ("fp32",))) == [column, "copy GB/s"]


def test_quality_is_compared_with_the_range_of_the_reference_over_seeds() -> None:
    fids = {
        ("ddim", 250): [1.0, 1.1, 1.2],
        ("ddpm", 20): [9.0, 9.0, 9.0],
        ("dpmsolver++", 20): [1.2, 1.3, 1.2],
        ("unipc", 20): [0.8, 0.9, 0.7],
    }
    targets = sampling.quality_targets(fids)
    assert [target.what for target in targets] == [
        "FID of dpmsolver++ with 20 evaluations, from that of ddim with 250",
        "FID of unipc with 20 evaluations, from that of ddim with 250",
    ]
    assert [target.value for target in targets] == pytest.approx([3.7 / 3 - 1.1, 0.3])
    assert [target.bound for target in targets] == pytest.approx([0.2] * 2)
    assert [target.is_met for target in targets] == [True, False]
    table = sampling.quality_table(fids, "a machine, bf16")
    assert [row["FID of the seeds"] for row in table.rows] == [Spread(tuple(of_seeds)) for of_seeds in fids.values()]


# --- real steps


@pytest.mark.parametrize("rate", [0.0, 0.75])
def test_steps_are_real_training_steps(rate: float, settings: Settings) -> None:
    steps = make_steps(NANO, settings, rate)
    state = steps.trainer.state
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    assert steps.run(3) > 0
    assert state.step == 3
    assert all(not torch.equal(old, new) for old, new in zip(before, state.model.parameters(), strict=True))
    assert steps.num_visible == round((1 - rate) * NANO.num_patches)
    steps.run(2)
    assert state.step == 5
    assert 0 < steps.waiting_share < 1


def test_the_update_alone_moves_weights_and_averages(settings: Settings) -> None:
    steps = make_steps(NANO, settings, 0.0, grad_clip=1.0)
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
def test_the_reference_uses_the_requested_attention(is_plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, calls = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or kernel(*a, **k)
    )
    model = reference.TimmUViT(NANO)
    model.use_plain_attention(is_plain)
    model(torch.randn(2, NANO.num_patches, 4), torch.zeros(2))
    assert len(calls) == (0 if is_plain else NANO.model["depth"])


def test_the_gpu_benchmark_measures_every_variant(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    limits: list[bool] = []
    make = gpu.make_steps
    monkeypatch.setattr(
        gpu,
        "make_steps",
        lambda *a, **k: limits.append(torch._dynamo.config.fail_on_recompile_limit_hit) or make(*a, **k),
    )
    outcome = gpu.measure(settings, (gpu.Case(NANO, (0.0, 0.5), 0.5, 0.4),))
    names = ["rate 0.0", "rate 0.5", "rate 0.5, eager", "rate 0.5, streamed"]
    assert [row["what"] for row in outcome.tables[0].rows] == names
    assert [target.bound for target in outcome.targets] == [0.4]
    assert limits == [True] * 4, "compiling too often is an error, not an eager run"
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


def test_another_sampler_leaves_the_rest_of_the_experiment() -> None:
    params = NANO.params(0.0, threads=1)
    changed = sampling.with_sampler(params, "ddpm", 7, 3)
    assert (changed.sampling.sampler, changed.sampling.num_steps, changed.sampling.batch_size) == ("ddpm", 7, 3)
    assert changed.model_copy(update={"sampling": params.sampling}) == params


# --- the command


@pytest.mark.parametrize(
    "name",
    ["train_step", "sampling", "attention", "gpu", pytest.param("workflow", marks=pytest.mark.workflow)],
)
def test_every_benchmark_writes_a_record(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "tiny", NANO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "record.json"
    words = ["--quick", "--rounds", "1", "--threads", "1", "--only", name, "--shapes", "tiny", "--out", str(out)]
    assert main(words) == 0
    record = read_record(out)
    assert (record["rounds"], record["is_quick"], record["is_complete"]) == (1, True, True)
    assert set(record["machine"]) >= MACHINE_KEYS
    assert set(record["benchmarks"]) == {name}
    outcome = record["benchmarks"][name]
    assert outcome["tables"] or outcome["notes"] == ["no CUDA device: not measured"]
    for table in outcome["tables"]:
        assert table["rows"], table["title"]
        assert all(row.keys() == table["rows"][0].keys() for row in table["rows"])
    if name == "train_step":
        assert len(outcome["tables"][0]["rows"]) == len(RATES)
    said = capsys.readouterr().out
    assert str(out) in said
    assert "QUICK: proves nothing" in said
    assert "holds" not in said


def test_a_record_is_shown_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("speed", [{"what": "a", "s": Spread((1.0, 2.0, 3.0))}], "a note")
    outcome = Outcome([table], [Target("speed", 1.0, value=2.0)], ["why"])
    benchmarks = {"gpu": outcome.as_dict(), "old": Outcome(notes=["of an older version"]).as_dict()}
    file = tmp_path / "record.json"
    create_record(a_record(benchmarks=benchmarks), file)
    assert main(["--table", str(file)]) == 0
    lines = [line.replace(" ", "") for line in capsys.readouterr().out.splitlines()]
    assert "|a|2.00[1.50,2.50]|" in lines
    assert "|speed|2.00|atmost1.00|NO|" in lines
    assert {"anote", "why", "ofanolderversion", "0of1targetshold"} <= set(lines)
    assert lines[0].startswith("AMDEPYC(Zen4),2cores,1threads,7rounds,commit0123456,")
    assert main(["--table", str(file), "--only", "old"]) == 0
    said = capsys.readouterr().out
    assert "of an older version" in said
    assert "speed" not in said


def test_the_published_records_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for file in Path(shapes.ROOT, "benchmarks", "records").iterdir():
        assert main(["--table", str(file)]) == 0
        assert "targets hold" in capsys.readouterr().out


def test_a_quick_run_has_no_verdicts() -> None:
    outcome = Outcome(targets=[Target("good", 1.0, value=0.5), Target("bad", 1.0, value=2.0)]).as_dict()
    assert "1 of 2 targets hold" in summary(a_record(benchmarks={"one": outcome}))
    text = summary(a_record(benchmarks={"one": outcome}, is_quick=True))
    assert "proves nothing" in text
    assert not {"yes", "NO", "holds", "hold"} & set(text.split())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"machine": {**ABOUT, "git_dirty": True}}, "commit 0123456 DIRTY, 2030"),
        ({"machine": {**ABOUT, "gpu": "NVIDIA H100"}}, "AMD EPYC (Zen 4), NVIDIA H100, 2 cores"),
        ({"is_quick": True}, "\nQUICK: proves nothing"),
        ({"is_complete": False}, "\nINCOMPLETE"),
    ],
)
def test_the_header_says_what_limits_a_record(changes: dict[str, Any], said: str) -> None:
    assert said in header(a_record(**changes))


def test_full_records_are_named_after_day_machine_and_commit() -> None:
    assert path_for(ABOUT, is_full=True).name == "2030-01-02-amd-epyc-zen-4-2-cores-0123456.json"
    assert path_for(ABOUT, is_full=True).parent == Path(shapes.ROOT, "benchmarks", "records")
    assert machine.slug({**ABOUT, "gpu": "NVIDIA H100"}) == "nvidia-h100"


@pytest.mark.parametrize(
    ("words", "is_kept"),
    [
        ([], True),
        (["--rounds", "9"], True),
        (["--quick"], False),
        (["--only", "gpu"], False),
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
    monkeypatch.setattr("benchmarks.gpu.run", fail)
    words = ["--only", "attention,gpu", "--out", str(out)]
    assert main(words) == 2
    assert "benchmarks: error: it broke\n" in capsys.readouterr().err
    record = read_record(out)
    assert list(record["benchmarks"]) == ["attention"]
    assert record["is_complete"] is False
    assert main(words) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert read_record(out) == record
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_nothing_is_measured_if_the_record_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.attention.run", lambda _: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert main(["--only", "attention", "--out", str(tmp_path / "file" / "record.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks: error: cannot write the record")
    assert error.count("\n") == 1


def test_numbers_that_are_not_finite_are_null_in_a_record(tmp_path: Path) -> None:
    table = Table("t", [{"a": math.inf, "b": Spread((math.nan, 1.0)), "c": 1.0}])
    file = tmp_path / "record.json"
    replace_record(a_record(benchmarks={"x": Outcome([table], [Target("t", 1.0)]).as_dict()}), file)
    outcome = read_record(file)["benchmarks"]["x"]
    (row,) = outcome["tables"][0]["rows"]
    assert (row["a"], row["b"]["raw"], row["c"]) == (None, [None, 1.0], 1.0)
    assert (outcome["targets"][0]["value"], outcome["targets"][0]["is_met"]) == (None, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "expected a whole number above 0, got '0'"),
        (["--threads", "two"], "expected a whole number above 0, got 'two'"),
        (["--only", "train_step,speed"], "unknown: speed; expected some of train_step, sampling"),
        (["--shapes", "huge"], "unknown: huge; expected some of tiny, small, celeba"),
        (["--table", "nowhere.json"], "cannot read the record nowhere.json"),
        (["--table", str(shapes.ROOT / "params.yaml")], "params.yaml"),
    ],
)
def test_mistakes_in_the_command(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
