"""Low-rank adapters: a fine-tuned matrix is its frozen weight and the product of two thin ones (LoRA, arXiv 2106.09685)."""

import torch
import torch.nn.functional as F
from torch import nn

from ops import Linear


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
