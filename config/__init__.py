"""How settings reach a script: class defaults < preset files, left to right < --key=value.

Each file of the project declares its settings in a frozen dataclass whose name ends in `Config`; each field's trailing
comment is its help text. A script composes the classes it needs and reads them as cfg.model.n_layer:

    @dataclass(frozen=True)
    class Settings:
        model: ModelConfig
        run: RunConfig = only("out_dir", "seed")  # the script takes only these two settings of RunConfig
        presets: tuple = ()  # filled with the command's preset files
        files: tuple = ()  # optional: filled with the command's .json files
        given: frozenset = ...  # optional: filled with the names that presets or the command line set

A preset is a Python file of plain assignments, run in its own namespace. Each class checks its values in combination:
its __post_init__ raises a UserError, a line for each mistake.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import runpy
import shutil
import sys
import textwrap
import time
import traceback
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = ("text", "run", "perf", "interop", "config")  # source folders below ROOT


class UserError(ValueError):
    """A user's mistake; its message has the value, the rule and the remedy. It ends a command with exit code 2.

    Every other exception is a bug and keeps its traceback.
    """


# nanoGPT's name for a setting: ours, and where the meaning differs, a sentence.
NANOGPT_NAMES = {
    "max_iters": ("max_steps", ""),
    "lr_decay_iters": ("lr_decay_steps", ""),
    "warmup_iters": ("warmup_steps", ""),
    "batch_size": (
        "micro_batch_size",
        "micro_batch_size is the sequences of one forward pass; batch_tokens sets the size of a step",
    ),
    "gradient_accumulation_steps": (
        "batch_tokens",
        "batch_tokens sets the size of a step, and gradient accumulation is derived from it",
    ),
    "eval_iters": ("eval_tokens", "eval_tokens is the number of tokens to evaluate on"),
    "dataset": ("data_dir", "data_dir is the folder that prepare.py wrote"),
    "dtype": ("precision", "precision is auto, fp32, bf16 or fp16"),
    "wandb_log": ("wandb", ""),
    "decay_lr": ("schedule", "schedule=constant keeps the learning rate"),
    "start": ("prompt", ""),
    "always_save_checkpoint": ("save_interval", "save_interval is the number of steps between checkpoints"),
    "backend": ("device", "the backend follows from the device: nccl on GPUs, gloo on CPUs"),
}


def only(*names):
    """A section of a script's settings that takes only these settings of its class."""
    return dataclasses.field(metadata={"only": names})


def load(settings_type, argv):
    """Settings from a command's arguments: preset files, --key=value, and .json files where the script reads them.

    Raises UserError that lists every mistake of the command, one a line.
    """
    given, errors = _Given(settings_of(settings_type)), []
    presets, files = _files_in(argv, settings_type, errors)
    for path in presets:
        _read_preset(path, given, errors)
    for arg in argv:
        if arg.startswith("--"):
            _read_argument(arg[2:], given, errors)
    extra = {"presets": tuple(presets), "files": tuple(files), "given": frozenset(given.values)}
    cfg = _compose(settings_type, given, extra, errors)
    if errors:
        raise UserError("\n".join(errors))
    return cfg


@dataclasses.dataclass
class _Given:
    """The values that a command sets; sections with a wrong value are not built."""

    settings: dict  # {name: (section, field)} of the script
    values: dict = dataclasses.field(default_factory=dict)
    wrong_sections: set = dataclasses.field(default_factory=set)

    def set(self, name, value, where, errors):
        section, field = self.settings[name]
        try:
            self.values[name] = _checked(value, field.type)
        except (TypeError, OverflowError):  # OverflowError: an int beyond the range of floats
            self.wrong_sections.add(section)
            hint = _nearest_choice(value, _choices(field.type)) if isinstance(value, str) else ""
            errors.append(f"{where} must be {_described(field.type)}, not {value!r}{hint}")


def _files_in(argv, settings_type, errors):
    """(presets, .json files) among a command's arguments; anything else without -- is a mistake."""
    words = [arg for arg in argv if not arg.startswith("--")]
    takes_json = "files" in {field.name for field in dataclasses.fields(settings_type)}
    files = [word for word in words if takes_json and word.endswith(".json")]
    presets = [word for word in words if word.endswith(".py")]
    if others := [word for word in words if word not in files and word not in presets]:
        errors.append(_stray_words(others, argv, settings_of(settings_type)))
    return presets, files


def _stray_words(words, argv, settings):
    shown = " ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
    what = f"{shown}: neither a preset file (.py) nor --name=value"
    if "input" not in settings:
        return f"{what}{_did_you_mean(words[0], _known_presets())}"
    if len(words) > 1 or any(arg.startswith("--input=") for arg in argv):
        return f"{what}; name several files by a glob in quotes, as in --input='{_glob_of(words)}'"
    return f"{what}; name your text by --input={words[0]}"


def _glob_of(words):
    """A glob for files that the shell may have expanded from one: their common folder and ending."""
    folder = os.path.commonpath([os.path.dirname(word) or "." for word in words])
    endings = {os.path.splitext(word)[1] for word in words}
    return os.path.normpath(os.path.join(folder, "*" + (endings.pop() if len(endings) == 1 else "")))


