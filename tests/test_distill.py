"""Distillation: a student's losses are those of the papers, in any layout, and its run is a run like any other."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import compress
import config
import ops
import train
from config import UserError
from conftest import slow
from distill import DistillConfig, Teaching
from hugging_face import V, saved
from interop.pretrained import RunModel, load_model, resolve
from interop.teacher import in_precision, make_student, teacher_config
from model import parameter_shapes
from objective import weighted_sum
from ops import IGNORE, LossOptions, Vocabulary, linear_cross_entropy
from perf.cost import setup_of
from perf.hardware import DEVICES
from perf.memory import memory
from perf.timing import step_seconds
from ranks import copy_run, launch, logged, on_ranks, records, run, settings, wait_until, write_data
from test_compress import random_model as ours
from test_convert import GPT2, LLAMA
from test_model import LargestTensor
from test_train import SPECIAL_IDS, assert_same_run, weights
from world import World

SIZES = {"n_layer": 4, "max_steps": 4, "seed": 5}  # of teachers
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ALL = {"distill_weight": 0.4, "distill_temperature": 2.0, "distill_cosine": 0.7, "distill_hidden": 0.3,
       "distill_attention": 0.2, "n_layer": 2}  # fmt: skip


def closed_form(logits, teacher_logits, targets, share, temperature, **options):
    """(1 - w) * cross-entropy + w * T^2 * KL of targets' tokens, summed, and the two by themselves."""
    own = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum", **options)
    valid = targets != IGNORE
    student, teacher = (F.log_softmax(x[valid] / temperature, -1) for x in (logits, teacher_logits))
    kl = temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum")
    return (1 - share) * own + share * kl, own, kl


# ---- the loss of logits


@pytest.mark.parametrize("chunks", [(3, 2, 7), (5, 5, 64), (512, 1, 4096)])
@pytest.mark.parametrize("share, temperature, smoothing", [(0.5, 1.0, 0.0), (0.3, 2.5, 0.1), (1.0, 2.0, 0.0)])
def test_kl_and_its_gradients_are_torchs_for_chunks_of_any_size(chunks, share, temperature, smoothing, monkeypatch):
    monkeypatch.setattr(ops, "loss_chunks", lambda *_: chunks)
    torch.manual_seed(0)
    N, C, size, columns = 11, 6, 37, 64
    hidden, weight, bias = torch.randn(N, C), torch.randn(columns, C), torch.randn(columns)
    theirs = torch.randn(N, 9), torch.randn(columns, 9), torch.randn(columns)
    targets = torch.randint(size, (N,)).where(torch.arange(N) % 4 > 0, IGNORE)
    found, wanted = ([x.clone().requires_grad_() for x in (hidden, weight, bias)] for _ in range(2))

    teaching, options = Teaching(*theirs, share, temperature), LossOptions(label_smoothing=smoothing)
    losses = linear_cross_entropy(*found[:2], targets, Vocabulary(size), found[2], options, teaching=teaching)
    (2.5 * (losses * torch.tensor([1 - share, share])).sum()).backward()

    logits, teacher_logits = (F.linear(*x)[:, :size] for x in (wanted, theirs))
    loss, *parts = closed_form(logits, teacher_logits, targets, share, temperature, label_smoothing=smoothing)
    (2.5 * loss).backward()
    torch.testing.assert_close(losses, torch.stack(parts), rtol=1e-5, atol=1e-5)
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


def test_z_loss_stays_in_the_students_own_share():
    torch.manual_seed(0)
    args = torch.randn(5, 6, requires_grad=True), torch.randn(64, 6), torch.randint(37, (5,)), Vocabulary(37), None
    teaching = Teaching(torch.randn(5, 6), args[1].detach(), None, 0.5, 1.0)
    plain = linear_cross_entropy(*args, LossOptions(z_loss=0.1))
    own, kl = linear_cross_entropy(*args, LossOptions(z_loss=0.1), teaching=teaching)
    assert own == plain and kl == linear_cross_entropy(*args, teaching=teaching)[1]


def test_neither_models_logits_are_held_for_all_tokens(monkeypatch):
    torch.manual_seed(0)
    N, size = 3000, 1000
    hidden, weight = torch.randn(N, 8, requires_grad=True), torch.randn(size, 8, requires_grad=True)
    teaching, targets = Teaching(torch.randn(N, 8), torch.randn(size, 8), None, 0.5, 2.0), torch.randint(size, (N,))
    monkeypatch.setattr(ops, "loss_chunks", lambda *_: (512, 100, 4096))
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, targets, Vocabulary(size), teaching=teaching).sum().backward()
    assert largest.elements == 512 * size


