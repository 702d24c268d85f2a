"""How settings reach a script: class defaults < preset files, left to right < --key=value.

Each file of the project declares its settings in a frozen dataclass whose name ends in `Config`; the comment that ends
a field's line is its help text. A script composes the classes it needs and reads them as cfg.model.n_layer:

    @dataclass(frozen=True)
    class Settings:
        model: ModelConfig
        run: RunConfig = only("out_dir", "seed")  # of RunConfig, just these are settings of this script
        presets: tuple = ()  # filled with the preset files of the command
        files: tuple = ()  # where a script has it, with the .json files of the command
        given: frozenset = ...  # likewise, with the names that presets or the command line set

A preset is a Python file of plain assignments, run in a namespace of its own. Wrong values in combination are found by
the classes themselves: __post_init__ raises a UserError, a line for each mistake.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import runpy
import sys
import time
import traceback
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = ("text", "run", "perf", "interop", "config")  # of the project's source, beside its root


class UserError(ValueError):
    """A mistake that the user can mend; its message has the value, the rule and the remedy. Ends a command with code 2.

    Every other exception is a bug, and keeps its traceback.
    """


# What nanoGPT's users will type, and what it is called here.
NANOGPT_NAMES = {
    "max_iters": "max_steps", "lr_decay_iters": "lr_decay_steps", "warmup_iters": "warmup_steps",
    "batch_size": "micro_batch_size", "gradient_accumulation_steps": "batch_tokens", "eval_iters": "eval_tokens",
    "dataset": "data_dir", "dtype": "precision", "wandb_log": "wandb", "decay_lr": "schedule", "start": "prompt",
    "always_save_checkpoint": "save_interval", "backend": "device",
}  # fmt: skip


def only(*names):
    """A section of a script's settings that takes just these settings of its class."""
    return dataclasses.field(metadata={"only": names})


def load(settings_type, argv):
    """Settings from the arguments of a command: preset files and --key=value, and .json files where a script reads any.

    Raises UserError that lists every mistake of the command, a line each.
    """
    owners = settings_of(settings_type)
    words = [arg for arg in argv if not arg.startswith("--")]
    names = {field.name for field in dataclasses.fields(settings_type)}
    files = [word for word in words if "files" in names and word.endswith(".json")]
    presets = [word for word in words if word not in files]
    values, failed, errors = {}, set(), []
    for path in presets:
        for name, value in _run_preset(path, errors).items():
            if name in owners:
                _take(values, name, value, owners, f"{path}: {name}", failed, errors)
            elif name not in (everywhere := _settings_everywhere()):
                errors.append(f"{path}: {name} is not a setting{_did_you_mean(name, everywhere)}")
    for arg in argv:
        if not arg.startswith("--"):
            continue
        name, equals, text = arg[2:].partition("=")
        if name in owners and (equals or bool in _kinds(owners[name][1].type)):
            value = _from_text(text, owners[name][1].type) if equals else True  # a bare --profile switches it on
            _take(values, name, value, owners, f"--{name}", failed, errors)
        elif name in owners:
            errors.append(f"--{name} has no value; settings are written --{name}=value")
        elif name in (everywhere := _settings_everywhere()) and name not in NANOGPT_NAMES:
            errors.append(
                f"--{name} is a setting of {everywhere[name]}, not of this script{_did_you_mean(name, owners)}"
            )
        else:
            errors.append(f"--{name} is not a setting{_did_you_mean(name, owners)}")

    sections = {}
    for section in _sections(settings_type):
        own = {name: value for name, value in values.items() if owners[name][0] == section.name}
        if section.name in failed:
            continue
        try:
            sections[section.name] = section.type(**own)
        except ValueError as error:
            errors.append(str(error))
    if sections.keys() == {section.name for section in _sections(settings_type)}:
        try:
            others = {"presets": tuple(presets), "files": tuple(files), "given": frozenset(values)}
            cfg = settings_type(**sections, **{name: others[name] for name in others.keys() & names})
        except ValueError as error:  # of settings of several classes together
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))
    return cfg


def preset_value(presets, name):
    """What preset files by themselves set a name to, the last one first; None where they do not."""
    return next((names[name] for path in reversed(presets) if name in (names := _run_preset(path, []))), None)


def settings_of(settings_type):
    """{name: (section, field)} of every setting that a script takes, in order."""
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
    told = comments(type(cfg))
    return "".join(f"{name} = {value!r}  # {told[name]}\n" for name, value in as_dict(cfg).items())


