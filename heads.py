"""Heads beside the one of the vocabulary: a Transformer that also learns from whole sequences."""

import torch
import torch.nn.functional as F

from model import Transformer
from ops import IGNORE, Linear


class Pooler(Linear):
    """BERT's layer on the first token's output, which stands for the sequence."""

    def forward(self, x):
        return super().forward(x).tanh()


class PretrainingModel(Transformer):
    """Token ids to logits or, with targets and labels, to a vector with the sum of losses of each objective.

    pooler and pair_head, two classes, tell what two sentences are to each other, as transformers' BertForPreTraining.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        self.pooler = Pooler(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.pair_head = Linear(cfg.n_embd, 2, bias=cfg.bias)

    def forward(self, ids, targets=None, positions=None, attention_mask=None, token_types=None, documents=None,
                labels=None, count_correct=False, **cached):  # fmt: skip
        """Transformer's, or with labels (B,) the sums of losses (M,) in the order of cfg.objectives.

        count_correct then also returns the numbers of right answers (M,).
        """
        about_ids = attention_mask, token_types, documents
        if labels is None:
            return super().forward(ids, targets, positions, *about_ids, count_correct=count_correct, **cached)
        x = self.states(ids, *about_ids)
        of_tokens = self.predict(self.selected(x, positions), targets, count_correct)
        logits = self.pair_head(self.pooler(self.norm_f(x[:, 0]))).float()  # B 2
        loss = label_loss(logits, labels)
        if count_correct:
            of_pairs = loss, (logits.argmax(-1) == labels).sum()
            return tuple(torch.stack(both) for both in zip(of_tokens, of_pairs))
        return torch.stack([of_tokens, loss])


def label_loss(logits, targets):
    """Sum of the cross-entropies of logits (B, L), float32, of L classes; targets (B,) with IGNORE for none."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
