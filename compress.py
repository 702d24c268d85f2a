"""Makes a trained model smaller: prunes heads, neurons or single weights, or quantizes matrices.

    python compress.py config/quickstart.py --prune=neurons --sparsity=0.5 --to_run=out/small
    python train.py out/small/config.py
    python compress.py config/quickstart.py --quantize=int8 --to_run=out/int8

The second command trains the pruned model again, for a tenth of its run's steps. A quantized one is not trained.
"""

import dataclasses
import shutil
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils import prune as torch_prune

from checkpoint import check_is_float
from config import Config, Fraction, UserError, only, run_script, settings_of
from data import DataConfig, Split, each, eval_batches, objective_for, prepare_command
from interop.hub import save_tensors
from interop.pretrained import CHAT_FILE, EXTRA_FILE, keep_tokenizer_of, load_model, model_location
from interop.quantized import KINDS, quantize, stored
from model import ModelConfig
from objective import CONTRASTIVE, ObjectiveConfig, weighted_sum
from ops import Linear
from run.folder import RunConfig
from run.resume import check_is_new, write_run
from train import EVAL_MASK_SEED, evaluate
from train import Settings as TrainSettings
from world import WorldConfig, init_world


@dataclass(frozen=True)
class CompressConfig(Config):
    prune: Literal["heads", "neurons", "magnitude"] | None = None  # takes out attention heads, neurons of MLPs, weights
    sparsity: Fraction = 0.5  # share of them that goes, of each layer
    quantize: Literal[*KINDS] | None = None  # bits of the blocks' matrices; int8_dynamic: of matmuls' inputs, too
    to_run: str | None = None  # folder of the run to write


@dataclass(frozen=True)
class Settings:
    compress: CompressConfig
    model: ModelConfig = only()
    objective: ObjectiveConfig
    data: DataConfig = only("data_dir", "eval_tokens", "micro_batch_size")
    run: RunConfig = only("out_dir", "init_from")
    world: WorldConfig = only("device", "precision")
    presets: tuple = ()
    given: frozenset = dataclasses.field(default=frozenset(), compare=False)


def main(cfg):
    wanted = cfg.compress
    if (wanted.prune is None) == (wanted.quantize is None):
        which = "are none" if wanted.prune is None else f"are {wanted.prune} and {wanted.quantize}"
        raise UserError(f"prune and quantize {which}; give one of them, and quantize what was pruned and trained again")
    if wanted.to_run is None:
        raise UserError("to_run is none; name the folder of the run to write")
    check_is_new(wanted.to_run)
    with init_world(cfg.world) as world:
        model, source = load_model(model_location(cfg), world.device)
        check_is_float(source.folder, getattr(source, "manifest", {}))
        settings = training_settings(source)
        cfg = with_settings(cfg, source, settings)
        splits = [
            Split(folder, "val", model.cfg.vocab_size, prepare_command(cfg, folder)) for folder in cfg.data.folders
        ]
        objective = objective_for(cfg, EVAL_MASK_SEED)
        print(f"{'':<28} {'parameters':>12} {'bytes':>12} {'zeros':>6} {'val loss':>9} {'bits per byte':>14}")
        print_row("before", model, evaluate(model, splits, objective, cfg.data, world))
        if wanted.quantize:
            quantize(model, wanted.quantize)
            after = evaluate(model, splits, objective, cfg.data, world)
            write(cfg, source, settings, model, after["val_loss"], world)
            print_row(wanted.quantize, model, after, wanted.quantize)
            return print(f"to sample from it: python sample.py --out_dir={wanted.to_run}")
        batches = (
            each(batch, lambda part: part.to(world.device))
            for split in splits
            for batch in eval_batches(
                split, objective, cfg.data.eval_tokens // len(splits), cfg.data.micro_batch_size, 0, 1
            )
        )
        pruned = PRUNERS[wanted.prune](model, batches, wanted.sparsity)
        after = evaluate(pruned, splits, objective, cfg.data, world)
        write(cfg, source, settings, pruned, after["val_loss"], world)
        what = "weights" if wanted.prune == "magnitude" else wanted.prune
        print_row(f"{100 * wanted.sparsity:.3g} % of the {what} gone", pruned, after)
        to_set = "" if settings else "; set batch_tokens, learning_rate and max_steps, which the model does not tell"
        print(f"to train it again: python train.py {wanted.to_run}/config.py{to_set}")


