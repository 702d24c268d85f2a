"""A checkpoint of nanoGPT's becomes a run that computes the same, and goes on with the same optimizer."""

import copy
import math
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import config
import sample
import train
from checkpoint import checkpoints, newest_checkpoint
from config import UserError
from interop.nanogpt import import_nanogpt, read_characters
from interop.pretrained import load_model
from optim import lr_at, set_lr
from ranks import records, run, without_matplotlib
from run.folder import tokenizer_of
from run.resume import Saver
from text.tokenizer import load_tokenizer
from world import World

ARGS = {"n_layer": 3, "n_head": 5, "n_embd": 20, "block_size": 11, "vocab_size": 131, "dropout": 0.0}
CONFIG = {  # what nanoGPT's train.py saves beside its tensors
    "out_dir": "out", "eval_interval": 2, "log_interval": 1, "eval_iters": 5, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "letters", "gradient_accumulation_steps": 2, "batch_size": 3, "block_size": 11,
    "n_layer": 3, "n_head": 5, "n_embd": 20, "dropout": 0.0, "bias": False, "learning_rate": 1e-3, "max_iters": 8,
    "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.97, "grad_clip": 0.5, "decay_lr": True, "warmup_iters": 3,
    "lr_decay_iters": 20, "min_lr": 1e-4, "backend": "nccl", "device": "cpu", "dtype": "bfloat16", "compile": True,
}  # fmt: skip
STEPS = 4
CHARACTERS = [chr(0x4E00 + i) for i in range(ARGS["vocab_size"])]


def parameters(bias, args=ARGS, seed=0):
    """nanoGPT's parameters, in its order: large enough that a wrong one shows, and no GELU is dead."""
    C, random = args["n_embd"], torch.Generator().manual_seed(seed)
    shapes = {"transformer.wte.weight": (args["vocab_size"], C), "transformer.wpe.weight": (args["block_size"], C)}
    for i in range(args["n_layer"]):
        for name, shape in [("ln_1", (C,)), ("attn.c_attn", (3 * C, C)), ("attn.c_proj", (C, C)), ("ln_2", (C,)),
                            ("mlp.c_fc", (4 * C, C)), ("mlp.c_proj", (C, 4 * C))]:  # fmt: skip
            shapes[f"transformer.h.{i}.{name}.weight"] = shape
            shapes |= {f"transformer.h.{i}.{name}.bias": shape[:1]} if bias else {}
    shapes["transformer.ln_f.weight"] = (C,)
    shapes |= {"transformer.ln_f.bias": (C,)} if bias else {}
    return {
        name: (torch.randn(shape, generator=random) * 0.15 + ("ln_" in name)).requires_grad_()
        for name, shape in shapes.items()
    }


def logits_of(w, ids, args=ARGS):
    """nanoGPT's forward, written out."""
    T, C, H = ids.shape[1], args["n_embd"], args["n_head"]

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    for i in range(args["n_layer"]):
        block = f"transformer.h.{i}"
        q, k, v = (
            part.view(len(ids), T, H, C // H).transpose(1, 2)
            for part in linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(C, dim=2)
        )
        scores = (q @ k.mT / math.sqrt(C // H)).masked_fill(torch.ones(T, T).tril() == 0, -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape), f"{block}.attn.c_proj")
        up = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(up * 0.5 * (1 + torch.erf(up / math.sqrt(2))), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def optimizer_of(w, settings=CONFIG):
    groups = [[p for p in w.values() if p.dim() >= 2], [p for p in w.values() if p.dim() < 2]]
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for params, decay in zip(groups, (settings["weight_decay"], 0.0))],
        lr=settings["learning_rate"], betas=(settings["beta1"], settings["beta2"]),
    )  # fmt: skip


def batches_of(step):
    """The micro-batches of a step: ids that go up by 0 to 2, the next as targets."""
    for i in range(CONFIG["gradient_accumulation_steps"]):
        random = torch.Generator().manual_seed(100 * step + i)
        ids = torch.randint(0, 3, (CONFIG["batch_size"], ARGS["block_size"] + 1), generator=random).cumsum(1)
        yield ids[:, :-1], ids[:, 1:]


def their_step(w, optimizer, step, lr):
    """A step of nanoGPT's loop; returns its loss and the gradient's norm."""
    total, n = 0.0, CONFIG["gradient_accumulation_steps"]
    for ids, targets in batches_of(step):
        loss = F.cross_entropy(logits_of(w, ids).flatten(0, 1), targets.flatten()) / n
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(w.values(), CONFIG["grad_clip"])
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return total, norm.item()


def their_lr(step):
    """nanoGPT's schedule."""
    warmup, end, peak, low = (CONFIG[name] for name in ("warmup_iters", "lr_decay_iters", "learning_rate", "min_lr"))
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return low if step > end else low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup)))


