"""params.yaml, weights and results from anybody, made to do harm; images are in tests/data/test_hostile_images.py.

What could fill the memory, or never end, is given to the command line in a process of its own (`alone`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from maskdm.base.checksums import CHECKSUM, with_checksum
from maskdm.base.errors import ParamsError, UserError
from maskdm.base.tensors import FORMAT, load_tensors, save_tensors
from maskdm.config import EvaluationConfig, load_params, paths
from maskdm.data.arrays import ImageArrays, dataset_sha256
from maskdm.data.inputs import read_json
from maskdm.scoring.classifier import Classifier
from maskdm.scoring.extractors import open_classifier, open_pretrained
from maskdm.training.state import StateStore
from tests.alone import put, victim
from tests.conftest import ARM, TINY, Experiment
from tests.factories import CPU

# --- params.yaml


PARAMS: dict[str, tuple[str | bytes, str]] = {
    "deep-list": ("name: " + "[" * 100_000, "is nested too deeply"),
    "deep-map": ("\n".join(" " * i + "a:" for i in range(500)), "is nested too deeply"),
    "many-keys": ("\n".join(f"k{i}: 1" for i in range(10_000)), "and 9"),
    "twice-in-many": ("\n".join(f"k{i % 10_000}: 1" for i in range(10_001)), "given twice"),
    "one-value": (f"name: {'x' * 200_000}", "params.yaml: seeds: is missing"),
    "number": (f"seeds: [0x{'f' * 2900}]\nname: 1", "name: "),
    "nul": (b"name: a\0b", "is not plain YAML"),
    "utf-16": ("name: tiny".encode("utf-16"), "is not plain YAML"),
    "module": ("name: !!python/module:os", "is not plain YAML"),
    "name": ("name: !!python/name:os.system", "is not plain YAML"),
    "new": ("name: !!python/object/new:os.system [touch executed]", "is not plain YAML"),
    "apply": ("name: !!python/object/apply:os.system [touch executed]", "is not plain YAML"),
    "other-tag": ("name: !secret x", "is not plain YAML"),
    "date": ("seeds: 2024-13-45", "is not plain YAML"),
    "no-date": ("seeds: !!timestamp soon", "is not plain YAML"),
    "no-boolean": ("seeds: !!bool perhaps", "is not plain YAML"),
    "no-number": ("seeds: !!int many", "is not plain YAML"),
    "key-that-is-a-list": ("[a]: 1", "is not plain YAML"),
    "escapes": ('"\\e[31m\\a": "\\e[31m"', "\\x1b[31m\\x07: unknown key"),
}


FILL_MEMORY = {"deep-list", "number"}


@pytest.fixture
def python_as_it_starts() -> Iterator[None]:
    """Its recursion limit: PyTorch's compiler, in another test of this process, raises it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("python_as_it_starts")
@pytest.mark.parametrize("case", PARAMS)
def test_harmful_params_are_refused(tmp_path: Path, case: str) -> None:
    content, says = PARAMS[case]
    (tmp_path / "params.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    outcome = victim(tmp_path, "validate", alone=case in FILL_MEMORY, memory=2**29)
    assert outcome.code == 2
    assert says in outcome.err
    assert len(outcome.err) < 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_params_of_gigabytes_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "params.yaml").open("wb") as file:
        file.truncate(2**32)  # takes no room
    outcome = victim(tmp_path, "validate", memory=2**29)
    assert (outcome.code, "params.yaml is larger than 262144 bytes" in outcome.err) == (2, True)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_params_that_are_a_pipe_or_folder_are_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "params.yaml")
    outcome = victim(tmp_path, "validate")
    assert (outcome.code, "params.yaml is not a file" in outcome.err) == (2, True)


def test_ordinary_aliases_and_merges_are_read(tmp_path: Path) -> None:
    content = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    del content["arms"]
    aliases = "arms:\n  scratch: {strategy: none}\n  one: &one {strategy: patch, mask_rate: &m 0.5}\n"
    aliases += "  two: {<<: *one, finetune: {lr: *m}}\n  three: {<<: [*one], mask_rate: 0.75}\n  four: *one\n"
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(content) + aliases, encoding="utf-8")
    params = load_params(file)
    assert [params.arms[name].mask_rate for name in ("one", "two", "three", "four")] == [0.5, 0.5, 0.75, 0.5]
    assert params.finetune_of("two").lr == 0.5