# ---- the losses of the papers


def batch_of(cfg, rows=3, length=9):
    """(ids, targets, positions, attention_mask) of a masked model or (ids, targets) of a causal one."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(cfg.vocab_size, (rows, length), generator=generator)
    if cfg.is_causal:
        return ids, torch.randint(cfg.vocab_size, (rows, length), generator=generator)
    positions = torch.tensor([[1, 4], [2, 3], [0, 5]])[:rows]
    return ids, ids.gather(1, positions), positions, torch.arange(length) < torch.tensor([[9], [7], [6]])[:rows]


def taught(student, teacher, **wanted):
    """A student in training: its weighted loss and {name: loss}, of mean losses, for batch_of its settings."""
    make_student(student, teacher, DistillConfig(teacher="out/big", **wanted))
    batch = batch_of(student.cfg)
    losses = student.train()(*batch) / (batch[1] != IGNORE).sum()
    return weighted_sum(losses, student.objectives), dict(zip(student.objectives, losses.tolist()))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_triple_loss_is_distilberts_of_transformers_models(kind, tmp_path):
    """DistilBERT: 5 ce + 2 mlm + 1 cos, ce = T^2 KL at T = 2, cos between the last hidden states of all tokens."""
    layers, still = ("num_hidden_layers", STILL) if kind == "bert" else ("n_layer", {})
    their_student = saved(kind, tmp_path / "student", seed=1, **{layers: 2}, **still)[0]
    their_teacher = saved(kind, tmp_path / "teacher", seed=2, **{layers: 4})[0]
    student, teacher = (load_model(tmp_path / name, "cpu")[0] for name in ("student", "teacher"))
    loss, parts = taught(student, teacher, distill_weight=5 / 7, distill_temperature=2.0, distill_cosine=1 / 7)
    loss.backward()

    ids, targets, *rest = batch_of(student.cfg)
    mask = {"attention_mask": rest[1].long()} if rest else {}
    with torch.no_grad():
        wanted = their_teacher(ids, **mask, output_hidden_states=True)
    found = their_student(ids, **mask, output_hidden_states=True)
    logits, teacher_logits = found.logits, wanted.logits
    if rest:
        logits, teacher_logits = (x.gather(1, rest[0][..., None].expand(-1, -1, V)) for x in (logits, teacher_logits))
    combined, *_ = closed_form(logits.flatten(0, 1), teacher_logits.flatten(0, 1), targets.flatten(), 5 / 7, 2.0)
    cosines = []
    for i in range(len(ids)):  # each text's mean; all have as many targets
        own, theirs = (x.hidden_states[-1][i][rest[1][i] if rest else slice(None)] for x in (found, wanted))
        cosines.append(torch.nn.CosineEmbeddingLoss()(own, theirs, torch.ones(len(own))))
    expected = combined / targets.numel() + torch.stack(cosines).mean() / 7
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    embedding = their_student.get_input_embeddings().weight.grad
    torch.testing.assert_close(student.wte.weight.grad[:V], embedding, rtol=1e-3, atol=1e-4 * embedding.abs().max())
    assert [*parts] == [student.cfg.base, "kl", "cosine"]


def test_hidden_states_and_attention_scores_are_compared_as_in_tinybert_of_transformers_models(tmp_path):
    """TinyBERT: squared errors of the embeddings and of the outputs of layer m and of the teacher's 2 m, and scores."""
    theirs = [saved("bert", tmp_path / name, seed, num_hidden_layers=n, **STILL)[0]
              for name, seed, n in (("student", 1, 2), ("teacher", 2, 4))]  # fmt: skip
    student, teacher = (load_model(tmp_path / name, "cpu")[0] for name in ("student", "teacher"))
    ids, _, _, mask = batch_of(student.cfg)
    _, parts = taught(student, teacher, distill_weight=0.0, distill_hidden=1.0, distill_attention=1.0)

    def insides(model):
        with torch.no_grad():
            states, scores = model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states, []
            for x, layer in zip(states, model.bert.encoder.layer):
                q, k = (f(x).unflatten(-1, (5, 6)).transpose(1, 2) for f in
                        (layer.attention.self.query, layer.attention.self.key))  # fmt: skip
                scores.append(q @ k.mT / math.sqrt(6))
        return states, scores

    (states, scores), (their_states, their_scores) = map(insides, theirs)
    hidden, attention = [], []
    for i in range(len(ids)):
        seen = mask[i]
        pairs = [(states[m][i][seen], their_states[2 * m][i][seen]) for m in range(3)]
        hidden.append(sum(F.mse_loss(*pair) for pair in pairs))
        pairs = [(scores[m][i][:, seen][:, :, seen], their_scores[2 * m + 1][i][:, seen][:, :, seen]) for m in range(2)]
        attention.append(sum(F.mse_loss(*pair) for pair in pairs))
    assert parts["hidden"] == pytest.approx(torch.stack(hidden).mean().item(), rel=1e-4)
    assert parts["attention"] == pytest.approx(torch.stack(attention).mean().item(), rel=1e-4)


