"""A Hugging Face model, in a folder or on the hub, read a tensor at a time."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import torch

from config import UserError
from interop.families import FAMILIES, model_config, slots
from interop.tokenizer import load_hub_tokenizer

MODELS = ("config.json", "model*.safetensors", "model.safetensors.index.json")
BESIDE = (  # files that accompany the weights in an export
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json"),
    *("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"),
)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


class HubModel:
    """A model in a Hugging Face folder, read a tensor at a time.

    cfg are our settings of it, carried {name: tensor} what ours has no place for.
    """

    def __init__(self, folder):
        self.folder, self.config = Path(folder), read_config(folder)
        self.cfg, _ = model_config_in(self.folder, self.config)
        self.family = FAMILIES[self.config["model_type"]]
        self.name = f"{folder}, a Hugging Face model of {self.family.name}'s kind"
        self._files = TensorFiles(self.folder)
        try:
            expected = slots(self.family, self.cfg)
        except (RuntimeError, TypeError) as error:  # sizes that torch cannot hold
            raise UserError(f"{folder}: config.json is of no possible model ({error}); copy it again") from error
        self._slots = {name: slot for slot in expected for name in slot.ours}
        self._tied = self._tied_tensors()
        self._keys, carried = self._assign({slot.name for slot in expected})
        self._check_shapes()
        self.carried = {name: self._files.read(key) for name, key in carried.items()}
        if spoilt := [name for name, slot in self._slots.items() if slot.is_filled and self.read(name).any()]:
            raise UserError(
                f'{self.folder}: by "flatlm" in config.json the model has no {", ".join(spoilt[:3])}, but its file has, '
                f'and not zeros; remove "flatlm" from config.json to use what is in the file'
            )

    def load_tokenizer(self):
        """Its tokenizer; UserError where it has none that can be read."""
        return load_hub_tokenizer(self.folder)

    @property
    def dtype(self):
        """The weights' dtype, by torch's name."""
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        return named if named in [str(dtype).removeprefix("torch.") for dtype in DTYPES] else "float32"

    def read(self, name):
        """Our tensor of a name, whole, without rows that pad the vocabulary, in the dtype of the file."""
        slot = self._slots[name]
        key = self._keys[slot.name]
        tensor = self._files.read(key)
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{self.folder}: {key!r} is of {tensor.dtype}, where weights are floats of 16 bits or more"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{self.folder}: {key!r} holds numbers that are not finite; copy it again")
        tensor = tensor.T if slot.is_transposed else tensor
        parts = tensor.split([rows for rows, *_ in slot.ours.values()])
        return dict(zip(slot.ours, parts))[name]

    def _assign(self, known):
        """({their tensor: its name in the files} of what ours is made of, the same of what is carried)."""
        used = {slot.name for slot in self._slots.values()}
        keys, carried, tied, strange, family = {}, {}, {}, [], self.family
        for key in self._files.names:
            name = self._whole_name(key, known)
            if name in keys or name in carried:
                strange.append(key)
            elif name in used:
                keys[name] = key
            elif name in known or re.search(family.carried, name):
                carried[name] = key
            elif name in self._tied:
                tied[name] = key
            elif not re.search(family.ignored, name):
                strange.append(key)
        if missing := sorted(used - keys.keys()):
            raise UserError(
                f"{self.folder} lacks {len(missing)} tensors of a {family.architecture}, {missing[0]} for one; "
                f"its files are not whole, or of another model than its config.json"
            )
        if strange:
            raise UserError(
                f"{self.folder} has {len(strange)} tensors that no {family.architecture} has, or has twice, {strange[0]!r} "
                f"for one; its files are of another model than its config.json"
            )
        self._check_tied(tied, keys)
        return keys, carried

    def _tied_tensors(self):
        """{tied tensor that files may hold a second time: the tensor that it is tied to}."""
        ours = {".weight": "wte.weight", ".bias": "head.bias"} if self.cfg.tie_embeddings else {}
        return {
            f"{self.family.head}{kind}": self._slots[name].name for kind, name in ours.items() if name in self._slots
        }

    def _check_tied(self, tied, keys):
        for name, key in tied.items():
            other = keys[self._tied[name]]
            if not torch.equal(self._files.read(key), self._files.read(other)):
                raise UserError(
                    f"{self.folder}: {key!r} is not {other!r}, to which config.json ties it; "
                    f"set tie_word_embeddings to false there, or take it out"
                )

    def _whole_name(self, key, known):
        """The present name of a tensor in the files, in a model with its head."""
        # TensorFlow's names of norms, in old files of BERT
        name = re.sub(r"\.(gamma|beta)$", lambda m: {"gamma": ".weight", "beta": ".bias"}[m[1]], key)
        for whole in (name, self.family.base + name):
            if whole in known or whole in self._tied or re.search(self.family.carried, whole):
                return whole
        return name

    def _check_shapes(self):
        for slot in self._slots.values():
            key = self._keys[slot.name]
            if (found := self._files.shape(key)) != slot.shape:
                raise UserError(
                    f"{self.folder}: {key!r} has the shape {found}, by config.json {slot.shape}; "
                    f"its files are of another model than its config.json"
                )


class TensorFiles:
    """The tensors of a folder's safetensors files, or, where there are none, of its pytorch_model*.bin.

    The latter are pickles, read by torch's loader of plain weights, which runs no code of theirs.
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
        """{name of a tensor: its file} by an index, or of the one file; {} where there are neither."""
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
            raise UserError(f"{index} cannot be used ({error}); copy the files that it names again") from error
        if missing:
            raise UserError(f"{index} names {missing[0]}, which its file lacks; copy the files that it names again")
        return files

    def _tensors(self, file):
        if file not in self._open:
            self._open[file] = open_tensors(self._folder / file)
        return self._open[file]


