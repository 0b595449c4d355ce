"""Datasets by name, from files in their authors' formats; selection of images; error messages.

torchvision checks compressed and downloaded files against the md5 of the real ones; here, of made-up ones.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from maskdm.base.errors import ParamsError, UserError
from maskdm.base.publishing import publish_folder
from maskdm.base.torchvision_compat import declare_missing_operators
from maskdm.config import Params
from maskdm.config.schema import SOURCES, SPLITS
from maskdm.data.arrays import ImageArrays
from maskdm.data.opening import OPENERS, open_collection
from maskdm.data.prepare import check_apart, prepare
from maskdm.data.selection import _drawn
from tests.factories import data_params

declare_missing_operators()
from torchvision import datasets as torchvision_datasets  # noqa: E402

OUT = Path("out")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def params(datasets: dict[str, Any] | None = None, threads: int = 1, **dataset: Any) -> Params:
    return data_params({"channels": 3, **dataset}, datasets, threads)


def prepared(**given: Any) -> ImageArrays:
    """What `prepare` makes of a dataset; nothing is left where nothing is made."""
    before = set(Path().rglob("*"))
    try:
        check_apart(params(**given), OUT)
        with publish_folder(OUT) as folder:
            prepare(params(**given), folder)
    except UserError as error:
        assert not OUT.exists()
        left = set(Path().rglob("*")) - before
        assert not any(path.is_file() for path in left), f"left behind: {left}"
        assert "\n" not in str(error)
        raise
    arrays = ImageArrays.open(OUT)
    arrays.verify()
    return arrays


def labels_of(arrays: ImageArrays) -> list[int]:
    assert arrays.labels is not None
    return list(map(int, arrays.labels))


def pixels(number: int, seed: int = 0, shape: tuple[int, ...] = (28, 28)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, *shape), dtype=np.uint8)


def encode(image: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=kind, **options)
    return file.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def put(path: str | Path, content: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look-up of a name fails, as it does without a network."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network here")

    monkeypatch.setattr("socket.getaddrinfo", fail)


# --- MNIST, Fashion-MNIST and SVHN: torchvision reads, checks and downloads them


def idx(values: np.ndarray) -> bytes:
    """An idx file of bytes: magic number, sizes, values."""
    return struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def make_mnist(folder: str = "data/mnist", suffix: str = "") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both parts as they are distributed, compressed or not; their images and labels."""
    parts = {
        "train": (pixels(7), np.array([3, 1, 4, 1, 5, 9, 2], np.uint8)),
        "t10k": (pixels(3, 1), np.arange(3, dtype=np.uint8)),
    }
    for part, (images, labels) in parts.items():
        for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            put(f"{folder}/{name}{suffix}", gzip.compress(idx(values), mtime=0) if suffix else idx(values))
    return parts