def _read_preset(path, given, errors):
    for name, value in _run_preset(path, errors).items():
        if name in given.settings:
            given.set(name, value, f"{path}: {name}", errors)
        elif name not in (everywhere := _settings_everywhere()):
            errors.append(f"{path}: {name} is not a setting{_did_you_mean(name, everywhere)}")


def _read_argument(arg, given, errors):
    name, equals, text = arg.partition("=")
    if name not in given.settings:
        errors.append(f"--{name} {_not_taken(name, given.settings)}")
        return
    type_ = given.settings[name][1].type
    if equals:
        given.set(name, _from_text(text, type_), f"--{name}", errors)
    elif bool in _kinds(type_):
        given.set(name, True, f"--{name}", errors)  # a bare --profile switches it on
    else:
        errors.append(f"--{name} has no value; settings are written --{name}=value")


def _not_taken(name, settings):
    everywhere = _settings_everywhere()
    if name in everywhere and name not in NANOGPT_NAMES:
        return f"is a setting of {everywhere[name]}, not of this script{_did_you_mean(name, settings)}"
    return f"is not a setting{_did_you_mean(name, settings)}"


def _compose(settings_type, given, extra, errors):
    """The script's settings; None, and errors extended, where values don't fit each other."""
    sections, taken = {}, {field.name for field in dataclasses.fields(settings_type)}
    for section in _sections(settings_type):
        own = {name: value for name, value in given.values.items() if given.settings[name][0] == section.name}
        if section.name not in given.wrong_sections:
            with _collecting(errors):
                sections[section.name] = section.type(**own)
    if len(sections) == len(_sections(settings_type)):
        with _collecting(errors):
            return settings_type(**sections, **{name: value for name, value in extra.items() if name in taken})
    return None


@contextlib.contextmanager
def _collecting(errors):
    try:
        yield
    except UserError as error:
        errors.append(str(error))


def preset_value(presets, name):
    """The value that preset files give a name, the last file first; None where none sets it."""
    return next((names[name] for path in reversed(presets) if name in (names := _run_preset(path, []))), None)


def settings_of(settings_type):
    """Every setting that a script takes, in order, as {name: (section, field)}."""
    found = {}
    for section in _sections(settings_type):
        for field in dataclasses.fields(section.type):
            if field.name in section.metadata.get("only", (field.name,)):
                assert field.name not in found, (
                    f"{field.name} is declared twice: in {found[field.name][0]} and {section.name}"
                )
                found[field.name] = (section.name, field)
    return found


def as_dict(cfg):
    """The settings of a script as one flat {name: value}."""
    return {name: getattr(getattr(cfg, section), name) for name, (section, _) in settings_of(type(cfg)).items()}


def as_preset(cfg):
    """The settings of a script as the text of a preset file that reproduces them."""
    texts = comments(type(cfg))
    return "".join(f"{name} = {value!r}  # {texts[name]}\n" for name, value in as_dict(cfg).items())


def help_text(values, settings_type, doc):
    """Every setting of a script with its value, its comment and its choices, below the script's docstring."""
    texts, width = comments(settings_type), min(120, shutil.get_terminal_size((120, 24)).columns)
    lines = [doc.strip(), "", "Settings, written --name=value or, in a preset file, name = value:"]
    last = None
    for name, (section, field) in settings_of(settings_type).items():
        if section != last:
            lines.append(f"\n  {section}")
            last = section
        choices = ", ".join([*_choices(field.type), *["none"] * (types.NoneType in _kinds(field.type))])
        text = f"{texts[name]} [{choices}]" if _choices(field.type) else texts[name]
        head = f"--{name}={_text(values[name])}"
        head, first = (f"{head:<31} ", []) if len(head) < 32 else (" " * 32, [f"    {head}"])
        lines += first + textwrap.wrap(
            text, width, initial_indent=f"    {head}", subsequent_indent=" " * 36, break_on_hyphens=False
        )
    return "\n".join(lines)


def _values_for_help(settings_type, argv):
    """{name: value} to show in the help: of the command's presets and arguments where they are sound, else defaults."""
    given = _Given(settings_of(settings_type))
    for arg in argv:
        if not arg.startswith("-") and arg.endswith(".py"):
            _read_preset(arg, given, [])
    for arg in argv:
        if arg.startswith("--"):
            _read_argument(arg[2:], given, [])
    return {name: given.values.get(name, field.default) for name, (_, field) in given.settings.items()}


def project_files(root=ROOT):
    """The project's Python files, without tests."""
    return [path for folder in (".", *FOLDERS) for path in sorted((root / folder).glob("*.py"))]


