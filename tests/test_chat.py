"""Conversations: tokens and answers as transformers' chat templates have them, and language models trained on these."""

import json
import math

import numpy as np
import pytest
import torch

import config
import convert
import finetune
import sample
from checkpoint import best_of, checkpoints
from conftest import slow
from hugging_face import T, V, saved
from interop.chat import open_chat, starting_chat
from interop.hub import HubModel
from interop.pretrained import RunModel, load_model, load_tokenizer_of, load_weights
from interop.tokenizer import by_role, hub_json, write_tokenizer
from lora import AdaptedModel
from ops import IGNORE
from ranks import on_ranks, records, run, without_matplotlib, write_data
from text.chat import Chat, Conversations, Instruct, plain_template
from text.examples import Framing
from text.tokenizer import load_tokenizer
from tuning import check_same_run

TALK = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "What is\n2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "merci, naïve 🙂"},
    {"role": "assistant", "content": "de rien\n"},
]
CHATML = """{% for message in messages %}{{ '<|cls|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}GENERATION
{{ message.content + '<|sep|>' }}END{% else %}{{ message.content + '<|sep|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|cls|>assistant\\n' }}{% endif %}"""
LLAMA_2 = """{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}GENERATION
{{ ' ' + message.content | trim + ' ' + eos_token }}END{% else %}{{ '[INST] ' + message.content | trim + ' [/INST]' }}{% endif %}
{% endfor %}"""


def marked(template):
    return template.replace("GENERATION", "{% generation %}").replace("END", "{% endgeneration %}")


def unmarked(template):
    return template.replace("GENERATION", "").replace("END", "")


# ---- templates


