"""A Hugging Face model, in a folder or on the hub, read a tensor at a time."""

import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

import foreign
from config import UserError
from heads import TunedModel
from interop.families import FAMILIES, model_config, tensors_of, with_head
from interop.hub_tokenizer import chat_settings, load_hub_tokenizer

MODELS = ("config.json", "model*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
ACCOMPANYING = (  # files that accompany the weights in an export
    *(*TOKENIZER_FILES, "generation_config.json"),
    *("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"),
)
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


class HubModel:
    """A model in a Hugging Face folder, read a tensor at a time.

    cfg: its settings as a ModelConfig. extra: {name: tensor} that our models lack.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config, self.cfg, _ = read_config(folder)
        self.family = FAMILIES[self.config["model_type"]]
        if isinstance(self.cfg, TunedModel):
            self.family = with_head(self.family, self.cfg)
        self.name = f"{folder}, a Hugging Face model of {self.family.name}'s kind"
        tensors = tensors_in(self.folder)
        expected = tensors_of(self.family, self.cfg)
        self._tensor_of = {name: theirs for theirs in expected for name in theirs.ours}
        self._lacking = None  # why some tensors cannot be read
        self._theirs, self.extra = self._assign(tensors, {theirs.name for theirs in expected})
        self._tensor_of = {name: theirs for name, theirs in self._tensor_of.items() if theirs.name in self._theirs}
        for theirs in self._tensor_of.values():
            if (found := [*self._theirs[theirs.name].shape]) != theirs.shape:
                what = f"has the shape {found}, where config.json gives {theirs.shape}"
                raise UserError(f"{folder}: {theirs.name!r} {what}; its files do not belong to its config.json")
        if spoilt := [name for name, theirs in self._tensor_of.items() if theirs.is_zero and self.read(name).any()]:
            what = f'by "flatlm" in config.json the model has no {spoilt[0]}, but its file has one that is not zero'
            raise UserError(f'{folder}: {what}; remove "flatlm" from config.json to use it')

    def load_tokenizer(self):
        """The folder's tokenizer; UserError where it has none that we can read."""
        return load_hub_tokenizer(self.folder)

    @property
    def chat(self):
        """(its chat template, None where it has none; {a template's variable, such as eos_token: the token})."""
        return chat_settings(self.folder)

    @property
    def dtype(self):
        """The weights' dtype, by torch's name."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        return named if named in ("float64", "float32", "float16", "bfloat16") else "float32"

    def read(self, name):
        """A tensor by our name, whole, without the vocabulary's padding, in the file's dtype."""
        if self._lacking and name not in self._tensor_of:
            raise UserError(self._lacking)
        theirs = self._tensor_of[name]
        tensor, place = self._theirs[theirs.name], f"{self.folder}: {theirs.name!r}"
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise UserError(f"{place} has the dtype {tensor.dtype}; weights must be floats of 16 bits or more")
        if not tensor.isfinite().all():
            raise UserError(f"{place} holds numbers that are not finite; copy it again")
        tensor = tensor.T if theirs.is_transposed else tensor
        parts = tensor.split([rows for rows, *_ in theirs.ours.values()])
        return dict(zip(theirs.ours, parts))[name]

    def _assign(self, tensors, known):
        """({their name: tensor} that our model consists of, the same for what it lacks), from the files' tensors."""
        family, used = self.family, {theirs.name for theirs in self._tensor_of.values()}
        tied_to = {f"{family.head}.weight": "wte.weight", f"{family.head}.bias": "head.bias"}
        found, extra, tied, strange = {}, {}, {}, []
        for key, tensor in tensors.items():
            # Old files of BERT have TensorFlow's names of norms.
            name = re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", key))
            whole = family.base + name
            if whole in known or re.search(family.extra, whole):
                name = whole
            if name in found or name in extra:
                strange.append(key)
            elif name in used:
                found[name] = tensor
            elif name in known or re.search(family.extra, name):
                extra[name] = tensor
            elif tied_to.get(name) in self._tensor_of:  # files may hold a tied tensor a second time
                tied[name] = tensor
            elif not re.search(family.ignored, name):
                strange.append(key)
        if missing := sorted(used - found.keys()):
            if all(name.startswith("cls.predictions") for name in missing):  # fine-tuning needs none
                what = "has no head for masked tokens (cls.predictions), so it predicts none"
                self._lacking = f"{self.folder} {what}; use a {family.architecture}"
            else:
                what = f"lacks {len(missing)} tensors of a {family.architecture}, {missing[0]} for one"
                raise UserError(f"{self.folder} {what}; its files are incomplete, or do not belong to its config.json")
        if strange:
            what = f"has {len(strange)} tensors that no {family.architecture} has, or has twice, {strange[0]!r} for one"
            raise UserError(f"{self.folder} {what}; its files do not belong to its config.json")
        for name, tensor in tied.items():
            other = self._tensor_of[tied_to[name]].name
            if not torch.equal(tensor, found[other]):
                what = f"{name!r} differs from {other!r}, to which config.json ties it"
                raise UserError(f"{self.folder}: {what}; set tie_word_embeddings to false, or remove the tensor")
        return found, extra


def read_config(folder):
    """(a Hugging Face folder's config.json as a dict, its model's settings, longest sequence; None: any)."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{folder} holds no checkpoint of flatlm's (ckpt/step_*), no config.json; name another folder")
    config = foreign.read_json(path)
    if (kind := config.get("model_type")) not in [*FAMILIES]:
        raise UserError(f"{path} has the model type {kind!r}, not supported; supported are {', '.join(FAMILIES)}")
    foreign.check(config, FAMILIES[kind].kinds, path)
    try:
        return config, *model_config(config)
    except UserError as error:
        raise UserError(f"{path}: {'; '.join(error.args)}") from error


# ---- files of tensors


def tensors_in(folder):
    """{name: tensor} of a folder's safetensors files, or, where it has none, of its pytorch_model*.bin."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.exists():
            return open_tensors(single)
        if index.exists():
            files = foreign.read_json(index, {"weight_map!": {"*": str}})["weight_map"]
            opened = {file: open_tensors(folder / foreign.check_name(file, index)) for file in {*files.values()}}
            if lacking := [name for name, file in files.items() if name not in opened[file]]:
                raise UserError(f"{index} names {lacking[0]!r}, which its file has not; {foreign.COPY_AGAIN}")
            return {name: opened[file][name] for name, file in files.items()}
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin; copy its weights there")


def open_tensors(path):
    """{name: tensor} of a file; UserError where it holds anything else."""
    tensors = load_plain(path)
    if not all(isinstance(name, str) and is_plain(tensor) for name, tensor in tensors.items()):
        raise UserError(f"{path} holds more than plain tensors; copy it from its source again")
    return tensors


def load_plain(path):
    """The dict in a safetensors file or in a pickle of torch's; its tensors are read from disk when they are used.

    No code in a pickle runs: torch's loader for plain weights reads it.
    """
    remedy = "copy it again, or name another"
    with foreign.telling(lambda reason: f"{path} holds no tensors that can be read ({reason}); {remedy}"):
        if os.path.exists(path) and not foreign.is_regular(path):
            raise UserError("it is no regular file")
        if Path(path).suffix == ".safetensors":
            import safetensors

            file = safetensors.safe_open(path, "pt")
            return {name: file.get_tensor(name) for name in file.keys()}
        try:
            is_new = zipfile.is_zipfile(path)  # files older than torch 1.6 cannot be mapped into memory
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=is_new))
        except pickle.UnpicklingError as error:  # torch's text explains how to run the code all the same
            raise UserError("it is damaged, or holds more than plain values, which could run code") from error


