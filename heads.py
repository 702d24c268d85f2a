"""Heads beside or in place of the vocabulary's: for whole sequences in pre-training, for labels in fine-tuning.

Fine-tuning's for texts compute as transformers' ...ForSequenceClassification do: an encoder's from the first token, through
BERT's pooler and dropout; a decoder's from the last token of a text. Those of words compute as ...ForTokenClassification
do, those of spans as ...ForQuestionAnswering, but that padding is never a span's end.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lora import AdaptedModel, AdaptedTransformer
from model import Transformer
from objective import CONTRASTIVE, PAIRS
from ops import IGNORE, Linear

TEMPERATURE = 0.05  # contrastive divides scores by it, as the paper does
CONTRASTED, GROUP = 1024, 64  # sequences that evaluation embeds, at most, and those that it compares at a time


class Pooler(Linear):
    """BERT's layer on the first token's output, which stands for the sequence."""

    def forward(self, x):
        return super().forward(x).tanh()


class PretrainingModel(Transformer):
    """Token ids to logits or, with targets, to a vector with the sum of losses of each objective.

    pooler and pair_head, two classes, tell what two sentences are to each other, as transformers' BertForPreTraining.
    Contrastive adds no weights.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        if PAIRS.keys() & cfg.objectives:
            self.pooler = Pooler(cfg.n_embd, cfg.n_embd)
            self.pair_head = Linear(cfg.n_embd, 2)
        if not cfg.learns_tokens:  # nothing gives them gradients, for which DDP would wait
            for param in {*self.transform.parameters(), *self.head.parameters()} - {self.wte.weight}:
                param.requires_grad_(False)
        self.gather = lambda x: (x, 0)  # gather_rows' on several ranks: their rows, and the number of this one's first

    def forward(self, ids, targets=None, positions=None, attention_mask=None, token_types=None, documents=None,
                labels=None, count_correct=False, **cached):  # fmt: skip
        """Transformer's, or with targets the sums of losses (M,) in the order of cfg.objectives; labels (B,).

        A loss of weight 0 is not computed, but 0. count_correct, for evaluation, computes it, and also returns the
        numbers of right answers (M,) and, with contrastive, whose own two numbers are 0, the texts' embeddings (B, C):
        they are to be compared in groups that do not depend on batches.
        """
        about_ids, contrasts = (attention_mask, token_types, documents), CONTRASTIVE in self.cfg.objectives
        if targets is None:
            return super().forward(ids, None, positions, *about_ids, **cached)
        if contrasts:
            x, *views = self.views(ids, targets, positions, attention_mask, token_types, count_correct)
        else:
            x, views = self.states(ids, *about_ids), ()
        nothing = torch.zeros((), device=ids.device)
        figures = [(nothing, nothing)]
        if self.cfg.learns_tokens or count_correct:
            found = self.predict(self.selected(x, positions), targets, count_correct)
            figures = [found if count_correct else (found, nothing)]
        if labels is not None:
            logits = self.pair_head(self.pooler(self.norm_f(x[:, 0]))).float()  # B 2
            figures.append((label_loss(logits, labels), (logits.argmax(-1) == labels).sum()))
        seen = targets != IGNORE if self.cfg.is_causal else attention_mask
        embedded = [F.normalize(embedding(self, view, seen), dim=-1) for view in views]
        if contrasts:
            is_text = targets.amax(1) != IGNORE
            loss = nothing if count_correct else self.contrastive_loss(*embedded, is_text)  # type: ignore[call-arg]
            figures.append((loss, nothing))
        losses, n_correct = map(torch.stack, zip(*figures))
        return (losses, n_correct, *embedded) if count_correct else losses

    def views(self, ids, targets, positions, attention_mask, token_types, evaluates):
        """The last block's output (B, T, C) for ids, and for copies of them without masks, each under its dropout.

        Evaluation has one copy, training two. A causal model's first copy is the output for ids; a masked one's is None
        in training where nothing reads it. All are one batch: sharded layers then run once.
        """
        copies = 1 if evaluates else 2
        if self.cfg.is_causal:
            rows = [ids] * copies
        else:
            old = ids.gather(1, positions)
            rows = [ids.scatter(1, positions, targets.where(targets != IGNORE, old))] * copies
            rows = [ids, *rows] if evaluates or self.cfg.passes > copies else rows
        about_ids = (None if part is None else part.repeat(len(rows), 1) for part in (attention_mask, token_types))
        x = self.states(torch.cat(rows), *about_ids).chunk(len(rows))
        if len(rows) > copies:
            return x
        return (x[0] if self.cfg.is_causal else None, *x)

    def contrastive_loss(self, first, second, is_text):
        """This rank's part of contrastive_losses of all ranks' rows; its gradient is for the sum over all of them."""
        n_rows, ((first, start), (second, _), (is_text, _)) = len(first), map(self.gather, (first, second, is_text))
        losses = contrastive_losses(first, second, is_text)
        total, own = losses.sum(), losses[start : start + n_rows].sum()
        return own.detach() + (total - total.detach())