def training_settings(source):
    """The settings of train.py with which a model was trained, {} where it is no run of train.py's."""
    settings = getattr(source, "manifest", {}).get("settings", {})
    sections = {name: section for name, (section, _) in settings_of(TrainSettings).items()}
    # A teacher's losses and layers may not fit what is left.
    return {} if "task" in settings else {n: v for n, v in settings.items() if sections.get(n, "distill") != "distill"}


def with_settings(cfg, source, settings):
    """cfg with the model's settings and, unless the user has given them, its run's data, seq_len and objective."""
    data_dir = cfg.data.data_dir or settings.get("data_dir")
    if data_dir is None:
        raise UserError("data_dir is none; name the data, by prepare.py, whose validation text judges the model")
    names = {field.name for field in dataclasses.fields(ObjectiveConfig)} & settings.keys() - cfg.given
    objective = replace(cfg.objective, **{name: settings[name] for name in names}).without_augmentation()
    seq_len = settings.get("seq_len") or source.cfg.block_size
    data = replace(cfg.data, data_dir=data_dir, seq_len=min(seq_len, source.cfg.block_size))
    return replace(cfg, model=source.cfg, objective=objective, data=data)


def print_row(name, model, figures, kind=None):
    """Prints a model's size and the figures of its evaluation; bytes: of its tensors in a checkpoint."""
    tensors, bits = stored(model, kind), f"{figures['val_bpb']:.4f}" if "val_bpb" in figures else "-"
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    n_zeros = sum(int((p == 0).sum()) for name, p in tensors.items() if name.startswith("blocks."))
    zeros = "-" if kind else f"{n_zeros / model.num_params():.1%}"
    print(f"{name:<28} {model.num_params():>12,} {n_bytes:>12,} {zeros:>6} {figures['val_loss']:>9.4f} {bits:>14}")


# ---- pruning


