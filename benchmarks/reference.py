"""An outside reference: the same network built of timm's ViT blocks, in a training loop as most users would write it.

The same: width, depth, heads, hidden width, long skips, patches, time token, ε-prediction, AdamW, averaged weights, and
so FLOPs. Different: every patch enters, and masks, random draws and averaging are not ours.

"Tuned" adds PyTorch's fused AdamW and the attention kernel that our rule chooses
(`maskdm.method.backbones.uvit.uses_plain_attention`).
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import Shape
from maskdm.base.torchvision_compat import declare_missing_operators
from maskdm.method.backbones.uvit import timestep_embedding, uses_plain_attention
from maskdm.method.diffusion import Diffusion
from maskdm.method.masks import patchify


class TimmUViT(nn.Module):
    """timm's blocks with long skips, on the patches of an image and a time token.

    Args:
        shape: gives width, depth, heads and patches.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        block = _timm("models.vision_transformer").Block
        model, dim = shape.model, shape.model["dim"]
        self.patch_size, self.dim = model["patch_size"], dim
        patch_dim = self.patch_size**2 * shape.channels
        self.patch_embed = nn.Linear(patch_dim, dim)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + shape.num_patches, dim))
        depth, heads, mlp_ratio = model["depth"], model["num_heads"], model["mlp_ratio"]
        self.blocks = nn.ModuleList(block(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=False) for _ in range(depth))
        self.skips = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, patch_dim)

    def use_plain_attention(self, is_plain: bool) -> None:
        """Compute attention by matrix products and a softmax, or by PyTorch's kernel."""
        for block in self.blocks:
            block.attn.fused_attn = not is_plain  # type: ignore[union-attr]

    def forward(self, patches: Tensor, t: Tensor) -> Tensor:
        """(B, N, P), (B,) → (B, N, P)."""
        time_token = timestep_embedding(t, self.dim)[:, None]
        x = torch.cat([time_token, self.patch_embed(patches)], dim=1) + self.pos_embed
        half, kept = len(self.skips), list[Tensor]()
        for block in self.blocks[:half]:
            kept.append(x := block(x))
        x = self.blocks[half](x)
        for block, skip in zip(self.blocks[half + 1 :], self.skips, strict=True):
            x = block(skip(torch.cat([x, kept.pop()], dim=-1)))
        prediction: Tensor = self.head(self.norm(x)[:, 1:])
        return prediction


class TimmSteps:
    """Unmasked training steps of the reference.

    Args:
        shape: images, network and batch.
        images: uint8 (N, H, W, C).
        precision: `fp32`, or `bf16` by autocast.
        device: the device to train on.
        is_tuned: whether to use the fused AdamW and our rule's attention.
    """

    def __init__(
        self, shape: Shape, images: Tensor, precision: str, device: torch.device, is_tuned: bool = False
    ) -> None:
        self._images, self._batch_size, self._precision = images.to(device), shape.batch_size, precision
        self._device = device
        self.model = TimmUViT(shape).to(device)
        if is_tuned:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            self.model.use_plain_attention(uses_plain_attention("auto", device.type, dtype, shape.num_patches + 1))
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=is_tuned or None)
        self._ema = _timm("utils").ModelEmaV3(self.model, decay=0.999)
        self._diffusion = Diffusion(1000, "linear", "epsilon", device)

    def run(self, num_steps: int) -> float:
        """Make steps; returns the seconds in total."""
        with _default_kernels():
            started = time.perf_counter()
            for _ in range(num_steps):
                self._step()
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

    def _step(self) -> None:
        batch, device = self._batch_size, self._device
        x_0 = self._images[torch.randint(len(self._images), (batch,), device=device)]
        patches = patchify(x_0.permute(0, 3, 1, 2).float() / 127.5 - 1, self.model.patch_size)
        t = torch.randint(1000, (batch,), device=device)
        noise = torch.randn_like(patches)
        x_t = self._diffusion.add_noise(patches, noise, t)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._precision == "bf16"):
            loss = F.mse_loss(self.model(x_t, t).float(), noise)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._ema.update(self.model)


def count_flops(shape: Shape) -> int:
    """FLOPs of forward and backward for one image of the reference, counted by PyTorch."""
    _timm("models.vision_transformer")  # imported before tensors become meta tensors
    with torch.device("meta"):
        model = TimmUViT(shape)
        patches = torch.empty(1, shape.num_patches, shape.model["patch_size"] ** 2 * shape.channels)
        t = torch.empty(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]):
            model(patches, t).sum().backward()
    return int(counter.get_total_flops())


def is_installed() -> bool:
    """Whether timm, which nothing else needs, is installed."""
    return importlib.util.find_spec("timm") is not None


@contextmanager
def _default_kernels() -> Iterator[None]:
    """Do not require deterministic kernels in the block: our stages do, users of timm would not."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def _timm(module: str) -> Any:
    declare_missing_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"timm.{module}")
