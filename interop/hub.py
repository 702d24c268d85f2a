"""A Hugging Face model, in a folder or on the hub, read a tensor at a time."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import torch

from config import UserError
from interop.families import FAMILIES, model_config, tensors_of
from interop.tokenizer import load_hub_tokenizer, read_json

MODELS = ("config.json", "model*.safetensors", "model.safetensors.index.json")
ACCOMPANYING = (  # files that accompany the weights in an export
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json"),
    *("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"),
)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


class HubModel:
    """A model in a Hugging Face folder, read a tensor at a time.

    cfg: its settings as a ModelConfig. extra: {name: tensor} that our models lack.
    """

    def __init__(self, folder):
        self.folder, self.config = Path(folder), read_config(folder)
        self.cfg, _ = model_config_in(self.folder, self.config)
        self.family = FAMILIES[self.config["model_type"]]
        self.name = f"{folder}, a Hugging Face model of {self.family.name}'s kind"
        self._files = TensorFiles(self.folder)
        try:
            expected = tensors_of(self.family, self.cfg)
        except (RuntimeError, TypeError) as error:  # sizes that torch cannot hold
            raise UserError(f"{folder}: no model can have the sizes in config.json ({error}); copy it again") from error
        self._tensor_of = {name: theirs for theirs in expected for name in theirs.ours}
        self._tied = self._tied_tensors()
        self._keys, extra = self._assign({theirs.name for theirs in expected})
        self._check_shapes()
        self.extra = {name: self._files.read(key) for name, key in extra.items()}
        if spoilt := [name for name, theirs in self._tensor_of.items() if theirs.is_zero and self.read(name).any()]:
            raise UserError(
                f'{self.folder}: by "flatlm" in config.json the model has no {", ".join(spoilt[:3])}, but its file has, '
                f'and not zeros; remove "flatlm" from config.json to use what is in the file'
            )

    def load_tokenizer(self):
        """The folder's tokenizer; UserError where there is none that we can read."""
        return load_hub_tokenizer(self.folder)

    @property
    def dtype(self):
        """The weights' dtype, by torch's name."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        return named if named in [str(dtype).removeprefix("torch.") for dtype in DTYPES] else "float32"

    def read(self, name):
        """A tensor by our name, whole, without the vocabulary's padding, in the file's dtype."""
        theirs = self._tensor_of[name]
        key = self._keys[theirs.name]
        tensor = self._files.read(key)
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{self.folder}: {key!r} has the dtype {tensor.dtype}; weights must be floats of 16 bits or more"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{self.folder}: {key!r} holds numbers that are not finite; copy it again")
        tensor = tensor.T if theirs.is_transposed else tensor
        parts = tensor.split([rows for rows, *_ in theirs.ours.values()])
        return dict(zip(theirs.ours, parts))[name]

    def _assign(self, known):
        """{their tensor: its name in the files}: a dict of those that ours consist of, and one of the extra ones."""
        used = {theirs.name for theirs in self._tensor_of.values()}
        keys, extra, tied, strange, family = {}, {}, {}, [], self.family
        for key in self._files.names:
            name = self._whole_name(key, known)
            if name in keys or name in extra:
                strange.append(key)
            elif name in used:
                keys[name] = key
            elif name in known or re.search(family.extra, name):
                extra[name] = key
            elif name in self._tied:
                tied[name] = key
            elif not re.search(family.ignored, name):
                strange.append(key)
        if missing := sorted(used - keys.keys()):
            raise UserError(
                f"{self.folder} lacks {len(missing)} tensors of a {family.architecture}, {missing[0]} for one; "
                f"its files are incomplete, or another model's than its config.json"
            )
        if strange:
            raise UserError(
                f"{self.folder} has {len(strange)} tensors that no {family.architecture} has, or has twice, {strange[0]!r} "
                f"for one; its files are another model's than its config.json"
            )
        self._check_tied(tied, keys)
        return keys, extra

    def _tied_tensors(self):
        """{tied tensor that files may hold a second time: the tensor that it is tied to}."""
        ours = {".weight": "wte.weight", ".bias": "head.bias"} if self.cfg.tie_embeddings else {}
        return {
            f"{self.family.head}{kind}": self._tensor_of[name].name
            for kind, name in ours.items()
            if name in self._tensor_of
        }

    def _check_tied(self, tied, keys):
        for name, key in tied.items():
            other = keys[self._tied[name]]
            if not torch.equal(self._files.read(key), self._files.read(other)):
                raise UserError(
                    f"{self.folder}: {key!r} differs from {other!r}, to which config.json ties it; "
                    f"set tie_word_embeddings to false there, or remove the tensor"
                )

    def _whole_name(self, key, known):
        """The present name of a tensor in the files, in a model with its head."""
        # TensorFlow's names of norms, in old files of BERT
        name = re.sub(r"\.(gamma|beta)$", lambda m: {"gamma": ".weight", "beta": ".bias"}[m[1]], key)
        for whole in (name, self.family.base + name):
            if whole in known or whole in self._tied or re.search(self.family.extra, whole):
                return whole
        return name

    def _check_shapes(self):
        for theirs in self._tensor_of.values():
            key = self._keys[theirs.name]
            if (found := self._files.shape(key)) != theirs.shape:
                raise UserError(
                    f"{self.folder}: {key!r} has the shape {found}, where config.json gives {theirs.shape}; "
                    f"its files are another model's than its config.json"
                )


class TensorFiles:
    """The tensors of a folder's safetensors files, or, where there are none, of its pytorch_model*.bin.

    The latter are pickles, read by torch's loader for plain weights, which runs no code in them.
    """

    def __init__(self, folder):
        self._folder, self._open = folder, {}
        self._file_of = self._files("model", "safetensors") or self._files("pytorch_model", "bin")
        if not self._file_of:
            raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin; copy its weights there")

    @property
    def names(self):
        return self._file_of.keys()

    def shape(self, name):
        """A tensor's shape, as a list."""
        tensors = self._tensors(self._file_of[name])
        return [*tensors[name].shape] if isinstance(tensors, dict) else tensors.get_slice(name).get_shape()

    def read(self, name):
        """A tensor, on the CPU."""
        tensors = self._tensors(self._file_of[name])
        return tensors[name] if isinstance(tensors, dict) else tensors.get_tensor(name)

    def _files(self, stem, suffix):
        """{tensor: its file}, from an index or a single file; {} where there is neither."""
        index, single = self._folder / f"{stem}.{suffix}.index.json", self._folder / f"{stem}.{suffix}"
        if single.exists():
            return dict.fromkeys(self._tensors(single.name).keys(), single.name)
        if not index.exists():
            return {}
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: Path(file).name for name, file in files.items()}  # always in this folder
            missing = [name for name, file in files.items() if name not in self._tensors(file).keys()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} cannot be used ({error}); copy its files again") from error
        if missing:
            raise UserError(f"{index} names {missing[0]}, which its file lacks; copy its files again")
        return files

    def _tensors(self, file):
        if file not in self._open:
            self._open[file] = open_tensors(self._folder / file)
        return self._open[file]