def expect(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Let torchvision take the compressed files of a folder for the real ones."""
    found = [(file.name, md5(file.read_bytes())) for file in sorted(Path(folder).glob("*.gz"))]
    for kind in (torchvision_datasets.MNIST, torchvision_datasets.FashionMNIST):
        monkeypatch.setattr(kind, "resources", found)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", ["", "MNIST/raw/"])
def test_mnist_is_its_files_bit_by_bit(suffix: str, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make_mnist(f"files/{below}", suffix)
    if suffix:
        expect(monkeypatch, f"files/{below}")
    arrays = prepared(source="mnist", root="files", image_size=28, channels=1)
    np.testing.assert_array_equal(arrays.all()[..., 0], parts["train"][0])
    assert labels_of(arrays) == [3, 1, 4, 1, 5, 9, 2]
    assert arrays.class_names == tuple("0123456789")


def test_splits_of_mnist() -> None:
    parts = make_mnist()
    test = prepared(source="mnist", split="test", image_size=28, channels=1).all()[..., 0]
    np.testing.assert_array_equal(test, parts["t10k"][0])
    everything = prepared(source="mnist", split="all", image_size=28, channels=1).all()[..., 0]
    np.testing.assert_array_equal(everything, np.concatenate([parts["train"][0], parts["t10k"][0]]))
    with pytest.raises(ParamsError, match="source mnist has no split 'tset'; expected one of train, test, all"):
        params(source="mnist", split="tset", image_size=28, channels=1)


def test_the_files_of_a_split_are_enough() -> None:
    make_mnist()
    for file in Path("data/mnist").glob("t10k*"):
        file.unlink()
    assert len(prepared(source="mnist", image_size=28, channels=1)) == 7


def test_fashion_mnist_has_the_names_of_its_classes_and_another_size() -> None:
    parts = make_mnist("data/fashion_mnist")
    arrays = prepared(source="fashion_mnist", image_size=32, channels=3)
    assert arrays.class_names[9] == "Ankle boot"
    resized = Image.fromarray(parts["train"][0][2]).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(arrays.all()[2], np.asarray(resized))
    assert arrays.manifest["source"]["root"] == "data/fashion_mnist"


def test_mnist_and_fashion_mnist_share_a_root() -> None:
    make_mnist("files/MNIST/raw")
    expected = pixels(7, 5)
    make_mnist("files/FashionMNIST/raw")
    put("files/FashionMNIST/raw/train-images-idx3-ubyte", idx(expected))
    fashion = prepared(source="fashion_mnist", root="files", image_size=28, channels=1)
    np.testing.assert_array_equal(fashion.all()[..., 0], expected)
    numbers = prepared(source="mnist", root="files", image_size=28, channels=1)
    np.testing.assert_array_equal(numbers.all()[..., 0], pixels(7))
    assert numbers.manifest["source"]["root"] == "files/MNIST/raw"


@pytest.mark.usefixtures("no_network")
def test_mnist_is_not_taken_for_fashion_mnist() -> None:
    make_mnist("files/MNIST/raw")
    with pytest.raises(UserError, match="the files of fashion_mnist are not in files"):
        prepared(source="fashion_mnist", root="files", image_size=28, channels=1)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            LABELS,
            idx(np.zeros(6, np.uint8)),
            r"they hold images \(7, 28, 28\) and 6 labels up to 0; expected images \(N,",
        ),
        (LABELS, idx(np.full(7, 10, np.uint8)), r"7 labels up to 10; expected .* N labels up to 9"),
        (LABELS, idx(np.zeros(7, np.uint8))[:-1], r"invalid for input of size 6"),
        (LABELS, b"", r"\(invalid literal"),
        (LABELS, idx(np.zeros(0, np.uint8)), r"\(offset"),
        (IMAGES, idx(pixels(7)) + b"x", r"invalid for input of size 5489"),
        (IMAGES, idx(pixels(7, shape=(27, 28))), r"they hold images \(7, 27, 28\)"),
        (IMAGES, struct.pack(">4I", 0x0803, 2**32 - 1, 28, 28), r"\(.+\)"),
        (IMAGES, b"<html>not found</html>", r"\(AssertionError\)"),
    ],
)
def test_damaged_files_of_mnist_are_reported(name: str, content: bytes, message: str) -> None:
    make_mnist()
    put(f"data/mnist/{name}", content)
    with pytest.raises(UserError, match=message) as caught:
        prepared(source="mnist", image_size=28, channels=1)
    said = str(caught.value)
    assert said.startswith("dataset.root: the files of mnist in data/mnist are damaged, or can't be read (")
    assert said.endswith(f"): download {IMAGES} and {LABELS} again")


@pytest.mark.usefixtures("no_network")
def test_a_cut_off_gz_of_mnist_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    make_mnist(suffix=".gz")
    expect(monkeypatch, "data/mnist")
    file = Path("data/mnist/train-images-idx3-ubyte.gz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        UserError, match=r"not in data/mnist, or are incomplete .*could not be downloaded \(Error downloading"
    ):
        prepared(source="mnist", image_size=28, channels=1)
    assert file.stat().st_size == 100


@pytest.mark.parametrize(
    ("source", "files", "root"),
    [
        ("mnist", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"], None),
        ("fashion_mnist", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"], "there"),
        ("svhn", ["train_32x32.mat"], None),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_missing_files_are_named_with_their_folder(source: str, files: list[str], root: str | None) -> None:
    with pytest.raises(UserError, match=r"could not be downloaded \(.+\): put ") as caught:
        prepared(source=source, root=root, image_size=8)
    instruction = str(caught.value).split("): put ")[1]
    assert all(file in instruction for file in files)
    assert instruction.endswith(f"into {root or f'data/{source}'}")


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of a folder's files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("is_whole", [True, False])
def test_what_is_downloaded_is_checked(is_whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make_mnist("elsewhere", ".gz")
    expect(monkeypatch, "elsewhere")
    if not is_whole:
        put("elsewhere/train-labels-idx1-ubyte.gz", b"cut")
    with served(Path("elsewhere")) as address:
        monkeypatch.setattr(torchvision_datasets.MNIST, "mirrors", [address])
        if not is_whole:
            with pytest.raises(UserError, match=r"could not be downloaded \(Error downloading train-labels"):
                prepare(params(source="mnist", image_size=28, channels=1), OUT)
            return
        arrays = prepared(source="mnist", image_size=28, channels=1)
    np.testing.assert_array_equal(arrays.all()[..., 0], parts["train"][0])
    again = prepared(source="mnist", image_size=28, channels=1)  # from what was downloaded: the server is gone
    assert again.manifest == arrays.manifest
    assert arrays.manifest["source"]["root"] == "data/mnist/MNIST/raw"


def make_svhn(monkeypatch: pytest.MonkeyPatch, split: str = "train", folder: str = "data/svhn") -> np.ndarray:
    """A file as it is distributed: images (32, 32, 3, N), labels (N, 1) from 1 to 10, which stands for a zero."""
    images = pixels(11, 3, (32, 32, 3))
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder) / f"{split}_32x32.mat"
    labels = np.array([[10, *range(1, 11)]], np.uint8).T
    scipy.io.savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": labels})
    real = torchvision_datasets.SVHN.split_list
    entry = [*real[split][:2], md5(file.read_bytes())]
    monkeypatch.setattr(torchvision_datasets.SVHN, "split_list", {**real, split: entry})
    return images


@pytest.mark.parametrize("split", [None, "test", "extra"])
def test_svhn_is_its_file_bit_by_bit(split: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_svhn(monkeypatch, split or "train")
    arrays = prepared(source="svhn", split=split, image_size=32)
    np.testing.assert_array_equal(arrays.all(), images)
    assert labels_of(arrays) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert arrays.class_names == tuple("0123456789")
    assert arrays.manifest["source"]["root"] == "data/svhn"


@pytest.mark.usefixtures("no_network")
def test_a_damaged_file_of_svhn_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    make_svhn(monkeypatch)
    put("data/svhn/train_32x32.mat", b"cut")
    with pytest.raises(UserError, match=r"files of svhn in data/svhn are damaged, .*: download train_32x32\.mat again"):
        prepared(source="svhn", image_size=32)
    assert Path("data/svhn/train_32x32.mat").read_bytes() == b"cut"


# --- LSUN: an LMDB database of webp or jpeg files by hash

CHURCH = "data/lsun/church_outdoor_train_lmdb"


def make_lsun(number: int = 40, folder: str = CHURCH, kind: str = "WEBP", **environment: Any) -> list[bytes]:
    """A database as LSUN's authors export it, by the lmdb package; its values in the order of their keys."""
    import lmdb

    entries = {}
    for i in range(number):
        side = 16 if i % 3 else 64  # small values lie in the tree's own pages, large ones in pages apart
        content = encode(pixels(1, i, (side, side, 3))[0], kind, quality=90)
        entries[hashlib.sha1(content).hexdigest().encode()] = content
    Path(folder).mkdir(parents=True)
    with lmdb.open(folder, map_size=2**26, **environment) as database:
        for begin in range(0, number, 16):  # several transactions: the descriptions at the file's start take turns
            with database.begin(write=True) as transaction:
                for key in list(entries)[begin : begin + 16]:
                    transaction.put(key, entries[key])
    return [entries[key] for key in sorted(entries)]


@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
def test_lsun_is_the_files_of_its_database_bit_by_bit(kind: str) -> None:
    values = make_lsun(kind=kind)
    arrays = prepared(source="lsun", split="church_outdoor", image_size=16, crop="center", resize_filter="bicubic")
    small = [(i, decoded(content)) for i, content in enumerate(values) if decoded(content).shape[0] == 16]
    assert 20 < len(small) < 40 == len(arrays)
    for i, image in small:
        np.testing.assert_array_equal(arrays.all()[i], image)
    assert arrays.manifest["source"]["root"] == CHURCH
    assert arrays.labels is None


@pytest.mark.parametrize("number", [1, 150])
def test_every_entry_of_a_database_is_an_image_named_by_its_key(number: int) -> None:
    values = make_lsun(number)
    with open_collection(params(source="lsun", split="church_outdoor", image_size=8).dataset) as collection:
        assert [collection.load(i) for i in range(len(collection))] == values
        keys = [collection.name(i) for i in range(len(collection))]
    assert keys == [hashlib.sha1(content).hexdigest() for content in values]


def test_a_database_without_images_is_refused() -> None:
    make_lsun(0)
    with pytest.raises(UserError, match=r"data\.mdb holds no images"):
        prepared(source="lsun", split="church_outdoor", image_size=8)


@pytest.mark.parametrize(
    ("split", "folder"), [("church_outdoor_val", "church_outdoor_val_lmdb"), ("cat", "cat"), ("test", "test_lmdb")]
)
def test_other_databases_by_the_names_of_their_folders(split: str, folder: str) -> None:
    make_lsun(3, f"files/{folder}")
    assert len(prepared(source="lsun", root="files", split=split, image_size=8)) == 3


def test_a_missing_category_names_the_folder_and_what_is_there() -> None:
    make_lsun(3)
    with pytest.raises(
        UserError, match=r"there is no bedroom_train_lmdb/data\.mdb in data/lsun .*found church_outdoor_train"
    ):
        prepared(source="lsun", split="bedroom", image_size=8)


def cut(part: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * part)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut(0.5), r"is damaged \(it is cut off: \d+ bytes of \d+\)"),
        (lambda content: content[:-1], "it is cut off"),
        (cut(0.01), r"is damaged \(.*not an LMDB file\)"),
        (lambda _: b"", "it is empty"),
        (
            lambda content: bytes(len(content)),
            r"data\.mdb is damaged \(MDB_INVALID: File is not an LMDB file\): unpack",
        ),
        (lambda content: content.replace(b"\xde\xc0\xef\xbe\x01", b"\xde\xc0\xef\xbe\x07"), "is damaged"),
    ],
)
def test_a_damaged_database_is_refused(damage: Callable[[bytes], bytes], message: str) -> None:
    make_lsun()
    file = Path(CHURCH) / "data.mdb"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        prepared(source="lsun", split="church_outdoor", image_size=8)
    assert str(file) in str(caught.value)