def checkpoint_of(w, optimizer, args, settings=CONFIG):
    """What nanoGPT saves."""
    weights = {name: p.detach() for name, p in w.items()}
    return {
        "model": weights | {"lm_head.weight": weights["transformer.wte.weight"]}, "optimizer": optimizer.state_dict(),
        "model_args": args, "iter_num": STEPS, "best_val_loss": torch.tensor(4.5), "config": dict(settings),
    }  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["bias", "no bias"])
def theirs(request, tmp_path_factory):
    """(parameters, optimizer, path of ckpt.pt, bias) after some steps; the file's folder is also where runs may go."""
    bias = request.param
    w = parameters(bias)
    optimizer = optimizer_of(w)
    for step in range(STEPS):
        their_step(w, optimizer, step, their_lr(step))
    path = tmp_path_factory.mktemp("nanogpt") / "ckpt.pt"
    saved = checkpoint_of(w, optimizer, ARGS | {"bias": bias})
    if not bias:  # as torch.compile and, of old, attention without sdpa leave it
        mask = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 11, 11).tril() for i in range(3)}
        saved["model"] = {f"_orig_mod.{name}": tensor for name, tensor in (saved["model"] | mask).items()}
    torch.save(saved, path)
    return w, optimizer, path, bias


@pytest.fixture(scope="module")
def ours(theirs):
    """The run that it became; not to be written to."""
    out_dir = theirs[2].parent / "run"
    import_nanogpt(theirs[2], out_dir)
    return out_dir


@pytest.fixture
def saved():
    """A checkpoint to be spoilt, without the steps."""
    w = parameters(bias=True)
    optimizer = optimizer_of(w)
    for p in w.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return checkpoint_of(w, optimizer, ARGS | {"bias": True})


def imported(saved, folder, **kwargs):
    """The run folder of a checkpoint, and the lines that the user is told."""
    torch.save(saved, folder / "ckpt.pt")
    return folder / "run", import_nanogpt(folder / "ckpt.pt", folder / "run", **kwargs)


def settings_of(run_dir, *arguments):
    return config.load(train.Settings, [str(run_dir / "config.py"), "--device=cpu", *arguments])


def renamed(name):
    """The names here of one of nanoGPT's parameters."""
    for old, new in [("transformer.h", "blocks"), ("transformer.", ""), ("ln_1", "norm1"), ("ln_2", "norm2"),
                     ("ln_f", "norm_f"), ("attn.c_proj", "attn.proj"), ("c_fc", "up"), ("c_proj", "down")]:  # fmt: skip
        name = name.replace(old, new)
    return [name.replace("c_attn", part) for part in "qkv"] if "c_attn" in name else [name]


def test_logits_are_nanogpts(theirs, ours):
    w, _, _, bias = theirs
    ids = torch.randint(131, (3, 11), generator=torch.Generator().manual_seed(1))
    model, source = load_model(ours, "cpu")
    assert (model(ids) - logits_of(w, ids)).abs().max() < 1e-5
    assert (model.cfg.mlp, model.cfg.bias, model.cfg.vocab_size, source.manifest["step"]) == ("gelu", bias, 131, STEPS)
    assert logits_of(w, ids).abs().max() > 1 and len(model.wte.weight) == 192 and not model.wte.weight[131:].any()


