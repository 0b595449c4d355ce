"""Files from anybody: images, archives, params.yaml, weights and results that were made to do harm.

What could fill the memory, or take for ever, is given to the command line in a process of its own, with a bounded
address space and so many seconds of work (`alone`).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from maskdm.base.checksums import CHECKSUM, with_checksum
from maskdm.base.errors import ParamsError, UserError, printable
from maskdm.base.tensors import FORMAT, load_tensors, save_tensors
from maskdm.config import EvaluationConfig, load_params, paths
from maskdm.data.arrays import ImageArrays, dataset_sha256
from maskdm.data.inputs import read_json
from maskdm.scoring.classifier import Classifier
from maskdm.scoring.extractors import open_classifier, open_pretrained
from maskdm.training.state import StateStore
from tests.conftest import ARM, TINY, Experiment, Outcome
from tests.factories import CPU

MEMORY = 3 * 2**29  # bytes of address space; the command line needs half of it
SECONDS = 20  # of work, not by the clock: other processes slow nothing down
WAITED_FOR = 300  # seconds by the clock until a process that waits without working is given up


def victim(folder: Path, *words: str, alone: bool = True, memory: int = MEMORY) -> Outcome:
    """Run a command; alone, it gets no more memory and time than honest input needs."""
    outcome = run_alone(folder, memory, *words) if alone else Experiment(folder).run(*words)
    assert "Traceback" not in outcome.err, outcome.err[-3000:]
    assert not [c for c in outcome.err if not c.isprintable() and c not in "\n\r"]
    return outcome


def run_alone(folder: Path, memory: int, *words: str) -> Outcome:
    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    done = subprocess.run(
        [sys.executable, "-m", "maskdm", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=WAITED_FOR,
        errors="surrogateescape",
        preexec_fn=bounded,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment on the images in `photos`."""
    place = tmp_path / "experiment"
    place.mkdir()
    write_params(place, "photos")
    return place


def write_params(folder: Path, root: str, **dataset: Any) -> None:
    content = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    content["dataset"] |= {"source": "image_folder", "root": root, **dataset}
    content["tracking"] = {"enabled": False}
    content["evaluation"] |= {"kid_subset_size": 2, "prc_neighborhood": 1}  # else few images are refused
    (folder / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def prepare(folder: Path, root: str = "photos", alone: bool = False) -> dict[str, str]:
    """Prepare all good images; the reasons of the bad ones by their names."""
    write_params(folder, root, on_bad_image="skip")
    outcome = victim(folder, "prepare", alone=alone)
    assert outcome.code == 0, outcome.err
    manifest = ImageArrays.open(folder / "results" / "data").manifest
    return {entry["file"]: entry["reason"] for entry in manifest["skipped"]}


def refusal(folder: Path, root: str = "photos", alone: bool = False, **dataset: Any) -> str:
    """What `prepare` says when it refuses the images."""
    write_params(folder, root, **dataset)
    outcome = victim(folder, "prepare", alone=alone)
    assert outcome.code == 1, outcome.err
    assert not (folder / "results" / "data").exists()
    return outcome.err


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


GOOD = encode(Image.new("RGB", (8, 8), "red"))


def put(path: Path, content: bytes = GOOD) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# --- images


@cache
def zeros(size: int) -> bytes:
    """So many zero bytes, deflated."""
    packer, block = zlib.compressobj(1), bytes(2**20)
    parts = [packer.compress(block) for _ in range(size >> 20)]
    return b"".join([*parts, packer.compress(bytes(size & 0xFFFFF)), packer.flush()])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, extra: bytes = b"", after: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")


PIXELS = zlib.compress(bytes(9 * 8))


def exif_of_one_place() -> bytes:
    """Thousands of tags that all mean the same MB: as objects, each has its own."""
    tags = b"".join(struct.pack("<HHLL", tag, 7, 2**20, 8) for tag in range(60_000))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + tags + bytes(2**20)


def tiff(**changes: tuple[int, int, int]) -> bytes:
    """A grey 8×8 TIFF; `t273=(type, count, value)` changes a tag."""
    tags = {256: (3, 1, 8), 257: (3, 1, 8), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 900)}
    tags |= {277: (3, 1, 1), 278: (3, 1, 8), 279: (4, 1, 64)}
    tags |= {int(name[1:]): value for name, value in changes.items()}
    listed = b"".join(struct.pack("<HHLL", tag, *value) for tag, value in sorted(tags.items()))
    return (b"II*\0\x08\0\0\0" + bytes([len(tags), 0]) + listed + bytes(8)).ljust(1000, b"\0")


def jpeg_with(segments: bytes) -> bytes:
    plain = encode(Image.new("RGB", (8, 8)), "JPEG")
    return plain[:2] + segments + plain[2:]


