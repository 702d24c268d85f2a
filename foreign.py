"""Files that others wrote: JSON within bounds of size, depth, numbers and types, from regular files alone."""

import contextlib
import json
import math
import os
import stat
from dataclasses import fields
from pathlib import Path

from config import UserError, checked

# Without waiting for the other end of a pipe, which Windows cannot; there, bytes as they are
READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
LARGEST_FILE = 48 * 10**6  # bytes; a JSON file's values take up to 20 times as many
MOST_BRACKETS = 2**22  # objects and lists of a file, each of 56 bytes or more; the largest tokenizers have 500,000
DEEPEST = 64  # levels of nesting
# Sizes of models beyond which none exists; building one of them would take all memory, or for ever.
LARGEST = {
    "vocab_size": 2**24, "block_size": 2**31 - 1, "n_layer": 1024, "n_head": 2**16, "n_kv_head": 2**16,
    "head_dim": 2**16, "n_embd": 2**20, "n_inner": 2**22, "rope_context": 2**31 - 1, "n_token_types": 2**16,
    "window": 2**31 - 1,
}  # fmt: skip
COPY_AGAIN = "copy it from its source again"


def read_json(path, schema=None, lacking=None, largest=LARGEST_FILE, finite=True, has_paths=False):
    """The object in a JSON file, with values as the schema has them (see check).

    lacking: the answer where there is no file; None: UserError, as for all else that is wrong. largest: in bytes.
    finite: whether NaN and infinities, which our own files may hold, are wrong. has_paths: whether texts may be paths
    that are not UTF-8; Python has a half of a surrogate pair for each of their other bytes.
    """
    if lacking is not None and not os.path.lexists(path):
        return lacking
    number = _finite if finite else float
    try:
        text = read_bytes(path, largest).decode("utf-8-sig")
        if text.count("{") + text.count("[") > MOST_BRACKETS:
            raise ValueError(f"it has more than {MOST_BRACKETS:,} objects and lists")
        value = json.loads(text, parse_int=_whole, parse_float=number, parse_constant=number)
        _check_depth(value)
        if "\\ud" in text or "\\uD" in text:
            errors = "surrogateescape" if has_paths else "strict"
            json.dumps(value, ensure_ascii=False).encode(errors=errors)  # raises at half a surrogate pair
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); {COPY_AGAIN}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; {COPY_AGAIN}")
    return check(value, schema or dict, path)


def check(value, kind, where):
    """Returns a value that is of a kind; raises a UserError, which names the place in `where`, for any other.

    A kind is a type (float takes whole numbers, too; object takes anything), a range of whole numbers, None, a tuple of
    alternatives, [kind] for a list of them, or {key: kind} for an object, in which "*" stands for all other keys, and a
    key with "!" behind it must be there; keys without a kind may hold anything.
    """
    if not _is_of(value, kind):
        raise UserError(f"{where} is {shown(value)}, where there must be {_described(kind)}; {COPY_AGAIN}")
    for alternative in kind if isinstance(kind, tuple) else (kind,):
        if isinstance(alternative, list) and isinstance(value, list):
            pairs = [(i, item, alternative[0]) for i, item in enumerate(value)]
        elif isinstance(alternative, dict) and isinstance(value, dict):
            others = alternative.get("*", object)
            pairs = [
                (key, item, alternative.get(key, alternative.get(f"{key}!", others))) for key, item in value.items()
            ]
        else:
            continue
        for key, item, inner in pairs:
            if isinstance(inner, (tuple, list, dict)) or not _is_of(item, inner):
                check(item, inner, f"{where}: {key!r}")
    return value


def settings_of(cls, values, where):
    """An instance of a class of settings from an object's values; UserError for unknown, wrong and oversized ones."""
    types, wrong, typed = {field.name: field.type for field in fields(cls)}, [], {}
    for name, value in values.items():
        try:
            typed[name] = checked(value, types[name])
            if name in LARGEST and value is not None and value > LARGEST[name]:
                raise OverflowError
        except KeyError:
            wrong.append(f"{name!r}, which is unknown here")
        except (TypeError, OverflowError):
            wrong.append(f"{name} {shown(value)}")
    if wrong:
        raise UserError(f"{where} has settings that are not {cls.__name__}'s: {', '.join(wrong[:5])}; {COPY_AGAIN}")
    try:
        return cls(**typed)
    except UserError as error:
        raise UserError("; ".join(error.args)) from error


@contextlib.contextmanager
def telling(sentence):
    """Turns whatever a library raises into a UserError with the sentence for its reason; a panic in Rust, too."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except ImportError as error:
        raise UserError(f"{sentence(f'it needs {error.name}')}; pip install {error.name}") from error
    except BaseException as error:  # PanicException is no Exception
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            sentence(reason if type(error) is UserError else f"{type(error).__name__}: {reason}")
        ) from error


def read_bytes(path, largest=LARGEST_FILE):
    """The bytes of a regular file; ValueError where it is another kind of file or larger, OSError where none is read."""
    handle = os.open(path, READING)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no regular file")
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it is larger than {largest:,} bytes")
    return data


def check_name(name, where):
    """A file's name in another file: UserError where it leads out of the folder."""
    if name in ("", ".", "..") or "\0" in name or name != Path(name).name:
        raise UserError(f"{where} names {shown(name)}, which is no name of a file beside it; {COPY_AGAIN}")
    return name


def check_inside(path):
    """UserError where a file's content lies outside its folder, behind a link; the hub's cache links to its own store."""
    path, real = Path(path), Path(path).resolve()
    folder = path.parent.resolve()
    roots = [folder] + [folder.parent.parent / "blobs"] * (folder.parent.name == "snapshots")
    if not any(real.is_relative_to(root) for root in roots):
        raise UserError(f"{path} is a link to {real}, outside its folder; put a copy in its place, or remove it")


def is_regular(path):
    """Whether a path is a regular file, or leads to one."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _whole(text):
    if len(text) > 40:  # transformers writes 10**30 for "without a limit"
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _finite(text):
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def _check_depth(value):
    """ValueError where lists and objects are nested too deeply to be walked by recursion."""
    level = [value]
    for _ in range(DEEPEST):
        inner = []
        for item in level:
            if isinstance(item, dict):
                inner += [child for child in item.values() if isinstance(child, (dict, list))]
            elif isinstance(item, list):
                inner += [child for child in item if isinstance(child, (dict, list))]
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _is_of(value, kind):
    if isinstance(kind, tuple):
        return any(_is_of(value, alternative) for alternative in kind)
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(key in value for key in _needed(kind))
    if isinstance(kind, list):
        return isinstance(value, list)
    if kind is None:
        return value is None
    if kind in (int, float):
        return type(value) is int or type(value) is kind
    return isinstance(value, kind)


def _needed(kind):
    return [key[:-1] for key in kind if key[-1:] == "!"]


def _described(kind):
    if isinstance(kind, tuple):
        return " or ".join(map(_described, kind))
    if isinstance(kind, range):
        return f"a whole number from {kind.start} to {kind.stop - 1}"
    if isinstance(kind, dict) and _needed(kind):
        return f"an object with {', '.join(_needed(kind))}"
    kind = type(kind) if isinstance(kind, (dict, list)) else kind
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}
    return names.get(kind, "a number" if kind is float else "null")


def shown(value):
    """A value as short text for an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
