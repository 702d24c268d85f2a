"""Document masks and sliding windows: each document as if alone, each token with the keys that its window has."""

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import test_model
from cache import Cache
from config import UserError
from conftest import slow
from context import in_parts
from data import Split, objective_for
from interop.families import family_of
from launch import compile_model
from model import ModelConfig, Transformer
from objective import OBJECTIVES, Masked, NextToken, ObjectiveConfig
from ops import IGNORE, locate
from optim import OptimConfig, build_optimizer
from parallel import ParallelConfig, distribute, recompute_blocks
from ranks import on_ranks, records, run, settings, step_settings, write_data
from train import evaluate, train_step
from world import World, WorldConfig, init_world

B, T, V, END = 3, 11, 37, 5  # END: the id that ends documents
GPT = ModelConfig(vocab_size=V, block_size=13, n_layer=3, n_head=4, n_embd=20, head_dim=6, n_inner=38)
MODELS = {
    "gpt": GPT,
    "modern": replace(GPT, n_kv_head=2, norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=True, bias=False),
    "bert": replace(GPT, objective="mlm", norm_position="post", n_token_types=2, mlp="gelu"),
    "modern bert": replace(GPT, objective="mlm", norm="rmsnorm", position="rope", mlp="swiglu"),
}  # fmt: skip
KINDS = pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)
DECODERS = pytest.mark.parametrize("cfg", [GPT, MODELS["modern"]], ids=["gpt", "modern"])
WINDOWS = pytest.mark.parametrize(
    "windows", [{}, {"window": 3}, {"window": 3, "global_every": 2}, {"window": 2}], ids=str
)
SPECIALS = {"<|endoftext|>": 31, "<|pad|>": 32, "<|mask|>": 33, "<|cls|>": 34, "<|sep|>": 35}
random_model = functools.partial(test_model.random_model, std=0.2)
LENGTHS = ((4, 1, 6), (11,), (2, 7, 1, 1))  # the lengths of each row's documents


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


@KINDS
def test_tokens_of_other_documents_change_nothing(cfg):
    model, (ids, _) = random_model(cfg), a_batch()
    inside = torch.zeros(B, T, dtype=torch.bool)
    inside[0, 5:] = True  # the third document of the first row
    other = ids.where(inside, (ids + 1) % V)
    with torch.no_grad():
        ours, theirs = (model(x, documents=starts_of())[inside] for x in (ids, other))
    assert torch.equal(ours, theirs)


@KINDS
def test_more_or_fewer_starts_behind_the_last_document_change_nothing(cfg):
    model, (ids, targets) = random_model(cfg), a_batch()
    with torch.no_grad():
        losses = {model(ids, targets, documents=starts_of(padding=n)).item() for n in (0, 1, 40)}
    assert len(losses) == 1


@KINDS
def test_padding_beside_documents_influences_no_other_token(cfg):
    model, (ids, _) = random_model(cfg), a_batch()
    real = torch.arange(T) < torch.tensor([[10], [7], [11]])
    with torch.no_grad():
        ours, theirs = (model(x, attention_mask=real, documents=starts_of())[real] for x in (ids, ids.where(real, 3)))
    assert torch.equal(ours, theirs) and ours.isfinite().all()


# ---- windows


def seen_by(model, ids):
    """(T, T): which tokens change a query's logits, by changing one at a time."""
    with torch.no_grad():
        logits = model(ids)
        changed = [model(ids.clone().index_fill_(1, torch.tensor([j]), (ids[0, j].item() + 1) % V)) for j in range(T)]
    return torch.stack([(other - logits).abs().amax(-1)[0] > 1e-6 for other in changed], dim=1)


@pytest.mark.parametrize("objective", ["clm", "mlm"])
@pytest.mark.parametrize("window", [1, 2, 5, T - 1, T, T + 1])
def test_a_token_sees_itself_and_window_minus_one_before_it_and_in_encoders_after_it(window, objective):
    model = random_model(replace(GPT, n_layer=1, objective=objective, window=window))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    expected = distance.abs() < window
    expected = expected & (distance >= 0) if objective == "clm" else expected
    assert torch.equal(seen_by(model, a_batch()[0][:1]), expected)


