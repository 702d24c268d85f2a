"""Guards of a run while it trains: stop requests, the watchdog against hangs, crash reports.

Threads watch for signals and hangs, since the main thread may be deep in a kernel or wait for another rank for ever.
"""

import contextlib
import enum
import itertools
import os
import platform
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from config import UserError, as_preset, project_files
from perf.memory import explaining_out_of_memory
from run.folder import locked


class Stop(enum.IntEnum):
    """Reasons for a run to end before its last step. Where ranks have several, the largest counts."""

    NO = 0
    OUT_OF_TIME = 1  # by max_minutes
    SIGUSR1 = 2
    SIGINT = 3
    SIGHUP = 4  # the terminal is closed
    SIGQUIT = 5
    SIGTERM = 6
    FILE = 7  # a file named stop in the run's folder
    SAVE_FAILED = 8

    @property
    def is_requested(self):
        """Whether somebody asks, who may soon kill the process."""
        return Stop.OUT_OF_TIME < self < Stop.SAVE_FAILED

    @property
    def is_signal(self):
        """Whether a signal asks."""
        return Stop.OUT_OF_TIME < self < Stop.FILE


@contextlib.contextmanager
def guarded(cfg, world):
    """Keeps the run's folder to this run, watches for hangs and reports crashes; yields the StopRequests."""
    with (
        StopRequests(cfg.run.out_dir, world) as stop,  # first, so that torchrun's SIGTERM cuts short no report
        crash_reports(cfg.run.out_dir, world, as_preset(cfg)) as write_report,
        Watchdog(cfg.world.timeout_minutes, world, write_report),
        locked(cfg.run.out_dir, world),
        explaining_out_of_memory(cfg, world),
    ):
        yield stop


class StopRequests:
    """A signal or a file named stop ends a run after its step; a second SIGINT ends it at once."""

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGQUIT")
    SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has the first two

    def __init__(self, out_dir, world):
        self.file, self.world, self._looked, self._request = Path(out_dir) / "stop", world, 0.0, Stop.NO

    def __enter__(self):
        self._read, self._write = os.pipe()
        if hasattr(os, "set_blocking"):  # before Python 3.12 Windows lacks it, and does not ask for it
            os.set_blocking(self._write, False)
        self._wakeup_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # With a Python handler, even an empty one, a signal's number comes down the pipe at once.
        ignored = [s for s in self.SIGNALS if s.name == "SIGHUP" and signal.getsignal(s) == signal.SIG_IGN]  # by nohup
        self._handlers = {s: signal.signal(s, lambda *_: None) for s in self.SIGNALS if s not in ignored}
        self._thread = threading.Thread(target=self._listen, daemon=True, name="signals")
        self._thread.start()
        return self

    def __exit__(self, *error):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        os.close(self._write)  # ends the thread
        self._thread.join()
        os.close(self._read)

    def agreed(self, out_of_time, save_failed):
        """The Stop that all ranks agree on, from what each has seen."""
        # The file once a second, since a look may go over a network.
        if self.world.is_main and not self._request and time.monotonic() - self._looked > 1:
            self._looked = time.monotonic()
            if os.path.exists(self.file):  # it takes a disk's errors for no
                self._request = Stop.FILE
        seen = Stop.SAVE_FAILED if save_failed else self._request or (Stop.OUT_OF_TIME if out_of_time else Stop.NO)
        return Stop(int(self.world.worst(seen)))

    def acknowledge(self, stop):
        """Renames the file `stop` to `stopped`, if it was the request, so that the run can continue later."""
        if stop == Stop.FILE and self.world.is_main:
            with contextlib.suppress(OSError):  # its owner may have removed it
                os.replace(self.file, self.file.with_name("stopped"))

    def _listen(self):
        first_sigint = None
        while number := os.read(self._read, 1):
            if number[0] not in self.SIGNALS:
                continue
            name, now = signal.Signals(number[0]).name, time.monotonic()
            if name == "SIGINT":
                first_sigint = first_sigint or now
                if now - first_sigint > 1:  # torchrun may pass on the first a moment after the terminal did
                    print("interrupted twice: stopped at once, without saving", file=sys.stderr, flush=True)
                    os._exit(130)
            if not self._request:
                self._request = Stop[name]
                if self.world.is_main:
                    again = "; a second Ctrl-C stops at once" if name == "SIGINT" else ""
                    print(f"{name}: stopping after this step{again}", flush=True)


