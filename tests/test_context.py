"""A model is used no further than it was trained: the context of a run bounds samples, scores and exports."""

import json

import pytest
import torch

import config
import convert
import sample
from checkpoint import checkpoints, context_of, read_manifest
from config import UserError
from hugging_face import logits_of
from interop.pretrained import load_model, open_model
from interop.score import loglikelihood_rolling, score_tokens
from model import ModelConfig
from ranks import run, write_data
from text.tokenizer import load_tokenizer

MODERN = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "n_head": 5, "n_embd": 30}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), vocab_size=261)


@pytest.fixture(scope="module", params=["learned", "rope"])
def seven(request, data_dir, tmp_path_factory):
    """A run on sequences of 7 tokens, with a block_size of 11."""
    changes = {"position": "learned"} if request.param == "learned" else MODERN
    return run(data_dir, tmp_path_factory.mktemp(request.param) / "run", vocab_size="none", max_steps=2, **changes)


def test_a_sample_reads_no_more_than_the_trained_context(seven, capsys):
    def generated(*arguments):
        argv = [f"--out_dir={seven}", "--device=cpu", *arguments]
        sample.main(config.load(sample.Settings, argv))
        return capsys.readouterr()

    with pytest.raises(UserError, match="prompt has 8 tokens, the model's context is 7; shorten it"):
        generated("--prompt=abcdefgh")
    assert "trained on sequences of 7 tokens (block_size 11)" in generated("--prompt=abcdefg", "--max_new_tokens=9").err


def test_a_score_has_windows_of_the_trained_context(seven):
    model, tokenizer, text = load_model(seven, "cpu")[0], load_tokenizer("byte"), "To be, or not to be: that"[:21]
    ids = [tokenizer.eot, *text.encode()]
    pairs = [(ids[i : i + 1], ids[i + 1 : i + 8]) for i in (0, 7, 14)]
    expected = sum(score.log_likelihood for score in score_tokens(model, pairs))
    assert loglikelihood_rolling(model, tokenizer, [text])[0].log_likelihood == pytest.approx(expected, rel=1e-6)


def test_an_export_has_the_trained_positions_alone_and_training_goes_on_from_it(seven, data_dir, tmp_path, no_curves):
    from transformers import AutoModelForCausalLM

    model = load_model(seven, "cpu")[0]
    convert.export(open_model(seven), tmp_path / "hf")
    saved = json.loads((tmp_path / "hf" / "config.json").read_text())
    is_learned = model.cfg.position == "learned"
    assert saved["n_positions" if is_learned else "max_position_embeddings"] == 7
    ids = torch.randint(261, (3, 7), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), ids), model(ids),
                               rtol=0, atol=1e-4)  # fmt: skip
    start = {"init_from": tmp_path / "hf", "max_steps": 1, "vocab_size": "none"}
    unset = dict.fromkeys(("n_layer", "n_head", "n_embd"))
    again = run_from(data_dir, tmp_path / "again", block_size=7, **start, **unset)
    assert load_model(again, "cpu")[0].cfg.block_size == 7
    if is_learned:
        with pytest.raises(UserError, match="block_size is 11, but .* holds at most 7 tokens; lower it"):
            run_from(data_dir, tmp_path / "longer", block_size=11, seq_len=11, batch_tokens=33, **start, **unset)


def run_from(data_dir, out_dir, **changes):
    """A small run whose sizes are the weights' own."""
    import ranks
    import train

    names = ranks.SMALL | {"data_dir": data_dir, "out_dir": out_dir} | changes
    train.main(config.load(train.Settings, [f"--{name}={value}" for name, value in names.items() if value is not None]))
    return out_dir


@pytest.mark.parametrize("seq_len, context", [(5, 7), (9, 9), (11, 11)])
def test_the_context_is_the_longest_that_a_run_or_its_initial_weights_saw_and_a_resumed_run_keeps_it(
    seven, seq_len, context, data_dir, tmp_path, no_curves
):
    changes = {"init_from": seven, "seq_len": seq_len, "batch_tokens": 3 * seq_len, "vocab_size": "none"}
    sizes = dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd"))
    for steps in (1, 2):
        run_from(data_dir, tmp_path, max_steps=steps, **changes, **sizes)
        model, source = load_model(tmp_path, "cpu")
        assert model.cfg.block_size == context and source.manifest["model"]["block_size"] == 11
    assert torch.equal(source.read("wte.weight")[:261], model.wte.weight[:261])


def test_older_checkpoints_have_the_context_of_their_settings(seven):
    manifest = read_manifest(checkpoints(seven)[-1])
    cfg = ModelConfig(vocab_size=261, block_size=11)
    assert manifest.pop("context") == context_of(manifest, cfg) == 7
    assert context_of(manifest | {"settings": manifest["settings"] | {"init_from": "gpt2"}}, cfg) == 11
    assert context_of(manifest | {"settings": {}}, cfg) == 11
