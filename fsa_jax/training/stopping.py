"""How a signal ends a run: Ctrl-C, SIGTERM (from schedulers), SIGHUP (from a closed terminal).

After the first signal, the run finishes the current step and saves a checkpoint. Before the first
step and after the last one there is nothing to wait for, and the run ends at once. A second signal
always ends it at once.

The processes of a distributed run must save the same step. jax's preemption service sees to that:
it catches SIGTERM in any process and chooses a step that all of them will reach, their first one at
the earliest. Other signals are passed on to it as SIGTERM.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from fsa_jax.messages import say_now

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: How long a signal waits for code that Python cannot interrupt, such as the compiler.
_PATIENCE_SECONDS = 1.0


class RunStopped(KeyboardInterrupt):
    """A signal has ended a run.

    Attributes:
      signal: the signal.
      saved: step of the last checkpoint of this run; None if there is none.
      trained: whether the run had completed a step.
    """

    def __init__(self, number: int, saved: int | None, trained: bool):
        super().__init__(number, saved, trained)
        self.signal, self.saved, self.trained = signal.Signals(number), saved, trained


class Stop:
    """The stop state of a run in progress.

    Attributes:
      signal: the first signal that arrived, if any.
      stepping: whether the run is between its first and its last step.
      together: whether other processes must stop at the same step.
      saved: step of the last checkpoint of this run, if any.
      trained: whether the run has completed a step.
    """

    def __init__(self):
        self.signal: int | None = None
        self.stepping = self.together = self.trained = False
        self.saved: int | None = None

    def due(self, step: int) -> bool:
        """Whether the run must end after this step. A distributed run must ask after every step."""
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
        say_now(
            f"{name}: saving a checkpoint after this step; a second {name} ends the run at once"
        )
        if self.together and number != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)


_active: Stop | None = None


@contextlib.contextmanager
def catching_signals(at_once: Callable[[RunStopped], None] | None = None) -> Iterator[Stop]:
    """Lets signals end the run in this context, as the module describes.

    A nested context yields the `Stop` of the outer one. Signals can be caught only in the main
    thread; in other threads this context changes nothing.

    Args:
      at_once: ends the process. Python runs its signal handlers between two instructions of the
        main thread, and so not while the compiler or a long step runs. A separate thread then
        calls this function. None: the error is raised as soon as Python can run a handler.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or Stop()
        return
    _active = stop = Stop()
    # A process that was started with nohup ignores SIGHUP, and must go on doing so.
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
    """Whether jax's service handles SIGTERM already, because the processes have been joined."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


@contextlib.contextmanager
def _watched(stop: Stop, at_once: Callable[[RunStopped], None]) -> Iterator[None]:
    """Calls `at_once` from another thread if Python does not get to run its signal handlers."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch():
        count = 0
        while byte := os.read(reader, 1):
            count += byte[0] in _SIGNALS
            waits = stop.stepping or stop.together
            if count == 1 and not waits:
                over.wait(_PATIENCE_SECONDS)
            if over.is_set():
                return
            if count > 1 or (count == 1 and not waits and stop.signal is None):
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
