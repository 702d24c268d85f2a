"""What guards a run while it trains: stop signals, hangs, crashes.

Signals and hangs are seen by threads, since the main one may be deep in a kernel or wait for another rank for ever.
"""

import contextlib
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

from config import is_users


HERE = str(Path(__file__).resolve().parent)
STOP_FILE = 1000  # as a number beside those of signals


class StopRequests:
    """SIGTERM, SIGINT, SIGUSR1, or a file named stop in the run's folder, ask a run to stop after the step.

    A second SIGINT ends this process at once. `asked` is the signal's number, or STOP_FILE, or 0.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, out_dir, world):
        self.file, self._looked, self._is_main = Path(out_dir) / "stop", 0.0, world.is_main
        self._signal, self._first_sigint = 0, None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            # With a handler of Python's, even one that does nothing, a signal's number comes down the pipe at once.
            self._handlers = {s: signal.signal(s, lambda *_: None) for s in self.SIGNALS}
            self._thread = threading.Thread(target=self._listen, daemon=True, name="signals")
            self._thread.start()
        return self

    def __exit__(self, *error):
        if hasattr(self, "_thread"):
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_fd)
            os.close(self._write)  # ends the thread
            self._thread.join()
            os.close(self._read)

    @property
    def asked(self):
        if self._is_main and not self._signal and time.monotonic() - self._looked > 1:  # a look may go over a network
            self._looked = time.monotonic()
            if self.file.exists():
                self._signal = STOP_FILE
        return self._signal

    def obeyed(self, number):
        """What asked, in words, or none; the file is renamed to `stopped`, so that the run may go on later."""
        if number == STOP_FILE:
            if self._is_main:
                with contextlib.suppress(OSError):  # of who has taken it away again
                    os.replace(self.file, self.file.with_name("stopped"))
            return str(self.file)
        return signal.Signals(number).name if number else None

    def _listen(self):
        while number := os.read(self._read, 1):
            if number[0] not in self.SIGNALS:
                continue
            now = time.monotonic()
            if number[0] == signal.SIGINT:
                if self._first_sigint is None:
                    self._first_sigint = now
                elif now - self._first_sigint > 1:  # torchrun may hand on the first a moment after the terminal did
                    print("interrupted twice: stopped at once, without saving", file=sys.stderr, flush=True)
                    os._exit(130)
            if not self._signal and self._is_main:
                name = signal.Signals(number[0]).name
                again = "; a second Ctrl-C stops at once" if name == "SIGINT" else ""
                print(f"{name}: stopping after this step{again}", flush=True)
            self._signal = self._signal or number[0]


class Watchdog:
    """Ends the process when the main thread has not come to a new place for too long, naming the rank that hangs.

    All ranks pass the same places, so the one that has passed fewest is the one that others wait for.
    """

    def __init__(self, minutes, rank=0, size=1, store=None):
        """store: a key-value store of the process group, where ranks leave their places."""
        self.minutes, self.rank, self.size, self.store = minutes, rank, size, store
        self.report = lambda text: None  # a run sets it, to write the text into its folder
        self.step = 0
        self._now, self._closed, self._main = (0, "the start"), threading.Event(), threading.get_ident()
        if minutes:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def at(self, place):
        """Says where the main thread is."""
        self._now = (self._now[0] + 1, f"step {self.step}, {place}")

    @property
    def place(self):
        return self._now[1]

    def close(self):
        """Ends the watch."""
        self._closed.set()

    def _watch(self):
        tick = 3 * self.minutes  # seconds, a twentieth: ticks are counted, so that a suspended process has not hung
        seen, ticks = None, 0
        while not self._closed.wait(tick):
            if self._now != seen:
                seen, ticks = self._now, 0
                self._tell(seen[0], f"last seen at {seen[1]}")
            elif seen[0]:  # what comes before the first place may take what it takes
                ticks += 1
            if ticks >= 20:
                self._end(tick)

    def _tell(self, count, place):
        if self.store:
            with contextlib.suppress(Exception):  # the process that keeps the store may be gone
                self.store.set(f"place_{self.rank}", f"{count} {place}")

    def _end(self, tick):
        count, place = self._now
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        frame = next((frame for frame in reversed(stack) if frame.filename.startswith(HERE)), stack[-1])
        place = f"at {place}, in {frame.name}, {Path(frame.filename).name}:{frame.lineno}"
        self._tell(count, place)
        self.report("".join([f"no progress, {place}\n", *traceback.format_list(stack)]))
        if self.size == 1:
            culprit = f"the run hangs {place}"
        else:
            try:
                if self.store.add("told", 1) > 1:  # another rank has its say, and ends them all
                    time.sleep(60)
                time.sleep(2 * tick)  # the others' clocks run out as well
                culprit = self._culprit()
            except Exception as error:
                culprit = f"rank {self.rank} is {place}; where others are is not known ({type(error).__name__})"
        print(
            f"error: no progress for {self.minutes:g} minutes (timeout_minutes): {culprit}", file=sys.stderr, flush=True
        )
        os._exit(1)

    def _culprit(self):
        places = {}
        for rank in range(self.size):
            told = self.store.get(f"place_{rank}") if self.store.check([f"place_{rank}"]) else b"0 not heard of"
            count, _, place = told.decode().partition(" ")
            places[rank] = (int(count), place)
        fewest = min(count for count, _ in places.values())
        behind = "; ".join(f"rank {rank} hangs, {place}" for rank, (count, place) in places.items() if count == fewest)
        others = next((place for count, place in places.values() if count > fewest), None)
        return behind + (f"; others wait for it {others}" if others else "; no rank is behind another")


class CrashReports:
    """Writes what ends a run, but for mistakes of its user, into its folder: where, settings, versions, the stack.

    Of several ranks the first one's error is shown; others, which follow from it, end their process with one line.
    """

    def __init__(self, out_dir, world, settings):
        """settings: their text."""
        self.out_dir, self.world, self.settings = Path(out_dir), world, settings

    def write(self, text):
        """Writes a report of this rank; returns its path, none where the disk does not take it."""
        name = f"crash_{time.strftime('%Y%m%d_%H%M%S', time.gmtime())}_rank_{self.world.rank}.txt"
        where = f"rank {self.world.rank} of {self.world.size} on {platform.node()}, {self.world.watchdog.place}"
        versions = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
        try:
            (self.out_dir / name).write_text(f"{where}\n{versions}\n\n{text}\n{self.settings}", encoding="utf-8")
        except OSError:
            return None
        return self.out_dir / name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, stack):
        if not isinstance(error, Exception):
            return
        if is_users(error):
            self._tell_mistake()
            return
        if self._in_store(lambda store: store.check(["mistake"])):  # of another rank, which tells
            raise SystemExit(2)
        report = self.write("".join(traceback.format_exception(error)))
        if self._in_store(lambda store: store.add("crashes", 1) > 1):  # what follows from the first only confuses
            raise SystemExit(1)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)  # torchrun then shows it as the cause
        where = f"rank {self.world.rank}, {self.world.watchdog.place}"
        told = f"; the report, with settings and versions, is {report}" if report else "; no report could be written"
        print(f"error on {where}{told}", file=sys.stderr, flush=True)

    def _tell_mistake(self):
        """Lets one rank tell of a mistake that all may have found: rank 0, if it has within five seconds."""
        deadline = time.monotonic() + 5
        while not self.world.is_main and time.monotonic() < deadline:
            if self._in_store(lambda store: store.check(["mistake"]), if_lost=True):  # rank 0, which has it, has ended
                raise SystemExit(2)
            time.sleep(0.1)
        self._in_store(lambda store: store.set("mistake", "told"))

    def _in_store(self, function, if_lost=False):
        """What function(store) gives; False where there is none, if_lost where the process that keeps it has ended."""
        try:
            return self.world.size > 1 and function(self.world.store)
        except RuntimeError:
            return if_lost