def copy_files(folder, to, names):
    """Copies the files of these names that a folder has; UserError where one leads out of it or cannot be read."""
    for path in (folder / name for name in names if os.path.lexists(folder / name)):
        foreign.check_inside(path)
        with foreign.telling(lambda reason, path=path: f"{path} cannot be copied ({reason})"):
            (to / path.name).write_bytes(foreign.read_bytes(path))


def is_plain(tensor):
    """Whether a value is a dense, unquantized tensor in the CPU's memory."""
    is_tensor = isinstance(tensor, torch.Tensor)
    return is_tensor and tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


def save_tensors(tensors, path, metadata=None):
    """Writes tensors as safetensors; OSError where that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(str(error)) from error


# ---- from the hub


def folder_of(where):
    """The folder of a Hugging Face model: the path itself, or the cache where a model of that name is downloaded."""
    if Path(where).is_dir():
        return Path(where)
    if Path(where).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", where):
        raise UserError(f"{where} is no folder; give the out_dir of a run, or a Hugging Face model's folder or name")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{where} is no folder; to fetch a model of that name: pip install huggingface_hub") from error
    try:
        folder = Path(huggingface_hub.snapshot_download(where, allow_patterns=[*MODELS, *ACCOMPANYING]))
        if not any(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(where, allow_patterns=PICKLES)
        return folder
    except Exception as error:  # network and hub raise a dozen kinds
        what = f"{where} is no folder here, and the Hugging Face hub did not give it ({type(error).__name__})"
        raise UserError(f"{what}; check the name and network, or fetch it elsewhere and name its folder") from error
