"""Low-rank adapters: a fine-tuned matrix is its frozen weight and the product of two thin ones (LoRA, arXiv 2106.09685)."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from model import ModelConfig, Transformer
from ops import Linear


@dataclass(frozen=True)
class AdaptedModel(ModelConfig):
    """A ModelConfig with adapters in the blocks' matrices."""

    lora_rank: int | None = None  # rank of the adapters; none: there are none
    lora_scale: float = 1.0

    def build(self):
        """The model with these settings."""
        return AdaptedTransformer(self) if self.lora_rank else super().build()

    def without_adapters(self):
        """The settings of the model whose adapters have been merged."""
        return replace(self, lora_rank=None)


class AdaptedTransformer(Transformer):
    """A Transformer with adapters, which add nothing at first."""

    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.lora_rank:  # a Labeller may be without
            adapt(self, cfg.lora_rank, cfg.lora_scale)


class AdaptedLinear(Linear):
    """A Linear whose output has scale * x A' B' added; A (rank, in) and B (out, rank)."""

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def adapt(model, rank, scale):
    """Gives each matrix of a model's blocks an adapter, in place; B must start at zero, so that nothing changes."""
    for linear in (module for module in model.blocks.modules() if isinstance(module, Linear)):
        linear.__class__, linear.scale = AdaptedLinear, scale
        n_out, n_in = linear.weight.shape
        linear.lora_a, linear.lora_b = nn.Parameter(torch.empty(rank, n_in)), nn.Parameter(torch.empty(n_out, rank))


def merged(read, scale):
    """A function from a parameter's name to its tensor, as read gives it, but with adapters added to their weights."""

    def read_merged(name):
        tensor, module = read(name), name.removesuffix(".weight")
        if not name.startswith("blocks.") or tensor.dim() < 2:
            return tensor
        return tensor + scale * read(f"{module}.lora_b") @ read(f"{module}.lora_a")

    return read_merged
