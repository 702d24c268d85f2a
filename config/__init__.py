"""Settings: class defaults < preset files, left to right < --key=value.

Each file of the project declares its settings in a frozen dataclass whose name ends in `Config`; the comment at the end
of a field's line is its help text. A script composes the classes it needs and reads them as cfg.model.n_layer:

    @dataclass(frozen=True)
    class Settings:
        model: ModelConfig
        run: RunConfig = only("out_dir", "seed")  # these alone are settings of this script
        presets: tuple = ()  # the command's preset files
        files: tuple = ()  # where a script has it, the command's .json files
        given: frozenset = ...  # likewise, the names that presets or the command line set

A preset is a Python file of plain assignments, run in a namespace of its own. The classes themselves refuse wrong
values: __post_init__ raises a UserError, a line for each mistake.
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
import sys
import textwrap
import time
import traceback
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = ("text", "run", "perf", "interop", "config")  # folders of the project's source, beside its root


class UserError(ValueError):
    """A mistake that the user can mend; its message has the value, the rule and the remedy. Ends a command with code 2.

    Every other exception is a bug, and keeps its traceback.
    """


# nanoGPT's names for settings, and what they are called here; a sentence where the two differ in meaning.
NANOGPT_NAMES = {
    "max_iters": "max_steps", "lr_decay_iters": "lr_decay_steps", "warmup_iters": "warmup_steps",
    "eval_iters": "eval_tokens", "dtype": "precision", "wandb_log": "wandb", "decay_lr": "schedule", "start": "prompt",
    "always_save_checkpoint": "save_interval", "backend": "device", "dataset": "data_dir",
    "batch_size": "batch_tokens sets the tokens of a step, micro_batch_size the sequences of one forward pass",
    "gradient_accumulation_steps": "it follows from batch_tokens, the tokens of a step, and micro_batch_size",
}  # fmt: skip


def only(*names):
    """A section of a script's settings with some of its class's settings alone."""
    return dataclasses.field(metadata={"only": names})


def load(settings_type, argv):
    """Settings from the arguments of a command: preset files and --key=value, and .json files where a script reads any.

    Raises UserError that lists every mistake of the command, a line each.
    """
    taken = {field.name for field in dataclasses.fields(settings_type)}
    words = [arg for arg in argv if not arg.startswith("--")]
    files = [word for word in words if "files" in taken and word.endswith(".json")]
    presets = [word for word in words if word.endswith(".py")]
    values = _Values(settings_of(settings_type))
    if strays := [word for word in words if word not in (*files, *presets)]:
        values.errors.append(_stray_words(strays, values.owners))
    for path in presets:
        values.take_preset(path)
    for arg in argv:
        if arg.startswith("--"):
            values.take_argument(arg)
    extra = {"presets": tuple(presets), "files": tuple(files), "given": frozenset(values.by_name)}
    cfg = values.build(settings_type, {name: extra[name] for name in extra.keys() & taken})
    if values.errors:
        raise UserError("\n".join(values.errors))
    return cfg


def _stray_words(words, owners):
    """The error about arguments that are neither presets nor settings."""
    known = [f"config/{path.name}" for path in sorted((ROOT / "config").glob("[!_]*.py"))]
    if len(words) == 1:
        (word,) = words
        remedy = f"; text files are named by --input={word}" if "input" in owners else ""
        return f"{word}: neither a preset file (.py) nor --name=value{_did_you_mean(word, known) or remedy}"
    remedy = "; several text files are named by a quoted glob, as in --input='texts/*.txt'" if "input" in owners else ""
    return f"{words[0]}, {words[1]}{' ...' * (len(words) > 2)}: neither preset files (.py) nor --name=value{remedy}"


class _Values:
    """The values that a command sets, and its mistakes."""

    def __init__(self, owners):
        """owners: {name: (section, field)} of the script's settings."""
        self.owners, self.by_name, self.errors, self.failed_sections = owners, {}, [], set()

    def take_preset(self, path):
        """Takes the script's own settings from a preset file; the others must be some script's."""
        for name, value in _run_preset(path, self.errors).items():
            if name in self.owners:
                self._take(name, value, f"{path}: {name}")
            elif name not in (everywhere := _settings_everywhere()):
                self.errors.append(f"{path}: {name} is not a setting{_did_you_mean(name, everywhere)}")

    def take_argument(self, arg):
        """Takes --name=value, or --name for what is true or false."""
        name, equals, text = arg[2:].partition("=")
        if name in self.owners:
            type_ = self.owners[name][1].type
            if equals:
                self._take(name, _from_text(text, type_), f"--{name}")
            elif bool in _kinds(type_):
                self._take(name, True, f"--{name}")
            else:
                self.errors.append(f"--{name} has no value; settings are written --{name}=value")
        elif name in (everywhere := _settings_everywhere()) and name not in NANOGPT_NAMES:
            self.errors.append(
                f"--{name} is a setting of {everywhere[name]}, not of this script{_did_you_mean(name, self.owners)}"
            )
        else:
            self.errors.append(f"--{name} is not a setting{_did_you_mean(name, self.owners)}")

    def _take(self, name, value, where):
        section, field = self.owners[name]
        try:
            self.by_name[name] = _checked(value, field.type)
        except (TypeError, OverflowError):  # OverflowError: a whole number that no float holds
            self.failed_sections.add(section)
            choices = [choice for kind in _kinds(field.type) for choice in typing.get_args(kind)]
            hint = _did_you_mean(value, choices) if isinstance(value, str) else ""
            self.errors.append(f"{where} must be {_described(field.type)}, not {value!r}{hint}")

    def build(self, settings_type, extra):
        """The script's settings; None where a section is wrong."""
        sections = {}
        for section in _sections(settings_type):
            if section.name not in self.failed_sections:
                own = {name: v for name, v in self.by_name.items() if self.owners[name][0] == section.name}
                with self._collecting_errors():
                    sections[section.name] = section.type(**own)
        if len(sections) == len(_sections(settings_type)):
            with self._collecting_errors():  # mistakes of several sections together
                return settings_type(**sections, **extra)

    @contextlib.contextmanager
    def _collecting_errors(self):
        try:
            yield
        except ValueError as error:
            self.errors.append(str(error))


