"""Models made smaller: what is pruned, by the methods' papers, and what is left."""

import json
from dataclasses import replace

import pytest
import torch

import compress
import config
import train
from checkpoint import checkpoints
from compress import most_important, prune_heads, prune_neurons, prune_weights
from config import UserError
from interop.pretrained import RunModel, load_model
from model import ModelConfig
from ranks import run, without_matplotlib, write_data
from test_convert import BERT, GPT2, LLAMA

MODELS = {"gpt2": GPT2, "bert": BERT, "llama": LLAMA, "qwen3": replace(LLAMA, qk_norm=True, head_dim=10)}


def random_model(cfg):
    torch.manual_seed(3)
    model = cfg.build()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval()


def batches(cfg, n=3):
    """Batches of two sequences."""
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(cfg.vocab_size, (2, 9), generator=generator) for _ in range(2)) for _ in range(n)]


def slopes(model, reader, groups):
    """|dL/dx| for each sequence, x a factor of each group of channels that a Linear reads, by autograd."""
    factor, found = torch.ones(groups, requires_grad=True), []
    handle = reader.register_forward_pre_hook(lambda _, inputs: (
        (inputs[0].unflatten(-1, (groups, -1)) * factor[:, None]).flatten(-2),))  # fmt: skip
    for ids, targets in batches(model.cfg):
        for i in range(2):
            loss = model(ids[i : i + 1], targets[i : i + 1])
            found.append(torch.autograd.grad(loss, factor)[0].abs())
    handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_what_stays_has_the_largest_gradient_of_a_factor_on_its_output(name, kind):
    model = random_model(MODELS[name])
    groups = model.cfg.kv_heads if kind == "heads" else model.cfg.inner_width
    reader_of = (lambda block: block.attn.proj) if kind == "heads" else (lambda block: block.mlp.down)
    kept = most_important(model, batches(model.cfg), reader_of, groups, 0.5, kind)
    for block, places in zip(model.blocks, kept):
        wanted = slopes(model, reader_of(block), groups).mean(0).topk(len(places)).indices.sort().values
        assert len(places) == round(groups / 2) and torch.equal(places, wanted)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_pruned_model_is_the_whole_one_without_the_outputs_of_what_is_gone(name, kind):
    model = random_model(MODELS[name])
    cfg, data = model.cfg, batches(model.cfg)
    pruned = (prune_heads if kind == "heads" else prune_neurons)(model, data, 0.6)
    groups = cfg.kv_heads if kind == "heads" else cfg.inner_width
    reader_of = (lambda block: block.attn.proj) if kind == "heads" else (lambda block: block.mlp.down)
    kept = most_important(model, data, reader_of, groups, 0.6, kind)
    for block, places in zip(model.blocks, kept):
        gone = torch.ones(groups, dtype=torch.bool)
        gone[places] = False
        with torch.no_grad():
            reader_of(block).weight.unflatten(1, (groups, -1))[:, gone] = 0
    ids = data[0][0]
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert pruned.num_params() < model.num_params()
    n = round(0.4 * groups)
    assert (pruned.cfg.kv_heads if kind == "heads" else pruned.cfg.inner_width) == n
    assert pruned.cfg.n_head % pruned.cfg.kv_heads == 0 and pruned.cfg.head_width == cfg.head_width


def test_smallest_weights_of_each_matrix_become_zero():
    model = random_model(LLAMA)
    pruned = prune_weights(model, [], 0.3)
    for name, old in model.named_parameters():
        new = pruned.get_parameter(name)
        if not name.startswith("blocks.") or old.dim() < 2:
            assert torch.equal(new, old)
            continue
        n = round(0.3 * old.numel())
        limit = old.abs().flatten().kthvalue(n).values
        assert torch.equal(new, torch.where(old.abs() <= limit, 0.0, old)) and (new == 0).sum() == n


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of data and of a run on them."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder / "data", vocab_size=261)
    run(
        data, folder / "run", vocab_size=261, block_size=12, seq_len=12, batch_tokens=72, max_steps=20, save_interval=20
    )
    return data, folder / "run"


def compressed(trained, out_dir, **changes):
    names = {"out_dir": trained[1], "to_run": out_dir, "device": "cpu", "precision": "fp32", "eval_tokens": 500}
    compress.main(config.load(compress.Settings, [f"--{name}={value}" for name, value in (names | changes).items()]))


