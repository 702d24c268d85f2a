"""Models with the blocks' matrices in 8 or 4 bits, by torchao."""

import functools
import logging

import torch

from config import UserError
from ops import Linear
from perf.generation import GROUP

KINDS = ("int8", "int8_dynamic", "int4")


def quantize(model, kind):
    """Replaces the matrices of a model's blocks by torchao's tensors, in place; UserError where it cannot.

    int8: one scale per row. int8_dynamic: matmuls' inputs are rounded to 8 bits, too, with a scale per token. int4: one
    scale per GROUP weights of a row; kernels for 4 bits are GPUs' alone, so torchao multiplies by floats.
    """
    if kind not in KINDS:
        raise UserError(f"a model is quantized to {kind!r}; known kinds are {', '.join(KINDS)}")
    linears = {name: layer for name, layer in model.blocks.named_modules() if isinstance(layer, Linear)}
    for name, layer in linears.items():
        if kind == "int4" and layer.in_features % GROUP:
            what = f"blocks.{name} has rows of {layer.in_features} weights"
            raise UserError(f"{what}; quantize=int4 needs a multiple of {GROUP}; take int8")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao warns of kernels for other machines
    try:
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            PerGroup,
            quantize_,
        )
    except ImportError as error:
        raise UserError(f"quantized models need torchao 0.18 or newer ({error}); pip install torchao") from error
    finally:
        logging.disable(before)
    config = {
        "int8": functools.partial(Int8WeightOnlyConfig, version=2),
        "int8_dynamic": functools.partial(Int8DynamicActivationInt8WeightConfig, version=2),
        "int4": functools.partial(IntxWeightOnlyConfig, weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
    }[kind]
    try:
        quantize_(model.blocks, config(), filter_fn=lambda layer, name: name in linears)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"torchao cannot quantize this model to {kind} here: {' '.join(str(error).split())}") from error


def parts_of(param):
    """{name: tensor} that a parameter consists of: integers, scales, zero points; {"": itself} for a plain one."""
    if not hasattr(param, "__tensor_flatten__"):
        return {"": param.detach()}
    return {f".{name}": getattr(param, name) for name in param.__tensor_flatten__()[0]}


def stored(model, kind=None):
    """{name: plain tensor} of a model's parameters as a checkpoint holds them; int4's integers are two in a byte."""
    found = {}
    for name, param in model.named_parameters():
        for part, tensor in parts_of(param).items():
            found[name + part] = packed(tensor) if part == ".qdata" and kind == "int4" else tensor
    return found


def stored_shapes(cfg, kind):
    """{name: shape} of what `stored` returns for a model of settings cfg, without allocating it."""
    with torch.device("meta"):
        model = cfg.build()
        quantize(model, kind)
        return {name: [*tensor.shape] for name, tensor in stored(model, kind).items()}


@torch.no_grad()
def fill(model, read, kind):
    """Copies the tensors that read(name) returns, named as by `stored`, into a quantized model."""
    for name, param in model.named_parameters():
        for part, tensor in parts_of(param).items():
            value = read(name + part)
            tensor.copy_(unpacked(value) if part == ".qdata" and kind == "int4" else value)


def packed(numbers):
    """Integers from -8 to 7 (..., n) as bytes (..., n / 2), the first of a pair in the low bits."""
    low, high = (numbers & 15).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def unpacked(pairs):
    """The integers of `packed`."""
    pairs = pairs.to(torch.int16)
    numbers = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)
    return (numbers ^ 8) - 8  # the highest of the 4 bits is the sign