def prune_heads(model, batches, sparsity):
    """The model with the most important heads of each layer; heads that share keys and values stay together."""
    cfg, groups = model.cfg, model.cfg.kv_heads
    kept = most_important(model, batches, lambda block: block.attn.proj, groups, sparsity, "heads")
    n = len(kept[0])
    heads = {"n_head": n * cfg.n_head // groups, "n_kv_head": cfg.n_kv_head and n, "head_dim": cfg.head_width}
    return smaller(model, replace(cfg, **heads), keeping(kept, groups, ("attn.q", "attn.k", "attn.v"), "attn.proj"))


def prune_neurons(model, batches, sparsity):
    """The model with the most important neurons of each layer's MLP."""
    n = model.cfg.inner_width
    kept = most_important(model, batches, lambda block: block.mlp.down, n, sparsity, "neurons")
    return smaller(
        model, replace(model.cfg, n_inner=len(kept[0])), keeping(kept, n, ("mlp.up", "mlp.gate"), "mlp.down")
    )


def prune_weights(model, batches, sparsity):
    """A copy of the model whose matrices in the blocks have 0 in place of their smallest weights; batches is not read."""
    copy = smaller(model, model.cfg, lambda name, tensor: tensor)
    for linear in (module for module in copy.blocks.modules() if isinstance(module, Linear)):
        torch_prune.remove(torch_prune.l1_unstructured(linear, "weight", sparsity), "weight")
    return copy


PRUNERS = {"heads": prune_heads, "neurons": prune_neurons, "magnitude": prune_weights}


def most_important(model, batches, reader_of, n_groups, sparsity, name):
    """The places, in order, of the groups of channels to keep, a tensor for each layer.

    reader_of(block): the Linear that reads the channels. A group's importance is the mean over sequences of |dL/dx|, x
    a factor of 1 on its output (Michel et al. 2019, arXiv 1905.10650, section 4.1).
    """
    n_kept = round((1 - sparsity) * n_groups)
    if n_kept < 1:
        raise UserError(f"sparsity {sparsity} leaves a layer without {name}, of which it has {n_groups}; lower it")
    if n_kept == n_groups:
        raise UserError(f"sparsity {sparsity} takes none of the {n_groups} {name} of a layer; raise it")
    importance, handles = defaultdict(lambda: torch.zeros(n_groups)), []
    for layer, block in enumerate(model.blocks):

        def watch(linear, inputs, layer=layer):
            def add(grad, x=inputs[0].detach()):  # noqa: B008  (a new one at each call)
                by_group = (x * grad).float().unflatten(-1, (n_groups, -1)).sum((1, 3))  # B, groups
                importance[layer] += by_group.abs().sum(0).cpu()

            inputs[0].register_hook(add)

        handles.append(reader_of(block).register_forward_pre_hook(watch))
    model.eval()  # without dropout
    weights = {name: weight for name, weight in model.cfg.objectives.items() if name != CONTRASTIVE}
    if not any(weights.values()):
        rule = f"{name} are told apart by a loss of tokens or pairs, and the model has learned by contrastive alone"
        raise UserError(f"prune is {name}, but {rule}; use --prune=magnitude")
    for batch in batches:
        weighted_sum(model(*batch).view(-1), weights).backward()
        model.zero_grad()
    for handle in handles:
        handle.remove()
    return [importance[layer].topk(n_kept).indices.sort().values for layer in range(len(model.blocks))]


def keeping(kept, n_groups, writers, reader):
    """A function from a parameter's name and tensor to what stays of it: its groups of channels in `kept`, by layer.

    The rows of the writers' tensors are channels, and the columns of the reader's.
    """

    def cut(name, tensor):
        layer, module = name.split(".")[1], ".".join(name.split(".")[2:-1])
        axis = 0 if module in writers else 1
        if not (module in writers or module == reader and tensor.dim() == 2):
            return tensor
        channels = torch.arange(tensor.shape[axis]).view(n_groups, -1)[kept[int(layer)]].flatten()
        return tensor.index_select(axis, channels.to(tensor.device))

    return cut


@torch.no_grad()
def smaller(model, cfg, cut):
    """A model with settings cfg whose parameters are what cut(name, tensor) leaves of the given model's."""
    with torch.device("meta"):
        new = cfg.build()
    new.to_empty(device=next(model.parameters()).device)
    new.tie_weights()
    for name, param in new.named_parameters():
        param.copy_(cut(name, model.get_parameter(name)))
    return new.eval()


# ---- the run to write


def write(cfg, source, settings, model, val_loss, world):
    """Writes the model as a run without steps; a pruned one's config.py trains it for a tenth of its source's steps."""
    out_dir, kind, model_settings = cfg.compress.to_run, cfg.compress.quantize, dataclasses.asdict(model.cfg)
    preset = settings | {name: value for name, value in model_settings.items() if name in settings_of(TrainSettings)}
    preset |= {"init_from": out_dir, "out_dir": f"{out_dir}_trained", "data_dir": cfg.data.data_dir}
    if kind:  # sample.py and evaluate.py read it
        preset = {"out_dir": out_dir}
    elif settings:
        steps = max(1, source.manifest["step"] // 10)
        preset |= dict.fromkeys(("max_tokens", "target_loss", "lr_decay_steps", "max_minutes", "data_schedule"))
        preset |= {"max_steps": steps, "warmup_steps": min(settings["warmup_steps"], steps // 10)}
        # At the full rate it would unlearn first.
        preset |= {name: settings[name] / 10 for name in ("learning_rate", "min_lr")}
        preset["cooldown_steps"] = settings["cooldown_steps"] // 10
    facts = {"model": model_settings, "settings": settings, "val_loss": val_loss, "quantize": kind}
    tensors = {f"model.{name}": tensor.cpu() for name, tensor in stored(model, kind).items()}
    write_run(out_dir, 0, tensors, facts | {"context": source.cfg.block_size}, preset)
    keep_tokenizer_of(replace(cfg, run=replace(cfg.run, init_from=str(source.folder), out_dir=out_dir)), world)
    if source.extra:
        save_tensors(source.extra, Path(out_dir) / EXTRA_FILE)
    if (source.folder / CHAT_FILE).exists():
        shutil.copyfile(source.folder / CHAT_FILE, Path(out_dir) / CHAT_FILE)


if __name__ == "__main__":
    run_script(main, Settings, __doc__, needs_console=False)