def help_text(cfg, doc):
    """Every setting of a script with its value and its comment, below the script's docstring."""
    lines = [doc.strip(), "", "Settings, written --name=value or, in a preset file, name = value:"]
    told, last = comments(type(cfg)), None
    for name, (section, _) in settings_of(type(cfg)).items():
        if section != last:
            lines.append(f"\n  {section}")
            last = section
        lines.append(f"    {f'--{name}={_text(as_dict(cfg)[name])}':<36} {told[name]}")
    return "\n".join(lines)


def project_files(root=ROOT):
    """The project's Python files, tests apart."""
    return [path for folder in (".", *FOLDERS) for path in sorted((root / folder).glob("*.py"))]


def run_script(main, settings_type, doc):
    """Runs main(cfg) with the settings of the command line; ends the process with code 2 and one line on wrong input.

    Any other error keeps its traceback, and ends it with code 1.
    """
    try:
        asks_for_help = not {"-h", "--help"}.isdisjoint(sys.argv[1:])
        cfg = load(settings_type, [arg for arg in sys.argv[1:] if arg not in ("-h", "--help")])
        if asks_for_help:
            print(help_text(cfg, doc))
        else:
            main(cfg)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _end(130)
    except SystemExit as ending:  # of a rank whose error another one tells
        _end(ending.code)
    except BrokenPipeError:  # the reader of our output has gone (`| head`): nobody is left to tell
        os._exit(1)
    except Exception as error:
        if isinstance(error, UserError):
            _exit_with(str(error))
        traceback.print_exc()
        _end(1)


def _exit_with(message):
    # Under torchrun every rank meets the same wrong input: rank 0 speaks and torchrun ends the others while they wait.
    # A rank that is still there after the wait has an error of its own.
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
        known = [f"config/{p.name}" for p in sorted((ROOT / "config").glob("[!_]*.py"))]
        what = "no such preset file" if path.endswith(".py") else "neither a preset file (.py) nor --name=value"
        errors.append(f"{path}: {what}{_did_you_mean(path, known)}")
        return {}
    try:
        names = runpy.run_path(str(file))
    except Exception as error:  # whatever a person's own file raises
        where, line = _place(error, path)
        what = error.msg if isinstance(error, SyntaxError) else error
        errors.append(f"{where}, line {line}: {type(error).__name__}: {what}")
        return {}
    scratch = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, scratch)}


def _place(error, path):
    """(file, line) of a preset's mistake: where its own assignments stand, be it in a preset that it starts from."""
    if isinstance(error, SyntaxError):
        where, line = error.filename or path, error.lineno or 1
    else:
        in_files = [f for f in traceback.extract_tb(error.__traceback__) if f.name == "<module>"]
        where, line = (in_files[-1].filename, in_files[-1].lineno) if in_files else (path, 1)
    where = Path(where).resolve()
    return (where.relative_to(ROOT) if where.is_relative_to(ROOT) else where), line


# ---- one value


def _take(values, name, value, owners, where, failed, errors):
    section, field = owners[name]
    try:
        values[name] = _checked(value, field.type)
    except (TypeError, OverflowError):  # the latter of whole numbers that no float holds
        failed.add(section)
        choices = [choice for kind in _kinds(field.type) for choice in typing.get_args(kind)]
        hint = _did_you_mean(value, choices) if isinstance(value, str) else ""
        errors.append(f"{where} must be {_described(field.type)}, not {value!r}{hint}")


def _kinds(type_):
    """The alternatives of a setting's type, the plainest last: text is read as str only where nothing else fits."""
    kinds = typing.get_args(type_) if typing.get_origin(type_) in (types.UnionType, typing.Union) else (type_,)
    return sorted(kinds, key=lambda kind: (kind is str, kind is float))


def _from_text(text, type_):
    """The value that a command line's text stands for, or the text itself where it fits no kind of the type."""
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
    """The value as its setting's type; TypeError where it is of another one."""
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


def _did_you_mean(name, names):
    known = NANOGPT_NAMES.get(name)
    close = [known] if known in names else difflib.get_close_matches(name.lower(), list(names), 1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


# ---- the classes


def _sections(settings_type):
    return [f for f in dataclasses.fields(settings_type) if dataclasses.is_dataclass(f.type)]


def comments(settings_type):
    """{name: the comment that ends its line in the class} of every setting of a script."""
    found = {}
    for section in _sections(settings_type):
        found.update(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(section.type), re.MULTILINE))
    bare = settings_of(settings_type).keys() - found.keys()
    assert not bare, f"the settings {', '.join(sorted(bare))} need a comment at the end of their line: it is their help"
    return found


@functools.cache
def _settings_everywhere():
    """{name: file} of the settings that any script of the project declares, read without importing them."""
    found = {}
    for path in project_files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                found.update(
                    {
                        line.target.id: path.relative_to(ROOT).as_posix()
                        for line in node.body
                        if isinstance(line, ast.AnnAssign)
                    }
                )
    return found
