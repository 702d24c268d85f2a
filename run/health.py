"""Whether a step is sound, and which tensor went bad first."""

import functools
import math
import statistics
from dataclasses import dataclass

import torch

from config import Config, Count, Positive
from launch import launch_plainly
from world import local

WINDOW = 128  # sound steps in the baseline for spikes


@dataclass(frozen=True)
class HealthConfig(Config):
    spike_z: Positive | None = None  # skip steps whose loss or norm is this many standard deviations up; none: do not
    max_bad_steps: Count = 10  # consecutive bad steps before a rollback; a second rollback ends the run


def bad_step(loss, grad_norm, cfg, recent=()):
    """Why a step of this loss and gradient norm is not to be taken, in words; None for a sound step.

    cfg: a HealthConfig. recent: (loss, gradient norm) of sound steps; with WINDOW of them, spikes are found.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
    if cfg.spike_z is not None and len(recent) == WINDOW:
        for name, value, past in zip(("loss", "gradient norm"), (loss, grad_norm), zip(*recent)):
            mean, deviation = statistics.fmean(past), statistics.pstdev(past)
            if deviation > 0 and value - mean > cfg.spike_z * deviation:
                return f"{name} {value:.4g}, {(value - mean) / deviation:.1f} standard deviations above {mean:.4g}"
    return None


def first_bad_tensor(model, forward_and_backward):
    """The name of the first tensor that is not finite on this rank while a step is repeated; None if all are finite.

    Weights come first, then the outputs of modules in forward, then gradients in the order of backward.
    """
    bad, hooks = [], []
    launch_plainly(model)

    def look(name, tensor):
        if not torch.isfinite(local(tensor)).all():
            bad.append(name)

    def watch_gradients(named):
        for name, tensor in named:
            hooks.append(tensor.register_hook(functools.partial(look, f"the gradient of {name}")))

    def after(name, module, inputs, output):
        if isinstance(output, torch.Tensor):
            look(f"the output of {name or 'the model'}", output)
            if output.requires_grad:
                watch_gradients([(f"the output of {name or 'the model'}", output)])
        watch_gradients(module.named_parameters(prefix=name, recurse=False))  # FSDP has gathered them at this moment

    for name, p in model.named_parameters():
        look(name, p)
    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(functools.partial(after, name)))
    # For a table whose module is never called, such as the head's.
    hooks.append(model.register_forward_pre_hook(lambda module, inputs: watch_gradients(module.named_parameters())))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not see new hooks
            forward_and_backward()
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None
