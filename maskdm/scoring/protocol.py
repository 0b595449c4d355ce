"""The protocol of scores: everything they depend on besides the model. Only scores of one protocol are comparable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from maskdm.base.checksums import differing
from maskdm.config import EvaluationConfig, Params, SamplingConfig

CROPS = {"none": "not cropped", "center": "centre crop"}
MAX_NAMED = 10  # classes
PARTS = {"train": "those trained on", "held_out": "held out", "all": "those trained on and held out"}


@dataclass(frozen=True)
class Protocol:
    """Everything that scores depend on besides the model.

    Attributes:
        images: how the real images were prepared, from the dataset's manifest: source, split, crop, resize …
        shape: (H, W, C) of real and generated images.
        reference: which real images: train, held_out or all.
        num_real: number of real images.
        real_sha256: hash of their pixels.
        extractor: name and layer of the feature extractor.
        extractor_sha256: hash of its weights.
        weights_sha256: hash of the local file that the weights came from; None if downloaded or trained here.
        num_samples: number of generated images; FID depends on it.
        drawn: how they were generated: weights, sampler, number of steps …; empty if unknown.
        metrics: KID's subsets and the neighbourhood of precision and recall.
    """

    images: dict[str, Any]
    shape: tuple[int, int, int]
    reference: str
    num_real: int
    real_sha256: str
    extractor: str
    extractor_sha256: str
    weights_sha256: str | None
    num_samples: int
    drawn: dict[str, Any]
    metrics: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`.

        Raises:
            ValueError: `content` has other fields.
        """
        try:
            height, width, channels = content["shape"]
            protocol = cls(**{**content, "shape": (height, width, channels)})
            _ = protocol.text  # raises if a field has the wrong type
            return protocol
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a protocol of this version of maskdm: {error}") from None

    @property
    def text(self) -> str:
        """The protocol in two lines for people."""
        file = "" if self.weights_sha256 is None else f" (file {self.weights_sha256[:12]})"
        subsets = f"{self.metrics['kid_subsets']} subsets of {self.metrics['kid_subset_size']}"
        return (
            f"Scores are of {self.num_samples:,} generated images{_drawn_text(self.drawn)} "
            f"and {self.num_real:,} real ones{_real_text(self)}.\n"
            f"Features: {self.extractor}, sha256 {self.extractor_sha256[:12]}{file}; KID over {subsets}, precision and "
            f"recall with {self.metrics['prc_neighborhood']} neighbours."
        )


def protocol_of(params: Params, info: Mapping[str, Any]) -> Protocol:
    """The protocol of an experiment's scores.

    Args:
        params: the experiment.
        info: the content of features.json.
    """
    config, sampling = params.evaluation, params.sampling
    return Protocol(
        images=info["images"],
        shape=params.dataset.shape,
        reference=config.reference,
        num_real=info["num_real"],
        real_sha256=info["real_sha256"],
        extractor=info["extractor"],
        extractor_sha256=info["extractor_sha256"],
        weights_sha256=info["weights_sha256"],
        num_samples=sampling.num_samples,
        drawn=drawn_as(sampling),
        metrics=metrics_as(config),
    )


