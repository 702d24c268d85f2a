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

A number's type may name its range, as in `n_layer: Count = 12`. A class that checks values in combination extends
__post_init__, which raises a UserError, a line for each mistake. A preset is a Python file of plain assignments, run in
its own namespace.
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

from console import ConsoleError, end, open_console, report

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = ("text", "run", "perf", "interop", "config")  # source folders below ROOT


class UserError(ValueError):
    """A user's mistake: value, rule and remedy. A command ends with exit code 2; other exceptions are bugs.

    Each argument becomes one line, whatever stands in the values that it quotes.
    """

    def __init__(self, *lines):
        super().__init__(*(visible(line) for line in lines))

    def __str__(self):
        return "\n".join(self.args)


def visible(text):
    """The text with escapes for what cannot be printed, such as line breaks, terminal codes and lone surrogates."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of a number: the rule in words, and a function of the number that tells whether it holds."""

    rule: str
    holds: typing.Callable


COUNTABLE = Range("at most 2**53", lambda n: n <= 2**53)  # larger numbers are not exact in floats, nor meant
Count = typing.Annotated[int, Range("at least 1", lambda n: n >= 1), COUNTABLE]
Whole = typing.Annotated[int, Range("at least 0", lambda n: n >= 0)]
Positive = typing.Annotated[float, Range("above 0", lambda x: x > 0)]
NotNegative = typing.Annotated[float, Range("at least 0", lambda x: x >= 0)]
Fraction = typing.Annotated[float, Range("above 0 and below 1", lambda x: 0 < x < 1)]
UpToOne = typing.Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)]
Rate = typing.Annotated[float, Range("at least 0 and at most 1", lambda x: 0 <= x <= 1)]
Share = typing.Annotated[float, Range("at least 0 and below 1", lambda x: 0 <= x < 1)]


class Config:
    """Base of the classes that declare settings; UserError where a number is outside the range of its type."""

    def __post_init__(self):
        wrong = []
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), _alternatives(field.type)
            or_none = ", or none" if types.NoneType in kinds else ""
            limits = [limit for kind in kinds for limit in getattr(kind, "__metadata__", ()) if value is not None]
            wrong += [f"{field.name} is {value}; it must be {x.rule}{or_none}" for x in limits if not x.holds(value)]
        if wrong:
            raise UserError(*wrong)


# nanoGPT's names that are not near ours: our name, or where the meaning differs, a sentence that begins with it.
NANOGPT_NAMES = {
    "max_iters": "max_steps",
    "batch_size": "micro_batch_size is the sequences of one forward pass; batch_tokens sets the size of a step",
    "gradient_accumulation_steps": "batch_tokens sets the size of a step; gradient accumulation is derived from it",
    "eval_iters": "eval_tokens is the number of tokens to evaluate on",
    "eval_only": "max_steps=0 evaluates and stops",
    "dataset": "data_dir is the folder that prepare.py wrote, as in --data_dir=data/shakespeare",
    "dtype": "precision is auto, fp32, bf16 or fp16",
    "decay_lr": "schedule=constant keeps the learning rate",
    "start": "prompt",
    "always_save_checkpoint": "save_interval is the number of steps between checkpoints",
    "wandb": "log_to=wandb logs to Weights & Biases",
    "wandb_log": "log_to=wandb logs to Weights & Biases",
    "backend": "device=cuda communicates by nccl, device=cpu by gloo",
}


def only(*names):
    """A section of a script's settings that takes only these settings of its class."""
    return dataclasses.field(metadata={"only": names})


def load(settings_type, argv):
    """A script's settings from a command's arguments; UserError with a line for each mistake."""
    command = _Command(settings_type, argv)
    cfg = command.compose()
    if command.errors:
        raise UserError(*command.errors)
    return cfg