def run_script(main, settings_type, doc):
    """Runs main(cfg) with the settings of the command line, or prints the help and does nothing else.

    A UserError ends the process with a line for each mistake and exit code 2, any other error with its traceback and 1.
    """
    argv = sys.argv[1:]
    try:
        if "-h" in argv or "--help" in argv:
            print(help_text(_values_for_help(settings_type, argv), settings_type, doc))
        else:
            main(load(settings_type, argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _end(130)
    except SystemExit as ending:  # another rank reports the error
        _end(ending.code)
    except BrokenPipeError:  # the reader of our output has ended (`| head`): nothing more can be printed
        os._exit(1)
    except UserError as error:
        _exit_with(str(error))
    except Exception:
        traceback.print_exc()
        _end(1)


def _exit_with(message):
    # Under torchrun every rank meets the same wrong input: rank 0 prints it and torchrun ends the others while they
    # wait. A rank that still runs after the wait has an error that rank 0 does not have.
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        time.sleep(5)
    for line in message.splitlines():
        print(f"error: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr)
    _end(2)


def _end(code):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: a process group left open by an error can hang or crash the interpreter's shutdown


# ---- presets


def _run_preset(path, errors):
    file = next((p for p in (Path(path), ROOT / path) if p.is_file()), None)
    if file is None:
        errors.append(f"{path}: no such preset file{_did_you_mean(path, _known_presets())}")
        return {}
    try:
        names = runpy.run_path(str(file))
    except Exception as error:  # a user's file may raise anything
        where, line = _source_of(error, path)
        what = error.msg if isinstance(error, SyntaxError) else error
        errors.append(f"{where}, line {line}: {type(error).__name__}: {what}")
        return {}
    scratch = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, scratch)}


def _known_presets():
    return [f"config/{path.name}" for path in sorted((ROOT / "config").glob("[!_]*.py"))]


def _source_of(error, path):
    """(file, line) of a preset's mistake: the innermost top-level line, which may be in an imported preset."""
    if isinstance(error, SyntaxError):
        where, line = error.filename or path, error.lineno or 1
    else:
        in_files = [f for f in traceback.extract_tb(error.__traceback__) if f.name == "<module>"]
        where, line = (in_files[-1].filename, in_files[-1].lineno) if in_files else (path, 1)
    where = Path(where).resolve()
    return (where.relative_to(ROOT) if where.is_relative_to(ROOT) else where), line


# ---- one value


def _kinds(type_):
    """The alternatives of a setting's type, float and str last: text is read as str only where nothing else fits."""
    kinds = typing.get_args(type_) if typing.get_origin(type_) in (types.UnionType, typing.Union) else (type_,)
    return sorted(kinds, key=lambda kind: (kind is str, kind is float))


def _from_text(text, type_):
    """The value of a command line's text, or the text itself where it fits no alternative of the type."""
    for kind in _kinds(type_):
        if kind is types.NoneType and text.lower() in (("none",) if str in _kinds(type_) else ("none", "auto")):
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return int(text) if kind is int and re.fullmatch(r"[-+]?[\d_]+", text) else float(text)
            except ValueError:
                pass
    return text


def _checked(value, type_):
    """The value converted to its setting's type; TypeError where it has another."""
    for kind in _kinds(type_):
        if typing.get_origin(kind) is typing.Literal:
            if value in typing.get_args(kind) and not isinstance(value, bool):
                return value
        elif kind in (types.NoneType, bool, str):
            if isinstance(value, kind) and value != "":
                return value
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            if kind is float or value == int(value):
                return kind(value)
    raise TypeError


def _described(type_):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    return " or ".join(
        "one of " + ", ".join(typing.get_args(k)) if typing.get_origin(k) is typing.Literal else names[k]
        for k in sorted(_kinds(type_), key=lambda k: k is types.NoneType)
    )


def _text(value):
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _choices(type_):
    return [c for kind in _kinds(type_) if typing.get_origin(kind) is typing.Literal for c in typing.get_args(kind)]


def _nearest_choice(text, choices):
    """A hint with the choices that start with the text, else with the nearest one."""
    starting = [choice for choice in choices if text and choice.lower().startswith(text.lower())]
    close = starting or difflib.get_close_matches(text.lower(), choices, 1, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _did_you_mean(name, names):
    ours, meaning = NANOGPT_NAMES.get(name, (None, ""))
    close = [ours] if ours in names else difflib.get_close_matches(name.lower(), list(names), 1, cutoff=0.7)
    if not close:
        return ""
    return f"; did you mean {close[0]}?" + (
        f" {meaning[0].upper()}{meaning[1:]}" if close == [ours] and meaning else ""
    )


# ---- the classes


def _sections(settings_type):
    return [f for f in dataclasses.fields(settings_type) if dataclasses.is_dataclass(f.type)]


def comments(settings_type):
    """{name: trailing comment} for every setting of a script."""
    found = {}
    for section in _sections(settings_type):
        found.update(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(section.type), re.MULTILINE))
    bare = settings_of(settings_type).keys() - found.keys()
    assert not bare, f"the settings {', '.join(sorted(bare))} need a trailing comment, their help text"
    return found


@functools.cache
def _settings_everywhere():
    """{name: file} of all settings that the project declares, read without importing its files."""
    found = {}
    for path in project_files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                names = [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
                found |= dict.fromkeys(names, path.relative_to(ROOT).as_posix())
    return found