def test_without_lmdb_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    make_lsun()
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(UserError, match=r"source lsun needs the package lmdb: pip install 'maskdm\[datasets\]'"):
        prepared(source="lsun", split="church_outdoor", image_size=8)


def test_a_bad_image_of_a_database_is_named_by_its_key() -> None:
    import lmdb

    make_lsun(5)
    with lmdb.open(CHURCH, map_size=2**26) as database, database.begin(write=True) as transaction:
        transaction.put(b"0" * 40, b"no image")
    with pytest.raises(UserError, match=rf"bad image {'0' * 40} in {CHURCH}/data\.mdb: not an image"):
        prepared(source="lsun", split="church_outdoor", image_size=8)
    arrays = prepared(source="lsun", split="church_outdoor", image_size=8, on_bad_image="skip")
    assert (len(arrays), arrays.manifest["skipped"][0]["file"]) == (5, "0" * 40)


# --- Hugging Face


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package `datasets`, with its cache in the test's folder and without a network."""
    import datasets as package

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".work" / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return package


def make_hub_cifar(folder: str) -> None:
    """CIFAR-10's first images as the hub has them: their files in the column img, their classes in label."""
    import datasets as hub

    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    features = hub.Features({"img": hub.Image(), "label": hub.ClassLabel(names=names)})
    for start, split in ((0, "train"), (20, "test")):
        images = [pixels(1, start + i, (32, 32, 3))[0] for i in range(20)]
        cells = [{"bytes": encode(image, "PNG"), "path": None} for image in images]
        table = hub.Dataset.from_dict({"img": cells, "label": [i % 10 for i in range(20)]}, features=features)
        Path(folder).mkdir(parents=True, exist_ok=True)
        table.to_parquet(f"{folder}/{split}-00000-of-00001.parquet")