def test_every_nth_layer_sees_all_tokens():
    cfg = replace(GPT, n_layer=7, window=3, global_every=3)
    assert [cfg.window_of(layer) for layer in range(7)] == [3, 3, None, 3, 3, None, 3]
    assert [block.attn.window for block in Transformer(cfg).blocks] == [3, 3, None, 3, 3, None, 3]
    with pytest.raises(UserError, match="global_every is 2, but window is none, so all layers are; set --window"):
        replace(GPT, global_every=2)


@DECODERS
@pytest.mark.parametrize("prompt", [1, 4, T])
def test_cached_logits_beyond_the_window_are_the_uncached_ones(prompt, cfg):
    model, (ids, _) = random_model(replace(cfg, window=3, global_every=2)), a_batch()
    with torch.no_grad():
        whole, cache = model(ids), Cache(model.cfg, B, "cpu", torch.float32)
        steps = [model(ids[:, :prompt], cache=cache)]
        steps += [model(ids[:, i : i + 1], cache=cache) for i in range(prompt, T)]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, prompt - 1 :], rtol=0, atol=1e-4)
        cache = Cache(model.cfg, B, "cpu", torch.float32, n_tokens=16)
        steps = [model(ids[:, :prompt], cache=cache)]
        steps += [model(ids[:, i : i + 1], cache=cache, place=torch.tensor([i])) for i in range(prompt, T)]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, prompt - 1 :], rtol=0, atol=1e-4)


@DECODERS
def test_generation_computes_the_windows_keys_alone(cfg):
    model, (ids, _) = random_model(replace(cfg, window=3)), a_batch()
    with torch.no_grad():
        cache = Cache(model.cfg, B, "cpu", torch.float32)
        model(ids[:, :9], cache=cache)
        for layer in cache.layers:
            layer.k[:, :, :7], layer.v[:, :, :7] = math.nan, math.nan
        assert model(ids[:, 9:10], cache=cache).isfinite().all()


@DECODERS
def test_a_padded_prompt_goes_on_within_the_window(cfg):
    """Padding on the left, as batches of prompts have it: the mask covers all tokens so far."""
    model, (ids, _) = random_model(replace(cfg, position="rope", window=4)), a_batch()
    real = torch.arange(T) >= torch.tensor([[2], [0], [5]])
    with torch.no_grad():
        expected, cache = model(ids, attention_mask=real)[:, -1:], Cache(model.cfg, B, "cpu", torch.float32)
        model(ids[:, :-1], attention_mask=real[:, :-1], cache=cache)
        torch.testing.assert_close(model(ids[:, -1:], attention_mask=real, cache=cache), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cfg", [replace(GPT, head_dim=None, window=3), replace(MODELS["bert"], head_dim=None, window=3),
                                 replace(MODELS["modern"], qk_norm=False, window=3, global_every=2),
                                 replace(MODELS["modern"], window=3)], ids=["gpt", "bert", "global layers", "qwen3"])  # fmt: skip
def test_windows_that_transformers_cannot_compute_are_not_exported(cfg):
    with pytest.raises(
        UserError, match="transformers cannot compute this model; .*(window is 3|global_every is 2), not None"
    ):
        family_of(cfg)


# ---- the kernel of GPUs


