"""How a signal ends a run: Ctrl-C, SIGTERM (schedulers), SIGHUP (a terminal that was closed).

The first signal lets the step at hand end and the run save a checkpoint; before the first step and
after the last there is nothing to wait for. A second one ends the run at once.

The processes of a distributed run must save the same step. jax has a service for that: it catches
SIGTERM in any process and names a step that all will reach, their first one at the earliest. Other
signals are handed on to it.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from fsa_jax.messages import say_now

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Longer than this nobody waits for code that Python cannot interrupt, such as the compiler.
_PATIENCE_SECONDS = 1.0


class RunStopped(KeyboardInterrupt):
    """A signal has ended a run.

    Attributes:
      signal: its number.
      saved: step of the last checkpoint of this run, None without one.
      trained: whether the run had made steps.
    """

    def __init__(self, number: int, saved: int | None, trained: bool):
        super().__init__(number, saved, trained)
        self.signal, self.saved, self.trained = signal.Signals(number), saved, trained


class Stop:
    """What is known about the end of a run that is going on.

    Attributes:
      signal: the first signal that came, if one did.
      stepping: whether the run is between its first and its last step.
      together: whether other processes must stop at the same step.
      saved: step of the last checkpoint of this run.
      trained: whether the run has made steps.
    """

    def __init__(self):
        self.signal: int | None = None
        self.stepping = self.together = self.trained = False
        self.saved: int | None = None

    def due(self, step: int) -> bool:
        """Whether the run must end after this step. Distributed runs must ask after every step."""
        if not self.together:
            return self.signal is not None
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def stopped(self, number: int | None = None) -> RunStopped:
        """The error that ends the run."""
        number = number or self.signal or signal.SIGTERM
        return RunStopped(number, self.saved, self.trained)

    def _handle(self, number: int, _) -> None:
        first, self.signal = self.signal is None, self.signal or number
        if not first or not (self.stepping or self.together):
            raise self.stopped(number)
        name = signal.Signals(number).name
        say_now(f"{name}: saving a checkpoint after this step; a second {name} ends at once")
        if self.together and number != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)


_active: Stop | None = None


@contextlib.contextmanager
def catching_signals(at_once: Callable[[RunStopped], None] | None = None) -> Iterator[Stop]:
    """Has signals end the run inside as described above; inside another one, gives that one's.

    Python runs its handlers between two instructions of the main thread, which never come while
    the compiler or a long step runs. A program may give `at_once`, which is then called by another
    thread and must end the process; without it the error waits.

    Signals can be caught in the main thread only; elsewhere they do what they did before.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or Stop()
        return
    _active = stop = Stop()
    # Who started us with nohup wants no SIGHUP to end us.
    caught = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    if _service_runs():
        caught.remove(signal.SIGTERM)
    before = {number: signal.signal(number, stop._handle) for number in caught}
    try:
        with _watched(stop, at_once) if at_once else contextlib.nullcontext():
            yield stop
    finally:
        _active = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _service_runs() -> bool:
    """Whether jax's service has taken SIGTERM already: where processes were joined before."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


@contextlib.contextmanager
def _watched(stop: Stop, at_once: Callable[[RunStopped], None]) -> Iterator[None]:
    """Calls `at_once` where the handlers of Python do not come to run."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch():
        came = 0
        while byte := os.read(reader, 1):
            came += byte[0] in _SIGNALS
            waits = stop.stepping or stop.together
            if came == 1 and not waits:
                over.wait(_PATIENCE_SECONDS)
            if over.is_set():
                return
            if came > 1 or (came == 1 and not waits and stop.signal is None):
                at_once(stop.stopped(byte[0]))

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        os.close(writer)  # ends the thread
        thread.join(timeout=5)
        os.close(reader)