def test_next_steps_give_the_weights_that_nanogpt_would_have(theirs, ours):
    """Moments, groups that decay, learning rate and clipping, all in one."""
    w, optimizer, path, _ = theirs
    w = {name: p.detach().clone().requires_grad_() for name, p in w.items()}
    its_optimizer = optimizer_of(w)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    cfg = train.resolve(settings_of(ours))
    world = World(0, 1, torch.device("cpu"), "fp32")
    model, optimizer, scaler = train.build(cfg, world, seed=3)
    state = Saver(cfg, world, model, optimizer, scaler, None).resume()
    assert (state.step, state.sequences_seen, state.val_loss) == (STEPS, STEPS * 6, 4.5)
    for step in (STEPS, STEPS + 1):
        set_lr(optimizer, lr_at(step, cfg.optim, cfg.optim.max_steps))
        loss, norm, _ = train.train_step(model, optimizer, scaler, list(batches_of(step)), cfg, world)
        assert their_step(w, its_optimizer, step, their_lr(step)) == pytest.approx((loss, norm), rel=1e-5)
        assert norm > cfg.optim.grad_clip  # else clipping shows nothing
    parameters = dict(model.named_parameters())
    for name, p in w.items():
        off = (torch.cat([parameters.pop(ours) for ours in renamed(name)])[: len(p)] - p).abs()
        if name.endswith("c_attn.bias"):
            off[20:40] = 0  # keys' biases change no attention: their gradient is rounding, which Adam scales up
        assert off.max() < 1e-6, name
    # Nothing is left over, and padding has stayed zero.
    assert not parameters and not model.wte.weight[131:].any()
    assert not any(moment[131:].any() for name, moment in optimizer.state[model.wte.weight].items() if name != "step")


def test_moments_come_along_to_the_bit(theirs, ours):
    w, optimizer, _, _ = theirs
    file, *others = newest_checkpoint(ours).glob("*.safetensors")
    tensors = load_file(file)
    assert not others and len(tensors) == 4 * len({name for old in w for name in renamed(old)})
    for name, p in w.items():
        for moment, value in optimizer.state[p].items():
            parts = [tensors[f"optimizer.state.{new}.{moment}"] for new in renamed(name)]
            found = torch.cat(parts)[: len(p)] if moment != "step" else torch.stack(parts).unique().squeeze()
            assert torch.equal(found, value), (name, moment)


def test_settings_are_nanogpts_by_our_names(ours):
    cfg = settings_of(ours)
    after_warmup = range(3, 30)
    assert [lr_at(step, cfg.optim, 8) for step in after_warmup] == pytest.approx([*map(their_lr, after_warmup)])
    optim, data = cfg.optim, cfg.data
    assert (optim.weight_decay, optim.beta1, optim.beta2, optim.grad_clip, optim.max_steps) == (0.2, 0.8, 0.97, 0.5, 8)
    assert (data.batch_tokens, data.micro_batch_size, data.data_dir, data.eval_tokens) == (66, 3, "data/letters", 165)
    assert (cfg.train.eval_interval, cfg.checkpoint.save_interval, cfg.log.log_interval) == (2, 2, 1)
    assert (cfg.world.precision, cfg.run.seed, cfg.run.out_dir) == ("fp32", 1337, str(ours))


def test_without_decay_the_rate_is_constant_and_grad_clip_0_is_none(saved, tmp_path):
    saved["config"] |= {"decay_lr": False, "grad_clip": 0.0, "min_lr": 1.0, "device": "cuda"}
    saved["iter_num"] = 2
    run_dir, _ = imported(saved, tmp_path)
    cfg = settings_of(run_dir)
    assert cfg.optim.grad_clip is None and cfg.world.precision == "auto"
    assert [lr_at(step, cfg.optim, 8) for step in range(9)] == [1e-3] * 9


def test_where_the_learning_rate_is_not_nanogpts_a_line_says_so(saved, tmp_path):
    saved["iter_num"] = 2
    saved["config"] |= {"min_lr": 0.5}
    _, lines = imported(saved, tmp_path)
    assert any("to step 3 the learning rate is 1/3 above" in line for line in lines)
    assert any("min_lr is 0.001, the learning_rate: nanoGPT's 0.5" in line for line in lines)