def make_hub_celeba(folder: str) -> None:
    """CelebA's first images as the hub has them: their files in the column image, and no other column."""
    import datasets as hub

    cells = [{"bytes": encode(pixels(1, i, (218, 178, 3))[0]), "path": None} for i in range(6)]
    Path(folder).mkdir(parents=True, exist_ok=True)
    table = hub.Dataset.from_dict({"image": cells}, features=hub.Features({"image": hub.Image()}))
    table.to_parquet(f"{folder}/train-00000-of-00001.parquet")


def rows() -> tuple[list[bytes], list[int]]:
    return [encode(pixels(1, i, (8, 8, 3))[0], "PNG") for i in range(6)], [1, 0, 2, 1, 1, 0]


def table(hub: Any) -> Any:
    files, labels = rows()
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["ant", "bee", "cow"])})
    cells = [{"bytes": content, "path": None} for content in files]
    return hub.Dataset.from_dict({"image": cells, "label": labels}, features=features)


@pytest.mark.parametrize("kind", ["saved", "saved splits", "parquet", "images"])
def test_a_dataset_of_hugging_face_is_its_files_bit_by_bit(hub: Any, kind: str) -> None:
    files, labels = rows()
    if kind == "saved":
        table(hub).save_to_disk("files")
    elif kind == "saved splits":
        hub.DatasetDict(train=table(hub), test=table(hub).select([0])).save_to_disk("files")
    elif kind == "parquet":
        Path("files").mkdir()
        table(hub).to_parquet("files/train-00000-of-00001.parquet")
    else:
        for i, content in enumerate(files):
            put(f"files/train/{('ant', 'bee', 'cow')[labels[i]]}/{i}.png", content)
    arrays = prepared(source="huggingface:someone/insects", root="files", image_size=8)
    expected = np.stack([decoded(content) for content in files])
    order = np.argsort([f"{label}/{i}" for i, label in enumerate(labels)]) if kind == "images" else range(6)
    np.testing.assert_array_equal(arrays.all(), expected[order])
    assert labels_of(arrays) == [labels[i] for i in order]
    assert arrays.class_names == ("ant", "bee", "cow")


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_of_the_hub_is_read_from_its_parquet_files(hub: Any, split: str) -> None:
    make_hub_cifar("files")
    arrays = prepared(source="huggingface:uoft-cs/cifar10", root="files", split=split, image_size=32)
    start = 0 if split == "train" else 20
    np.testing.assert_array_equal(arrays.all(), np.stack([pixels(1, start + i, (32, 32, 3))[0] for i in range(20)]))
    assert labels_of(arrays) == [i % 10 for i in range(20)]
    assert arrays.class_names[:2] == ("airplane", "automobile")


