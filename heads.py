"""Heads beside the one of the vocabulary: a Transformer that also learns from whole sequences."""

import torch
import torch.nn.functional as F

from model import Transformer
from objective import CONTRASTIVE, PAIRS
from ops import IGNORE, Linear

TEMPERATURE = 0.05  # of contrastive, as in the paper
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
            self.pooler = Pooler(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
            self.pair_head = Linear(cfg.n_embd, 2, bias=cfg.bias)
        self.gather = lambda x: (x, 0)  # parallel.py: rows of all ranks, and the number of this one's first

    def forward(self, ids, targets=None, positions=None, attention_mask=None, token_types=None, documents=None,
                labels=None, count_correct=False, **cached):  # fmt: skip
        """Transformer's, or with targets the sums of losses (M,) in the order of cfg.objectives; labels (B,).

        count_correct then also returns the numbers of right answers (M,). With contrastive, both have M - 1 numbers,
        and the embeddings (B, C) come third: they are to be compared in groups that do not depend on batches.
        """
        about_ids = attention_mask, token_types, documents
        if targets is None:
            return super().forward(ids, None, positions, *about_ids, **cached)
        views = ()
        if CONTRASTIVE in self.cfg.objectives:
            x, *views = self.views(ids, targets, positions, attention_mask, token_types, 1 if count_correct else 2)
        else:
            x = self.states(ids, *about_ids)
        figures = [self.predict(self.selected(x, positions), targets, count_correct)]
        if labels is not None:
            logits = self.pair_head(self.pooler(self.norm_f(x[:, 0]))).float()  # B 2
            loss = label_loss(logits, labels)
            figures.append((loss, (logits.argmax(-1) == labels).sum()) if count_correct else loss)
        seen = targets != IGNORE if self.cfg.is_causal else attention_mask
        embedded = [F.normalize(embedding(self, view, seen), dim=-1) for view in views]
        if count_correct:
            return *(torch.stack(both) for both in zip(*figures)), *embedded
        if embedded:
            figures.append(self.contrastive_loss(*embedded, targets.amax(1) != IGNORE))
        return torch.stack(figures)

    def views(self, ids, targets, positions, attention_mask, token_types, n):
        """The last block's output (B, T, C) for ids, and for n copies of them without masks, each under its dropout.

        A causal model's first copy is the output for ids. All are one batch: sharded layers then run once.
        """
        if self.cfg.is_causal:
            rows = [ids] * n
        else:
            old = ids.gather(1, positions)
            rows = [ids] + [ids.scatter(1, positions, targets.where(targets != IGNORE, old))] * n
        about_ids = (None if part is None else part.repeat(len(rows), 1) for part in (attention_mask, token_types))
        x = self.states(torch.cat(rows), *about_ids).chunk(len(rows))
        return (x[0], *x) if self.cfg.is_causal else x

    def contrastive_loss(self, first, second, is_text):
        """This rank's part of contrastive_losses of all ranks' rows; its gradient is for the sum over all of them."""
        n_rows, ((first, start), (second, _), (is_text, _)) = len(first), map(self.gather, (first, second, is_text))
        losses = contrastive_losses(first, second, is_text)
        total, own = losses.sum(), losses[start : start + n_rows].sum()
        return own.detach() + (total - total.detach())


def label_loss(logits, targets):
    """Sum of the cross-entropies of logits (B, L), float32, of L classes; targets (B,) with IGNORE for none."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


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