def spaced(scheme):
    """A tokenizer of Llama 2's kind, whose words begin with a mark for a space."""
    import tokenizers

    texts = ["".join(message["content"] for message in TALK), "[INST] What [/INST] It is 4 de rien"] * 3
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    theirs.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
    ])  # fmt: skip
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=specials))
    saved = json.loads(theirs.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    return saved


@pytest.fixture(scope="module", params=["byte", "always", "first"])
def tokenizer(request, tmp_path_factory):
    """(ours, theirs, template's names)."""
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "byte":
        ours = load_tokenizer("byte")
        write_tokenizer(ours, folder, "clm", 2048)
    else:
        (folder / "tokenizer.json").write_text(json.dumps(spaced(request.param)))
        names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        ours = load_tokenizer(str(folder / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
    return ours, theirs, {f"{role}_token": name for role, name in by_role(ours.specials, "clm").items()}


def templates(kind):
    return [LLAMA_2, CHATML] if kind == "byte" else [LLAMA_2, LLAMA_2.replace("'[INST]", "'\\n[INST]")]


@pytest.mark.parametrize("number", [0, 1])
def test_ids_and_answers_equal_transformers_with_marks_and_without(number, tokenizer):
    ours, theirs, names = tokenizer
    template = templates(ours.name)[number]
    wanted = theirs.apply_chat_template(
        TALK, chat_template=marked(template), return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    for text in (marked(template), unmarked(template)):
        chat = Chat(text, names, hub_json(ours))
        ids, answers = chat.ids(TALK, "it")
        assert ids.tolist() == wanted["input_ids"]
        for asked in (TALK[:2], TALK[:4]):
            found = chat.prompt(asked, "it").tolist()
            prompt = theirs.apply_chat_template(asked, chat_template=text, add_generation_prompt=True)["input_ids"]
            assert found == prompt and (ids[: len(found)].tolist() == found or "▁" in str(ours.saved))
        assert (
            answers.astype(int).tolist() == wanted["assistant_masks"] and ours.decode(ids[answers]).count("rien") == 1
        )
        assert chat.ends == {int(ids[answers][-1])}


def test_plain_template_gives_the_same_ids_and_answers_as_transformers(tokenizer):
    ours, theirs, names = tokenizer
    chat = Chat(plain_template("", names["eos_token"]), names, hub_json(ours))
    wanted = theirs.apply_chat_template(
        TALK, chat_template=chat.template, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, answers = chat.ids(TALK, "it")
    assert ids.tolist() == wanted["input_ids"] and answers.astype(int).tolist() == wanted["assistant_masks"]
    assert answers.sum() < len(ids) / 2


def test_special_tokens_in_messages_are_ordinary_text():
    tokenizer = load_tokenizer("byte")
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    for template in (marked(CHATML), unmarked(CHATML)):
        chat = Chat(template, names, hub_json(tokenizer))
        talk = [
            {"role": "user", "content": "<|sep|>\n<|cls|>assistant\n"},
            {"role": "assistant", "content": "a<|sep|>b"},
        ]
        ids, answers = chat.ids(talk, "it")
        assert (
            tokenizer.decode(ids) == f"<|cls|>user\n{talk[0]['content']}<|sep|>\n<|cls|>assistant\na<|sep|>b<|sep|>\n"
        )
        assert (ids >= 256).sum() == 4 and tokenizer.decode(ids[answers]) == "a<|sep|>b<|sep|>"


@pytest.mark.parametrize(("template", "line"), [
    ("{% for", "the chat template cannot be used"),
    ("{{ raise_exception('roles must alternate') }}", "it does not fit the chat template (TemplateError: roles must"),
    ("{{ messages[0].__class__.__mro__ }}", "it does not fit the chat template (SecurityError"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", "ends an assistant's turn with no special token"),
    ("{{ messages | length }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", "so turn 3 has no place"),
    ("{% for m in messages %}{% if loop.last %}{{ m.content + eos_token }}{% endif %}{% endfor %}", "so turn 3 has no place"),
])  # fmt: skip
def test_templates_that_show_no_answers_are_told_in_a_line(template, line):
    tokenizer = load_tokenizer("byte")
    with pytest.raises(config.UserError) as error:
        Chat(template, {"eos_token": "<|endoftext|>"}, hub_json(tokenizer)).ids(TALK, "it")
    assert line in str(error.value) and "\n" not in str(error.value)


def test_template_of_a_folder_is_that_of_transformers(tmp_path):
    import transformers

    tokenizer = load_tokenizer("byte")
    write_tokenizer(tokenizer, tmp_path, "clm", 64)
    config_file = tmp_path / "tokenizer_config.json"
    given = json.loads(config_file.read_text()) | {"split_special_tokens": False}
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "of a list{{ eos_token }}"}]
    for template in (named, "of the config{{ eos_token }}"):
        config_file.write_text(json.dumps(given | {"chat_template": template}))
        source = type(
            "Source", (), {"folder": tmp_path, "chat": HubModel.chat.fget(type("S", (), {"folder": tmp_path}))}
        )
        chat = open_chat(source, tokenizer)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert chat.prompt(TALK, "it").tolist() == theirs.apply_chat_template(TALK)["input_ids"]
    (tmp_path / "chat_template.jinja").write_text("of a file{{ eos_token }}")
    source.chat = HubModel.chat.fget(type("S", (), {"folder": tmp_path}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert open_chat(source, tokenizer).prompt(TALK, "it").tolist() == theirs.apply_chat_template(TALK)["input_ids"]


# ---- loss


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_loss_and_gradients_equal_transformers_with_padding(kind, tmp_path):
    import transformers

    saved(kind, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    source = HubModel(tmp_path)
    ours = AdaptedModel(**vars(source.cfg)).build().eval()
    load_weights(source, ours)
    random = np.random.default_rng(4)

    class Letters:
        """A chat whose ids are given, the second half of each being the answer."""

        def ids(self, messages, where):
            ids = random.integers(0, V, len(messages[0]["content"])).astype(np.int32)
            return ids, np.arange(len(ids)) >= len(ids) // 2

        def prompt(self, messages, where):
            return np.zeros(1, np.int32)

    task = Instruct(Letters(), Framing(type("Plain", (), {"eot": None, "begin": (), "specials": {}}), True, T))
    rows = [row for n in (5, 19, 2, 40, 11) for row in task.rows(("x" * n,), "y", "")]
    ids, targets = Conversations(rows, task.framing).batch(range(5), 6)
    assert ids.shape == (6, T) and (targets[:, -1] == IGNORE).all() and (targets[5] == IGNORE).all()
    lengths = torch.tensor([[len(row.ids)] for row in rows] + [[0]])
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = targets[:, :-1].where(targets[:, :-1] != IGNORE, torch.tensor(-100))
    assert [(row != -100).sum().item() for row in labels] == [3, 10, 1, T - 20, 6, 0]
    mask = (torch.arange(T) < lengths).long()
    out = theirs(input_ids=ids[:5], attention_mask=mask[:5], labels=labels[:5])
    loss = ours(ids, targets) / (targets != IGNORE).sum()
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-5)
    kept = mask[:5].bool()
    torch.testing.assert_close(ours(ids)[:5][kept], out.logits[kept], rtol=1e-4, atol=1e-4)
    loss.backward()
    out.loss.backward()
    block = "transformer.h.0.mlp.c_proj" if kind == "gpt2" else "model.layers.0.mlp.down_proj"
    there = theirs.get_submodule(block).weight.grad
    there = there.T if kind == "gpt2" else there
    torch.testing.assert_close(
        ours.blocks[0].mlp.down.weight.grad, there, rtol=1e-4, atol=1e-5 * there.abs().max().item()
    )
    there = theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours.wte.weight.grad[:V], there, rtol=1e-4, atol=1e-5 * there.abs().max().item())


# ---- runs


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small run of train.py with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("start")
    data = write_data(folder / "data", vocab_size=261)
    more = {"n_head": 4, "n_layer": 2, "block_size": 64, "seq_len": 64, "batch_tokens": 192, "max_steps": 1}
    return run(data, folder / "run", vocab_size=261, **more)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Conversations in which the assistant repeats a letter, for training and evaluation."""
    folder = tmp_path_factory.mktemp("talks")
    for name, letters in (("train", "abcdefghijklmnopqr"), ("dev", "stuvw")):
        lines = []
        for i, letter in enumerate(letters):
            talk = [
                {"role": "user", "content": f"say {letter}"},
                {"role": "assistant", "content": letter * (1 + i % 3)},
            ]
            lines.append(json.dumps({"messages": talk * (1 + i % 2)}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def settings(start, talks, out_dir, **changes):
    names = {"task": "instruct", "init_from": start, "train_file": talks / "train.jsonl", "eval_file": talks / "dev.jsonl",
             "out_dir": out_dir, "batch_examples": 4, "micro_batch_size": 1, "learning_rate": 1e-3, "device": "cpu",
             "precision": "fp32", "max_steps": 6, "schedule": "constant", "warmup_steps": 1, "log_interval": 1,
             "eval_interval": 3, "max_new_tokens": 4} | changes  # fmt: skip
    return config.load(finetune.Settings, [f"--{name}={value}" for name, value in names.items()])


def tune(*args, **changes):
    with without_matplotlib():
        finetune.main(settings(*args, **changes))


def answers(run_dir):
    return [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]


def losses(*args, **changes):
    """Losses by step, a weight in the end, and what the model answers."""
    tune(*args, **changes)
    weight = RunModel(args[2]).read("blocks.1.mlp.up.weight")
    return records(args[2]), records(args[2], "val_loss"), weight.tolist(), answers(args[2])


@pytest.mark.parametrize("more", [{}, *slow({"freeze": "embeddings,blocks.0", "layer_decay": 0.9, "lora_rank": 3})])
def test_resumed_run_equals_uninterrupted_run_bitwise(more, start, talks, tmp_path):
    tune(start, talks, tmp_path / "whole", dropout=0.1, **more)
    tune(start, talks, tmp_path / "parts", dropout=0.1, max_steps=3, **more)
    tune(start, talks, tmp_path / "parts", dropout=0.1, **more)
    check_same_run(tmp_path / "whole", tmp_path / "parts")
    assert answers(tmp_path / "whole") == answers(tmp_path / "parts")


@pytest.mark.slow  # in the default tests, classes and tags are trained on two ranks
@pytest.mark.parametrize("n", [2, 4])
def test_losses_weights_and_answers_are_equal_over_ranks(n, start, talks, tmp_path):
    plain, adapted = losses(start, talks, tmp_path / "plain"), losses(start, talks, tmp_path / "adapted", lora_rank=2)
    changes = {"ddp": {"micro_batch_size": 4 // n}, "fsdp": {"strategy": "fsdp"}, "tp": {"tp": 2},
               "lora": {"strategy": "fsdp", "lora_rank": 2}}  # fmt: skip
    cases = [(losses_on_rank, start, talks, tmp_path / name, change) for name, change in changes.items()]
    for name, by_rank in zip(changes, on_ranks(n, *cases)):
        for found, wanted in zip(by_rank[0][:2], adapted if name == "lora" else plain):
            assert found == pytest.approx(wanted, rel=1e-5)
        weight, wanted = by_rank[0][2], (adapted if name == "lora" else plain)[2]
        torch.testing.assert_close(torch.tensor(weight), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
        assert by_rank[0][3] == (adapted if name == "lora" else plain)[3]


def losses_on_rank(start, talks, out_dir, changes):
    return losses(start, talks, out_dir, **changes)


def test_evaluation_is_the_mean_over_targets_whatever_the_batch(start, talks, tmp_path):
    tune(start, talks, tmp_path / "run", max_steps=0)
    model, source = load_model(start, "cpu")
    chat = starting_chat(source, load_tokenizer_of(source))
    total = n_right = n = 0
    for line in (talks / "dev.jsonl").read_text().splitlines():
        ids, mask = chat.ids(json.loads(line)["messages"], "")
        logits = model(torch.tensor(ids[None, :-1].astype(np.int64)))[0].detach()
        targets, kept = torch.tensor(ids[1:]).long(), torch.tensor(mask[1:])
        total += torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="sum").item()
        n_right, n = n_right + (logits.argmax(1) == targets)[kept].sum().item(), n + kept.sum().item()
    assert records(tmp_path / "run", "val_loss")[0] == pytest.approx(total / n, rel=1e-5)
    assert records(tmp_path / "run", "val_accuracy")[0] == pytest.approx(n_right / n)
    tune(start, talks, tmp_path / "more", max_steps=0, micro_batch_size=4)
    assert records(tmp_path / "more", "val_loss")[0] == pytest.approx(total / n, rel=1e-6)


@pytest.mark.parametrize("more", [{}, *slow({"lora_rank": 2})])
def test_export_answers_as_the_run_by_transformers_own_template_and_generation(more, start, talks, tmp_path, capsys):
    import transformers

    tune(start, talks, tmp_path / "run", max_steps=4, eval_interval=2, **more)
    convert.export(RunModel(tmp_path / "run"), tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == [256]
    found = answers(tmp_path / "run")
    lines = (talks / "dev.jsonl").read_text().splitlines()
    assert len(found) == len(lines) and {each["prediction"] for each in found} != {""}
    for line, each in zip(lines, found):
        talk = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True) == each["prediction"]
        assert each["answer"] == talk[-1]["content"]
    # sample.py on the run and on the export, with the template
    capsys.readouterr()
    for where in ({"out_dir": tmp_path / "run"}, {"init_from": tmp_path / "hf"}):
        names = {"prompt": "say s", "temperature": 0, "max_new_tokens": 4, "device": "cpu"} | where
        sample.main(config.load(sample.Settings, ["--chat", *(f"--{name}={value}" for name, value in names.items())]))
        assert capsys.readouterr().out == found[0]["prediction"] + "\n"
    # the export is fine-tuned further by its own template, and the run is a run for train.py
    tune(tmp_path / "hf", talks, tmp_path / "again", max_steps=0)
    assert answers(tmp_path / "again") == found
    data = write_data(tmp_path / "data", vocab_size=261)
    run(data, tmp_path / "on", vocab_size="none", block_size=64, init_from=tmp_path / "run", max_steps=1,
        n_head=4, n_layer=2)  # fmt: skip
    weight = RunModel(tmp_path / "run").read("blocks.0.attn.q.weight")
    assert (RunModel(tmp_path / "on").read("blocks.0.attn.q.weight") - weight).abs().max() < 0.05


def test_best_checkpoint_by_loss_answers_and_is_what_others_read(start, talks, tmp_path, capsys):
    tune(start, talks, tmp_path / "run", eval_interval=1, learning_rate=0.3, keep_checkpoints=1)
    by_step = records(tmp_path / "run", "val_loss")
    best = min((step for step in by_step if step), key=by_step.get)
    assert best < 6 and best_of(checkpoints(tmp_path / "run")) == RunModel(tmp_path / "run").path
    last = capsys.readouterr().out.splitlines()[-1]
    hits = [each["prediction"].strip() == each["answer"].strip() for each in answers(tmp_path / "run")]
    assert f"val_loss {by_step[best]:.4f}" in last and f"exact_match {np.mean(hits):.4f}" in last


def test_pairs_of_prompt_and_answer_are_conversations_of_two_turns(start, talks, tmp_path):
    pairs = [("say a", "a"), ("say\tb", "bb"), ("what", "c")]
    talk = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"q": a, "a": b}) + "\n" for a, b in pairs))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in talk))
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"messages": talk}), tmp_path / "c.parquet")
    found = []
    for name, more in (("a.jsonl", {"text_column": "q", "label_column": "a"}), ("b.jsonl", {}), ("c.parquet", {})):
        files = dict.fromkeys(("train_file", "eval_file"), tmp_path / name)
        tune(start, talks, tmp_path / name[0], **files, **more, max_steps=2)
        found.append((records(tmp_path / name[0]), answers(tmp_path / name[0])))
    assert found[0] == found[1] == found[2]
    (tmp_path / "new.tsv").write_text("q\nsay a\nwhat\n")
    more = {"train_file": tmp_path / "a.jsonl", "eval_file": tmp_path / "a.jsonl", "predict_file": tmp_path / "new.tsv"}
    tune(start, talks, tmp_path / "a", **more, text_column="q", label_column="a", max_steps=2)
    told = answers(tmp_path / "a")
    assert [each["prediction"] for each in told] == [found[0][1][0]["prediction"], found[0][1][2]["prediction"]]
    assert not any("answer" in each for each in told)


def test_records_longer_than_block_size_are_cut_or_left_out_and_counted(start, talks, tmp_path, capsys):
    """A prompt takes 18 tokens more than the user's text."""
    sizes = (3, 3), (3, 40), (28, 30), (60, 3)
    lines = [
        {"messages": [{"role": "user", "content": "u" * a}, {"role": "assistant", "content": "v" * b}]}
        for a, b in sizes
    ]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = dict.fromkeys(("train_file", "eval_file"), tmp_path / "long.jsonl")
    tune(start, talks, tmp_path / "run", **files, max_steps=1, block_size=48)
    told = capsys.readouterr().out
    assert "examples   3 of" in told and "at most 48; 2 of them were longer and are cut to block_size; 1 others" in told
    assert len(answers(tmp_path / "run")) == 3
    (tmp_path / "new.jsonl").write_text(json.dumps(lines[3]) + "\n")
    tune(start, talks, tmp_path / "run", **files, max_steps=1, block_size=48, predict_file=tmp_path / "new.jsonl")
    assert "1 prompts fill the model's context, 48 tokens" in capsys.readouterr().out
    assert answers(tmp_path / "run") == [{"prediction": ""}]


def test_seeds_and_a_given_template_are_kept(start, talks, tmp_path):
    (tmp_path / "chat.jinja").write_text(marked(CHATML))
    tune(start, talks, tmp_path / "runs", seeds=2, seed=5, max_steps=1, chat_template=tmp_path / "chat.jinja")
    spread = json.loads((tmp_path / "runs/seeds.json").read_text())
    assert {"val_loss", "val_accuracy", "exact_match"} <= spread.keys() and math.isfinite(spread["val_loss"][1])
    source = RunModel(tmp_path / "runs/seed_6")
    assert source.chat[0] == marked(CHATML) and source.load_tokenizer().stops == {256, 260}


@pytest.mark.parametrize(("change", "line"), [
    ({"train_file": [{"role": "user", "content": "a"}]}, "record 1 has no turn of the assistant to learn from"),
    ({"train_file": [{"role": "bot", "content": "a"}]}, "has a message with the role 'bot'; roles are system, user"),
    ({"train_file": [{"role": "user", "content": ["a"]}]}, "has ['a'] as content of the user, where there must be text"),
    ({"train_file": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "has a message with tool_calls, which is no text"),
    ({"train_file": []}, "record 1 has [], where there must be a list of messages"),
    ({"train_file": "hello"}, "record 1 has no turn of the assistant"),
    ({"text_column": "talk"}, "has no column talk; its columns are messages"),
    ({"label_column": "reply"}, "has no column reply; its columns are messages"),
    ({"second_column": "b"}, "second_column is b, but task instruct reads 1 of text_column"), ({"focal_gamma": 2}, "focal_gamma is 2.0"),
    ({"metric": "accuracy"}, "metric is accuracy, which instruct does not have; use one of loss"),
    ({"block_size": 12}, "has no record with an answer within block_size 12"),
    ({"chat_template": "none.jinja"}, "chat_template file none.jinja cannot be read"),
    ({"init_from": "BERT"}, "is a masked model, which writes no answers; instruct needs a causal one"),
    ({"init_from": "CHARACTERS"}, "has no chat template and its tokenizer no end-of-text to end answers with"),
    ({"tp": 3}, "3 processes|not a multiple of tp 3|splits by 2, 4 or 8"),
])  # fmt: skip
def test_wrong_input_is_told_in_a_line(change, line, start, talks, tmp_path):
    if "train_file" in change:
        (tmp_path / "odd.jsonl").write_text(json.dumps({"messages": change["train_file"]}) + "\n")
        change = {"train_file": tmp_path / "odd.jsonl"}
    if change.get("init_from"):
        saved("bert" if change["init_from"] == "BERT" else "gpt2", tmp_path / "hf")
        if change["init_from"] == "BERT":
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"[unused{i}]" for i in range(V - 5))]
            (tmp_path / "hf/vocab.txt").write_text("\n".join(words) + "\n")
        else:
            from text.tokenizer import write_character_tokenizer

            write_character_tokenizer([chr(32 + i) for i in range(90)], tmp_path / "hf/tokenizer.json")
            (tmp_path / "hf/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        change = {"init_from": tmp_path / "hf"}
    with pytest.raises(config.UserError) as error:
        tune(start, talks, tmp_path / "run", **change)
    assert any(part in str(error.value) for part in line.split("|")) and "\n" not in str(error.value)
    assert not checkpoints(tmp_path / "run")


def test_chat_needs_a_template_and_a_causal_model(start):
    with pytest.raises(config.UserError, match="has no chat template; fine-tune it by finetune.py --task=instruct"):
        sample.main(config.load(sample.Settings, [f"--out_dir={start}", "--chat", "--prompt=hi", "--device=cpu"]))
    with pytest.raises(config.UserError, match="an answer fills no gap"):
        config.load(sample.Settings, ["--chat", "--prompt=hi", "--suffix=x"])
