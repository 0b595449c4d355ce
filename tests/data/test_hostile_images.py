"""Images, folders and archives from anybody, made to do harm.

What could fill the memory, or never end, is given to the command line in a process of its own (`alone`).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import socket
import struct
import subprocess
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from maskdm.base.errors import printable
from maskdm.data.arrays import ImageArrays
from tests.alone import put, victim
from tests.conftest import TINY


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
    put(folder / "photos" / "good.png", GOOD)
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
    put(folder / "photos" / "good.png", GOOD)
    put(folder / "photos" / "real.png", BOMBS["real.png"][0]())
    assert "bad image photos/real.png: 20000×20000 pixels are more than" in refusal(folder, alone=True)


def test_an_image_too_large_for_memory_is_named(folder: Path) -> None:
    put(folder / "photos" / "good.png", GOOD)
    put(folder / "photos" / "large.png", BOMBS["real.png"][0]())
    said = refusal(folder, alone=True, max_pixels=10**9, channels=3)
    assert "too little memory to decode photos/large.png: lower compute.threads, or lower dataset.max_pixels" in said


# --- folders


def test_pipes_sockets_and_devices_are_left_out(folder: Path) -> None:
    put(folder / "photos" / "a" / "good.png", GOOD)
    put(folder / "photos" / "a" / "other.png", GOOD)
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
    put(folder / "photos" / "good.png", GOOD)
    (folder / "photos" / "loop.png").symlink_to("loop.png")
    assert "cannot read photos/loop.png: Too many levels of symbolic links" in refusal(folder)


@pytest.mark.parametrize("root", ["pipe", "/dev/zero"])
def test_a_root_that_is_a_pipe_or_device_is_refused(folder: Path, root: str) -> None:
    os.mkfifo(folder / "pipe")
    assert f"dataset.root: {root} is neither a folder nor a file, but a pipe, socket or device" in refusal(
        folder, root, alone=True
    )


def test_deep_folders_are_read(folder: Path) -> None:
    place = folder / "photos"
    for _ in range(1100):
        place.mkdir()
        place = place / "d"
    put(place / "good.png", GOOD)
    put(place / "other.png", GOOD)
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
def test_names_with_control_characters_are_escaped_and_recorded(folder: Path, root: str) -> None:
    members = dict.fromkeys(STRANGE, b"text") | {f"{ESCAPES}/good.png": GOOD, "z/good.png": GOOD}
    if root == "photos":
        for name, content in members.items():
            put(folder / root / name, content)
        put(folder / root / os.fsdecode(b"b\xff") / os.fsdecode(b"\xfe.png"), b"text")
        put(folder / root / os.fsdecode(b"b\xff") / "good.png", GOOD)
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
