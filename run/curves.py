"""The curves of a run as a picture: losses, learning rate and gradient norm."""

import os
import re

from run.folder import read_log


def draw_curves(out_dir):
    """Draws losses, learning rate and gradient norm of log.jsonl as curves.png."""
    from matplotlib.figure import Figure

    records = [record for _, record in read_log(out_dir / "log.jsonl") if record]
    figure = Figure(figsize=(8, 7), layout="constrained")
    loss, lr, norm = all_axes = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    names = {name: None for record in records for name in record if re.match("(mean|val)_loss_", name)}
    for axes, name, style in (
        (loss, "mean_loss", {"linewidth": 1, "label": "training, mean of the interval"}),
        (loss, "val_loss", {"marker": "o", "label": "validation"}),
        *((loss, name, {"linewidth": 1, "linestyle": ":", "label": name.replace("_", " ")}) for name in names),
        (lr, "lr", {"linewidth": 1}),
        (norm, "grad_norm", {"linewidth": 1}),
    ):
        if points := [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]:
            axes.plot(*zip(*points), **style)
    for axes, label in zip(all_axes, ("loss, nats per token", "learning rate", "gradient norm")):
        axes.set(ylabel=label)
        axes.grid(alpha=0.3)
    loss.set_title(os.fsencode(out_dir.name).decode(errors="replace"), parse_math=False)  # $ is a letter here
    loss.legend()
    norm.set(xlabel="step")
    figure.savefig(out_dir / ".curves.png", dpi=120)
    os.replace(out_dir / ".curves.png", out_dir / "curves.png")