def test_a_causal_models_scores_are_compared_where_a_query_sees_keys():
    """With rope, and keys that queries share."""
    cfgs = replace(LLAMA, n_layer=1), replace(LLAMA, n_layer=2, n_embd=36, head_dim=8, n_kv_head=3)
    student, teacher = map(ours, cfgs)
    _, parts = taught(student, teacher, distill_weight=0.0, distill_attention=1.0)
    scores = []
    for model, block in ((student, student.blocks[0]), (teacher, teacher.blocks[1])):
        found = []
        handle = block.attn.register_forward_pre_hook(lambda module, args, found=found: found.append(args))
        with torch.no_grad():
            model.eval()(batch_of(model.cfg)[0])
            handle.remove()
            q, k, _ = block.attn.heads(*found[0][:2])
            groups = q.shape[1] // k.shape[1]
            scores.append(torch.stack([q[:, h] @ k[:, h // groups].mT for h in range(6)], 1) / math.sqrt(q.shape[-1]))
    error = (scores[0] - scores[1]).square()
    wanted = torch.stack([error[:, :, i, : i + 1].mean((1, 2)) for i in range(error.shape[2])]).mean()
    assert parts["attention"] == pytest.approx(wanted.item(), rel=1e-4)


def test_gradients_of_all_losses_are_those_of_finite_differences():
    torch.manual_seed(0)
    student, teacher = ours(replace(GPT2, n_layer=2)), ours(replace(GPT2, n_layer=4))
    loss, _ = taught(student.double(), teacher.double(), **{k: v for k, v in ALL.items() if k != "n_layer"})
    loss.backward()
    batch, param, step = batch_of(student.cfg), student.blocks[0].attn.q.weight, 1e-2
    direction, sides = param.grad / param.grad.norm(), []
    for sign in (1, -1):
        with torch.no_grad():
            param += sign * step * direction
        losses = student(*batch) / batch[1].numel()
        sides.append(weighted_sum(losses, student.objectives).item())
        with torch.no_grad():
            param -= sign * step * direction
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(param.grad.norm().item(), rel=1e-2)


def test_packed_documents_are_taught_as_if_each_were_alone():
    student, teacher = ours(replace(GPT2, n_layer=2)), ours(GPT2)
    make_student(student.train(), teacher, DistillConfig(teacher="out/big"))
    ids, targets = batch_of(student.cfg, 1)
    packed = student(ids, targets, documents=torch.tensor([0, 4, 9], dtype=torch.int32))
    alone = [student(ids[:, part], targets[:, part]) for part in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(packed, sum(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_loss_has_the_same_gradients():
    args = torch.randn(7, 6), torch.randn(64, 6), torch.randint(37, (7,)), Vocabulary(37)
    teaching, gradients = Teaching(torch.randn(7, 6), torch.randn(64, 6), torch.randn(64), 0.5, 2.0), []
    for loss_pass in (ops.loss_pass, torch.compile(ops.loss_pass)):
        hidden = args[0].clone().requires_grad_()
        linear_cross_entropy(hidden, *args[1:], loss_pass=loss_pass, teaching=teaching).sum().backward()
        gradients.append(hidden.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


# ---- runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A trained teacher's folder; not to be written to."""
    return run(data, tmp_path_factory.mktemp("teacher"), **SIZES)


@pytest.fixture(scope="module")
def nine(data, teacher, tmp_path_factory):
    """A student's run of nine steps, uninterrupted, with each of the losses; not to be written to."""
    return run(data, tmp_path_factory.mktemp("nine"), teacher=teacher, **ALL)


def test_stopped_distillation_goes_on_as_if_it_had_not_been(data, teacher, nine, tmp_path):
    out_dir = run(data, tmp_path / "run", teacher=teacher, **ALL, max_steps=4)
    run(data, out_dir, teacher=teacher, **ALL)
    assert_same_run(out_dir, nine)


@pytest.mark.slow
def test_killed_distillation_goes_on_as_if_it_had_not_been(data, teacher, nine, tmp_path):
    changes = ALL | {"teacher": teacher, "save_interval": 1}
    [process] = launch(1, settings(data, tmp_path / "run", **changes | {"max_steps": 10_000, "lr_decay_steps": 20}))
    wait_until(lambda: logged(tmp_path / "run") >= 3)
    process.kill()
    process.join()
    for path in (tmp_path / "run" / "ckpt").glob("step_*"):
        if int(path.name[5:]) > 8:
            shutil.rmtree(path)
    run(data, tmp_path / "run", **changes)
    assert records(tmp_path / "run")[9] == records(nine)[9]
    assert all(torch.equal(weights(tmp_path / "run")[name], tensor) for name, tensor in weights(nine).items())


def test_log_names_each_loss_and_their_sum(nine):
    parts = {"clm": 0.6, "kl": 0.4, "cosine": 0.7, "hidden": 0.3, "attention": 0.2}
    for step, loss in records(nine).items():
        found = sum(weight * records(nine, f"mean_loss_{name}")[step] for name, weight in parts.items())
        assert loss == pytest.approx(found, rel=1e-5)


def test_evaluation_is_the_students_alone_and_its_checkpoint_and_count_are_without_the_teacher(
    data, teacher, nine, tmp_path, capsys
):
    plain = run(data, tmp_path / "plain", n_layer=2)
    told = capsys.readouterr().out
    assert records(nine, "val_loss")[0] == records(plain, "val_loss")[0]
    assert weights(nine).keys() == weights(plain).keys()
    run(data, tmp_path / "again", init_from=nine, max_steps=0, vocab_size="none", block_size=7, n_layer=2)
    assert records(tmp_path / "again", "val_loss")[0] == records(nine, "val_loss")[9]
    run(data, tmp_path / "other", teacher=teacher, **ALL, max_steps=1)
    counts = [next(line for line in text.splitlines() if line.startswith("model "))
              for text in (told, capsys.readouterr().out.partition("teacher ")[2])]  # fmt: skip
    assert counts[0] == counts[1]


def test_micro_batches_divide_the_losses_of_a_step(data, teacher, nine, tmp_path):
    whole = run(data, tmp_path, teacher=teacher, **ALL, micro_batch_size=6)
    assert records(whole) == pytest.approx(records(nine), rel=1e-5)
    assert records(whole, "grad_norm") == pytest.approx(records(nine, "grad_norm"), rel=1e-4)


def losses_on_rank(data, out_dir, changes):
    return records(run(data, out_dir, **changes)), records(out_dir, "grad_norm")


LAYOUTS = {
    "ddp": {},
    "fsdp": {"strategy": "fsdp", "distill_attention": 0.0},
    "tp": {"tp": 2, "distill_attention": 0.0, "distill_hidden": 0.0},
}
SPLIT = {"n_head": 4, "n_embd": 24, "seq_len": 6, "micro_batch_size": 2, "batch_tokens": 48,
         "max_steps": 3}  # what 2 and 4 divide


@pytest.mark.parametrize("n", slow(2, 4))
def test_layouts_change_no_loss(n, data, tmp_path):
    teacher = run(data, tmp_path / "teacher", **SIZES | SPLIT)
    changes = {name: ALL | SPLIT | {"teacher": teacher, "init_layers": "even"} | x for name, x in LAYOUTS.items()}
    cases = [(losses_on_rank, data, tmp_path / f"{name}_{n}", x) for name, x in changes.items()]
    for name, by_rank in zip(LAYOUTS, on_ranks(n, *cases)):
        alone = changes[name] | {"strategy": "ddp", "tp": 1}
        losses, norms = losses_on_rank(data, tmp_path / f"{name}_1", alone)
        assert by_rank[0][0] == pytest.approx(losses, rel=1e-5), name
        assert by_rank[0][1] == pytest.approx(norms, rel=1e-4), name


def test_a_masked_model_is_taught_in_bf16_as_in_float32(tmp_path):
    data = write_data(tmp_path / "data", specials=SPECIAL_IDS)
    masked = {"objective": "mlm", "mask_prob": 0.3, "norm_position": "post"}
    teacher, found = run(data, tmp_path / "teacher", **SIZES, **masked), []
    for precision in ("fp32", "bf16"):
        changes = ALL | masked | {"teacher": teacher, "precision": precision, "max_steps": 3}
        out_dir = run(data, tmp_path / precision, **changes)
        found.append({name: records(out_dir, f"mean_loss_{name}") for name in ("mlm", "kl", "cosine", "hidden")})
    for name, losses in found[0].items():
        assert found[1][name] == pytest.approx(losses, rel=3e-2) and min(losses.values()) > 0, name


# ---- the teacher of a run


def tensors_of(folder):
    source = RunModel(folder)
    return {name: source.read(name) for name in parameter_shapes(source.cfg)}


@pytest.mark.parametrize("layers, wanted", [("even", (0, 2)), ("3,1", (3, 1))])
def test_initial_layers_are_the_teachers_and_so_is_what_surrounds_them(layers, wanted, data, teacher, tmp_path):
    changes = {"init_layers": layers, "teacher": teacher, "n_layer": 2, "learning_rate": 1e-30, "weight_decay": 0.0}
    run(data, tmp_path, **changes, max_steps=1)
    found, theirs = tensors_of(tmp_path), tensors_of(teacher)
    for name, tensor in found.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(wanted[int(parts[1])])
        other = theirs[".".join(parts)]
        assert torch.equal(tensor, other[: len(tensor)]), name


def test_with_no_weight_a_teacher_gives_layers_alone(data, teacher, tmp_path, capsys):
    changes = {"teacher": teacher, "n_layer": 2, "init_layers": "even"}
    run(data, tmp_path / "run", **changes, distill_weight=0.0, max_steps=2)
    assert "weights    layers 0, 2 of " in (told := capsys.readouterr().out) and "teacher    " not in told
    assert not records(tmp_path / "run", "mean_loss_kl")


def test_memory_and_time_that_are_planned_count_the_teacher(data, teacher, tmp_path):
    model, found = load_model(teacher, "cpu")[0], []
    for weight in (0.5, 0.0):
        changes = {"n_layer": 2, "precision": "bf16", "init_layers": "even", "distill_weight": weight}
        cfg = resolve(settings(data, tmp_path, teacher=teacher, **changes))
        setup = setup_of(cfg, (1, 1, 1), 2, "bf16", "cuda", teacher=teacher_config(cfg) and model.cfg)
        assert setup.teacher in (None, replace(teacher_config(cfg) or model.cfg, block_size=7))
        found.append((memory(cfg.model, setup)["weights"], step_seconds(cfg.model, setup, DEVICES["h200"])))
    in_precision(model, World(0, 1, torch.device("cpu"), "bf16"))
    assert found[0][0] - found[1][0] == sum(p.nbytes for p in model.parameters())
    with_teacher, without = (seconds for _, seconds in found)
    assert with_teacher["matmul_s"] > without["matmul_s"] and with_teacher["optimizer_s"] == without["optimizer_s"]


def test_pruned_student_is_trained_again_without_the_teacher(data, nine, tmp_path):
    names = {"out_dir": nine, "to_run": tmp_path / "small", "prune": "neurons", "device": "cpu", "eval_tokens": 140}
    compress.main(config.load(compress.Settings, [f"--{name}={value}" for name, value in names.items()]))
    assert config.load(train.Settings, [str(tmp_path / "small" / "config.py")]).distill == DistillConfig()


def test_another_teacher_on_resume_is_refused_and_the_same_one_elsewhere_is_told(data, teacher, tmp_path, capsys):
    moved = copy_run(teacher, tmp_path / "moved")
    other = run(data, tmp_path / "other", **SIZES | {"seed": 6})
    out_dir = run(data, tmp_path / "run", n_layer=2, teacher=teacher, max_steps=2)
    for change in ({"teacher": other}, {"teacher": "none"}, {"teacher": teacher, "distill_weight": 0.9}):
        with pytest.raises(UserError, match="teacher_fingerprint: .* -> |distill_weight: 0.5 -> 0.9"):
            run(data, out_dir, n_layer=2, max_steps=3, **change)
    capsys.readouterr()
    run(data, out_dir, n_layer=2, teacher=moved, max_steps=3)
    assert f"teacher: {teacher} -> {moved}" in capsys.readouterr().out
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="moved is no folder; give the out_dir of a run, or a Hugging Face"):
        run(data, out_dir, n_layer=2, teacher=moved, max_steps=4)


REFUSED = {
    "vocab_size of 37, this model one of 39": {"vocab_size": 39},
    "was trained for clm, this model for mlm": {"objective": "mlm"},
    "sees at most 7 tokens, and seq_len is 9": {"seq_len": 9, "batch_tokens": 54},
    "n_embd 20, this model 10; leave distill_cosine": {"n_embd": 10, "distill_cosine": 1},
    "has 4 layers, no multiple of this model's 3; leave distill_hidden": {"distill_hidden": 1},
    "n_head 5, this model 4; leave distill_attention": {"n_head": 4, "distill_attention": 1, "n_layer": 2},
    "which strategy fsdp shards": {"distill_attention": 1, "n_layer": 2, "strategy": "fsdp"},
    "compares whole layers, which tp 2 splits": {"distill_hidden": 1, "n_layer": 2, "tp": 2, "n_head": 4, "seq_len": 6,
                                                 "batch_tokens": 36},
    "which pp 2 and cp 1 divide": {"pp": 2, "n_layer": 2},
    "and window hides some": {"distill_attention": 1, "n_layer": 2, "window": 3},
    "init_layers copies layers .* n_inner 80 there, 40 here": {"init_layers": "even", "n_inner": 40},
    "init_layers names 4, x; .* has the layers 0 to 3": {"init_layers": "0,4,x"},
    "init_layers names 2 layers, this model has n_layer 3": {"init_layers": "0,1"},
    "objective is .*, but a model with .* one alone": {},
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_a_teacher_that_does_not_fit_is_refused_in_one_line_before_anything_is_made(line, data, teacher, tmp_path):
    preset = []
    if "one alone" in line:
        preset = [tmp_path / "two.py"]
        preset[0].write_text('objective = {"clm": 1.0, "contrastive": 0.1}\ndropout = 0.1\n')
    cfg = settings(data, tmp_path / "run", *map(str, preset), **{"teacher": teacher} | REFUSED[line])
    with pytest.raises(UserError, match=line) as error:
        train.main(cfg)
    assert len(error.value.args) == 1 and not (tmp_path / "run").exists()


def test_a_teacher_of_another_tokenizer_is_refused_by_its_hash(teacher, tmp_path):
    characters = {chr(97 + i): i for i in range(37)}
    data = write_data(tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    (data / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "truncation": None,
        "padding": None, "decoder": {"type": "Fuse"},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        "model": {"type": "WordLevel", "vocab": characters, "unk_token": "a"},
    }))  # fmt: skip
    (data / "meta.json").write_text(json.dumps(meta | {"tokenizer": "tokenizer.json"}))
    with pytest.raises(UserError, match=r"knows the tokens of byte \(hash \w+\), .* has those of .*\(hash \w+\); take"):
        train.main(settings(data, tmp_path / "run", teacher=teacher))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, line", [
    ({"distill_cosine": 1}, "distill_cosine is 1.0, but teacher is none"),
    ({"init_layers": "even"}, r"init_layers is \('even',\), but teacher is none"),
    ({"teacher": "out/big", "distill_weight": 1.1}, "distill_weight is 1.1; it must be at least 0 and at most 1"),
    ({"teacher": "out/big", "distill_temperature": 0}, "distill_temperature is 0.0; it must be above 0"),
    ({"teacher": "out/big", "distill_weight": 0}, "teacher out/big teaches nothing"),
])  # fmt: skip
def test_settings_that_teach_nothing_are_refused(changes, line):
    with pytest.raises(UserError, match=line):
        config.load(train.Settings, [f"--{name}={value}" for name, value in changes.items()])


def test_init_from_and_init_layers_exclude_each_other(data, teacher, tmp_path):
    names = {"init_from": teacher, "teacher": teacher, "init_layers": "even", "n_layer": 4, "block_size": 7}
    with pytest.raises(UserError, match="init_from is .*, and init_layers names initial weights, too"):
        train.main(settings(data, tmp_path / "run", **names))
