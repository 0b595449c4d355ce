"""GPUs by their datasheets: how long an arm would take on hardware that is not there."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_UTILISATION = 0.4


@dataclass(frozen=True)
class Gpu:
    """A GPU's datasheet rates.

    Attributes:
        name: as people say it.
        bf16: dense bfloat16 rate with float32 accumulation in FLOP/s; None where the hardware has no bfloat16.
        fp32: dense rate of float32 matrix products as this code asks for them: TF32 where the hardware has it.

    Source: NVIDIA's datasheets of the V100 SXM2, A100 SXM, H100 SXM and H200 SXM; without sparsity.
    """

    name: str
    bf16: float | None
    fp32: float

    def rate(self, precision: str) -> float:
        """FLOP/s of a precision ("bf16" or "fp32") as this code would run it."""
        return self.bf16 if precision == "bf16" and self.bf16 is not None else self.fp32

    def seconds(self, flops: float, precision: str, utilisation: float) -> float:
        """How long so many FLOPs take at a share of the datasheet's rate."""
        return flops / (self.rate(precision) * utilisation)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("V100", bf16=None, fp32=15.7e12),
        Gpu("A100", bf16=312e12, fp32=156e12),
        Gpu("H100", bf16=989e12, fp32=494.7e12),
        Gpu("H200", bf16=989e12, fp32=494.7e12),
    )
}