def open_tensors(path):
    """The tensors of a file, mapped into memory: safetensors' handle, or a dict."""
    try:
        if path.suffix == ".bin":
            # Older than torch 1.6, they cannot be mapped.
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if not all(isinstance(name, str) and is_plain(tensor) for name, tensor in tensors.items()):
                raise TypeError("it holds other things than plain tensors")
            return tensors
        import safetensors

        return safetensors.safe_open(path, "pt")
    except ImportError as error:
        raise UserError(f"{path} needs safetensors; install it with: pip install safetensors") from error
    except Exception as error:  # whatever a damaged or a hostile file makes the two raise
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if isinstance(error, pickle.UnpicklingError):  # torch's text explains how to run the code all the same
            reason = "it is damaged, or holds other things than tensors, which could run code"
        raise UserError(
            f"{path} holds no tensors that can be read ({reason}); copy it from its source again"
        ) from error


def is_plain(tensor):
    """Whether something is a tensor with all its numbers in memory."""
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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no checkpoint of flatlm's (ckpt/step_*), and no config.json of a Hugging Face model; "
            f"give the out_dir of a run, or another folder"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy it from its source again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{path} has the model type {kind!r}, which is not supported; supported are {', '.join(FAMILIES)}"
        )
    return config


def model_config_in(folder, config):
    """(our settings of a model, the longest sequence that ours computes as theirs; none: any), of its config.json."""
    try:
        return model_config(config)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {'; '.join(str(error).splitlines())}") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} has a value of an odd type ({error}); copy it again") from error


# ---- from the hub


def folder_of(where):
    """The folder of a Hugging Face model by path or, fetched into Hugging Face's cache, by its name on the hub."""
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
        folder = Path(huggingface_hub.snapshot_download(where, allow_patterns=[*MODELS, *BESIDE]))
        if not any(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(where, allow_patterns=PICKLES)
        return folder
    except Exception as error:  # a dozen kinds, of network and of hub
        raise UserError(
            f"{where} is no folder here, and the Hugging Face hub did not give a model of that name "
            f"({type(error).__name__}); check the name and the network, or fetch it elsewhere and name its folder"
        ) from error