def jpeg_exif(content: bytes) -> bytes:
    """A JPEG whose EXIF goes on over many segments, which decoders put together."""
    parts = [b"Exif\0\0" + content[i : i + 65_000] for i in range(0, len(content), 65_000)]
    return jpeg_with(b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(part)) + part for part in parts))


def jpeg_profile(size: int) -> bytes:
    part = b"\xff\xe2" + struct.pack(">H", 2 + 14 + 65_000) + b"ICC_PROFILE\0\1\1" + bytes(65_000)
    return jpeg_with(part * (size // 65_000))


def with_size(kind: str, place: bytes, offset: int, size: bytes) -> bytes:
    """An image whose header declares another size."""
    content = bytearray(encode(Image.new("RGB", (8, 8)), kind))
    start = content.index(place) + offset
    content[start : start + len(size)] = size
    return bytes(content)


def webp_canvas() -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    start = content.index(b"VP8X") + 12
    content[start : start + 6] = (16382).to_bytes(3, "little") * 2
    return bytes(content)


def frames(kind: str, number: int, **options: Any) -> bytes:
    images = [Image.new("L", (8, 8), i % 256) for i in range(number)]
    return encode(images[0], kind, save_all=True, append_images=images[1:], **options)


TOO_LARGE = "pixels are more than dataset.max_pixels"
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "declared.png": (lambda: png(50_000, 50_000, PIXELS), TOO_LARGE),
    "real.png": (lambda: png(20_000, 20_000, zeros(20_001 * 20_000)), TOO_LARGE),
    "declared.jpg": (lambda: with_size("JPEG", b"\xff\xc0", 5, struct.pack(">HH", 50_000, 50_000)), TOO_LARGE),
    "canvas.gif": (lambda: with_size("GIF", b"GIF8", 6, struct.pack("<HH", 50_000, 50_000)), TOO_LARGE),
    "frame.gif": (lambda: with_size("GIF", b",\0\0\0\0", 5, struct.pack("<HH", 50_000, 50_000)), TOO_LARGE),
    "declared.bmp": (lambda: with_size("BMP", b"BM", 18, struct.pack("<ll", 50_000, 50_000)), TOO_LARGE),
    "declared.tif": (lambda: tiff(t256=(4, 1, 50_000), t257=(4, 1, 50_000), t278=(4, 1, 50_000)), TOO_LARGE),
    "declared.ppm": (lambda: b"P6\n50000 50000\n255\n", TOO_LARGE),
    "canvas.webp": (webp_canvas, TOO_LARGE),
    "zTXt.png": (lambda: png(8, 8, PIXELS, chunk(b"zTXt", b"k\0\0" + zeros(2**28))), "Decompressed data too large"),
    "iTXt.png": (lambda: png(8, 8, PIXELS, chunk(b"iTXt", b"k\0\1\0\0\0" + zeros(2**28))), "Decompressed data too"),
    "profile.png": (lambda: png(8, 8, PIXELS, chunk(b"iCCP", b"k\0\0" + zeros(2**28))), "Decompressed data too large"),
    "texts.png": (
        lambda: png(8, 8, PIXELS, chunk(b"zTXt", b"k\0\0" + zeros(2**20 - 1)) * 300),
        "Too much memory used in text chunks",
    ),
    "tile.tif": (
        lambda: tiff(t259=(3, 1, 5), t322=(4, 1, 50_000), t323=(4, 1, 50_000), t324=(4, 1, 900), t325=(4, 1, 64)),
        "decoder error",
    ),
}
HARMLESS: dict[str, Callable[[], bytes]] = {
    "more.png": lambda: png(8, 8, zeros(2**28)),
    "places.png": lambda: png(8, 8, PIXELS, chunk(b"eXIf", exif_of_one_place())),
    "absurd.jpg": lambda: jpeg_exif(b"II*\0\x08\0\0\0" + struct.pack("<HHHLLL", 1, 274, 3, 2**31, 2**31, 2**31)),
    "profile.jpg": lambda: jpeg_profile(2**25),
    "frames.gif": lambda: frames("GIF", 500),
    "frames.png": lambda: frames("PNG", 500),
    "frames.webp": lambda: frames("WEBP", 300),
    "pages.tif": lambda: frames("TIFF", 500),
}


def test_image_bombs_are_left_out_and_recorded(folder: Path) -> None:
    for name, (make, _) in BOMBS.items():
        put(folder / "photos" / name, make())
    put(folder / "photos" / "good.png")
    skipped = prepare(folder, alone=True)
    assert set(skipped) == set(BOMBS)
    for name, (_, reason) in BOMBS.items():
        assert reason in skipped[name], name


def test_what_an_image_holds_beside_its_pixels_takes_neither_memory_nor_time(folder: Path) -> None:
    for name, make in HARMLESS.items():
        put(folder / "photos" / name, make())
    assert prepare(folder, alone=True) == {}
    assert len(ImageArrays.open(folder / "results" / "data")) == len(HARMLESS)


def test_an_image_bomb_stops_prepare_and_is_named(folder: Path) -> None:
    put(folder / "photos" / "good.png")
    put(folder / "photos" / "real.png", BOMBS["real.png"][0]())
    assert "bad image photos/real.png: 20000×20000 pixels are more than" in refusal(folder, alone=True)


def test_an_image_that_memory_does_not_suffice_for_is_named(folder: Path) -> None:
    put(folder / "photos" / "good.png")
    put(folder / "photos" / "large.png", BOMBS["real.png"][0]())
    said = refusal(folder, alone=True, max_pixels=10**9, channels=3)
    assert "too little memory to decode photos/large.png: lower compute.threads, or lower dataset.max_pixels" in said


# --- folders


def test_what_is_no_file_is_not_waited_for(folder: Path) -> None:
    put(folder / "photos" / "a" / "good.png")
    put(folder / "photos" / "a" / "other.png")
    os.mkfifo(folder / "photos" / "pipe.png")
    (folder / "photos" / "linked.png").symlink_to("pipe.png")
    (folder / "photos" / "zero.png").symlink_to("/dev/zero")
    (folder / "photos" / "up").symlink_to("..")
    (folder / "photos" / "a" / "back").symlink_to("../a")
    with contextlib.chdir(folder / "photos"), socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        assert prepare(folder, alone=True) == {}
    assert len(ImageArrays.open(folder / "results" / "data")) == 2


def test_a_link_to_itself_is_named(folder: Path) -> None:
    put(folder / "photos" / "good.png")
    (folder / "photos" / "loop.png").symlink_to("loop.png")
    assert "cannot read photos/loop.png: Too many levels of symbolic links" in refusal(folder)


@pytest.mark.parametrize("root", ["pipe", "/dev/zero"])
def test_a_root_that_is_no_file_is_refused(folder: Path, root: str) -> None:
    os.mkfifo(folder / "pipe")
    assert f"dataset.root: {root} is neither a folder nor a file, but a pipe, socket or device" in refusal(
        folder, root, alone=True
    )


def test_deep_folders_are_read(folder: Path) -> None:
    place = folder / "photos"
    for _ in range(1100):
        place.mkdir()
        place = place / "d"
    put(place / "good.png")
    put(place / "other.png")
    try:
        assert prepare(folder) == {}
    finally:
        subprocess.run(["rm", "-r", folder / "photos"], check=True)  # pytest removes by recursion


# --- archives


def tar_of(path: Path, members: dict[str, bytes], mode: str = "w", **attributes: Any) -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in attributes.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))


