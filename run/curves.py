"""The curves of a run as a picture: losses, learning rate and gradient norm."""

import os
import re


def draw_curves(out_dir, records, reference=None):
    """Draws losses, learning rate and gradient norm of a log's records as curves.png, beside a reference Curve's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    loss, lr, norm = all_axes = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    names = {name: None for record in records for name in record if re.match("(mean|val)_loss_", name)}
    if reference and records:
        points = reference.until(max(record["step"] for record in records))
        loss.plot(*zip(*points), color="gray", linestyle="--", label="reference")
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