def gather_rows(world, x):
    """All data ranks' rows of x (B, ...), in their order, and the number of this rank's first one.

    Only this rank's have a gradient: what all ranks compute of all rows then has, summed over ranks, the whole one.
    """
    parts = [torch.empty_like(x) for _ in range(world.data_ranks)]
    dist.all_gather(parts, x.detach().contiguous(), group=world.data_group)
    parts[world.data_rank] = x
    return torch.cat(parts), world.data_rank * len(x)


def embedding(model, x, seen=None):
    """Embeddings of texts (B, C), float32, by cfg.pooling: the last norm's output at [CLS], or its mean where seen.

    x (B, T, C): the last block's output; seen (B, T): False at padding; None: at no token.
    """
    if model.cfg.pooling == "cls":
        return model.norm_f(x[:, 0]).float()
    x = model.norm_f(x).float()
    if seen is None:
        return x.mean(1)
    return (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)


def contrastive_losses(first, second, is_text):
    """The losses (N,) of embeddings (N, C) of norm 1: SimCSE's (Gao et al. 2021, arXiv 2104.08821, equation 4).

    Each of `first` shall be nearer to its own of `second` than to the others. Rows where is_text (N,) is False do not
    count.
    """
    with torch.autocast(first.device.type, enabled=False):
        scores = first @ second.T / TEMPERATURE
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(~(is_text | own), torch.finfo(scores.dtype).min)
    return -scores.log_softmax(-1).diagonal() * is_text


def contrast(embedded):
    """(sum of losses, right answers, rows) of embeddings (N, C), each GROUP of rows compared with itself."""
    n, is_text = len(embedded), torch.ones(GROUP, dtype=torch.bool)
    losses = [contrastive_losses(group, group, is_text[: len(group)]).sum() for group in embedded.split(GROUP)]
    return torch.tensor([sum(losses), n, n], dtype=torch.float64)


# ---- fine-tuning

SPAN = ("start", "end")  # the labels of a SpanFinder


@dataclass(frozen=True)
class TunedModel(AdaptedModel):
    """An AdaptedModel with a task and the labels that its head tells apart, in the order of its logits."""

    task: Literal["classify", "regress", "tag", "qa"] = "classify"
    labels: tuple = ()

    def build(self):
        """The model with these settings."""
        return SpanFinder(self) if self.task == "qa" else Labeller(self)

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
        self.pooler = Pooler(cfg.n_embd, cfg.n_embd) if cfg.has_pooler else None
        self.head_dropout = nn.Dropout(cfg.dropout if cfg.has_pooler or cfg.task == "tag" else 0.0)
        self.classifier = Linear(cfg.n_embd, len(cfg.labels), bias=cfg.has_pooler or not cfg.labels_texts)

    def tie_weights(self):
        """Ties nothing: there is no head of the vocabulary."""

    def predict(self, x, targets=None, count_correct=False):
        """forward's answer for the last norm's output at the positions (B, K, C); logits are float32."""
        if self.pooler is not None:
            x = self.pooler(x)
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