def test_celeba_of_the_hub_is_cropped_as_usual_and_resized(hub: Any) -> None:
    make_hub_celeba("files")
    given = {"source": "huggingface:nielsr/CelebA-faces", "root": "files", "crop": "box", "crop_box": [57, 25, 128]}
    files = [decoded(encode(pixels(1, i, (218, 178, 3))[0])) for i in range(6)]
    crops = [image[57 : 57 + 128, 25 : 25 + 128] for image in files]  # its centre: row 121, column 89
    arrays = prepared(**given, image_size=128)
    np.testing.assert_array_equal(arrays.all(), np.stack(crops))
    assert (arrays.labels, arrays.manifest["protocol"]["crop_box"]) == (None, [57, 25, 128])
    small = Image.fromarray(crops[1]).resize((64, 64), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(prepared(**given, image_size=64).all()[1], np.asarray(small))


def test_a_saved_dataset_of_one_split_is_of_that_split(hub: Any) -> None:
    Path("files").mkdir()
    table(hub).to_parquet("files/train-00000-of-00001.parquet")
    hub.load_dataset("files", split="train").save_to_disk("saved")
    table(hub).save_to_disk("unknown")
    given = {"source": "huggingface:someone/insects", "image_size": 8}
    assert len(prepared(root="saved", split="train", **given)) == len(prepared(root="saved", **given)) == 6
    for root, split in (("saved", "train"), ("unknown", "None")):
        with pytest.raises(
            UserError, match=rf"split: {root} was saved as one split, which is {split}: expected 'test'"
        ):
            prepare(params(root=root, split="test", **given), Path("other"))


def test_a_saved_dataset_without_the_split_is_refused(hub: Any) -> None:
    hub.DatasetDict(train=table(hub), valid=table(hub)).save_to_disk("files")
    with pytest.raises(UserError, match=r"dataset\.split: files has no split 'test'; it has train, valid"):
        prepared(source="huggingface:someone/insects", root="files", split="test", image_size=8)


def make_configurations(hub: Any) -> None:
    """A dataset with the configurations all, of six images, and few, of two."""
    Path("files").mkdir()
    table(hub).to_parquet("files/all.parquet")
    table(hub).select([4, 1]).to_parquet("files/few.parquet")
    entries = [f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("all", "few")]
    put("files/README.md", f"---\nconfigs:\n{''.join(entries)}---\n".encode())


def test_a_configuration_is_named_behind_the_dataset(hub: Any) -> None:
    make_configurations(hub)
    files, _ = rows()
    few = prepared(source="huggingface:someone/insects:few", root="files", image_size=8)
    np.testing.assert_array_equal(few.all(), np.stack([decoded(files[i]) for i in (4, 1)]))
    assert few.manifest["source"]["kind"] == "huggingface:someone/insects:few"
    assert len(prepared(source="huggingface:someone/insects:all", root="files", image_size=8)) == 6
    for name in ("insects", "insects:fwe"):
        with pytest.raises(UserError, match=r"can't be loaded: .*'all', 'few'"):
            prepare(params(source=f"huggingface:{name}", root="files", image_size=8), Path("other"))


def test_a_saved_dataset_is_of_its_configuration(hub: Any) -> None:
    make_configurations(hub)
    hub.load_dataset("files", "few").save_to_disk("saved")
    hub.load_dataset("files", "few", split="train").save_to_disk("split")
    for root in ("saved", "split"):
        assert len(prepared(source="huggingface:insects:few", root=root, image_size=8)) == 2
        with pytest.raises(
            UserError, match=rf"{root} was saved from the configuration few: expected 'all'; remove :all"
        ):
            prepare(params(source="huggingface:insects:all", root=root, image_size=8), Path("other"))


def test_what_hugging_face_does_not_have_is_reported(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table(hub).save_to_disk("files")
    table(hub).remove_columns("image").save_to_disk("other")
    with pytest.raises(UserError, match=r"has no column of images; it has label"):
        prepared(source="huggingface:x", root="other", image_size=8)
    with pytest.raises(UserError, match=r"dataset\.root: there is no nowhere"):
        prepared(source="huggingface:x", root="nowhere", image_size=8)
    with pytest.raises(UserError, match=r"someone/insects, split train, can't be loaded: .* name it in dataset\.root"):
        prepared(source="huggingface:someone/insects", image_size=8)


def test_a_script_in_a_dataset_of_hugging_face_is_not_run(hub: Any) -> None:
    put("files/files.py", b"open('run', 'w')\n")
    with pytest.raises(UserError, match="can't be loaded"):
        prepared(source="huggingface:someone/insects", root="files", image_size=8)
    assert not Path("run").exists()


def test_without_datasets_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'maskdm\[datasets\]'"):
        prepared(source="huggingface:x", image_size=8)


# --- which images are used


def digits(**dataset: Any) -> dict[str, Any]:
    return {"source": "digits", "image_size": 8, "channels": 1, **dataset}


def positions(part: np.ndarray, whole: np.ndarray) -> list[int]:
    """Where the images of a part are in the whole, the next always after the last."""
    found, start = [], 0
    for image in part:
        start = next(i for i in range(start, len(whole)) if np.array_equal(whole[i], image)) + 1
        found.append(start - 1)
    return found


def test_limit_draws_by_seed_and_keeps_the_order() -> None:
    whole = prepared(**digits())
    drawn = prepared(**digits(limit=200))
    where = positions(drawn.all(), whole.all())
    assert len(drawn) == 200
    assert where[-1] > 1500, "drawn from all images, not the first"
    assert whole.labels is not None
    assert labels_of(drawn) == [int(whole.labels[i]) for i in where]
    assert drawn.sha256 == prepared(**digits(limit=200)).sha256 != prepared(**digits(limit=200, seed=1)).sha256
    more = prepared(**digits(limit=400)).all()
    assert len(positions(drawn.all(), more)) == 200, "a smaller draw is a part of a larger one"


@pytest.mark.parametrize(("limit", "warns"), [(183, False), (184, True)])
def test_a_limit_of_more_images_than_there_are_is_all_with_a_warning(
    limit: int, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    given = digits(limit=limit, classes=["3"])
    assert prepared(**given, datasets={"same": given}).manifest["source"]["counts"]["used"] == 183
    said = capsys.readouterr().err
    for name in ("dataset", "datasets.same"):
        assert (f"warning: {name}.limit {limit}: there are 183 images; all are used\n" in said) == warns


def test_a_draw_is_the_same_in_all_versions() -> None:
    """Fixed values: another NumPy, or another implementation, must not change what experiments train on."""
    assert _drawn(1000, 8, 0, 0).tolist() == [11, 196, 269, 403, 600, 850, 855, 921]


def test_fraction_is_that_part() -> None:
    tenth = prepared(**digits(fraction=0.1))
    assert len(tenth) == 180
    assert tenth.sha256 == prepared(**digits(limit=180)).sha256


def test_classes_are_kept_by_name() -> None:
    whole, kept = prepared(**digits()), prepared(**digits(classes=["7", "2"]))
    assert whole.labels is not None
    chosen = np.isin(whole.labels, [2, 7])
    np.testing.assert_array_equal(kept.all(), whole.all()[chosen])
    assert kept.class_names == ("2", "7")
    assert labels_of(kept) == [int(label == 7) for label in whole.labels[chosen]]
    counts = kept.manifest["source"]["counts"]
    assert counts == {"available": 1797, "of_classes": int(chosen.sum()), "used": int(chosen.sum()), "held_out": 0}


def test_held_out_images_are_the_rest_of_those_used() -> None:
    used = prepared(**digits(limit=400)).all()
    train = prepared(**digits(limit=400, held_out=0.25, shard_images=64))
    held_out = ImageArrays.open(OUT / "held_out")
    held_out.verify()
    assert (len(train), len(held_out)) == (300, 100)
    of_train, of_held_out = positions(train.all(), used), positions(held_out.all(), used)
    assert sorted(of_train + of_held_out) == list(range(400))
    assert of_held_out[-1] > 350, "drawn, not cut off at an end"
    assert [m["source"]["part"] for m in (train.manifest, held_out.manifest)] == ["train", "held_out"]
    assert (OUT / "held_out" / "preview.png").is_file()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"source": "image_folder", "root": "nowhere"}, r"dataset\.root: there is no nowhere"),
        ({"source": "image_folder", "root": "."}, r"dataset\.root: \. holds out too"),
        ({"source": "lsun", "split": "church_outdoor_train", "root": "nowhere"}, r"dataset\.root: .*nowhere"),
        ({"source": "digits", "classes": ["x"]}, r"dataset\.classes: digits has no class 'x'"),
        ({"source": "image_folder", "root": "photos"}, r"bad image photos/1\.png: "),
        ({"source": "image_folder", "root": "photos", "on_bad_image": "skip"}, r"dataset\.root: all 1 images"),
    ],
)
def test_errors_in_other_datasets_name_them(other: dict[str, Any], message: str) -> None:
    put("photos/1.png", b"no image")
    with pytest.raises(UserError, match=rf"^datasets\.more: {message}"):
        prepared(**digits(), datasets={"more": {"image_size": 8, "channels": 1, **other}})