def preset_value(presets, name):
    """The value that preset files give a name, the last file first; None where they do not set it."""
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
    notes = comments(type(cfg))
    return "".join(f"{name} = {value!r}  # {notes[name]}\n" for name, value in as_dict(cfg).items())


def help_text(settings_type, argv, doc):
    """Every setting of a script with its value, its comment and its choices, below the script's docstring.

    Values are the command's where they are right by themselves, else the defaults.
    """
    values = _Values(settings_of(settings_type))
    for arg in argv:
        if arg.startswith("--"):
            values.take_argument(arg)
        elif arg.endswith(".py"):
            values.take_preset(arg)
    lines = [doc.strip(), "", "Settings, written --name=value or, in a preset file, name = value:"]
    notes, last = comments(settings_type), None
    for name, (section, field) in values.owners.items():
        if section != last:
            lines.append(f"\n  {section}")
            last = section
        value = values.by_name.get(name, field.default)
        lines.append(f"    {f'--{name}={_text(value)}':<36} {notes[name]}")
        choices = [choice for kind in _kinds(field.type) for choice in typing.get_args(kind)]
        if choices and not all(f"{choice}:" in notes[name] for choice in choices):
            indent = " " * 41
            lines.append(
                textwrap.fill("one of " + ", ".join(choices), 120, initial_indent=indent, subsequent_indent=indent)
            )
    return "\n".join(lines)


def project_files(root=ROOT):
    """The project's Python files, tests apart."""
    return [path for folder in (".", *FOLDERS) for path in sorted((root / folder).glob("*.py"))]


def run_script(main, settings_type, doc):
    """Runs main(cfg) with the settings of the command line; ends the process with code 2 and one line on wrong input.

    Any other error keeps its traceback, and ends it with code 1.
    """
    try:
        if {"-h", "--help"}.isdisjoint(sys.argv[1:]):
            main(load(settings_type, sys.argv[1:]))
        else:
            print(help_text(settings_type, sys.argv[1:], doc))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _end(130)
    except SystemExit as ending:  # another rank reports the error
        _end(ending.code)
    except BrokenPipeError:  # our output's reader has ended, as in `| head`
        os._exit(1)
    except Exception as error:
        if isinstance(error, UserError):
            _exit_with(str(error))
        traceback.print_exc()
        _end(1)


def _exit_with(message):
    # Under torchrun every rank meets the same wrong input: rank 0 prints it, and torchrun ends the others meanwhile.
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
        errors.append(f"{path}: no such preset file{_did_you_mean(path, known)}")
        return {}
    try:
        names = runpy.run_path(str(file))
    except Exception as error:  # a user's file may raise anything
        where, line = _place(error, path)
        what = error.msg if isinstance(error, SyntaxError) else error
        errors.append(f"{where}, line {line}: {type(error).__name__}: {what}")
        return {}
    scratch = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, scratch)}


def _place(error, path):
    """(file, line) of a preset's mistake, be it in a preset that it imports."""
    if isinstance(error, SyntaxError):
        where, line = error.filename or path, error.lineno or 1
    else:
        in_files = [f for f in traceback.extract_tb(error.__traceback__) if f.name == "<module>"]
        where, line = (in_files[-1].filename, in_files[-1].lineno) if in_files else (path, 1)
    where = Path(where).resolve()
    return (where.relative_to(ROOT) if where.is_relative_to(ROOT) else where), line


# ---- one value


def _kinds(type_):
    """The alternatives in a setting's type, str last: text is a str only where nothing else fits."""
    kinds = typing.get_args(type_) if typing.get_origin(type_) in (types.UnionType, typing.Union) else (type_,)
    return sorted(kinds, key=lambda kind: (kind is str, kind is float))


def _from_text(text, type_):
    """The value of a command line's text, or the text itself where it fits no alternative."""
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
    """The value in its setting's type; TypeError where it has another."""
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
    """A hint at what somebody meant by a name: nanoGPT's word for it, choices that start with it, or the nearest."""
    known = NANOGPT_NAMES.get(name)
    if known and known.split()[0] in (*names, "it"):
        return f"; did you mean {known}?" if known in names else f"; {known}"
    starts = [other for other in names if other.startswith(f"{name.lower()}-")]
    close = starts or difflib.get_close_matches(name.lower(), list(names), 1, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


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