class Watchdog:
    """Ends the process when the main thread enters no new phase for too long, and names the rank that hangs.

    All ranks pass the same phases, so the others wait for the rank that has entered fewest.
    """

    def __init__(self, minutes, world, report=lambda text: None):
        self.minutes, self.world, self.report = minutes, world, report  # report(text) writes into the run's folder
        self._closed, self._main = threading.Event(), threading.get_ident()

    def __enter__(self):
        if self.minutes:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def __exit__(self, *error):
        self._closed.set()

    def _watch(self):
        tick = 3 * self.minutes  # seconds, a twentieth: ticks are counted, so that a suspended process has not hung
        seen, ticks, progress = None, 0, self.world.progress
        while not self._closed.wait(tick):
            if progress.n_phases != seen:
                seen, ticks = progress.n_phases, 0
                self._publish(f"last seen at {progress.place}")
            elif seen:  # before the first phase, torch may load and compile for as long as it takes
                ticks += 1
            if ticks >= 20:
                self._end(tick)

    def _publish(self, place):
        if self.world.size > 1:
            with contextlib.suppress(Exception):  # the process that keeps the store may be gone
                self.world.store.set(f"place_{self.world.rank}", f"{self.world.progress.n_phases} {place}")

    def _end(self, tick):
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        ours = {str(path) for path in project_files()}
        frame = next((frame for frame in reversed(stack) if frame.filename in ours), stack[-1])
        place = f"at {self.world.progress.place}, in {frame.name}, {Path(frame.filename).name}:{frame.lineno}"
        self._publish(place)
        self.report("".join([f"no progress, {place}\n", *traceback.format_list(stack)]))
        culprit = f"the run hangs {place}"
        if self.world.size > 1:
            try:
                if self.world.store.add("watchdogs", 1) > 1:  # another rank's watchdog speaks, and ends them all
                    time.sleep(60)
                time.sleep(2 * tick)  # the others' time runs out as well
                culprit = self._culprit()
            except Exception as error:
                culprit = f"rank {self.world.rank} is {place}; the others cannot be asked ({type(error).__name__})"
        text = f"no progress for {self.minutes:g} minutes (timeout_minutes): {culprit}"
        print(f"error: {text}", file=sys.stderr, flush=True)
        os._exit(1)

    def _culprit(self):
        store, places = self.world.store, {}
        for rank in range(self.world.size):
            found = store.get(f"place_{rank}") if store.check([f"place_{rank}"]) else b"0 not heard of"
            count, _, place = found.decode().partition(" ")
            places[rank] = (int(count), place)
        fewest = min(count for count, _ in places.values())
        behind = "; ".join(f"rank {rank} hangs, {place}" for rank, (count, place) in places.items() if count == fewest)
        others = next((place for count, place in places.values() if count > fewest), None)
        return behind + (f"; others wait for it {others}" if others else "; no rank is behind another")


@contextlib.contextmanager
def crash_reports(out_dir, world, settings):
    """Reports crashes, but not users' mistakes, in the run's folder: place, versions, stack, settings (a text).

    Where several ranks crash, the first one's error is shown; the others' errors follow from it, and end in one line.
    Yields the function that writes a report.
    """

    def write(text):
        """Writes a report of this rank; returns the line's end that names it."""
        stem = f"crash_{time.strftime('%Y%m%d_%H%M%S', time.gmtime())}"
        names = (f"{stem}{f'_{i}' if i else ''}_rank_{world.rank}.txt" for i in itertools.count())
        file = next(path for name in names if not os.path.lexists(path := Path(out_dir) / name))
        where = f"rank {world.rank} of {world.size} on {platform.node()}, {world.progress.place}"
        versions = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
        try:
            file.write_text(f"{where}\n{versions}\n\n{text}\n{settings}", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            return f"no report could be written ({error})"
        return f"the report, with settings and versions, is {file}"

    def in_store(function, if_lost=False):
        """function(store); False for one process, if_lost where the process that keeps the store has ended."""
        try:
            return world.size > 1 and function(world.store)
        except RuntimeError:
            return if_lost

    try:
        yield write
    except UserError:  # all ranks may have found it: rank 0 reports it, or this one if rank 0 has not in five seconds
        deadline = time.monotonic() + 5
        while not world.is_main and time.monotonic() < deadline:
            if in_store(lambda store: store.check(["mistake"]), if_lost=True):  # rank 0 reported it, and ended
                raise SystemExit(2) from None
            time.sleep(0.1)
        in_store(lambda store: store.set("mistake", "reported"))
        raise
    except Exception as error:
        if in_store(lambda store: store.check(["mistake"])):  # another rank reports it
            raise SystemExit(2) from error
        written = write("".join(traceback.format_exception(error)))
        if in_store(lambda store: store.add("crashes", 1) > 1):  # errors that follow from the first only confuse
            raise SystemExit(1) from error
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)  # torchrun then shows it as the cause
        print(f"error on rank {world.rank}, {world.progress.place}; {written}", file=sys.stderr, flush=True)
        raise