def test_other_datasets_lie_beside_it() -> None:
    make_mnist()
    others = {"numbers": {"source": "mnist", "image_size": 28, "channels": 1, "held_out": 0.3}}
    given = {**digits(classes=["5"]), "datasets": others}
    prepared(**given)
    arrays = ImageArrays.open(OUT / "pretrain" / "numbers")
    arrays.verify()
    assert (arrays.shape, len(arrays)) == ((28, 28, 1), 5)
    assert sorted(path.name for path in OUT.iterdir() if path.is_dir()) == ["pretrain"]
    assert not (OUT / "pretrain" / "numbers" / "held_out").exists()
    alone = prepared(**digits(classes=["5"])).sha256
    prepared(**given)
    assert ImageArrays.open(OUT).sha256 == alone


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"classes": ["sevn"]}, r"digits has no class 'sevn'; there are 0, 1, 2"),
        ({"limit": 3, "held_out": 0.1}, r"held_out 0\.1 of 3 images is 0: expected at least one"),
        ({"limit": 1, "held_out": 0.9}, r"held_out 0\.9 of 1 images is 1"),
    ],
)
def test_impossible_selections_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(**digits(**knobs))


def test_classes_of_images_without_classes() -> None:
    put("photos/1.png", encode(pixels(1)[0], "PNG"))
    with pytest.raises(UserError, match=r"dataset\.classes: photos has no classes: remove"):
        prepared(source="image_folder", root="photos", image_size=8, classes=["smiling"])