class _Command:
    """The values that a command sets, read argument by argument, and its mistakes so far."""

    def __init__(self, settings_type, argv):
        self.type, self.settings, self.values, self.errors = settings_type, settings_of(settings_type), {}, []
        self.fields = {field.name for field in dataclasses.fields(settings_type)}
        self.wrong_sections = set()  # not built, so that a wrong value is reported once
        words = [arg for arg in argv if not arg.startswith("--")]
        self.presets = tuple(word for word in words if word.endswith(".py"))
        self.files = tuple(word for word in words if word.endswith(".json") and "files" in self.fields)
        if others := [word for word in words if word not in self.presets + self.files]:
            self._refuse_words(others)
        for path in self.presets:  # first, so that --key=value wins wherever it stands
            for name, value in (self._attempt(_run_preset, path) or {}).items():
                if name in self.settings:
                    self._set(name, value, f"{path}: {name}")
                elif name not in (everywhere := _settings_everywhere()):
                    self.errors.append(f"{path}: {name} is not a setting{_did_you_mean(name, everywhere)}")
        for arg in argv:
            if arg.startswith("--"):
                self._read_argument(arg[2:])

    def compose(self):
        """The script's settings; None where values are wrong by themselves or together."""
        sections = {}
        for section in _sections(self.type):
            own = {name: value for name, value in self.values.items() if self.settings[name][0] == section.name}
            if section.name not in self.wrong_sections:
                sections[section.name] = self._attempt(section.type, **own)
        if None in sections.values() or self.wrong_sections:
            return None
        extra = {"presets": self.presets, "files": self.files, "given": frozenset(self.values)}
        return self._attempt(self.type, **sections, **{name: extra[name] for name in extra.keys() & self.fields})

    def _attempt(self, function, *args, **names):
        """The function's result; None where it raises a UserError, which joins the command's."""
        try:
            return function(*args, **names)
        except UserError as error:
            self.errors += error.args

    def _read_argument(self, arg):
        name, equals, text = arg.partition("=")
        if name in self.settings:
            type_ = self.settings[name][1].type
            if equals or bool in _kinds(type_):
                self._set(name, _from_text(text, type_) if equals else True, f"--{name}")  # a bare --profile: true
            else:
                self.errors.append(f"--{name} has no value; settings are written --{name}=value")
        else:
            file = None if name in NANOGPT_NAMES else _settings_everywhere().get(name)
            what = f"a setting of {file}, not of this script" if file else "not a setting"
            self.errors.append(f"--{name} is {what}{_did_you_mean(name, self.settings)}")

    def _set(self, name, value, where):
        section, field = self.settings[name]
        try:
            self.values[name] = value if value == field.default == "" else checked(value, field.type)
        except (TypeError, OverflowError):  # OverflowError: an int beyond the range of floats
            self.wrong_sections.add(section)
            hint = _did_you_mean(value, _choices(field.type)) if isinstance(value, str) else ""
            self.errors.append(f"{where} must be {_described(field.type)}, not {value!r}{hint}")

    def _refuse_words(self, words):
        hint = _did_you_mean(words[0], _known_presets())
        if "input" in self.settings:
            self.wrong_sections.add(self.settings["input"][0])
            pattern = Path(words[0]).parent / f"*{Path(words[0]).suffix}"
            hint = f"; name your text by --input={words[0]}, or several files by a quoted glob: --input='{pattern}'"
        more = f" and {len(words) - 3} more" if len(words) > 3 else ""
        self.errors.append(f"{' '.join(words[:3])}{more}: neither a preset file (.py) nor --name=value{hint}")


def preset_value(presets, name):
    """The value that preset files give a name, the last file first; None where none sets it."""
    return next((names[name] for path in reversed(presets) if name in (names := _run_preset(path))), None)


def settings_of(settings_type):
    """Every setting that a script takes, in order, as {name: (section, field)}."""
    found = {}
    for section in _sections(settings_type):
        for field in dataclasses.fields(section.type):
            if field.name in section.metadata.get("only", (field.name,)):
                assert field.name not in found, f"two classes declare {field.name}"
                found[field.name] = (section.name, field)
    return found


