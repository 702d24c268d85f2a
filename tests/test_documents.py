"""Document masks and sliding windows: each document as if alone, each token with the keys that its window has."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from model import ModelConfig, Transformer
from objective import Masked, NextToken
from ops import IGNORE, locate
from ranks import write_data

B, T, V, END = 3, 11, 37, 5  # END: the id that ends documents
GPT = ModelConfig(vocab_size=V, block_size=13, n_layer=3, n_head=4, n_embd=20, head_dim=6, n_inner=33)
MODELS = {
    "gpt": GPT,
    "modern": replace(GPT, n_kv_head=2, norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=True, bias=False),
    "bert": replace(GPT, objective="mlm", norm_position="post", n_token_types=2, mlp="gelu"),
    "modern bert": replace(GPT, objective="mlm", norm="rmsnorm", position="rope", mlp="swiglu"),
}  # fmt: skip
KINDS = pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
WINDOWS = pytest.mark.parametrize("windows", [{}, {"window": 3}, {"window": 3, "global_every": 2}, {"window": 2}], ids=str)
SPECIALS = {"<|endoftext|>": 31, "<|pad|>": 32, "<|mask|>": 33, "<|cls|>": 34, "<|sep|>": 35}
LENGTHS = ((4, 1, 6), (11,), (2, 7, 1, 1))  # of each row's documents


def random_model(cfg, seed=1):
    """A model whose every weight is drawn, wide enough for mistakes to show."""
    torch.manual_seed(seed)
    model = Transformer(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.2).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for table in {model.wte.weight, model.head.weight}:
            table[V:] = 0
    return model


def starts_of(lengths=LENGTHS, padding=4):
    """The starts of documents with these lengths, as ops.locate has them."""
    firsts = itertools.accumulate(itertools.chain(*lengths), initial=0)
    return torch.tensor([*firsts, *[B * T] * padding], dtype=torch.int32)


def a_batch():
    g = torch.Generator().manual_seed(2)
    ids, targets = torch.randint(V, (2, B, T), generator=g)
    return ids, targets.where(torch.rand(B, T, generator=g) < 0.7, IGNORE)


def documents_of(tensor):
    """Each document's part of (B, T), as a batch of one."""
    return [part[None] for row, lengths in zip(tensor, LENGTHS) for part in row.split(lengths)]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_near(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() < tolerance * largest, name


@KINDS
@WINDOWS
def test_documents_side_by_side_are_documents_one_by_one(cfg, windows):
    model, (ids, targets) = random_model(replace(cfg, **windows)), a_batch()
    loss = model(ids, targets, documents=starts_of())
    alone = sum(model(*pair) for pair in zip(documents_of(ids), documents_of(targets)))
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    check_near(gradients(model, loss), gradients(model, alone))
    with torch.no_grad():
        logits = model(ids, documents=starts_of())
        for ours, part in zip(documents_of(logits), documents_of(ids)):
            torch.testing.assert_close(ours, model(part), rtol=0, atol=1e-4)
        assert not torch.allclose(logits, model(ids), atol=1e-2), "documents make no difference"


# ---- from tokens to documents


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data whose 29th, 58th, ... token ends a document; its tokenizer has what masked models need."""
    return write_data(tmp_path_factory.mktemp("data"), specials=SPECIALS)


def rows_of(*rows):
    return np.array(rows, dtype=np.int64)


def test_a_document_begins_behind_each_end_of_text_and_its_first_token_is_no_target():
    windows = NextToken(6)
    windows.document_end = END
    ids, targets, *unused, starts = windows.batch(rows_of([1, END, 2, 3, 4, END, 6], [END, 1, 2, END, END, 3, 4]), 0)
    assert ids.tolist() == [[1, END, 2, 3, 4, END], [END, 1, 2, END, END, 3]] and unused == [None] * 3
    assert targets.tolist() == [[END, IGNORE, 3, 4, END, IGNORE], [IGNORE, 2, END, IGNORE, IGNORE, 4]]
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 2, 6, 7, 10, 11, 12, 12, 12]
    document, place = locate(starts, ids.shape)
    assert document.tolist() == [[0, 0, 1, 1, 1, 1], [2, 3, 3, 3, 4, 5]]
    assert place.tolist() == [[0, 1, 0, 1, 2, 3], [0, 0, 1, 2, 0, 0]]


def test_batches_have_as_many_starts_unless_documents_are_very_short():
    windows, sizes = NextToken(256), []
    windows.document_end = END
    for every in (256, 64, 63, 16):
        rows = np.zeros((2, 257), dtype=np.int64)
        rows[:, ::every] = END
        sizes.append(len(windows.batch(rows, 0)[-1]) - 1)
    assert sizes == [8, 16, 16, 64]