def test_the_same_images_are_drawn_from_every_kind_of_root() -> None:
    files = {f"{name}/{i:02d}.png": encode(pixels(1, i, (8, 8, 3))[0], "PNG") for name in "ab" for i in range(20)}
    for name, content in files.items():
        put(f"photos/{name}", content)
    for mode in ("w", "w:gz"):
        with tarfile.open(f"photos{mode[2:]}.tar", mode) as archive:  # type: ignore[call-overload]
            for name in sorted(files, key=lambda name: name[::-1]):
                archive.add(f"photos/{name}", name)
    knobs = {"image_size": 8, "limit": 30, "held_out": 0.2, "shard_images": 7}
    found = set()
    for root in ("photos", "photos.tar", "photosgz.tar"):
        train = prepared(source="image_folder", root=root, **knobs)
        found.add((train.sha256, ImageArrays.open(OUT / "held_out").sha256))
    assert len(found) == 1


def test_an_unknown_dataset_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"unknown dataset 'minst'; did you mean 'mnist'"):
        params(source="minst", image_size=8)


@pytest.mark.parametrize(
    ("source", "instead"),
    [("celeba", "huggingface:nielsr/CelebA-faces.* or image_folder"), ("cifar10", "huggingface:uo")],
)
def test_a_source_of_former_versions_names_what_to_write(source: str, instead: str) -> None:
    with pytest.raises(ParamsError, match=f"source {source} was removed: write .*{instead}"):
        params(source=source, image_size=8)