@pytest.mark.parametrize("kind", ["heads", "neurons", "magnitude"])
def test_pruned_run_is_sampled_from_and_trained_again(kind, trained, tmp_path, capsys):
    compressed(trained, tmp_path / "small", prune=kind)
    told = capsys.readouterr().out.splitlines()
    before, after = (line.split() for line in told[-3:-1])
    whole, small = RunModel(trained[1]), RunModel(tmp_path / "small")
    model = load_model(str(tmp_path / "small"), "cpu")[0]
    what = "weights" if kind == "magnitude" else kind
    assert f"{model.num_params():,}" in after and f"50 % of the {what} gone" in told[-2]
    assert small.cfg.block_size == whole.cfg.block_size == 12 and small.load_tokenizer().name == "byte"
    assert told[-1] == f"to train it again: python train.py {tmp_path}/small/config.py"
    with without_matplotlib():
        train.main(config.load(train.Settings, [f"{tmp_path}/small/config.py"]))
    lines = [json.loads(line) for line in (tmp_path / "small_trained/log.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "val_loss" in line)
    last = checkpoints(tmp_path / "small_trained")[-1]
    assert last.name == "step_00000002" and RunModel(tmp_path / "small_trained").cfg == small.cfg
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(small.manifest["val_loss"], abs=0.2)


def test_a_run_is_judged_as_it_was_trained(tmp_path, capsys):
    """With its own length of sequences, objective and data, and trained again for a tenth of the steps it took."""
    data = write_data(tmp_path / "data", vocab_size=261)
    run(data, tmp_path / "run", vocab_size=261, block_size=12, seq_len=6, batch_tokens=72, max_tokens=1440,
        max_steps=1000, eval_tokens=500, target_loss=0.01, cooldown_steps=20)  # fmt: skip
    trained = RunModel(tmp_path / "run").manifest["val_loss"]
    compressed((data, tmp_path / "run"), tmp_path / "small", prune="neurons")
    before = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("before"))
    assert float(before.split()[4]) == pytest.approx(trained, abs=1e-4)
    with without_matplotlib():
        train.main(config.load(train.Settings, [f"{tmp_path}/small/config.py"]))
    assert checkpoints(tmp_path / "small_trained")[-1].name == "step_00000002"


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_models_of_several_objectives_are_pruned(kind):
    cfg = replace(BERT, objective={"mlm": 1.0, "nsp": 2.0})
    model, generator = random_model(cfg), torch.Generator().manual_seed(4)
    ids, targets = (torch.randint(cfg.vocab_size, (2, 9), generator=generator) for _ in range(2))
    batch = ids, targets, None, None, None, None, torch.tensor([0, 1])
    pruned = (prune_heads if kind == "heads" else prune_neurons)(model, [batch], 0.5)
    assert pruned.num_params() < model.num_params() and torch.equal(pruned.pair_head.weight, model.pair_head.weight)


@pytest.mark.parametrize(("change", "line"), [
    ({"prune": "heads", "sparsity": 0.05}, "sparsity 0.05 takes none of the 5 heads of a layer; raise it"),
    ({"prune": "heads", "sparsity": 0.9}, "sparsity 0.9 leaves a layer without heads, of which it has 5; lower it"),
    ({"prune": "none"}, "prune and quantize are none"),
    ({"prune": "heads", "to_run": "{run}"}, "holds a run already; name another folder"),
    ({"prune": "heads", "data_dir": "{tmp}/none"}, "none does not exist or is no folder"),
])  # fmt: skip
def test_wrong_input_is_told_in_a_line(change, line, trained, tmp_path):
    change = {k: v.format(run=trained[1], tmp=tmp_path) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(UserError) as error:
        compressed(trained, change.pop("to_run", tmp_path / "small"), **change)
    assert line in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "small").exists()


def test_model_with_fewer_heads_says_that_transformers_has_none(trained, tmp_path):
    import convert

    compressed(trained, tmp_path / "small", prune="heads")
    assert isinstance(RunModel(tmp_path / "small").cfg, ModelConfig)
    with pytest.raises(UserError, match="transformers cannot compute this model; GPT-2 is near, but head_dim is"):
        convert.export(RunModel(tmp_path / "small"), tmp_path / "hf")


def test_a_model_of_contrastive_alone_has_no_important_heads():
    objective = {"clm": 0.0, "contrastive": 1.0}
    shape = {"vocab_size": 37, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8, "dropout": 0.1}
    with pytest.raises(UserError, match="has learned by contrastive alone; use --prune=magnitude"):
        prune_heads(ModelConfig(**shape, objective=objective).build(), [], 0.5)