def varlen_by_its_documentation(q, k, v, starts, max_len, window_size, d_out=None):
    """varlen_attn as torch documents it: each sequence alone, keys from left before the query to right behind it.

    Or, for the gradient of its output, the gradients of q, k and v.
    """
    shared, (left, right) = q.shape[1] // k.shape[1], window_size
    results = [torch.zeros_like(x) for x in ([q] if d_out is None else [q, k, v])]
    for first, end in itertools.pairwise(starts.tolist()):
        assert 0 <= end - first <= max_len
        behind = torch.arange(end - first)[:, None] - torch.arange(end - first)  # the query's place minus the key's
        seen = ((behind <= left) | (left < 0)) & ((-behind <= right) | (right < 0))
        for head in range(q.shape[1]):
            Q, K, V = q[first:end, head], k[first:end, head // shared], v[first:end, head // shared]
            P = (Q @ K.T / Q.shape[1] ** 0.5).masked_fill(~seen, -math.inf).softmax(-1)
            if d_out is None:
                results[0][first:end, head] = P @ V
                continue
            d = d_out[first:end, head]
            d_scores = P * (d @ V.T - (d * (P @ V)).sum(1, keepdim=True)) / Q.shape[1] ** 0.5
            results[0][first:end, head] = d_scores @ K
            results[1][first:end, head // shared] += d_scores.T @ Q
            results[2][first:end, head // shared] += P.T @ d
    return results


CALLS = []


@pytest.fixture
def varlen_on_a_cpu():
    """torch's operator of varlen_attn, which has a kernel for CUDA alone, by its documentation; yields its calls."""
    CALLS.clear()
    yield CALLS


@pytest.fixture(scope="module", autouse=True)
def varlen_kernels():
    import torch.nn.attention.varlen  # registers the operators

    def forward(q, k, v, starts, _, max_q, max_k, is_causal, scale, window_size, *more):
        assert starts.dtype == torch.int32 and scale is None and is_causal == (window_size == [-1, 0])
        CALLS.append(window_size)
        [out] = varlen_by_its_documentation(q, k, v, starts, max_q, window_size)
        return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float), torch.zeros(2, dtype=torch.uint64)

    def backward(d_out, q, k, v, out, lse, starts, _, max_q, max_k, is_causal, rng, scale, window_size, *more):
        return tuple(varlen_by_its_documentation(q, k, v, starts, max_q, window_size, d_out))

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)


@KINDS
@WINDOWS
def test_gpus_kernel_is_asked_for_what_masks_leave(cfg, windows, varlen_on_a_cpu, monkeypatch):
    expected, theirs = trained(replace(cfg, **windows))
    monkeypatch.setattr("model.can_pack", lambda *_: True)
    loss, ours = trained(replace(cfg, **windows))
    assert len(varlen_on_a_cpu) == 3 and loss == pytest.approx(expected, rel=1e-5)
    check_near(ours, theirs)


def test_selective_activation_checkpointing_keeps_what_gpus_kernel_returns(varlen_on_a_cpu, monkeypatch):
    monkeypatch.setattr("model.can_pack", lambda *_: True)
    (loss, ours), (expected, theirs) = trained(GPT, "selective"), trained(GPT)
    assert len(varlen_on_a_cpu) == 3 + 3 and loss == expected
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("cfg", [GPT, MODELS["modern bert"]], ids=["gpt", "modern bert"])
def test_windows_alone_go_by_gpus_kernel_and_layers_that_see_all_do_not(cfg, varlen_on_a_cpu, monkeypatch):
    (ids, targets), model = a_batch(), random_model(replace(cfg, window=3, global_every=2))
    losses = [model(ids, targets)]
    monkeypatch.setattr("model.can_pack", lambda *_: True)
    losses.append(model(ids, targets))
    assert len(varlen_on_a_cpu) == 2 and losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    check_near(*(gradients(model, loss) for loss in losses))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@KINDS
@WINDOWS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_documents_and_windows_on_a_gpu_are_those_on_a_cpu(dtype, cfg, windows):
    cfg, (ids, targets) = replace(cfg, head_dim=8, **windows), a_batch()
    (expected, theirs), model = trained(cfg), random_model(cfg).cuda()
    with torch.autocast("cuda", dtype), torch.profiler.profile() as profiler:
        loss = model(ids.cuda(), targets.cuda(), documents=starts_of().cuda())
    assert "torch_attn::_varlen_attn" in {event.name for event in profiler.events()}
    assert loss.item() == pytest.approx(expected, rel=0.02)
    check_near({name: g.cpu() for name, g in gradients(model, loss).items()}, theirs, 0.1)


# ---- layouts


def trained(cfg, kind="none", compiled=False, bf16=False):
    """(loss, gradients) of a batch of documents."""
    model, (ids, targets) = random_model(cfg), a_batch()
    if kind == "selective":
        recompute_blocks(model, kind)
    if compiled:
        compile_model(model, 1, World(0, 1, torch.device("cpu"), "fp32"))
    if kind == "full":
        recompute_blocks(model, kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(ids, targets, documents=starts_of())
    return loss.item(), gradients(model, loss)


@KINDS
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing_changes_no_bit_beside_documents_and_windows(kind, cfg):
    cfg = replace(cfg, window=3, global_every=2)
    (loss, ours), (expected, theirs) = trained(cfg, kind), trained(cfg)
    assert loss == expected and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("gpt", "none"), ("modern", "full"), ("modern bert", "selective")])
