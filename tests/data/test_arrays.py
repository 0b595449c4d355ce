"""The arrays on disk, the digits, grids, and the stage that writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maskdm.base.checksums import checked, with_checksum
from maskdm.base.errors import UserError
from maskdm.config import Params
from maskdm.data.arrays import ImageArrays, ShardWriter
from maskdm.data.grids import GAP, save_grid
from maskdm.data.prepare import prepare
from tests.factories import data_params

SHAPE = (2, 3, 3)


def make_params(threads: int = 1, **dataset: Any) -> Params:
    return data_params({"source": "digits", "image_size": 8, "channels": 3, **dataset}, threads=threads)


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def write(folder: Path, images: np.ndarray, shard_images: int = 4, labelled: bool = True) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, SHAPE, shard_images)
    for index, image in enumerate(images):
        writer.add(image, index % 2 if labelled else None)
    return writer.finish(("even", "odd") if labelled else None, {"kind": "test"}, {}, [])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageArrays, np.ndarray]:
    folder, images = tmp_path_factory.mktemp("many"), random_images(23)
    write(folder, images)
    return ImageArrays.open(folder), images


@pytest.mark.parametrize(("count", "shards"), [(1, [1]), (3, [3]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (10, [4, 4, 2])])
def test_shards_hold_every_image_once(tmp_path: Path, count: int, shards: list[int]) -> None:
    images = random_images(count)
    manifest = write(tmp_path, images)
    arrays = ImageArrays.open(tmp_path)
    assert [shard["count"] for shard in manifest["shards"]] == shards
    assert [len(np.load(tmp_path / shard["file"])) for shard in manifest["shards"]] == shards
    assert len(arrays) == count
    assert arrays.shape == SHAPE
    np.testing.assert_array_equal(arrays.all(), images)
    arrays.verify()


@given(indices=st.lists(st.integers(0, 22), max_size=40))
def test_gather_is_indexing(many: tuple[ImageArrays, np.ndarray], indices: list[int]) -> None:
    arrays, images = many
    chosen = np.array(indices, dtype=np.int64)
    batch = arrays.gather(chosen)
    assert batch.dtype == np.uint8
    np.testing.assert_array_equal(batch, images[chosen])


@pytest.mark.parametrize("indices", [[23], [0, -1]])
def test_gather_refuses_indices_outside(many: tuple[ImageArrays, np.ndarray], indices: list[int]) -> None:
    with pytest.raises(IndexError, match=r"expected indices in \[0, 23\)"):
        many[0].gather(np.array(indices))


def test_labels(tmp_path: Path) -> None:
    write(tmp_path / "with", random_images(5))
    write(tmp_path / "without", random_images(5), labelled=False)
    labelled, plain = ImageArrays.open(tmp_path / "with"), ImageArrays.open(tmp_path / "without")
    assert labelled.labels is not None
    assert labelled.labels.dtype == np.int64
    assert labelled.labels.tolist() == [0, 1, 0, 1, 0]
    assert (labelled.class_names, labelled.num_classes) == (("even", "odd"), 2)
    assert (plain.labels, plain.class_names, plain.num_classes) == (None, (), 0)
    assert labelled.sha256 != plain.sha256


def test_digest_follows_pixels_and_labels_alone(tmp_path: Path) -> None:
    images = random_images(5)
    changed = images.copy()
    changed[4, 0, 0, 0] ^= 1
    one = write(tmp_path / "one", images)
    same = write(tmp_path / "same", images)
    other = write(tmp_path / "other", changed)
    assert one == same
    assert one["sha256"] != other["sha256"]
    assert one["shards"][0] == other["shards"][0]
    assert one["shards"][1]["sha256"] != other["shards"][1]["sha256"]


@pytest.mark.parametrize("image", [np.zeros((3, 2, 3), np.uint8), np.zeros(SHAPE, np.float32)])
def test_writer_refuses_other_images(tmp_path: Path, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 of shape \(2, 3, 3\)"):
        ShardWriter(tmp_path, SHAPE, 4).add(image)


@pytest.mark.parametrize("folder", ["missing", ""])
def test_no_dataset_names_the_command(tmp_path: Path, folder: str) -> None:
    with pytest.raises(UserError, match=r"there is no dataset in .*`maskdm prepare` makes it"):
        ImageArrays.open(tmp_path / folder)


def _edit(folder: Path, **changes: Any) -> None:
    """Change a manifest, as whoever makes its checksum right can."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(with_checksum({**checked(json.loads(path.read_text())), **changes})))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _cut(f / "manifest.json"), "manifest.json is not a complete .* manifest .*Expecting"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is not a complete"),
        (
            lambda f: _edit(f, format="maskdm-arrays/9"),
            "manifest.json is not a .*its format is maskdm-arrays/9",
        ),
        (lambda f: _edit(f, shards=[{}]), "manifest.json is not a complete .*'file'"),
        (lambda f: _edit(f, shape=[2, 3]), r"images-00000.npy holds uint8 of shape \(4, 2, 3, 3\)"),
        (lambda f: (f / "images-00001.npy").unlink(), "images-00001.npy is missing"),
        (lambda f: _cut(f / "images-00001.npy"), "images-00001.npy cannot be read or is cut off"),
        (
            lambda f: (f / "images-00001.npy").write_bytes(b""),
            "images-00001.npy cannot be read or is cut off",
        ),
        (
            lambda f: np.save(f / "images-00001.npy", np.zeros((4, 2, 2, 3), np.uint8)),
            r"images-00001.npy holds uint8 of shape \(4, 2, 2, 3\), expected uint8 of \(4, 2, 3, 3\)",
        ),
        (lambda f: (f / "labels.npy").unlink(), "labels.npy is missing"),
        (
            lambda f: np.save(f / "labels.npy", np.zeros(9, np.int64)),
            r"labels.npy holds int64 of shape \(9,\)",
        ),
        (lambda f: np.save(f / "labels.npy", np.full(10, 2)), r"labels.npy holds labels outside \[0, 2\)"),
    ],
)
def test_damage_names_the_file_and_the_remedy(tmp_path: Path, damage: Any, message: str) -> None:
    write(tmp_path, random_images(10))
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        ImageArrays.open(tmp_path)
    assert f"remove {tmp_path} and run `maskdm prepare` again" in str(caught.value)