def open_tensors(path):
    """The tensors of a file, mapped into memory: safetensors' handle, or a dict."""
    try:
        if path.suffix == ".bin":
            # files older than torch 1.6 cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if not all(isinstance(name, str) and is_plain(tensor) for name, tensor in tensors.items()):
                raise TypeError("it holds more than plain tensors")
            return tensors
        import safetensors

        return safetensors.safe_open(path, "pt")
    except ImportError as error:
        raise UserError(f"{path} needs safetensors; install it with: pip install safetensors") from error
    except Exception as error:  # damaged and hostile files raise many kinds
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if isinstance(error, pickle.UnpicklingError):  # torch's text explains how to run the code all the same
            reason = "it is damaged, or holds more than tensors, which could run code"
        raise UserError(
            f"{path} holds no tensors that can be read ({reason}); copy it from its source again"
        ) from error


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


def read_config(folder):
    """config.json of a Hugging Face folder, as a dict."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(
            f"{folder} holds no checkpoint of flatlm's (ckpt/step_*), and no config.json of a Hugging Face model; "
            f"give the out_dir of a run, or another folder"
        )
    config = read_json(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{path} has the model type {kind!r}, which is not supported; supported are {', '.join(FAMILIES)}"
        )
    return config


def model_config_in(folder, config):
    """model_config of a folder's config.json; errors name the file."""
    try:
        return model_config(config)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {'; '.join(str(error).splitlines())}") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} has a value of the wrong type ({error}); copy it again") from error


# ---- from the hub


def folder_of(where):
    """The folder of a Hugging Face model: the path itself, or the cache where a model of that name is downloaded."""
    if Path(where).is_dir():
        return Path(where)
    if Path(where).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", where):
        what = "is a file, not a folder" if Path(where).exists() else "does not exist"
        raise UserError(f"{where} {what}; give the out_dir of a run, or the folder of a Hugging Face model")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{where} is no folder here; to fetch a model of that name: pip install huggingface_hub"
        ) from error
    try:
        folder = Path(huggingface_hub.snapshot_download(where, allow_patterns=[*MODELS, *ACCOMPANYING]))
        if not any(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(where, allow_patterns=PICKLES)
        return folder
    except Exception as error:  # network and hub raise a dozen kinds
        raise UserError(
            f"{where} is no folder here, and the Hugging Face hub did not give a model of that name "
            f"({type(error).__name__}); check the name and the network, or fetch it elsewhere and name its folder"
        ) from error