def images_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How the images of a prepared dataset were made, from its manifest; the folder of the files does not matter."""
    said = {**(manifest.get("source") or {}), **(manifest.get("protocol") or {})}
    return {key: value for key, value in sorted(said.items()) if value is not None and key != "root"}


def shaping_of(images: Mapping[str, Any]) -> dict[str, Any]:
    """Crop and resize filter, if `images` (see `images_of`) has them."""
    return {key: images[key] for key in ("crop", "crop_box", "resize_filter") if key in images}


def drawn_as(sampling: SamplingConfig) -> dict[str, Any]:
    """How images are generated: from averaged weights, with this sampler."""
    return {"weights": "EMA", **sampling.model_dump(include={"sampler", "num_steps", "eta", "clip_x_0"})}


def metrics_as(evaluation: EvaluationConfig) -> dict[str, int]:
    """The settings that KID, precision and recall depend on."""
    return evaluation.model_dump(include={"kid_subsets", "kid_subset_size", "prc_neighborhood"})


def flips_text(flips: Mapping[str, float]) -> str:
    """How training flipped images; not part of the protocol, because arms may differ in it and are still compared.

    Args:
        flips: by arm, the probability of a left-right flip.

    Returns:
        a sentence, which names the arms if they differ; empty if nothing is known.
    """
    arms: dict[float, list[str]] = {}
    for arm, probability in flips.items():
        arms.setdefault(probability, []).append(arm)
    said = {flip_text(probability): ", ".join(of) for probability, of in arms.items()}
    if len(said) < 2:
        return "".join(f"Trained {how}." for how in said)
    return f"Trained {'; '.join(f'{how}: {of}' for how, of in said.items())}."


def flip_text(probability: float) -> str:
    """How training flipped images, as part of a sentence."""
    return f"with left-right flips of probability {probability:g}" if probability else "without left-right flips"


def bias_note(num_samples: int) -> str:
    """How FID depends on the number of samples."""
    return (
        f"FID is biased: it falls as the number of samples grows ({num_samples:,} here), by an amount that depends on "
        "the model. Compare it only between equal numbers of samples. KID is not biased, but it varies more."
    )


def extractor_caution(extractor: str) -> str:
    """What FIDs on these features cannot be compared with; empty for Inception's, which published numbers use.

    Args:
        extractor: its name and layer.
    """
    name = extractor.split("/")[0]
    if extractor == "pixels":
        return (
            "The features are the pixel values themselves: these are not Inception FIDs. They compare means and "
            "covariances of pixels, do not see shapes, and are comparable only within this dataset."
        )
    if "classifier" in extractor:
        return (
            "The features come from a small classifier trained on this dataset's own labels: these are not "
            "Inception FIDs. They are comparable only within this dataset and with this extractor, never with "
            "published numbers."
        )
    if name.startswith("inception"):
        return ""
    return (
        f"The features are those of {name}, not Inception's: the numbers are comparable only with others of the same "
        "extractor and weights."
    )


def few_samples_caution(num_samples: int, num_features: int) -> str:
    """What too few images do to FID; empty where there are enough for a covariance of full rank.

    Args:
        num_samples: of the smaller set.
        num_features: D.
    """
    if num_samples > num_features:
        return ""
    return (
        f"{num_samples:,} images are too few for {num_features:,} features: their covariance does not have full rank, "
        "and FID is far too high. Compare it only with FIDs of as many images; KID does not have this bias."
    )


def said_of(scores: Mapping[str, Any]) -> str:
    """The protocol and flips of published scores, for people; empty if they were not recorded.

    Raises:
        ValueError: the protocol has other fields.
    """
    protocol = scores.get("protocol")
    text = Protocol.from_dict(protocol).text if protocol else ""
    flips = {} if scores.get("flip") is None else {str(scores.get("arm")): scores["flip"]}
    return "\n".join(filter(None, (text, flips_text(flips))))


def differences(one: Any, other: Any) -> Iterator[str]:
    """Yield a line per difference between two protocols given as plain values: `crop: center and none`."""
    for path, here, there in differing(one, other):
        yield f"{path or 'protocol'}: {_short(here)} and {_short(there)}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _drawn_text(drawn: Mapping[str, Any]) -> str:
    if "sampler" not in drawn:
        return f" ({', '.join([str(drawn['from']), *_made_texts(drawn)])})" if "from" in drawn else ""
    eta = f", eta {drawn['eta']:g}" if drawn.get("sampler") == "ddim" else ""
    return f" ({drawn['weights']} weights, {drawn['sampler']}, {drawn['num_steps']} evaluations each{eta})"


def _real_text(protocol: Protocol) -> str:
    images, (height, width, channels) = protocol.images, protocol.shape
    part = [PARTS[protocol.reference]] if protocol.reference in PARTS else []
    source = [str(images[key]) for key in ("kind", "split", "from") if key in images]
    chosen = [f"{key} {_plain(images[key])}" for key in ("classes", "limit", "fraction", "held_out") if images.get(key)]
    size = f"{height}×{width} {'grey' if channels == 1 else 'RGB'}"
    return f" ({', '.join([' '.join(source) or 'given', *chosen, *part, size, *_made_texts(images), 'not flipped'])})"


def _made_texts(images: Mapping[str, Any]) -> list[str]:
    """How files were cropped and resized, if known."""
    said = []
    if images.get("crop_box"):
        top, left, side = images["crop_box"]
        said.append(f"cropped to {side}×{side} from row {top}, column {left}")
    elif "crop" in images:
        said.append(CROPS.get(str(images["crop"]), str(images["crop"])))
    if "resize_filter" in images:
        said.append(f"resized by {images['resize_filter']}, antialiased")
    return said


def _plain(value: Any) -> str:
    if isinstance(value, list):
        more = f" and {len(value) - MAX_NAMED} more" if len(value) > MAX_NAMED else ""
        return "/".join(map(str, value[:MAX_NAMED])) + more
    return f"{value:,}" if isinstance(value, int) else str(value)
