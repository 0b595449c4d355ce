"""Images from folders and archives: decoding, order, labels, bad images, and what the user is told."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_folder
from maskdm.config import DatasetConfig
from maskdm.data.arrays import ImageArrays
from maskdm.data.decoding import AHEAD_PER_THREAD, BadImageError, decode, map_in_order
from maskdm.data.image_folder import labels_from_folders
from maskdm.data.prepare import check_apart, prepare
from tests.factories import data_params

SIZE = 8


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(root: str | Path, threads: int = 1, output: str = "out", **dataset: Any) -> dict[str, Any]:
    given = {"source": "image_folder", "root": str(root), "image_size": SIZE, "channels": 3, **dataset}
    params = data_params(given, threads=threads)
    check_apart(params, Path(output))
    with publish_folder(Path(output)) as folder:
        return prepare(params, folder)


def config(**changes: Any) -> DatasetConfig:
    return DatasetConfig(
        **{"source": "image_folder", "root": "x", "image_size": SIZE, "channels": 3, "crop": "none", **changes}
    )


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def noise(seed: int = 0, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(seed: int = 0, kind: str = "PNG") -> bytes:
    return encode(Image.fromarray(noise(seed)), kind)


def put(path: str, content: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def make_folder(root: str = "photos") -> dict[str, bytes]:
    """Two classes of three images under `train/`, as folder; returns the files."""
    files = {f"train/{name}/{i}.png": picture(seed) for seed, (name, i) in enumerate(
        (name, i) for name in ("cat", "Dog") for i in (10, 9, 2)
    )}  # fmt: skip
    for name, content in files.items():
        put(f"{root}/{name}", content)
    return files


def make_tar(path: str, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def make_zip(path: str, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def shuffled(files: dict[str, bytes]) -> dict[str, bytes]:
    items = list(files.items())
    random.Random(1).shuffle(items)
    return dict(items)


# --- decoding


def test_images_of_the_right_size_are_not_touched() -> None:
    np.testing.assert_array_equal(decode(picture(3), config()), noise(3))
    jpeg = encode(Image.fromarray(noise(4)), "JPEG", quality=90)
    np.testing.assert_array_equal(decode(jpeg, config()), np.asarray(Image.open(io.BytesIO(jpeg))))


@pytest.mark.parametrize("name", ["lanczos", "bicubic"])
def test_resizing_is_pillows_antialiased(name: str) -> None:
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    board = Image.fromarray(checkers.astype(np.uint8))
    small = decode(encode(board), config(channels=1, resize_filter=name))
    assert np.abs(small.astype(int) - 127.5).max() < 10  # without antialiasing: black and white
    other = Image.fromarray(noise(0, 40, 30))
    expected = other.resize((SIZE, SIZE), Image.Resampling[name.upper()])
    np.testing.assert_array_equal(decode(encode(other), config(resize_filter=name)), np.asarray(expected))


def test_crops() -> None:
    wide = noise(0, SIZE, SIZE + 5)
    tall = wide.transpose(1, 0, 2).copy()
    centred = decode(encode(Image.fromarray(wide)), config(crop="center"))
    np.testing.assert_array_equal(centred, wide[:, 2 : 2 + SIZE])
    centred = decode(encode(Image.fromarray(tall)), config(crop="center"))
    np.testing.assert_array_equal(centred, tall[2 : 2 + SIZE])
    stretched = np.asarray(Image.fromarray(wide).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(decode(encode(Image.fromarray(wide)), config(crop="none")), stretched)


def test_pixels_outside_the_crop_do_not_bleed_in() -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    assert (decode(encode(Image.fromarray(pixels)), config(crop="center")) == 255).all()


def test_grey_to_rgb_and_back() -> None:
    grey = noise()[..., 0]
    rgb = decode(encode(Image.fromarray(grey)), config(channels=3))
    np.testing.assert_array_equal(rgb, grey[..., None].repeat(3, axis=2))
    back = decode(encode(Image.fromarray(rgb)), config(channels=1))
    np.testing.assert_array_equal(back[..., 0], grey)


def test_grey_is_luma() -> None:
    pixels = noise()
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    grey = decode(encode(Image.fromarray(pixels)), config(channels=1))
    assert np.abs(grey[..., 0] - luma).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_range(kind: str) -> None:
    values = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    grey = decode(encode(Image.fromarray(values), kind), config(channels=1))
    np.testing.assert_array_equal(grey[..., 0], np.floor(values / 257 + 0.5))


def test_transparency_is_laid_over_white() -> None:
    pixels = np.dstack([noise(), np.full((SIZE, SIZE), 255, np.uint8)])
    pixels[0], pixels[1, :, 3] = (10, 20, 30, 0), 128
    out = decode(encode(Image.fromarray(pixels)), config())
    assert (out[0] == 255).all()
    assert np.abs(out[1] - (pixels[1, :, :3] * 128.0 + 255 * 127.0) / 255).max() <= 1
    np.testing.assert_array_equal(out[2:], pixels[2:, :, :3])


def test_transparent_palette() -> None:
    image = Image.new("P", (SIZE, SIZE), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.paste(0, (0, 0, SIZE, 1))
    out = decode(encode(image, transparency=0), config())
    assert (out[0] == 255).all()
    assert (out[1:] == [200, 100, 50]).all()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "PNG"), ("L", "PGM"), ("LA", "PNG"), ("P", "GIF"), ("P", "BMP"), ("RGBA", "WEBP"),
        ("RGBA", "TIFF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("RGB", "PPM"),
        ("RGB", "WEBP"), ("RGB", "BMP"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_white_is_white_in_every_mode(mode: str, kind: str, channels: int) -> None:
    image = Image.new("RGB", (20, 12), "white").convert(mode)
    content = encode(image, "PPM" if kind == "PGM" else kind)
    out = decode(content, config(channels=channels))
    assert out.shape == (SIZE, SIZE, channels)
    assert out.min() >= 253


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind: str) -> None:
    pixels = np.zeros((SIZE, 2 * SIZE, 3), np.uint8)
    pixels[:, SIZE:] = 255  # black left, white right; orientation 6: to be turned right by a quarter
    exif = Image.Exif()
    exif[274] = 6
    out = decode(encode(Image.fromarray(pixels), kind, exif=exif), config())
    assert out[: SIZE // 2 - 1].max() < 60  # black on top
    assert out[SIZE // 2 + 1 :].min() > 195


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    out = decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), config())
    assert (out == [255, 0, 0]).all()


# --- folders and archives


@pytest.mark.parametrize(
    ("ending", "threads"), [("tar", 1), ("tar", 3), ("tar.gz", 1), ("tar.xz", 1), ("tar.bz2", 1), ("zip", 3)]
)
def test_archives_equal_the_folder(ending: str, threads: int) -> None:
    files = make_folder()
    if ending == "zip":
        make_zip("photos.zip", shuffled(files))
    else:
        make_tar(f"photos.{ending}", shuffled(files), f"w:{ending[4:]}")
    from_folder = run("photos", output="folder", shard_images=4)
    from_archive = run(f"photos.{ending}", threads, output="archive", shard_images=4)
    assert from_folder["source"].pop("root") == "photos"
    assert from_archive["source"].pop("root") == f"photos.{ending}"
    assert from_archive == from_folder
    for path in Path("folder").glob("*.npy"):
        assert (Path("archive") / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in Path("archive").iterdir()} == {path.name for path in Path("folder").iterdir()}


def test_order_is_that_of_the_path_strings() -> None:
    names = ["b/1.png", "a/2.PNG", "a/10.png", "a-b/1.Png", "A/9.png"]
    for seed, name in enumerate(names):
        put(f"photos/{name}", picture(seed))
    run("photos")
    images = ImageArrays.open(Path("out")).all()
    expected = [names.index(name) for name in sorted(names)]
    np.testing.assert_array_equal(images, np.stack([noise(seed) for seed in expected]))


def test_labels_of_class_folders() -> None:
    make_folder()
    manifest = run("photos")
    arrays = ImageArrays.open(Path("out"))
    assert arrays.class_names == ("Dog", "cat")
    assert arrays.labels is not None
    assert arrays.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert manifest["protocol"] == {
        "crop": "center", "crop_box": None, "resize_filter": "lanczos", "channels": 3, "image_size": SIZE,
        "pillow": PIL.__version__,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (["b/1.png", "a/1.png"], ("a", "b"), [1, 0]),
        (["x/y/b/1.png", "x/y/a/1.png"], ("a", "b"), [1, 0]),
        (["b/deep/1.png", "b/2.png", "a/x/y/1.png"], ("a", "b"), [1, 1, 0]),
        (["a/1.png", "ab/1.png"], ("a", "ab"), [0, 1]),
        (["1.png", "2.png"], None, []),
        (["a/1.png", "a/2.png"], None, []),
        (["a/1.png", "b/1.png", "1.png"], None, []),
        (["x/a/1.png", "x/b/1.png", "x/1.png"], None, []),
        (["x/1.png"], None, []),
    ],
)
def test_label_rules(names: list[str], classes: tuple[str, ...] | None, labels: list[int]) -> None:
    class_names, found = labels_from_folders(names)
    assert class_names == classes
    assert (found is None) == (classes is None)
    assert ([] if found is None else found.tolist()) == labels


def test_limit_keeps_the_classes() -> None:
    make_folder()
    run("photos", limit=2)
    arrays = ImageArrays.open(Path("out"))
    assert (len(arrays), arrays.class_names) == (2, ("Dog", "cat"))


def test_junk_and_hidden_files_are_ignored() -> None:
    files = make_folder()
    junk = [
        "__MACOSX/train/cat/1.png",
        "train/cat/._1.png",
        ".hidden/1.png",
        "train/.DS_Store",
        "readme.txt",
    ]
    for name in junk:
        put(f"photos/{name}", b"junk")
    everything = {name: (Path("photos") / name).read_bytes() for name in [*junk, *files]}
    make_tar("photos.tar", everything)
    make_zip("photos.zip", everything)
    manifests = [run(root) for root in ("photos", "photos.tar", "photos.zip")]
    assert {(m["count"], m["sha256"]) for m in manifests} == {(6, manifests[0]["sha256"])}


def test_names_with_dots_slashes_and_backslashes() -> None:
    files = make_folder()
    make_tar("dot.tar.gz", {f"./{name}": content for name, content in shuffled(files).items()}, "w:gz")
    make_tar("root.tar", {f"/{name}": content for name, content in files.items()})
    make_zip("windows.zip", {name.replace("/", "\\"): content for name, content in files.items()})
    expected = run("photos")["sha256"]
    assert [run(root)["sha256"] for root in ("dot.tar.gz", "root.tar", "windows.zip")] == [expected] * 3


def test_archives_read_regular_members_alone() -> None:
    put("outside.png", picture(99))
    with tarfile.open("photos.tar", "w") as tar:
        for kind, name in [
            (tarfile.SYMTYPE, "a/s.png"),
            (tarfile.LNKTYPE, "b/h.png"),
            (tarfile.FIFOTYPE, "b/f.png"),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../outside.png"
            tar.addfile(member)
        tar.add("outside.png", "../up.png")
        tar.add("outside.png", "a/1.png")
    with zipfile.ZipFile("photos.zip", "w") as archive:
        link = zipfile.ZipInfo("a/s.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "../outside.png")
        archive.write("outside.png", "../up.png")
        archive.write("outside.png", "a/1.png")
    assert run("photos.tar")["count"] == 1
    assert run("photos.zip")["count"] == 1
    assert {path.name for path in Path().iterdir()} <= {
        "outside.png",
        "photos.tar",
        "photos.zip",
        "out",
        "results",
    }


def test_links_in_a_folder_are_followed_once() -> None:
    make_folder()
    put("elsewhere/1.png", picture(50))
    Path("photos/train/linked").symlink_to(Path("elsewhere").absolute(), target_is_directory=True)
    Path("photos/train/cat/loop").symlink_to(Path("photos").absolute(), target_is_directory=True)
    Path("elsewhere/back").symlink_to(Path("photos/train/cat").absolute(), target_is_directory=True)
    manifest = run("photos")
    assert manifest["labels"]["class_names"] == ["Dog", "cat", "linked"]
    assert manifest["count"] == 6 + 1 + 3  # `linked` holds an image and `back`, which is `cat` again


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_of_equal_names_the_last_counts(mode: str) -> None:
    with tarfile.open("photos.tar", mode) as archive:  # type: ignore[call-overload]
        for seed, name in [(1, "b.png"), (2, "a.png"), (3, "b.png")]:
            member = tarfile.TarInfo(name)
            member.size = len(picture(seed))
            archive.addfile(member, io.BytesIO(picture(seed)))
    run("photos.tar")
    np.testing.assert_array_equal(ImageArrays.open(Path("out")).all(), np.stack([noise(2), noise(3)]))


def test_no_space_to_decompress_a_tar_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tar("photos.tar.gz", make_folder(), "w:gz")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", refuse)
    with pytest.raises(UserError, match=r"cannot read photos\.tar\.gz into a temporary file in .* \(set TMPDIR"):
        run("photos.tar.gz")


def test_threads_read_only_a_little_ahead() -> None:
    read: list[int] = []
    items = (read.append(i) or i for i in range(1000))  # type: ignore[func-returns-value]
    results = map_in_order(lambda i: -i, items, 2)
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    assert len(read) <= 3 + 2 * AHEAD_PER_THREAD
    assert list(results) == [-i for i in range(3, 1000)]


# --- bad images


def huge_header() -> bytes:
    """A PNG that declares 10^10 pixels and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def truncated_jpeg() -> bytes:
    content = encode(Image.fromarray(noise(0, 64, 64)), "JPEG")
    return content[: len(content) // 2]


BAD = {
    "truncated.jpg": (truncated_jpeg(), "image file is truncated"),
    "text.jpg": (b"not found\n" * 100, "not an image of a known format, or its header is damaged"),
    "empty.png": (b"", "the file is empty"),
    "bomb.png": (huge_header(), "100000×100000 pixels are more than dataset.max_pixels 64000000"),
    "float.tif": (encode(Image.new("F", (9, 9)), "TIFF"), "floating-point pixels"),
    "deep.tif": (
        encode(Image.new("I", (9, 9), 70000), "TIFF"),
        "values from 70000 to 70000; expected 8 or 16",
    ),
}
BUILDERS: dict[str, Callable[[dict[str, bytes]], None]] = {
    "photos": lambda files: [put(f"photos/{name}", content) for name, content in files.items()] and None,
    "photos.tar": lambda files: make_tar("photos.tar", files),
    "photos.tar.gz": lambda files: make_tar("photos.tar.gz", files, "w:gz"),
    "photos.zip": lambda files: make_zip("photos.zip", files),
}


@pytest.mark.parametrize(
    ("root", "name"), [*(("photos", name) for name in BAD), *((root, "text.jpg") for root in BUILDERS if "." in root)]
)
def test_a_bad_image_is_named(root: str, name: str) -> None:
    content, reason = BAD[name]
    BUILDERS[root]({"z/ok.png": picture(), f"a/{name}": content})
    with pytest.raises(UserError) as caught:
        run(root)
    where = f"{root}/a/{name}" if root == "photos" else f"a/{name} in {root}"
    assert str(caught.value).startswith(f"bad image {where}: {reason}")
    assert "dataset.on_bad_image: skip" in str(caught.value)
    assert not Path("out").exists()


@pytest.mark.parametrize("root", BUILDERS)
def test_skipped_images_are_recorded_and_reported(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"z/ok.png": picture(1), "a/ok.png": picture(2)}
    BUILDERS[root]({**good, **{f"a/{name}": content for name, (content, _) in BAD.items()}})
    manifest = run(root, threads=2, on_bad_image="skip")
    assert [entry["file"] for entry in manifest["skipped"]] == sorted(f"a/{name}" for name in BAD)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    for entry, warning in zip(manifest["skipped"], warnings, strict=True):
        assert entry["reason"].startswith(BAD[entry["file"][2:]][1])
        assert "0x" not in entry["reason"]  # no address of an object: the manifest is deterministic
        assert entry["file"] in warning
        assert entry["reason"] in warning
    arrays = ImageArrays.open(Path("out"))
    np.testing.assert_array_equal(arrays.all(), np.stack([noise(2), noise(1)]))
    assert arrays.labels is not None
    assert arrays.labels.tolist() == [0, 1]


def test_all_bad() -> None:
    put("photos/1.png", b"")
    put("photos/2.png", b"text")
    with pytest.raises(UserError, match=r"all 2 images of photos are bad; the first is 1\.png: the file is empty"):
        run("photos", on_bad_image="skip")


@pytest.mark.parametrize(("limit", "fits"), [(200_000_000, True), (63, False), (64, True)])
def test_max_pixels_alone_decides(monkeypatch: pytest.MonkeyPatch, limit: int, fits: bool) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow would warn from here and refuse twice as many
    put("photos/1.png", picture())
    if fits:
        assert run("photos", max_pixels=limit)["count"] == 1
    else:
        with pytest.raises(UserError, match=r"8×8 pixels are more than dataset\.max_pixels 63"):
            run("photos", max_pixels=limit)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_zip_that_lies_about_sizes_is_not_unpacked() -> None:
    make_zip("photos.zip", {"1.png": bytes(50_000_000), "2.png": picture()})
    content = bytearray(Path("photos.zip").read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 24, 100)
    Path("photos.zip").write_bytes(content)
    tracemalloc.start()
    try:
        assert run("photos.zip", on_bad_image="skip")["count"] == 1
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_damaged_and_encrypted_zip_members() -> None:
    make_zip("photos.zip", {"1.png": picture(1), "2.png": picture(2)})
    content = bytearray(Path("photos.zip").read_bytes())
    content[60] ^= 255  # within the first member's data
    Path("damaged.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"bad image 1\.png in damaged\.zip: "):
        run("damaged.zip")
    assert run("damaged.zip", on_bad_image="skip")["count"] == 1
    content = bytearray(Path("photos.zip").read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    Path("secret.zip").write_bytes(content)
    with pytest.raises(UserError, match="encrypted"):
        run("secret.zip")


def test_a_failed_run_leaves_the_old_dataset() -> None:
    make_folder()
    before = run("photos")
    put("photos/train/zebra/1.png", b"")
    with pytest.raises(UserError, match="bad image"):
        run("photos")
    assert ImageArrays.open(Path("out")).manifest == before
    assert not list(Path().rglob("*.building"))


# --- error messages about the root


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run("data/photos")
    assert str(caught.value) == f"dataset.root: there is no data/photos (looked for {tmp_path}/data/photos)"


def test_roots_without_images() -> None:
    Path("empty").mkdir()
    put("texts/a/1.txt", b"1")
    put("texts/a/2.txt", b"2")
    put("texts/README", b"3")
    make_tar("texts.tar", {"1.txt": b"1"})
    with pytest.raises(UserError, match=r"no images in empty: looked for \.jpg \.jpeg .* found no files"):
        run("empty")
    with pytest.raises(UserError, match=r"no images in texts: .* found 3 other files \(2 \.txt, 1 no suffix\)"):
        run("texts")
    with pytest.raises(UserError, match=r"no images in texts\.tar: .* found 1 other files \(1 \.txt\)"):
        run("texts.tar")


@pytest.mark.parametrize("content", [b"", b"hello", picture(), bytes(10_000)])
def test_a_root_that_is_not_an_archive(content: bytes) -> None:
    put("photos.tar", content)
    with pytest.raises(UserError, match=r"photos\.tar is neither a folder nor a \.zip.*|no images in photos\.tar"):
        run("photos.tar")


@pytest.mark.parametrize(
    ("name", "mode"), [("p.tar", "w:"), ("p.tar.gz", "w:gz"), ("p.tar.bz2", "w:bz2"), ("p.tar.xz", "w:xz")]
)
@pytest.mark.parametrize("part", [0.1, 0.8])
def test_part_of_a_tar_is_an_error(name: str, mode: str, part: float) -> None:
    rng = random.Random(0)
    make_tar(name, {f"{i}.png": picture(i) + rng.randbytes(2000) for i in range(20)}, mode)
    content = Path(name).read_bytes()
    Path(name).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=rf"{name} is damaged or incomplete|{name} is neither|cannot read {name}"):
        run(name)


def test_a_tar_cut_between_two_members_is_an_error() -> None:
    make_tar("p.tar", {"1.png": picture(1), "2.png": picture(2)})
    with tarfile.open("p.tar") as archive:
        second = archive.getmembers()[1].offset
    Path("p.tar").write_bytes(Path("p.tar").read_bytes()[:second])
    with pytest.raises(UserError, match=r"p\.tar is damaged or incomplete \(no end mark"):
        run("p.tar")


def test_a_damaged_tar_header_does_not_hide_the_rest() -> None:
    make_tar("p.tar", {"1.png": picture(1), "2.png": picture(2)})
    with tarfile.open("p.tar") as archive:
        second = archive.getmembers()[1].offset
    content = bytearray(Path("p.tar").read_bytes())
    content[second] ^= 255
    Path("p.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"p\.tar is damaged or incomplete"):
        run("p.tar")


def test_part_of_a_zip_is_an_error() -> None:
    make_zip("p.zip", {"1.png": picture(1), "2.png": picture(2)})
    Path("p.zip").write_bytes(Path("p.zip").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"p\.zip is neither a folder nor"):
        run("p.zip")


@pytest.mark.parametrize(("owner", "function"), [(os, "scandir"), (Path, "read_bytes"), (tarfile, "open")])
def test_no_permission(monkeypatch: pytest.MonkeyPatch, owner: Any, function: str) -> None:
    make_tar("photos.tar", make_folder())

    def refuse(path: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(owner, function, refuse)
    root = "photos.tar" if owner is tarfile else "photos"
    with pytest.raises(UserError, match=rf"cannot read {root}.*: Permission denied"):
        run(root, on_bad_image="skip")


def test_a_broken_link_is_an_error() -> None:
    make_folder()
    Path("photos/train/cat/0.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot read photos/train/cat/0\.png: No such file"):
        run("photos", on_bad_image="skip")


@pytest.mark.parametrize("root", [".", "results"])
def test_a_root_that_holds_the_output_is_refused(root: str) -> None:
    put("results/1.png", picture())
    with pytest.raises(UserError, match=r"holds results/data too: give your images a folder of their own"):
        run(root, output="results/data")


def test_a_file_that_makes_the_decoder_fail_oddly(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise IndexError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(BadImageError, match="IndexError"):
        decode(picture(), config())


def test_a_crop_box_keeps_exactly_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    put("photos/1.png", encode(Image.fromarray(pixels)))
    run("photos", crop="box", crop_box=[5, 11, SIZE])
    kept = ImageArrays.open(Path("out")).all()[0]
    assert np.array_equal(kept, pixels[5 : 5 + SIZE, 11 : 11 + SIZE])


def test_an_image_that_does_not_hold_the_crop_box_is_bad() -> None:
    put("photos/1.png", picture())
    with pytest.raises(UserError, match=r"1\.png.*do not hold dataset\.crop_box \(top 5, left 1000"):
        run("photos", crop="box", crop_box=[5, 1000, SIZE])


def test_files_that_are_no_images_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    make_folder()
    for name in ("a.avif", "b.AVIF", "c.heic", "README"):
        put(f"photos/train/cat/{name}", b"")
    put("photos/train/cat/d.jfif", encode(Image.open(io.BytesIO(picture(7))), "JPEG"))
    put("photos/train/cat/e.JPE", encode(Image.open(io.BytesIO(picture(8))), "JPEG"))
    manifest = run("photos")
    assert manifest["count"] == 8, ".jfif and .jpe are JPEG"
    said = "4 files left out: 2 .avif, 1 .heic, 1 no suffix"
    assert f"warning: photos: {said}\n" in capsys.readouterr().err
    assert manifest["source"]["left_out"] == said


@pytest.mark.parametrize(("names", "offered"), [(("train", "test"), "train"), (("Validation", "Training"), "Training")])
def test_folders_that_are_parts_of_a_dataset_are_not_classes(names: tuple[str, ...], offered: str) -> None:
    for name in names:
        for kind in ("cat", "dog"):
            put(f"photos/{name}/{kind}/1.png", picture(1))
    with pytest.raises(UserError, match=rf"look like the parts of a dataset.*e\.g\. root: photos/{offered}, or rename"):
        run("photos")
    assert run(f"photos/{offered}")["labels"]["class_names"] == ["cat", "dog"]