def test_every_source_can_be_opened() -> None:
    assert set(OPENERS) == {*SOURCES, "huggingface"}
    assert set(SPLITS) < set(SOURCES)


def test_original_files_may_lie_beside_the_results() -> None:
    """They are opened by their names: nothing else in the folder is taken for an image."""
    parts = make_mnist(".")
    arrays = prepared(source="mnist", root=".", image_size=28, channels=1)
    np.testing.assert_array_equal(arrays.all()[..., 0], parts["train"][0])


def test_image_files_read_by_hugging_faces_package_lie_apart(hub: Any) -> None:
    put("train/1.png", encode(pixels(8)[0], "PNG"))
    with pytest.raises(UserError, match=r"dataset\.root: \. holds out too"):
        prepared(source="huggingface:x", root=".", image_size=8)


# --- images that are not square


@pytest.mark.parametrize(
    ("size", "box"),
    [((20, 60), (0, 20, 60, 40)), ((60, 30), (15, 0, 45, 60)), ((60, 60), (0, 0, 60, 60))],
)
def test_the_largest_centred_box_of_the_targets_aspect(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    height, width = size
    image = pixels(1, 3, (60, 60, 3))[0]
    put("photos/1.png", encode(image, "PNG"))
    arrays = prepared(source="image_folder", root="photos", image_size=[height, width])
    expected = Image.fromarray(image).crop(box)
    assert arrays.shape == (height, width, 3)
    if expected.size != (width, height):
        expected = expected.resize((width, height), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(arrays.all()[0], np.asarray(expected))