def test_a_long_mistake_is_shown_shortened(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(f"name: [{'x, ' * 2000}]", encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load_params(file)
    assert max(len(line) for line in str(caught.value).splitlines()) < 400


# --- weights of others


def weights_with(pickled: bytes) -> bytes:
    """A file of torch.save whose pickle is replaced."""
    plain, other = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(4)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(other, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, pickled if member.filename.endswith(".pkl") else old.read(member))
    return other.getvalue()


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def open_weights(path: Path) -> None:
    open_pretrained(EvaluationConfig(features="inception-v3-compat", weights=str(path)), CPU)


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("executed",)


BLOCKED = (
    r"Trying to load unsupported GLOBAL posix\.mkdir whose module posix is blocked \(only plain tensors are accepted\)"
)
WEIGHTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "executes": (lambda: saved({"a": Payload()}), BLOCKED),
    "executes-old": (lambda: saved({"a": Payload()}, _use_new_zipfile_serialization=False), BLOCKED),
    "executes-protocol-4": (lambda: saved({"a": Payload()}, pickle_protocol=4), "Detected pickle protocol 4 in the"),
    "another-class": (
        lambda: saved({"a": Path("x")}),
        r"Unsupported global: GLOBAL pathlib\.PosixPath \(only plain tensors are accepted\); expected the file",
    ),
    "text": (lambda: b"some text", "is not a plain PyTorch weights file"),
    "nonsense": (lambda: weights_with(b"\x80\x02}K\x01R."), "Trying to call reduce for unrecognized function"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_hold_more_than_tensors_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make, reason = WEIGHTS[case]
    put(tmp_path / "weights.pth", make())
    with pytest.raises(UserError, match=reason) as caught:
        open_weights(tmp_path / "weights.pth")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_weights_that_are_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.pth")
    with pytest.raises(UserError, match="there is no file"):
        open_weights(tmp_path / "weights.pth")


@pytest.mark.parametrize("old", [False, True])
def test_plain_weights_get_as_far_as_the_network(tmp_path: Path, old: bool) -> None:
    content = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.zeros(3, dtype=torch.bfloat16)}
    put(tmp_path / "weights.pth", saved(content, _use_new_zipfile_serialization=not old))
    with pytest.raises(UserError, match="does not hold the weights of inception-v3-compat"):
        open_weights(tmp_path / "weights.pth")


# --- results of others


def tensors_file(header: dict[str, Any] | bytes, content: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def tensor(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


OURS = {"__metadata__": {"maskdm": json.dumps({"format": FORMAT})}}
TENSORS = {
    "header-of-a-tb": tensors_file(b"{}", length=2**40),
    "header-of-99-mb": tensors_file(b"{}", length=99_000_000),
    "header-of-less-than-none": tensors_file(b"{}", length=2**64 - 1),
    "tensor-of-4-tb": tensors_file({**OURS, "a": tensor([2**40], 0, 2**42)}),
    "tensors-in-one-place": tensors_file({**OURS, "a": tensor([4], 0, 16), "b": tensor([4], 0, 16)}, bytes(16)),
    "tensor-that-overflows": tensors_file({**OURS, "a": tensor([2**62, 16], 0, 0)}),
    "tensor-of-nothing": tensors_file({**OURS, "a": tensor([2**62, 0], 0, 0)}),
    "tensor-behind-the-end": tensors_file({**OURS, "a": tensor([4], 100, 116)}, bytes(16)),
    "deep-header": tensors_file(b"[" * 10**6),
    "deep-description": tensors_file({"__metadata__": {"maskdm": "[" * 10**6}}),
    "long-number": tensors_file({"__metadata__": {"maskdm": "9" * 10**5}}),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_declare_what_is_not_there_are_refused(tmp_path: Path, case: str) -> None:
    put(tmp_path / "checkpoint.safetensors", TENSORS[case])
    with pytest.raises(UserError, match="damaged"):
        load_tensors(tmp_path / "checkpoint.safetensors")


def test_a_classifier_that_declares_other_sizes_than_its_weights_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "classifier.safetensors"
    state = Classifier(1, 10).state_dict()
    save_tensors(file, {"classifier": state}, {"architecture": {"channels": 1, "num_classes": 10**13}, "accuracy": 1.0})
    with pytest.raises(UserError, match=r"classifier\.safetensors"):
        open_classifier(file, CPU)


def pickled() -> bytes:
    return saved({"a": Payload()})


def object_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("stage", "file", "make"),
    [
        ("finetune", f"results/pretrain/{ARM}/seed-0/checkpoint.safetensors", pickled),
        ("sample", f"results/finetune/{ARM}/seed-0/milestone-1.000.safetensors", pickled),
        ("evaluate", "results/features/classifier.safetensors", pickled),
        ("evaluate", "results/features/reference.npy", object_array),
        ("evaluate", f"results/samples/{ARM}/seed-0/milestone-1.000.npy", object_array),
        ("pretrain", "results/data/labels.npy", object_array),
        ("pretrain", "results/data/images-00000.npy", object_array),
    ],
)
def test_pickles_in_the_place_of_results_are_refused_unread(
    scored: Experiment, stage: str, file: str, make: Callable[[], bytes]
) -> None:
    put(scored.path(file), make())
    outcome = scored.stage(stage)
    assert (outcome.code, Path(file).name in outcome.err) == (1, True), outcome.err
    assert not scored.path("executed").exists()


def test_a_pickle_in_the_place_of_a_state_is_put_aside_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    states = StateStore(tmp_path, every_seconds=60)
    states.save({"raw": {"a": torch.ones(2)}}, {"step": 10})
    put(tmp_path / "state-0000000020.safetensors", saved({"a": Payload()}))
    found = states.load()
    assert found is not None
    assert found[1]["step"] == 10
    assert "state-0000000020.safetensors is damaged" in capsys.readouterr().err
    assert not Path("executed").exists()


@pytest.mark.parametrize("info", [{}, {"step": "ten"}, {"step": None}])
def test_a_state_without_a_step_is_put_aside(tmp_path: Path, info: dict[str, Any]) -> None:
    states = StateStore(tmp_path, every_seconds=60)
    states.save({"raw": {"a": torch.ones(2)}}, {"step": 10})
    save_tensors(tmp_path / "state-0000000020.safetensors", {"raw": {"a": torch.ones(2)}}, info)
    found = states.load()
    assert found is not None
    assert found[1]["step"] == 10


def npy(header: str, content: bytes = bytes(100)) -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode() + content


def described(kind: str, shape: str) -> str:
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n"


ARRAYS = {
    "8-tb": npy(described("<i8", f"({10**12},)")),
    "overflow": npy(described("<i8", f"({2**62},)")),
    "no-integer": npy(described("<i8", f"({10**30},)")),
    "negative": npy(described("<i8", "(-1,)")),
    "truth": npy(described("<i8", "(True,)")),
    "objects": npy(described("|O", "(1,)")),
    "nothing-many-times": npy(described("|V0", f"({2**40},)")),
    "long-header": npy("(" * 60_000),
    "deep-header": npy("(" * 9000),
    "deep-number": npy("-" * 9000 + "1"),
    "header-of-4-gb": b"\x93NUMPY\x02\0" + struct.pack("<L", 2**32 - 1) + b"{}",
    "archive": b"PK\3\4" + bytes(100),
}


@pytest.mark.parametrize("file", ["labels.npy", "images-00000.npy"])
def test_arrays_that_declare_what_is_not_there_are_refused(prepared: Experiment, file: str) -> None:
    data = prepared.path("results", "data")
    for case, content in ARRAYS.items():
        put(data / file, content)
        with pytest.raises(UserError, match=rf"(?s){file} .*run `maskdm prepare` again"):
            ImageArrays.open(data)
            pytest.fail(case)


@pytest.mark.parametrize("place", ["../../params.yaml", "/etc/passwd", "sub/images-00000.npy", "..", "a\\b/../x"])
@pytest.mark.parametrize("what", ["shard", "labels"])
def test_a_dataset_does_not_name_files_elsewhere(prepared: Experiment, what: str, place: str) -> None:
    file = prepared.path("results", "data", "manifest.json")
    manifest = json.loads(file.read_text(encoding="utf-8"))
    (manifest["shards"][0] if what == "shard" else manifest["labels"])["file"] = place
    manifest["sha256"] = dataset_sha256(manifest)
    del manifest[CHECKSUM]
    file.write_text(json.dumps(with_checksum(manifest)), encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json is not a complete .* manifest \(.* is not the name of a file"):
        ImageArrays.open(file.parent)


DEEP = {"lists": "[" * 10**5, "maps": '{"a":' * 10**5, "number": "9" * 10**4, "text": '"many"', "list": "[1]"}


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("place", ["results/data/manifest.json", "results/data/stamp.json"])
def test_endlessly_nested_descriptions_are_damaged(prepared: Experiment, place: str, content: str) -> None:
    put(prepared.path(place), content.encode())
    outcome = victim(prepared.folder, "pretrain", "--arm", ARM, "--seed", "0", alone=False)
    assert (outcome.code, Path(place).parts[1] in outcome.err) == (1, True)
    with contextlib.chdir(prepared.folder), pytest.raises(UserError, match="can't be read"):
        read_json(Path(place), "prepare")


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_nonsense_in_a_work_folder_is_not_resumed(prepared: Experiment, content: str) -> None:
    job = prepared.job("pretrain", ARM, 0)
    work = prepared.path(str(paths.work(job.output)))
    with contextlib.chdir(prepared.folder):
        key = job.wanted().key
    put(work / key / "begun.json", content.encode())
    put(work / "lock", content.encode())
    put(work / "previous" / key / "output" / "stamp.json", content.encode())
    outcome = victim(prepared.folder, "pretrain", "--arm", ARM, "--seed", "0", alone=False)
    assert outcome.code == 0
    assert json.loads(prepared.path(str(job.record)).read_text(encoding="utf-8"))["starts"] == 1


@pytest.mark.parametrize("change", [{"starts": "many"}, {"starts": None}])
def test_work_without_a_count_of_starts_begins_anew(prepared: Experiment, change: dict[str, Any]) -> None:
    job = prepared.job("pretrain", ARM, 0)
    with contextlib.chdir(prepared.folder):
        begun = paths.work(job.output) / job.wanted().key / "begun.json"
    put(prepared.path(str(begun)), json.dumps({"id": "a", "starts": 3, **change}).encode())
    assert prepared.stage("pretrain").code == 0
    record = json.loads(prepared.path(str(job.record)).read_text(encoding="utf-8"))
    assert (record["starts"], record["id"] != "a") == (1, True)


@pytest.mark.parametrize("place", ["../../../../params.yaml", "/etc/passwd", "checkpoint.safetensors/x", "."])
def test_a_stamp_that_names_files_elsewhere_moves_none_of_them(prepared: Experiment, place: str) -> None:
    """It comes from whoever sent the results; what it names is looked at, never written or moved."""
    assert prepared.stage("pretrain").code == 0
    output = prepared.path("results", "pretrain", ARM, "seed-0")
    stamp = json.loads((output / "stamp.json").read_text(encoding="utf-8"))
    del stamp[CHECKSUM]
    stamp["files"][place] = {"size": 1, "sha256": "0" * 64}
    put(output / "stamp.json", json.dumps(with_checksum(stamp)).encode())
    before = prepared.file.read_bytes()
    outcome = victim(prepared.folder, "pretrain", "--arm", ARM, "--seed", "0", alone=False)
    assert (outcome.code, "bytes, expected 1" in outcome.err or "is missing" in outcome.err) == (0, True)
    assert prepared.file.read_bytes() == before
    assert "up to date" in prepared.stage("pretrain").out