@pytest.mark.parametrize("name", ["images-00002.npy", "labels.npy"])
def test_verify_finds_one_flipped_bit(tmp_path: Path, name: str) -> None:
    write(tmp_path, random_images(10))
    content = bytearray((tmp_path / name).read_bytes())
    content[-8] ^= 1
    (tmp_path / name).write_bytes(content)
    arrays = ImageArrays.open(tmp_path)  # does not hash
    with pytest.raises(UserError, match=rf"{name} is not the file that was written"):
        arrays.verify()


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path, random_images(3))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"even",', '"evil",'))
    with pytest.raises(UserError, match=r"manifest\.json .* the checksum differs"):
        ImageArrays.open(tmp_path)


def test_digits(tmp_path: Path) -> None:
    manifest = prepare(make_params(channels=1, shard_images=1000), tmp_path / "data")
    arrays = ImageArrays.open(tmp_path / "data")
    images = arrays.all()
    assert images.shape == (1797, 8, 8, 1)
    expected = {int(np.floor(v * 255 / 16 + 0.5)) for v in range(17)}
    assert set(np.unique(images).tolist()) == expected
    # the set's first image: a zero whose first row is 0 0 5 13 9 1 0 0
    assert images[0, 0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert arrays.labels is not None
    assert arrays.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert arrays.class_names == tuple("0123456789")
    assert [shard["count"] for shard in manifest["shards"]] == [1000, 797]
    assert manifest["source"] == {
        **{"kind": "digits", "root": None, "part": "train", "split": None, "classes": None, "limit": None},
        **{"fraction": None, "held_out": 0.0, "seed": 0},
        "counts": {"available": 1797, "of_classes": 1797, "used": 1797, "held_out": 0},
    }
    assert manifest["skipped"] == []
    arrays.verify()


def test_digits_in_three_channels_and_another_size(tmp_path: Path) -> None:
    prepare(make_params(channels=1, limit=20), tmp_path / "grey")
    prepare(make_params(channels=3, limit=20), tmp_path / "rgb")
    prepare(make_params(channels=1, limit=20, image_size=16, resize_filter="bicubic"), tmp_path / "large")
    grey, rgb, large = (ImageArrays.open(tmp_path / name).all() for name in ("grey", "rgb", "large"))
    np.testing.assert_array_equal(rgb, grey.repeat(3, axis=3))
    reference = Image.fromarray(grey[3, ..., 0]).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(large[3, ..., 0], np.asarray(reference))


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    files = []
    for place in ("here", "there"):
        prepare(make_params(limit=100, shard_images=30), tmp_path / place)
        files.append({path.name: path.read_bytes() for path in (tmp_path / place).iterdir()})
    assert files[0] == files[1]
    shards = {f"images-0000{number}.npy" for number in range(4)}
    assert set(files[0]) == shards | {"labels.npy", "manifest.json", "preview.png"}


def test_preview_shows_images_from_the_first_to_the_last(tmp_path: Path) -> None:
    prepare(make_params(channels=1), tmp_path / "data")
    images = ImageArrays.open(tmp_path / "data").all()
    preview = np.asarray(Image.open(tmp_path / "data" / "preview.png"))
    assert preview.shape == (8 * (64 + GAP) + GAP, 8 * (64 + GAP) + GAP)
    for cell, index in ((0, 0), (10, round(10 * (len(images) - 1) / 63)), (63, len(images) - 1)):
        top, left = (GAP + place * (64 + GAP) for place in divmod(cell, 8))
        np.testing.assert_array_equal(preview[top : top + 64 : 8, left : left + 64 : 8], images[index, ..., 0])


def test_grid_of_large_and_few_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 300, 400, 3), dtype=np.uint8)
    save_grid(images, tmp_path / "grid.png", columns=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * (300 + GAP) + GAP, 2 * (400 + GAP) + GAP, 3)  # wide enough: not enlarged
    np.testing.assert_array_equal(grid[GAP + 300 + GAP : -GAP, GAP : GAP + 400], images[2])
    assert (grid[GAP + 300 + GAP :, GAP + 400 + GAP :] == 255).all()  # the place of the fourth


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (1, 8, 8, 2), (8, 8, 3)])
def test_grid_refuses_other_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        save_grid(np.zeros(shape, np.uint8), tmp_path / "grid.png")
