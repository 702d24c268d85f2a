"""Standard output that is closed, full or without a reader."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT

SCRIPT = """
import config, sys
from dataclasses import dataclass

@dataclass(frozen=True)
class Settings:
    presets: tuple = ()

def main(cfg):
    for i in range({lines}):
        print("line", i, "{letters}", flush={flush})
    {last}

config.run_script(main, Settings, "", needs_console={needed})
config.end(0)
"""


def printing(redirected, lines=3, flush=True, needed=True, letters="", last="pass", environment=None):
    """(exit code, standard error) of a script whose standard streams a shell redirects; UNREAD: to a pipe without a reader."""
    code = SCRIPT.format(lines=lines, flush=flush, needed=needed, letters=letters, last=last)
    reader, unread = os.pipe()
    os.close(reader)
    command = f'"$0" -c "$1" {redirected.replace("UNREAD", f">&{unread}")}'
    done = subprocess.run(["bash", "-c", command, sys.executable, code],
                          cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, pass_fds=[unread],
                          env={**os.environ, **(environment or {})})  # fmt: skip
    os.close(unread)
    return done.returncode, done.stderr


LINES = pytest.mark.parametrize("lines, flush", [(3, True), (3, False), (5000, True), (5000, False)])


@LINES
def test_output_that_is_lost_ends_a_script_with_code_1_and_a_line_unless_its_reader_has_ended(lines, flush):
    code, told = printing("> /dev/full", lines, flush)
    assert code == 1 and told.startswith("error: the output cannot be written ([Errno 28] No space left on device)")
    assert told.count("\n") == 1
    assert printing("UNREAD", lines, flush) == (1, "")


@LINES
def test_a_script_that_does_not_need_its_output_goes_on_says_so_once_and_ends_well(lines, flush):
    for redirected, why in (("> /dev/full", "No space left on device"), ("UNREAD", "Broken pipe")):
        code, told = printing(redirected, lines, flush, needed=False, last="print('went on', file=sys.stderr)")
        assert code == 0 and told.count("warning: standard output cannot be written (") == 1 and why in told
        assert told.count("the run goes on without") == 1 and "went on" in told and "Traceback" not in told
    assert printing("> /dev/full 2> /dev/full", lines, flush, needed=False)[0] == 0


@pytest.mark.parametrize("needed", [True, False])
def test_closed_streams_are_no_error_and_no_file_takes_their_place(needed):
    opened = "assert open('console.py').fileno() > 2, 'it would take what is printed'"
    for closed in (">&-", "<&-", ">&- <&-"):
        assert printing(closed, needed=needed, last=opened) == (0, "")
    assert printing("2>&-", needed=needed, last=opened)[0] == 0


def test_a_letter_that_the_terminal_lacks_is_escaped():
    for letters, encoding in (("\\udcff", "utf-8"), ("é", "ascii")):
        assert printing("> /dev/null", letters=letters, environment={"PYTHONIOENCODING": encoding}) == (0, "")


def test_a_broken_pipe_that_is_not_the_outputs_is_an_error_as_any_other():
    code, told = printing("> /dev/null", last="raise BrokenPipeError('of a service')")
    assert code == 1 and "Traceback" in told and "of a service" in told


def test_a_mistake_that_nobody_reads_still_ends_with_code_2():
    assert printing("2> /dev/full", last="raise config.UserError('wrong')")[0] == 2


def test_a_rank_that_is_no_number_keeps_no_mistake_from_being_told():
    code, told = printing("", last="raise config.UserError('wrong')", environment={"RANK": "x"})
    assert (code, told) == (2, "error: wrong\n")