def test_compiled_documents_and_windows_are_the_eager_ones(name, kind):
    cfg = replace(MODELS[name], window=3, global_every=2)
    (loss, ours), (expected, theirs) = trained(cfg, kind, compiled=True), trained(cfg)
    assert loss == pytest.approx(expected, rel=1e-5)
    check_near(ours, theirs)


@KINDS
def test_in_bf16_documents_and_windows_are_as_near_as_bf16_is(cfg):
    """Trained by matmuls, evaluated by torch's kernel."""
    cfg = replace(cfg, window=3, global_every=2)
    (loss, ours), (expected, theirs) = trained(cfg, bf16=True), trained(cfg)
    assert loss == pytest.approx(expected, rel=0.02)
    check_near(ours, theirs, 0.1)
    model, (ids, targets) = random_model(cfg), a_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(ids, targets, documents=starts_of()).item() == pytest.approx(expected, rel=0.02)


def steps_of(name, windows, steps=3, **layout):
    """Losses and gradient norms of steps on two sequences a rank or four alone, and a loss without gradients."""
    cfg, layout = replace(MODELS[name], **windows), ParallelConfig(**layout)
    with init_world(WorldConfig(device="cpu", precision="fp32"), layout) as world:
        with torch.device("meta"):
            model = Transformer(cfg)
        distribute(model, layout, world, seed=1)
        optimizer = build_optimizer(model, OptimConfig(optimizer="sgd", learning_rate=1.0, warmup_steps=0), world)
        meta = {"vocab_size": V, "specials": SPECIALS}
        made = OBJECTIVES[cfg.objective].build(ObjectiveConfig(mask_prob=0.4, document_mask=True), 8, 1, meta)
        rows = np.random.default_rng(3).integers(30, size=(4, made.stride + made.extra))
        rows[[0, 0, 1, 3], [1, 4, 3, 0]] = SPECIALS["<|endoftext|>"]
        size = 4 // world.data_ranks
        mine = slice(world.data_rank * size, (world.data_rank + 1) * size)
        batch = in_parts(made, world).batch(rows[mine], first=mine.start)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        figures = [train_step(model, optimizer, scaler, [batch], step_settings(1.0), world)[:2] for _ in range(steps)]
        with torch.no_grad():
            loss = model(*batch)
        return [*figures, (world.sum_over_data(loss).item(),)]


CASES = [("gpt", {"tp": 2}), ("bert", {"tp": 2}), ("modern", {"tp": 2}), ("modern", {"strategy": "fsdp"}), ("gpt", {}),
         ("gpt", {"cp": 2}), ("bert", {"cp": 2}), ("modern", {"cp": 2, "strategy": "fsdp"}), ("modern bert", {"cp": 2}),
         ("modern", {"tp": 2, "activation_checkpointing": "full"}),
         ("gpt", {"strategy": "fsdp", "activation_checkpointing": "full"})]  # fmt: skip


@pytest.mark.parametrize("cases", [[("gpt", {"tp": 2})], *slow(CASES)], ids=["tp", "all"])
def test_documents_and_windows_on_two_ranks_are_those_on_one(cases):
    windows = {"window": 3, "global_every": 2}
    answers = on_ranks(2, *((steps_in, name, windows, layout) for name, layout in cases))
    alone = {name: steps_of(name, windows) for name in {name for name, _ in cases}}
    for (name, layout), ranks in zip(cases, answers):
        for figures, expected in itertools.product(ranks, [alone[name]]):
            for found, wanted in zip(figures, expected, strict=True):
                assert found == pytest.approx(wanted, rel=1e-5), (name, layout)


