"""Sends the log's records to TensorBoard and Weights & Biases, under the names that they have in log.jsonl."""

import functools
import html
import importlib
import secrets

from config import UserError


def flat(record, prefix=""):
    """Yields (name, number or text) of a record; in {"val_losses": {"data/a": 1.0}} the name is val_losses/data/a."""
    for name, value in record.items():
        value = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        elif value is not None:
            yield f"{prefix}{name}", value


def _imported(module, package):
    """A dashboard's module; UserError where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        rule = f"log_to names {package}, which is not installed"
        raise UserError(f"{rule}; pip install {package}, or leave it out of --log_to") from error


class TensorBoard:
    """Event files in out_dir/tensorboard, one for each start."""

    def __init__(self, cfg, settings, out_dir, step):
        """Continues a run at a step. cfg: a LogConfig; settings: {name: value} of all that the run has."""
        SummaryWriter = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter
        # Its thread writes, so that training waits for no disk; a file that ends early lacks the last seconds at most.
        queue = {"max_queue": 1000, "flush_secs": 5}
        self.open, self.writer = functools.partial(SummaryWriter, str(out_dir / "tensorboard"), **queue), None
        self.go_back(step)

    def go_back(self, step):
        """Continues after a step: TensorBoard drops the points past it that are there already, all of them at 0."""
        self.finish()
        self.writer = self.open(purge_step=step + 1 if step else 0)

    def log(self, record):
        """Adds a record, which has a step."""
        for name, value in flat(record):
            if isinstance(value, str):  # indented, Markdown leaves it as it is
                self.writer.add_text(name, "    " + value.replace("\n", "\n    "), record["step"])
            elif name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def finish(self, failed=False):
        """Ends the file; a second time does nothing."""
        if self.writer:
            self.writer.close()


class Wandb:
    """A wandb run under the id kept in out_dir; offline, and said so once, where the service is out of reach."""

    def __init__(self, cfg, settings, out_dir, step):
        """See TensorBoard."""
        wandb = _imported("wandb", "wandb")
        id_file = out_dir / "wandb_id"
        if step == 0 or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        options = {"project": cfg.wandb_project, "name": cfg.wandb_run_name or out_dir.name, "resume": "allow"}
        options |= {"id": id_file.read_text().strip(), "dir": str(out_dir), "config": settings}
        try:
            self.run = wandb.init(**options, settings=wandb.Settings(init_timeout=30))
        except wandb.errors.Error as error:
            later = f"upload later: wandb sync {out_dir}/wandb/*"
            print(f"wandb is out of reach ({type(error).__name__}) and logs offline; {later}", flush=True)
            self.run = wandb.init(**options, mode="offline")
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.as_html = functools.partial(wandb.Html, data_is_not_path=True)

    def go_back(self, step):
        """Does nothing: wandb keeps points once they are there, and shows a step that came twice with both."""

    def log(self, record):
        """Adds a record, which has a step."""
        is_text = {name for name, value in flat(record) if isinstance(value, str)}
        self.run.log({n: self.as_html(f"<pre>{html.escape(v)}</pre>") if n in is_text else v for n, v in flat(record)})

    def finish(self, failed=False):
        """Ends the run; a second time does nothing."""
        self.run.finish(exit_code=int(failed))


DASHBOARDS = {"tensorboard": TensorBoard, "wandb": Wandb}
