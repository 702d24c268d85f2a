"""Each edit of the README's "To change X, edit here", made in a copy of the project, and its effect there."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest

import config
from conftest import ROOT
from ranks import SMALL, records, write_data

pytestmark = pytest.mark.slow
# Sizes that two tensor parallel ranks can split.
NAMES = SMALL | {"n_head": 4, "seq_len": 8, "batch_tokens": 48, "max_steps": 4, "compile": "false"}


def fork(folder, *edits):
    """A copy of the project's files with edits (file, anchor, text in its place); the anchor stands there once."""
    for path in config.project_files():
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name, anchor, text in edits:
        source = (folder / name).read_text()
        assert source.count(anchor) == 1, f"{name} has {source.count(anchor)} times {anchor!r}"
        (folder / name).write_text(source.replace(anchor, text))
    return folder


def run(folder, *command):
    """What Python prints in a folder; the test fails where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trained(folder, data, out, n_ranks=1, **changes):
    """The folder of a small run of the fork."""
    names = NAMES | {"data_dir": data, "out_dir": out} | changes
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"] if n_ranks > 1 else []
    run(folder, *launcher, "train.py", *(f"--{name}={value}" for name, value in names.items()))
    return out


# ---- a term of the loss: 0.01 times the square of the largest logit

LARGEST_LOGIT = [
    ("ops.py", "    exp = logits.exp_()\n", "    at_largest = logits == 0\n    exp = logits.exp_()\n"),
    ("ops.py", "    loss = (loss * valid).sum()\n",
     "    loss = loss + 0.01 * largest.square()\n    loss = (loss * valid).sum()\n"),
    ("ops.py", "    return loss, n_correct, d_logits\n",
     "    d_logits += 0.02 * valid * largest * at_largest\n    return loss, n_correct, d_logits\n"),
]  # fmt: skip
AGAINST_AUTOGRAD = """
import torch
import torch.nn.functional as F
from ops import IGNORE, LossOptions, Vocabulary, chunk_loss
torch.manual_seed(1)
logits, targets = 3 * torch.randn(50, 64), torch.randint(37, (50,))
targets[::3] = IGNORE
x = logits[:, :37].clone().requires_grad_()
wanted = F.cross_entropy(x, targets, reduction="sum") + 0.01 * x.amax(1).square()[targets != IGNORE].sum()
[d_wanted] = torch.autograd.grad(wanted, x)
loss, _, d_logits = chunk_loss(logits, targets[:, None], Vocabulary(37), LossOptions(), True)
torch.testing.assert_close(loss, wanted.detach())
torch.testing.assert_close(d_logits[:, :37], d_wanted)
"""


def test_a_term_of_the_loss_is_added_in_chunk_loss_alone(tmp_path):
    folder, data = fork(tmp_path / "fork", *LARGEST_LOGIT), write_data(tmp_path / "data")
    run(folder, "-c", AGAINST_AUTOGRAD)
    one, two = (
        records(trained(folder, data, tmp_path / f"tp{tp}", n_ranks=tp, tp=tp, strategy="fsdp" if tp > 1 else "ddp"))
        for tp in (1, 2)
    )
    plain = records(trained(ROOT, data, tmp_path / "plain"))
    assert one.keys() == two.keys() == plain.keys()
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert plain[1] * (1 + 1e-5) < one[1], "the term changes the loss"


# ---- an activation

SINE = ("model.py", "ACTIVATIONS = {\n", 'ACTIVATIONS = {\n    "sine": torch.sin,\n')
IS_SINE = """
import torch
from model import MLP, ModelConfig
mlp, x = MLP(ModelConfig(n_embd=8, n_head=1, mlp="sine")), torch.randn(3, 8)
assert mlp.gate is None and torch.equal(mlp(x), mlp.down(mlp.up(x).sin()))
"""


def test_an_activation_is_one_line_of_activations(tmp_path):
    folder, data = fork(tmp_path / "fork", SINE), write_data(tmp_path / "data")
    run(folder, "-c", IS_SINE)
    losses = [records(trained(folder, data, tmp_path / mlp, mlp=mlp)) for mlp in ("sine", "gelu")]
    assert losses[0].keys() == losses[1].keys() and losses[0] != losses[1]
    assert "sine" in run(folder, "-c", "import model; print(model.ModelConfig.__annotations__['mlp'])")
    run(folder, "plan.py", "config/gpt2_124m.py", "--mlp=sine", "--gpu=h100-sxm")


# ---- an objective: the token after the next

AFTER_NEXT = '''class TokenAfterNext(NextToken):
    """The token after the next as the target of each."""

    def __init__(self, seq_len):
        self.stride, self.extra = seq_len, 2

    def batch(self, rows, first, lengths=None):
        _, targets = super().batch(rows[:, 1:], first, lengths)
        return torch.from_numpy(rows[:, :-2]).contiguous(), targets


OBJECTIVES = {"after_next": TokenAfterNext, '''


def test_an_objective_is_a_class_and_its_name_in_objectives(tmp_path):
    """A token follows the last by 0, 1 or 2, which is 1.10 nats a token; the token after the next has 1.52."""
    folder = fork(tmp_path / "fork", ("objective.py", "OBJECTIVES = {", AFTER_NEXT))
    data = write_data(tmp_path / "data", train_tokens=20_000, val_tokens=3000)
    changes = {"max_steps": 600, "eval_tokens": 3000, "eval_interval": 600, "lr_decay_steps": 600}
    for objective, low, high in (("clm", 1.05, 1.25), ("after_next", 1.45, 1.7)):
        out = trained(folder, data, tmp_path / objective, objective=objective, log_interval=100, **changes)
        assert low < records(out, "val_loss")[600] < high


# ---- a data set for prepare.py


def test_a_data_set_is_its_files_and_its_name(tmp_path):
    (tmp_path / "letters").mkdir()
    for i in range(20):
        (tmp_path / f"letters/{i}.txt").write_text(f"Dear reader number {i}, this is letter {i}.\n")
    function = f'def letters_files(_):\n    return sorted(Path("{tmp_path}/letters").glob("*.txt"))\n\n\n'
    edit = ("text/corpus.py", "DATASETS = {", f'{function}DATASETS = {{"letters": letters_files, ')
    folder = fork(tmp_path / "fork", edit)
    run(folder, "prepare.py", "--dataset=letters", "--tokenizer=byte", "--workers=1")
    meta = json.loads((folder / "data/letters/meta.json").read_text())
    assert sum(split["documents"] for split in meta["splits"].values()) == 20
    trained(folder, folder / "data/letters", tmp_path / "out", vocab_size="none")


# ---- a logged figure


def test_a_logged_figure_is_one_line_of_the_record(tmp_path):
    line = '            "grad_norm": grad_norm,\n'
    folder = fork(tmp_path / "fork", ("run/log.py", line, f'{line}            "perplexity": math.exp(loss),\n'))
    out = trained(folder, write_data(tmp_path / "data"), tmp_path / "out")
    losses, perplexities = records(out), records(out, "perplexity")
    assert len(losses) == 4 and perplexities == {step: math.exp(loss) for step, loss in losses.items()}