def as_dict(cfg):
    """The settings of a script as one flat {name: value}."""
    return {name: getattr(getattr(cfg, section), name) for name, (section, _) in settings_of(type(cfg)).items()}


def as_preset(cfg):
    """The settings of a script as the text of a preset file that reproduces them."""
    return preset_text(as_dict(cfg), comments(type(cfg)))


def preset_text(values, texts):
    """The text of a preset file that sets values, {name: value}; texts: {name: comment}, for some of them."""
    texts = {name: f"  # {text}" for name, text in texts.items()}
    return "".join(f"{name} = {value!r}{texts.get(name, '')}\n" for name, value in values.items())


def help_text(settings_type, argv, doc):
    """A script's docstring and settings, each with its value under these arguments, comment and choices."""
    command = _Command(settings_type, argv)  # its mistakes, --help among them, are not looked at
    texts, width = comments(settings_type), min(120, shutil.get_terminal_size((120, 24)).columns)
    if doc is None:  # python -OO drops it
        doc = ast.get_docstring(ast.parse(inspect.getsource(sys.modules[settings_type.__module__])), clean=False)
    lines, last = [doc.strip(), "", "Settings, written --name=value or, in a preset file, name = value:"], None
    for name, (section, field) in command.settings.items():
        if section != last:
            lines.append(f"\n  {section}")
            last = section
        value = command.values.get(name, field.default)
        shown = str(value).lower() if value is None or isinstance(value, bool) else str(value)
        shown = ",".join(value) if isinstance(value, tuple) else shown
        choices = _choices(field.type) + ["none"] * (types.NoneType in _kinds(field.type))
        text = f"{texts[name]} [{', '.join(choices)}]" if _choices(field.type) else texts[name]
        head = f"    {f'--{name}={shown}':<31} "
        lines += textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * 36, break_on_hyphens=False)
    return "\n".join(lines)


def project_files(root=ROOT):
    """The project's Python files, without tests."""
    return [path for folder in (".", *FOLDERS) for path in sorted((root / folder).glob("*.py"))]


def run_script(main, settings_type, doc, needs_console=True):
    """Runs main(cfg) with the command line's settings, or prints the help; ends the process after an error.

    needs_console: whether output that cannot be written is an error, too, as it is where the output is what was wanted.
    """
    argv = sys.argv[1:]
    open_console(needs_console)
    try:
        if "-h" in argv or "--help" in argv:
            print(help_text(settings_type, argv, doc))
        else:
            main(load(settings_type, argv))
    except KeyboardInterrupt:
        report("interrupted")
        end(130)
    except SystemExit as ending:  # another rank reports the error
        end(ending.code)
    except ConsoleError as fault:
        end(1, fault)
    except UserError as error:
        # Under torchrun every rank meets the same wrong input: rank 0 prints it and torchrun ends the others while they
        # wait. A rank that still runs after the wait has an error that rank 0 does not have.
        rank = os.environ.get("RANK", "")
        rank = int(rank) if rank.isdecimal() else 0  # another text may be what is wrong
        time.sleep(5 if rank else 0)
        for line in error.args:
            report(f"error: {f'rank {rank}: ' if rank else ''}{line}")
        end(2)
    except Exception:
        report(traceback.format_exc())
        end(1)


# ---- presets


def _run_preset(path):
    """{name: value} of a preset file, without its scratch names."""
    file = next((p for p in (Path(path), ROOT / path) if p.is_file()), None)
    if file is None:
        raise UserError(f"{path}: no such preset file{_did_you_mean(path, _known_presets())}")
    try:
        names = runpy.run_path(str(file))
    except SyntaxError as error:
        where = f"{error.filename or path}, line {error.lineno or 1}"
        raise UserError(f"{where}: {type(error).__name__}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        # The innermost top-level line, which may be in an imported preset; none where the file cannot be read.
        lines = [f for f in traceback.extract_tb(error.__traceback__) if f.name == "<module>"]
        where = f"{lines[-1].filename}, line {lines[-1].lineno}" if lines else path
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    scratch = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, scratch)}


