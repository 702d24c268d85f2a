"""Whether a step is sound: which ones are not to be taken, and what in them went bad first."""

import math
import statistics
from dataclasses import dataclass

import torch

from optim import local


WINDOW = 128  # sound steps that a spike is measured against


@dataclass(frozen=True)
class HealthConfig:
    spike_z: float | None = None  # skip steps with a loss or gradient norm so many standard deviations up; none: do not
    max_bad_steps: int = 10  # skipped in a row after which to go back to a checkpoint; a second time ends the run

    def __post_init__(self):
        wrong = []
        if self.spike_z is not None and self.spike_z <= 0:
            wrong.append(f"spike_z is {self.spike_z}; it must be above 0, or none")
        if self.max_bad_steps < 1:
            wrong.append(f"max_bad_steps is {self.max_bad_steps}; it must be at least 1")
        if wrong:
            raise ValueError("\n".join(wrong))


def defect(loss, grad_norm, recent=None, spike_z=None):
    """What is wrong with a step of this loss and gradient norm, in words; None of a sound step, which joins `recent`.

    recent: (loss, gradient norm) of the last sound steps; its length grows to WINDOW, and then spikes are looked for.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
    if spike_z is None:
        return None
    if len(recent) == WINDOW:
        for name, value, past in zip(("loss", "gradient norm"), (loss, grad_norm), zip(*recent)):
            mean, deviation = statistics.fmean(past), statistics.pstdev(past)
            if deviation > 0 and value - mean > spike_z * deviation:
                return f"{name} {value:.4g}, {(value - mean) / deviation:.1f} standard deviations above {mean:.4g}"
    recent.append((loss, grad_norm))
    del recent[:-WINDOW]
    return None


def first_bad_tensor(model, forward_and_backward):
    """The name of the first tensor that is not finite on this rank while a step is computed again; None if all are.

    Weights come first, then what modules give in forward, then gradients in the order of backward.
    """
    bad = [name for name, p in model.named_parameters() if not _is_finite(p)]
    hooks = []

    def look(name, tensor):
        if isinstance(tensor, torch.Tensor) and not _is_finite(tensor):
            bad.append(name)

    def watch_weights(named):
        for name, p in named:
            hooks.append(p.register_hook(lambda grad, name=name: look(f"the gradient of {name}", grad)))

    def after(name):
        def hook(module, inputs, output):
            look(f"the output of {name or 'the model'}", output)
            if isinstance(output, torch.Tensor) and output.requires_grad:
                hooks.append(
                    output.register_hook(
                        lambda grad: look(f"the gradient of the output of {name or 'the model'}", grad)
                    )
                )
            watch_weights(module.named_parameters(prefix=name, recurse=False))  # sharded ones are whole at this moment

        return hook

    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(after(name)))
    # Of a table that is used without its module being called, as the head's is.
    hooks.append(model.register_forward_pre_hook(lambda module, inputs: watch_weights(module.named_parameters())))
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks are not seen by what is compiled already
            forward_and_backward()
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None


def _is_finite(tensor):
    return bool(torch.isfinite(local(tensor)).all())