def test_training_goes_on_without_a_jump(theirs, tmp_path, capsys):
    """From raw token files, as nanoGPT has them; with no tokenizer known, which a line says."""
    _, _, path, _ = theirs
    lines = import_nanogpt(path, tmp_path / "run")
    assert len(lines) == 2 and "data/letters" in lines[0] and "tokenizer is unknown" in lines[1]
    tokens = np.random.default_rng(0).integers(0, 3, 3000).cumsum() % 131
    (tmp_path / "data").mkdir()
    for name, part in (("train", tokens), ("val", tokens[:400])):
        part.astype(np.uint16).tofile(tmp_path / "data" / f"{name}.bin")
    with without_matplotlib():
        train.main(settings_of(tmp_path / "run", f"--data_dir={tmp_path / 'data'}"))
    assert "resumed from step 4" in capsys.readouterr().out
    losses, val_losses = records(tmp_path / "run"), records(tmp_path / "run", "val_loss")
    assert list(losses) == [5, 6, 7, 8] and list(val_losses) == [4, 6, 8]
    w = dict(theirs[0])
    ids = torch.from_numpy(tokens[:3000 // 11 * 11].copy()).view(-1, 11)
    with torch.no_grad():
        before = F.cross_entropy(logits_of(w, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert val_losses[4] == pytest.approx(before, rel=0.2) and losses[5] == pytest.approx(before, rel=0.2)
    assert val_losses[8] < val_losses[4]
    with pytest.raises(UserError, match="no meta.json, so its tokenizer is unknown"):
        tokenizer_of(tmp_path / "run")


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_gpt2s_vocabulary_has_its_tokenizer_and_keeps_its_rows(vocab_size, tmp_path):
    args = ARGS | {"vocab_size": vocab_size, "n_layer": 1, "n_embd": 5, "bias": False}
    w = parameters(False, args)
    optimizer = optimizer_of(w)
    w["transformer.wte.weight"].grad = torch.ones(vocab_size, 5)
    for p in w.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    run_dir, lines = imported(checkpoint_of(w, optimizer, args), tmp_path)
    assert tokenizer_of(run_dir) == "gpt2" and not any("tokenizer" in line for line in lines)
    model, _ = load_model(run_dir, "cpu")
    ids = torch.tensor([[50256, 7]])
    assert (model(ids) - logits_of(w, ids, args)).abs().max() < 1e-5 and model(ids).shape[-1] == vocab_size


def test_a_named_tokenizer_goes_with_the_run(saved, tmp_path):
    with pytest.raises(UserError, match="tokenizer byte has 261 ids, the model a vocab_size of 131"):
        imported(saved, tmp_path, tokenizer="byte")
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(letters))
    run_dir, lines = imported(saved, tmp_path, tokenizer=str(tmp_path / "vocab.txt"))
    assert load_tokenizer(tokenizer_of(run_dir)).encode("a b").tolist() == [5, 6]
    assert not any("tokenizer" in line for line in lines)


# ---- characters


def meta_pkl(folder, **changes):
    itos = dict(enumerate(CHARACTERS))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}} | changes
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return str(folder / "meta.pkl")


def test_characters_come_from_meta_pkl_in_the_order_of_their_ids(tmp_path):
    assert read_characters(meta_pkl(tmp_path, itos=dict(reversed(list(enumerate("xyz")))))) == ["x", "y", "z"]


def test_a_run_of_characters_can_be_sampled_from(theirs, tmp_path, capsys):
    w, _, path, _ = theirs
    import_nanogpt(path, tmp_path / "run", tokenizer=meta_pkl(tmp_path))
    prompt = "".join(CHARACTERS[i] for i in (5, 77, 130))
    options = ["--device=cpu", "--temperature=0", "--max_new_tokens=6"]
    sample.main(config.load(sample.Settings, [f"--out_dir={tmp_path / 'run'}", f"--prompt={prompt}", *options]))
    ids = [5, 77, 130]
    for _ in range(6):
        ids.append(logits_of(w, torch.tensor([ids]))[0, -1].argmax().item())
    assert capsys.readouterr().out.strip() == "".join(CHARACTERS[i] for i in ids)


class Code:
    """What runs code when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "ran"),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_meta_pkl_does_not_run(protocol, saved, tmp_path):
    for meta in (Code(tmp_path), {"itos": {0: "a"}, "vocab_size": 1, "more": Code(tmp_path)}):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        with pytest.raises(UserError, match=r"meta.pkl is no meta.pkl of nanoGPT's.*it wants to call \w+.mkdir"):
            imported(saved, tmp_path, tokenizer=str(tmp_path / "meta.pkl"))
    assert not (tmp_path / "ran").exists() and not checkpoints(tmp_path / "run")
    pickle.loads(pickle.dumps(Code(tmp_path), protocol))
    assert (tmp_path / "ran").exists()  # it was code indeed


@pytest.mark.parametrize(("changes", "words"), [
    ({"itos": {0: "a", 1: "a"}}, "ids that are not one character each, all different"),
    ({"itos": {0: "a", 1: "bc"}}, "ids that are not one character each"),
    ({"itos": {0: "a", 2: "b"}}, "no meta.pkl of nanoGPT's .KeyError"),
    ({"itos": 3}, "no meta.pkl of nanoGPT's .TypeError"),
    ({"itos": dict(enumerate("abc"))}, "has 3 characters, the model a vocab_size of 131"),
])  # fmt: skip
def test_a_wrong_meta_pkl_is_refused(changes, words, saved, tmp_path):
    refused(saved, tmp_path, words, tokenizer=meta_pkl(tmp_path, **changes))


# ---- bad input


def refused(saved, folder, words, **kwargs):
    """That a checkpoint is refused in one line, and leaves no run behind."""
    with pytest.raises(UserError, match=words) as error:
        imported(saved, folder, **kwargs)
    assert "\n" not in str(error.value)
    assert not checkpoints(folder / "run") and not (folder / "run" / "config.py").exists()


@pytest.mark.parametrize("kind", ["in a checkpoint", "bare"])
def test_code_in_a_checkpoint_does_not_run(kind, saved, tmp_path):
    path = tmp_path / "ckpt.pt"
    if kind == "bare":
        path.write_bytes(pickle.dumps(Code(tmp_path)))
    else:
        torch.save(saved | {"config": CONFIG | {"more": Code(tmp_path)}}, path)
    with pytest.raises(UserError, match="holds no tensors that can be read .it is damaged, or ") as error:
        import_nanogpt(path, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists() and not (tmp_path / "ran").exists()
    if kind != "bare":
        torch.load(path, weights_only=False)
        assert (tmp_path / "ran").exists()  # it was code indeed


def test_names_from_the_checkpoint_are_never_code_in_config_py(saved, tmp_path):
    evil = f"x'\nimport os; os.mkdir({str(tmp_path / 'ran')!r}) #"
    saved["config"] |= {"dataset": evil, "wandb_log": True, "wandb_run_name": evil}
    run_dir, _ = imported(saved, tmp_path)
    cfg = settings_of(run_dir)
    assert cfg.data.data_dir == f"data/{evil}" and cfg.log.wandb_run_name == evil and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, saved, tmp_path):
    torch.save(saved, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="ckpt.pt holds no tensors that can be read") as error:
        import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.pt holds no tensors that can be read .FileNotFoundError.*name another"):
        import_nanogpt(tmp_path / "gone.pt", tmp_path / "run")


def spoil(saved, *place, value=None):
    """Sets what lies at a place, or removes it."""
    *outer, last = place
    for name in outer:
        saved = saved[name]
    if value is None:
        del saved[last]
    else:
        saved[last] = value


FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(("place", "value", "words"), [
    (["optimizer"], None, "ckpt.pt lacks optimizer, which nanoGPT's train.py saves"),
    (["config"], None, "ckpt.pt lacks config"),
    (["config", "batch_size"], None, "ckpt.pt: config lacks batch_size"),
    (["model_args", "n_embd"], None, "ckpt.pt: model_args lacks n_embd"),
    (["model_args", "n_embd"], "20", "model_args has n_embd '20', where nanoGPT has a value of type int"),
    (["model_args", "n_embd"], 25, r"transformer.wte.weight by model_args is \(131, 25\), and there is \(131, 20\)"),
    (["model_args", "n_head"], 3, "n_embd 20 is not a multiple of n_head 3"),
    (["model_args", "n_layer"], 10**9, "n_layer 1000000000 in model_args, but weights of 3 layers"),
    (["model_args", "bias"], False, r"transformer.h.0.ln_1.bias is not expected"),
    (["model", FC], None, f"{FC} by model_args is .80, 20., and there is nothing"),
    (["model", FC], torch.zeros(20, 80), f"{FC} by model_args is .80, 20., and there is .20, 80."),
    (["model", FC], torch.zeros(80, 20, dtype=torch.int8), f"{FC} by .*, and there is no tensor of floats"),
    (["model", "lm_head.weight"], torch.zeros(131, 20), "lm_head.weight is not transformer.wte.weight"),
    (["optimizer", "state", 3], None, "the optimizer's transformer.h.0.attn.c_proj.weight exp_avg.* there is nothing"),
    (["optimizer", "state", 3, "exp_avg_sq"], torch.zeros(3), r"c_proj.weight exp_avg_sq by model_args.*\(3,\)"),
    (["optimizer", "param_groups"], [], "its optimizer is no AdamW of torch's in two groups"),
    (["optimizer", "param_groups", 0, "eps"], 1e-6, "its optimizer is not nanoGPT's AdamW"),
    (["iter_num"], 0, "iter_num 0; nanoGPT saves after step 1"),
    (["config", "gradient_accumulation_steps"], 0, "batch_tokens is 0; it must be at least 1"),
    (["config", "eval_interval"], 0, "save_interval is 0; it must be at least 1"),
    (["config", "log_interval"], 0, "log_interval is 0; it must be at least 1"),
    (["config", "learning_rate"], -1.0, "learning_rate is -1.0; it must be at least 0"),
    (["config", "learning_rate"], math.nan, "config has learning_rate 'nan', where nanoGPT has a value of type float"),
    (["model", FC], torch.zeros(80, 20, device="meta"), f"{FC} by model_args is .80, 20., and there is no tensor"),
    (["model", FC], torch.zeros(80, 20).to_sparse(), f"{FC} by model_args is .80, 20., and there is no tensor"),
], ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else "")  # fmt: skip
def test_bad_checkpoints_are_refused_in_one_line(place, value, words, saved, tmp_path):
    spoil(saved, *place, value=value)
    refused(saved, tmp_path, words)


def test_the_optimizer_of_before_may_2023_is_refused(saved, tmp_path):
    """It did not decay embeddings and put parameters in the order of their names."""
    groups = saved["optimizer"]["param_groups"]
    numbers = [i for group in groups for i in group["params"]]
    groups[0]["params"], groups[1]["params"] = numbers[:12], numbers[12:]
    refused(saved, tmp_path, r"groups have \[12, \d+\] .* where nanoGPT has \[14, \d+\]; .*before May 2023, with another GELU")


def test_a_folder_that_holds_a_run_is_refused(theirs, ours):
    before = {path: path.stat().st_mtime_ns for path in ours.rglob("*")}
    with pytest.raises(UserError, match="holds a run already; name another folder"):
        import_nanogpt(theirs[2], ours)
    assert before == {path: path.stat().st_mtime_ns for path in ours.rglob("*")}


def test_an_out_dir_that_cannot_be_written_to_is_refused(theirs, tmp_path):
    (tmp_path / "file").write_text("precious")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot be written to"):
            import_nanogpt(theirs[2], out_dir)
    assert (tmp_path / "file").read_text() == "precious"


# ---- others' token files


def test_llmc_shards_train_as_they_are(tmp_path):
    """nanoGPT's do in test_train.py."""
    for name, n in (("train_000001", 900), ("train_000002", 301), ("val_000000", 300)):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, n
        tokens = np.random.default_rng(n).integers(0, 37, n).astype(np.uint16)
        (tmp_path / f"fineweb_{name}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    assert (run(tmp_path, tmp_path / "run", max_steps=2) / "finished").exists()