def _known_presets():
    return [f"config/{path.name}" for path in sorted((ROOT / "config").glob("[!_]*.py"))]


# ---- one value


def _kinds(type_):
    """The alternatives of a setting's type, numbers without their range."""
    return [kind.__origin__ if hasattr(kind, "__metadata__") else kind for kind in _alternatives(type_)]


def _choices(type_):
    """The texts that a setting may have, where its type lists them."""
    return [c for kind in _kinds(type_) if typing.get_origin(kind) is typing.Literal for c in typing.get_args(kind)]


def _alternatives(type_):
    return typing.get_args(type_) if typing.get_origin(type_) in (types.UnionType, typing.Union) else (type_,)


def _from_text(text, type_):
    """The value of a command line's text, or the text itself where it fits no alternative of the type."""
    kinds, word = _kinds(type_), text.lower()
    if types.NoneType in kinds and word in (("none",) if str in kinds else ("none", "auto")):
        return None
    if bool in kinds and word in ("true", "false"):
        return word == "true"
    if tuple in kinds:
        return tuple(name.strip() for name in text.split(",") if name.strip())
    for number in (int, float) if int in kinds or float in kinds else ():
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def checked(value, type_):
    """The value converted to its setting's type; TypeError where it has another."""
    for kind in _kinds(type_):
        if kind in (types.NoneType, bool, str, dict):
            if isinstance(value, kind) and value not in ("", {}):
                return value
        elif kind is tuple:
            if isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value):
                return tuple(value)
        elif kind in (int, float):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if is_number and (kind is float or value == int(value)):
                return kind(value)
        elif value in typing.get_args(kind):
            return value
    raise TypeError


def _described(type_):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    names[dict] = "{...}, in a preset"
    names[tuple] = "names with commas between them"
    return " or ".join(names.get(kind) or "one of " + ", ".join(typing.get_args(kind)) for kind in _kinds(type_))


def _did_you_mean(text, names):
    """A hint: our name for nanoGPT's, or the names that start with the text, or the nearest one."""
    hint = NANOGPT_NAMES.get(text, "")
    if re.split(r"\W", hint)[0] in names:
        return f"; {hint}" if " " in hint else f"; did you mean {hint}?"
    starting = [name for name in names if text and name.lower().startswith(text.lower())]
    close = starting[:3] or difflib.get_close_matches(text.lower(), names, 1, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


# ---- the classes


def _sections(settings_type):
    return [f for f in dataclasses.fields(settings_type) if dataclasses.is_dataclass(f.type)]


@functools.cache
def comments(settings_type):
    """{name: trailing comment} for every setting of a script."""
    found = {}
    for section in _sections(settings_type):
        for class_ in filter(dataclasses.is_dataclass, section.type.__mro__):  # settings that it inherits, too
            found.update(re.findall(r"^    (\w+): .*?  # (.*)$", _source(class_), re.MULTILINE))
    bare = settings_of(settings_type).keys() - found.keys()
    assert not bare, f"settings without a trailing comment, their help text: {', '.join(sorted(bare))}"
    return found


def _source(class_):
    """The source of a class; inspect.getsource would parse the whole file, at every start of a run."""
    file = inspect.getsource(sys.modules[class_.__module__])
    return re.search(rf"^class {class_.__name__}\b.*?(?=^\S|\Z)", file, re.MULTILINE | re.DOTALL)[0]


@functools.cache
def _settings_everywhere():
    """{name: file} of all settings that the project declares, read without importing its files."""
    return {
        name: path.relative_to(ROOT).as_posix()
        for path in project_files()
        for body in re.findall(
            r"^class \w+Config\b.*\n((?:\n|    .*\n)*)", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        for name in re.findall(r"^    (\w+): .*  # ", body, re.MULTILINE)
    }
