"""Heads for fine-tuning: a Transformer that gives labels to texts or words, or numbers, or finds spans in them.

Those of texts compute as transformers' ...ForSequenceClassification do: an encoder's from the first token, through BERT's
pooler and dropout; a decoder's from the last token of a text. Those of words compute as ...ForTokenClassification do, those
of spans as ...ForQuestionAnswering, but that padding is never a span's end.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import nn

from lora import AdaptedModel, AdaptedTransformer
from ops import IGNORE, Linear

SPAN = ("start", "end")  # the labels of a SpanFinder


@dataclass(frozen=True)
class TunedModel(AdaptedModel):
    """An AdaptedModel with a task and the labels that its head tells apart, in the order of its logits."""

    task: Literal["classify", "regress", "tag", "qa"] = "classify"
    labels: tuple = ()

    def build(self):
        """The model with these settings."""
        return SpanFinder(self) if self.task == "qa" else Labeller(self)

    def without_adapters(self):
        """The settings of the model whose adapters have been merged."""
        return replace(self, lora_rank=None)

    @property
    def has_pooler(self):
        """Whether BERT's pooler stands between the first token and the head."""
        return not self.is_causal and self.labels_texts

    @property
    def labels_texts(self):
        """Whether a label belongs to a whole text."""
        return self.task in ("classify", "regress")


class Labeller(AdaptedTransformer):
    """Token ids to logits of labels (B, K, L) at positions (B, K) or, with targets (B, K), to the sum of their losses."""

    focal_gamma = 0.0  # exponent of the focal loss; 0: cross-entropy

    def __init__(self, cfg):
        super().__init__(cfg)
        self.head = self.transform = None
        self.pooler = Linear(cfg.n_embd, cfg.n_embd) if cfg.has_pooler else None
        self.head_dropout = nn.Dropout(cfg.dropout if cfg.has_pooler or cfg.task == "tag" else 0.0)
        self.classifier = Linear(cfg.n_embd, len(cfg.labels), bias=cfg.has_pooler or not cfg.labels_texts)

    def tie_weights(self):
        """Ties nothing: there is no head of the vocabulary."""

    def num_params(self):
        """Parameters, without the vocabulary's padding rows."""
        padding = self.cfg.padded_vocab_size - self.cfg.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.cfg.n_embd

    def predict(self, x, targets=None, count_correct=False):
        """forward's answer for the last norm's output at the positions (B, K, C); logits are float32."""
        if self.pooler is not None:
            x = self.pooler(x).tanh()
        logits = self.classifier(self.head_dropout(x)).float()  # B K L
        if targets is None:
            return logits
        smoothing, gamma = (self.cfg.label_smoothing, self.focal_gamma) if self.training else (0.0, 0.0)
        return label_loss(logits, targets, smoothing, gamma)


class SpanFinder(Labeller):
    """Token ids to the logits of a span's start and its end (B, T, 2) or, with targets (B, 2), to the sum of losses.

    The targets are the positions of both; positions (B, K) change nothing. Padding has the logits -inf.
    """

    def forward(self, ids, targets=None, positions=None, attention_mask=None, token_types=None):
        logits = super().forward(ids, None, None, attention_mask, token_types)
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask[..., None], -math.inf)
        return logits if targets is None else label_loss(logits.transpose(1, 2), targets)


def label_loss(logits, targets, label_smoothing=0.0, focal_gamma=0.0):
    """Sum of the losses of logits (..., L): cross-entropy or, where targets (...) are floats, the squared error.

    focal_gamma: each cross-entropy -log p is multiplied by (1 - p)^gamma (Lin et al. 2017, arXiv 1708.02002).
    """
    if targets.is_floating_point():
        return ((logits[..., 0] - targets).square() * (targets != IGNORE)).sum()
    options = {"ignore_index": IGNORE, "reduction": "none"}
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing, **options)
    if focal_gamma:
        likelihood = (-F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)).exp()
        loss = loss * (1 - likelihood).clamp(min=1e-7) ** focal_gamma  # at 0 a root has no gradient
    return loss.sum()