def zip_of(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


ARCHIVES: dict[str, Callable[[Path, dict[str, bytes]], None]] = {
    "photos.zip": zip_of,
    "photos.tar": tar_of,
    "photos.tar.gz": lambda path, members: tar_of(path, members, "w:gz"),
}
OUTSIDE = ["../up.png", "a/../../up.png", "..\\up.png", "/tmp/abs.png", "C:\\abs.png", "\\\\host\\share.png"]


@pytest.mark.parametrize("root", ARCHIVES)
def test_members_that_point_out_of_the_archive_write_nothing(folder: Path, root: str) -> None:
    ARCHIVES[root](folder / root, {**dict.fromkeys(OUTSIDE, GOOD), "good.png": GOOD})
    before = set(folder.parent.rglob("*"))
    assert prepare(folder, root) == {}
    new = {path.relative_to(folder).parts[0] for path in set(folder.parent.rglob("*")) - before}
    assert new == {"results", ".work"}
    assert not Path("/tmp/abs.png").exists()


ESCAPES = "\x1b[31m\x1b]0;title\x07\r\b\u202egnp"
STRANGE = [f"{ESCAPES}/bad.png", f"b/{ESCAPES}.png", "c/new\nline.png", f"d/{'long' * 60}.png"]


@pytest.mark.parametrize("root", [*ARCHIVES, "photos"])
def test_names_obey_no_terminal_and_can_be_recorded(folder: Path, root: str) -> None:
    members = dict.fromkeys(STRANGE, b"text") | {f"{ESCAPES}/good.png": GOOD, "z/good.png": GOOD}
    if root == "photos":
        for name, content in members.items():
            put(folder / root / name, content)
        put(folder / root / os.fsdecode(b"b\xff") / os.fsdecode(b"\xfe.png"), b"text")
        put(folder / root / os.fsdecode(b"b\xff") / "good.png")
    else:
        ARCHIVES[root](folder / root, members)
    skipped = prepare(folder, root)
    assert "c/new\\nline.png" in skipped
    assert len(skipped) == len(STRANGE) + (root == "photos")
    names = [*skipped, *ImageArrays.open(folder / "results" / "data").class_names]
    assert all(name.isprintable() for name in names)


def test_a_bad_image_of_a_strange_name_is_named(folder: Path) -> None:
    zip_of(folder / "photos.zip", {f"{ESCAPES}.png": b"P6\n\x1b[31mtoolong 8\n255\n", "good.png": GOOD})
    assert "bad image \\x1b[31m\\x1b]0;title\\x07\\r\\x08\\u202egnp.png in photos.zip: " in refusal(
        folder, "photos.zip"
    )


def test_kinds_of_strange_names_are_shown(folder: Path) -> None:
    tar_of(folder / "photos.tar", {f"a.{ESCAPES}": b"", "b." + "x" * 90_000: b""})
    said = refusal(folder, "photos.tar")
    assert "found 2 other files" in said
    assert len(said) < 1000


def test_printable_text_is_left_as_it_is() -> None:
    assert printable("Größe 12 µm/日本.png") == "Größe 12 µm/日本.png"
    assert printable("a" * 500, 9) == "aaaa…aaaa"


def plain_tar(**attributes: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(GOOD)
            for key, value in attributes.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(GOOD))
    return file.getvalue()


def test_a_hole_of_a_sparse_member_is_not_read(folder: Path) -> None:
    sparse = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40), "GNU.sparse.name": "hole.png"}
    tar_of(folder / "photos.tar", {"hole.png": b"1"}, pax_headers=sparse)
    tar_of(folder / "good.tar", {"good.png": GOOD})
    content = (folder / "photos.tar").read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512) + (folder / "good.tar").read_bytes()
    put(folder / "photos.tar", content)
    assert "too little memory to read hole.png in photos.tar: remove it" in refusal(folder, "photos.tar", alone=True)