def steps_in(name, windows, layout):
    return steps_of(name, windows, **layout)


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


def test_a_masked_models_documents_end_with_sep_and_padding_is_one_of_its_own():
    windows = Masked(9, 0.3, 1, V, SPECIALS, document_mask=True)
    end, sep = SPECIALS["<|endoftext|>"], SPECIALS["<|sep|>"]
    rows = rows_of([1, 2, end, 3, 4, 5, 6], [7, end, end, 8, 0, 0, 0])
    ids, targets, positions, *unused, starts = windows.batch(rows, 0, np.array([7, 4]))
    assert unused == [None, None] and targets.shape == positions.shape
    assert (ids == sep).tolist() == [[t in (3, 8) for t in range(9)], [t in (2, 3, 5) for t in range(9)]]
    assert starts.unique().tolist() == [0, 4, 9, 12, 13, 15, 18]


@pytest.mark.parametrize("specials", [None, {"<|pad|>": 3}])
def test_data_that_names_no_end_of_text_is_refused_in_a_line(specials):
    meta = {"vocab_size": V, "specials": specials} if specials else {}
    with pytest.raises(
        UserError, match="document_mask is on; it needs data whose meta.json names .*; this data has none"
    ):
        NextToken.build(ObjectiveConfig(document_mask=True), 7, 1, meta)
    assert NextToken.build(ObjectiveConfig(), 7, 1, meta).document_end is None


@pytest.mark.parametrize("changes", [
    {}, pytest.param({"objective": "mlm", "norm_position": "post"}, marks=pytest.mark.slow),
    pytest.param({"position": "rope", "window": 3}, marks=pytest.mark.slow),
], ids=["gpt", "bert", "rope and window"])  # fmt: skip
def test_a_run_with_documents_learns_resumes_and_is_another(changes, data, tmp_path):
    figures = {}
    for name, mask, steps in (("on", True, 9), ("off", False, 9), ("resumed", True, 4), ("resumed", True, 9)):
        run(data, tmp_path / name, document_mask=mask, max_steps=steps, save_interval=2, **changes)
        figures[name] = records(tmp_path / name), records(tmp_path / name, "val_loss")[9 if steps == 9 else 4]
    assert figures["on"] == figures["resumed"] != figures["off"]
    assert figures["on"][0][9] < figures["on"][0][1]


def test_evaluation_is_the_mean_over_documents_one_by_one(data):
    """Each document of each window alone; the token behind an end of text is predicted by nothing."""
    cfg = settings(data, "out", document_mask="true")
    split, made = Split(data, "val", V), objective_for(replace(cfg, data=replace(cfg.data, seq_len=7)), 0)
    model, world = random_model(replace(GPT, window=3)), World(0, 1, torch.device("cpu"), "fp32")
    figures = evaluate(model, [split], made, replace(cfg.data, seq_len=7, eval_tokens=140, micro_batch_size=3), world)
    losses, end = [], SPECIALS["<|endoftext|>"]
    tokens = split.shards[0][:141].astype(np.int64)
    for start in range(0, 140, 7):
        window, first = tokens[start : start + 8], 0
        for last in [*np.flatnonzero(window == end), 7]:
            if last > first:
                part = torch.from_numpy(window[first : last + 1])[None]
                logits = model(part[:, :-1])
                losses.append(torch.nn.functional.cross_entropy(logits[0], part[0, 1:], reduction="none"))
            first = last + 1
    assert figures["val_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_without_documents_and_windows_nothing_is_masked():
    model, (ids, targets), seen = random_model(GPT), a_batch(), []
    run_blocks = model.run_blocks
    model.run_blocks = lambda x, rope, masks, caches: seen.append(masks) or run_blocks(x, rope, masks, caches)
    model(ids, targets)
    assert seen == [{None: None}] and [len(NextToken(6).batch(rows_of(range(7)), 0))] == [2]
