"""U-ViT: a vision transformer with long skip connections whose tokens are the time and the visible patches.

Parameter names and shapes follow the U-ViT family (`in_blocks.0.attn.qkv.weight`, …; `patch_embed.proj` is the
convolution of the reference, flattened to (row, column, channel)), so that its checkpoints can be converted.

Source: Bao et al. 2022, "All are Worth Words: A ViT Backbone for Diffusion Models" (arXiv 2209.12152);
MaskDM (arXiv 2306.11363), section 3.2. Differs: as in MaskDM there is no final 3×3 convolution, because the neighbours
of a visible patch may be masked.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskdm.config import ModelConfig

AttentionChoice = Literal["auto", "plain", "fused"]
# Up to this many tokens plain attention is used on a CPU; docs/performance.md says what was measured.
MAX_PLAIN_TOKENS = {torch.bfloat16: 512, torch.float32: 100}
BF16_LANES, FP32_LANES = 32, 16  # numbers in a register of AVX-512, which CPUs with bfloat16 have


class UViT(nn.Module):
    """Predicts the target of every visible patch from the noised visible patches.

    Args:
        config: the architecture.
        num_patches: N of the grid.
        patch_dim: P = p·p·C, the values of a patch.
        num_classes: for a class-conditional model; ignored otherwise.
        attention: see `uses_plain_attention`.
        checkpointing: whether the backward pass computes the activations inside the blocks again, to save memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_patches: int,
        patch_dim: int,
        num_classes: int = 0,
        attention: AttentionChoice = "auto",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        dim = config.dim
        self.dim, self.checkpointing = dim, checkpointing
        self.num_extra_tokens = 2 if config.class_conditional else 1
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Linear(patch_dim, dim)))
        self.time_embed = _time_mlp(dim) if config.mlp_time_embed else nn.Identity()
        self.label_emb = nn.Embedding(num_classes, dim) if config.class_conditional else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_extra_tokens + num_patches, dim))
        self.in_blocks = nn.ModuleList(Block(config, attention) for _ in range(config.depth // 2))
        self.mid_block = Block(config, attention)
        self.out_blocks = nn.ModuleList(Block(config, attention, skip=True) for _ in range(config.depth // 2))
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, patch_dim)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in their order."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def forward(self, patches: Tensor, t: Tensor, visible_idx: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict the target of every visible patch.

        Args:
            patches: noised visible patches, (B, S, P).
            t: timesteps, (B,).
            visible_idx: which patches these are, (B, S) int64.
            labels: classes, (B,) int64, for a class-conditional model.

        Returns:
            the prediction, (B, S, P).
        """
        # fmt: off
        x = self.patch_embed(patches) + self._positions(visible_idx)  # (B, S, D)
        x = torch.cat([self._extra_tokens(t, labels), x], dim=1)      # (B, E+S, D)
        skips = []
        for block in self.in_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self._run(self.mid_block, x)
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop())
        x = self.norm(x[:, self.num_extra_tokens :])                  # (B, S, D)
        return self.decoder_pred(x)                                   # (B, S, P)
        # fmt: on

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights from a truncated normal distribution of standard deviation 0.02; biases are zero.

        Args:
            generator: on the CPU, so that the weights do not depend on the device.

        Source: U-ViT's code.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def _positions(self, visible_idx: Tensor) -> Tensor:
        """The position embeddings H of the visible patches: (B, S) → (B, S, D)."""
        return F.embedding(visible_idx + self.num_extra_tokens, self.pos_embed[0])

    def _extra_tokens(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """The class token, if any, and the time token, with their positions: (B, E, D)."""
        tokens = [self.time_embed(timestep_embedding(t, self.dim))]
        if self.label_emb is not None:
            assert labels is not None, "a class-conditional model needs labels"
            tokens = [self.label_emb(labels), *tokens]
        return torch.stack(tokens, dim=1) + self.pos_embed[:, : self.num_extra_tokens]


class Block(nn.Module):
    """A pre-norm transformer block; with `skip`, it first concatenates and projects a long skip connection."""

    def __init__(self, config: ModelConfig, attention: AttentionChoice = "auto", skip: bool = False) -> None:
        super().__init__()
        dim = config.dim
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, config.num_heads, config.qkv_bias, attention)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Tokens (B, S, D), long skip (B, S, D) or None → tokens (B, S, D)."""
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head self-attention between all tokens."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, choice: AttentionChoice) -> None:
        super().__init__()
        self.num_heads, self.choice = num_heads, choice
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        b, s, d = x.shape
        qkv = self.qkv(x).view(b, s, 3, self.num_heads, d // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, S, D/heads)
        is_plain = uses_plain_attention(self.choice, q.device.type, q.dtype, s)
        x = plain_attention(q, k, v) if is_plain else F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, s, d))


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


def uses_plain_attention(choice: AttentionChoice, device_type: str, dtype: torch.dtype, num_tokens: int) -> bool:
    """Whether attention is matrix products and a softmax instead of PyTorch's fused kernel, by a fixed rule.

    Args:
        choice: the value of `compute.attention`.
        device_type: `cpu` or `cuda`.
        dtype: of queries, keys and values.
        num_tokens: visible patches and extra tokens.
    """
    if choice != "auto":
        return choice == "plain"
    return device_type == "cpu" and num_tokens <= MAX_PLAIN_TOKENS.get(dtype, 0)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention softmax(q kᵀ / √d) v in the dtype of the inputs: q, k, v (…, S, d) → (…, S, d).

    PyTorch's fused kernel for a CPU computes in float32 and guards against fully masked rows, which do not occur here;
    in bfloat16 it takes more than twice as long.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
    """
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if widens_softmax(q.device.type, q.dtype, weights.shape[-1]):
        return weights.float().softmax(-1).to(v.dtype) @ v
    return weights.softmax(-1) @ v


def widens_softmax(device_type: str, dtype: torch.dtype, num_tokens: int) -> bool:
    """Whether plain attention computes its softmax in float32, by a fixed rule.

    On a CPU PyTorch's softmax of bfloat16 processes the rest of a row after the last full register one number at a
    time. If the rest would fill a register of float32, float32 is faster: three to four times for 16 to 31 tokens,
    1.1 to 1.5 times for 48 to 63. In longer rows the rest matters little (`python -m benchmarks --only attention`).

    Args:
        device_type: `cpu` or `cuda`.
        dtype: of queries, keys and values.
        num_tokens: visible patches and extra tokens.
    """
    is_short = num_tokens < 2 * BF16_LANES
    return device_type == "cpu" and dtype == torch.bfloat16 and is_short and num_tokens % BF16_LANES >= FP32_LANES


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """The sinusoidal embedding of timesteps, cosines first: (B,) → (B, dim).

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5, in the form of ADM and U-ViT.
    """
    half = dim // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(max_period) * steps / half)  # rounded in the order of the reference
    angles = t[:, None].float() * frequencies[None]  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim)


def _time_mlp(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