@pytest.mark.parametrize("root", ["photos.zip", "photos.tar.gz"])
def test_a_hundred_thousand_members_take_seconds(folder: Path, root: str) -> None:
    if root.endswith("zip"):
        with zipfile.ZipFile(folder / root, "w") as archive:
            archive.writestr("1.txt", b"")
            archive.filelist *= 100_000
            archive.writestr("good.png", GOOD)
            archive.writestr("other.png", GOOD)
    else:
        put(folder / root, gzip.compress(tarfile.TarInfo("1.txt").tobuf() * 100_000 + plain_tar(), 1))
    started = time.process_time()
    assert prepare(folder, root) == {}
    assert time.process_time() - started < 10


def test_members_of_a_zip_that_are_no_images_of_their_own(folder: Path) -> None:
    zip_of(folder / "inner.zip", {"good.png": GOOD})
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.write(folder / "inner.zip", "nested.png")
        archive.write(folder / "inner.zip", "nested.zip")
        archive.writestr("huge.png", GOOD)
        with archive.open("good.png", "w", force_zip64=True) as member:
            member.write(GOOD)
    content = (folder / "photos.zip").read_bytes()
    place = content.rindex(b"huge.png") - 46  # its entry in the directory at the end
    put(folder / "photos.zip", content[: place + 24] + struct.pack("<L", 2**32 - 2) + content[place + 28 :])
    assert set(prepare(folder, "photos.zip", alone=True)) == {"nested.png"}


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
def test_params_that_are_made_to_do_harm_are_refused(tmp_path: Path, case: str) -> None:
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
def test_params_that_are_no_file_are_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
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


def test_a_long_mistake_is_shown_in_short(tmp_path: Path) -> None:
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
def test_a_state_of_no_step_is_put_aside(tmp_path: Path, info: dict[str, Any]) -> None:
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


@pytest.mark.parametrize("case", ARRAYS)
@pytest.mark.parametrize("file", ["labels.npy", "images-00000.npy"])
def test_arrays_that_declare_what_is_not_there_are_refused(prepared: Experiment, file: str, case: str) -> None:
    data = prepared.path("results", "data")
    put(data / file, ARRAYS[case])
    with pytest.raises(UserError, match=rf"(?s){file} .*run `maskdm prepare` again"):
        ImageArrays.open(data)


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
def test_descriptions_that_are_nested_without_end_are_damaged_ones(
    prepared: Experiment, place: str, content: str
) -> None:
    put(prepared.path(place), content.encode())
    outcome = victim(prepared.folder, "pretrain", "--arm", ARM, "--seed", "0", alone=False)
    assert (outcome.code, Path(place).parts[1] in outcome.err) == (1, True)
    with contextlib.chdir(prepared.folder), pytest.raises(UserError, match="can't be read"):
        read_json(Path(place), "prepare")


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_nonsense_in_a_work_folder_is_nobodys_work(prepared: Experiment, content: str) -> None:
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
def test_work_that_counts_in_words_is_begun_anew(prepared: Experiment, change: dict[str, Any]) -> None:
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
