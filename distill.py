"""Distillation: its settings, and the loss that a teacher's logits give a student's."""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from config import Config, NotNegative, Positive, Rate, UserError


@dataclass(frozen=True)
class DistillConfig(Config):
    teacher: str | None = None  # model to learn from: a run's folder, or a Hugging Face model's folder or name
    distill_weight: Rate = 0.5  # w in the loss, (1 - w) * own + w * T^2 * KL(teacher || student)
    distill_temperature: Positive = 1.0  # T, which divides both models' logits in the KL; DistilBERT: 2
    distill_cosine: NotNegative = 0.0  # weight of 1 - cosine of both models' last hidden states; DistilBERT: 1
    distill_hidden: NotNegative = 0.0  # weight of the squared error of hidden states after each block; TinyBERT: 1
    distill_attention: NotNegative = 0.0  # weight of the squared error of attention scores in each block; TinyBERT: 1
    init_layers: tuple | None = None  # teacher's layers as initial blocks, such as 0,2,4; even: every n-th

    def __post_init__(self):
        super().__post_init__()
        if self.teacher is None:
            given = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
            if wrong := [f"{f.name} is {getattr(self, f.name)}, but teacher is none; name one" for f in given]:
                raise UserError(*wrong)
        elif not (self.distills or self.init_layers):
            what = f"distill_weight is 0 and no other weight is set, so teacher {self.teacher} teaches nothing"
            raise UserError(f"{what}; raise one, set init_layers, or leave teacher out")

    @property
    def distills(self):
        """Whether a teacher takes part in training, beyond the initial weights."""
        return bool(self.teacher and (self.distill_weight or self.compared))

    @property
    def compared(self):
        """{name: weight} of the losses that compare both models' insides."""
        weights = {
            "cosine": self.distill_cosine, "hidden": self.distill_hidden, "attention": self.distill_attention
        }  # fmt: skip
        return {name: weight for name, weight in weights.items() if weight}

    def weights(self, objective):
        """{name: weight} of a student's losses: the objective's own, the KL, and those that compare."""
        return {objective: 1 - self.distill_weight, "kl": self.distill_weight, **self.compared}


class Teaching(NamedTuple):
    """A teacher's predictions of some tokens: its head's input, its head, and how much they count."""

    hidden: torch.Tensor  # (N, its C)
    weight: torch.Tensor  # (V, its C)
    bias: torch.Tensor | None  # (V,)
    share: float  # distill_weight
    temperature: float

    def shard(self, vocabulary, n_columns, dtype):
        """The same for a shard of the vocabulary, with matrices in a dtype."""
        columns = slice(vocabulary.first, vocabulary.first + n_columns)
        bias = None if self.bias is None else self.bias[columns]
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight[columns].to(dtype), bias=bias)

    def of(self, logits):
        """What taught_loss takes, for some tokens' logits (N, V)."""
        return logits, self.bias, self.share, self.temperature


def taught_loss(logits, taught, valid, vocabulary):
    """(T^2 KL(teacher || student) at temperature T, summed over tokens; its gradient (N, V); its share).

    logits (N, V), float32, cover a shard of the vocabulary and are read alone; valid (N, 1): which tokens count.
    Knowledge distillation with its factor T^2 (Hinton et al. 2015, arXiv 1503.02531, section 2) and the whole KL, as
    DistilBERT has it (Sanh et al. 2019, arXiv 1910.01108).
    """
    theirs, bias, share, temperature = taught
    theirs = theirs.float() if bias is None else theirs.float() + bias
    own, wanted = (log_likelihoods(x / temperature, vocabulary) for x in (logits, theirs))
    likelihood, n_ids = wanted.exp(), vocabulary.ids_in(logits.shape[1])
    kl = vocabulary.reduce((likelihood * (wanted - own))[:, :n_ids].sum(1, keepdim=True), "sum")
    gradient = (own.exp_() - likelihood).mul_(temperature * valid)
    return temperature**2 * (kl * valid).sum(), gradient, share


def log_likelihoods(x, vocabulary):
    """The log-softmax of logits (N, V), which it overwrites; -inf in the columns that pad the vocabulary."""
    x[:, vocabulary.ids_in(x.shape[1]) :] = -math.inf
    x -= vocabulary.reduce(x.amax(1, keepdim=True), "max")
    return x.sub_(vocabulary.reduce(x.exp().sum(1, keepdim=True), "sum").log_())
