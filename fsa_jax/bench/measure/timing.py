"""Compiling in threads, timing, and describing the machine, for all benchmarks."""

import concurrent.futures
import datetime
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fsa_jax.versions import commit, output, versions

#: The number of calls before the first measured one.
WARM_UP = 2
#: The target length of a round in seconds, long compared with the clock's resolution and with one
#: synchronisation.
ROUND = 0.1
#: The fewest and the most calls of a round.
REPS = (3, 10)
#: The number of calls whose device time the profiler records.
PROFILED = 3

_BEGAN = time.perf_counter()


def say(message: str) -> None:
    """Reports progress, with the seconds since the start, on stderr; stdout is for the result."""
    print(f"[{time.perf_counter() - _BEGAN:6.1f} s] {message}", file=sys.stderr, flush=True)


def seconds() -> float:
    """Seconds since the start."""
    return round(time.perf_counter() - _BEGAN, 1)


class Clock:
    """Times a program in ms per call, over rounds of calls that are issued before one wait.

    Rivals are timed in turns, one round of each after another: a GPU that warms up slows down,
    which would favour the program that is timed first.
    """

    def __init__(self, function: Callable):
        self.function, self.calls, self.used = function, 0, 0
        self.times: list[float] = []
        self.issues: list[float] = []
        self.profiled: dict[str, Any] = {}

    def _next(self, argument_sets: Sequence[tuple]) -> tuple:
        """Cycles through the sets, so that no call finds its inputs cached by the one before."""
        self.used += 1
        return argument_sets[self.used % len(argument_sets)]

    def warm_up(self, argument_sets: Sequence[tuple]) -> None:
        """Makes warm-up calls before a round; the first time, also sets the calls of a round."""
        for _ in range(WARM_UP if not self.calls else 1):
            jax.block_until_ready(self.function(*self._next(argument_sets)))
        if not self.calls:
            began = time.perf_counter()
            jax.block_until_ready(self.function(*self._next(argument_sets)))
            once = time.perf_counter() - began
            self.calls = min(max(round(ROUND / once), REPS[0]), REPS[1])

    def round(self, argument_sets: Sequence[tuple]) -> None:
        """Times a round; the sets may be remade for each round, in the same order."""
        result = None
        began = time.perf_counter()
        for _ in range(self.calls):
            result = self.function(*self._next(argument_sets))
        issued = time.perf_counter()
        jax.block_until_ready(result)
        self.times.append(1e3 * (time.perf_counter() - began) / self.calls)
        self.issues.append(1e3 * (issued - began) / self.calls)

    def profile(self, argument_sets: Sequence[tuple]) -> None:
        """Profiles a few calls with jax's profiler."""
        arguments = [self._next(argument_sets) for _ in range(PROFILED)]
        self.profiled = profile(self.function, arguments)

    def row(self) -> dict[str, Any]:
        """The measurements.

        Returns:
          `samples_ms` (ms per call, for each round), `ms` (their median), `spread` ((slowest -
          fastest) / median), `dispatch_ms` (how long the host took to issue a call: if it is close
          to `ms`, the device may have waited for the host), `device_ms` (how long the device was
          busy, by jax's profiler; None if it recorded nothing), `kernels_ms` (the same by kernel,
          longest first), `calls` (the number of calls of a round).
        """
        middle = statistics.median(self.times)
        return {
            "samples_ms": self.times,
            "ms": middle,
            "spread": (max(self.times) - min(self.times)) / middle,
            "dispatch_ms": statistics.median(self.issues),
            **self.profiled,
            "calls": self.calls,
        }


def measure(function: Callable, argument_sets: Sequence[tuple], rounds: int) -> dict[str, Any]:
    """`Clock.row` of a function without rivals, or whose rivals do not fit in memory beside it."""
    clock = Clock(function)
    clock.warm_up(argument_sets)
    for _ in range(rounds):
        clock.round(argument_sets)
    clock.profile(argument_sets)
    return clock.row()


def profile(function: Callable, argument_sets: Sequence[tuple]) -> dict[str, Any]:
    """The ms per call that a GPU is busy, in total and by kernel; None without a GPU."""
    spans = {}
    if jax.devices()[0].platform == "gpu":
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for args in argument_sets:
                    jax.block_until_ready(function(*args))
            for trace in Path(folder).rglob("*.xplane.pb"):
                for name, span in _spans(trace):
                    spans.setdefault(name, []).append(span)
    if not spans:
        return {"device_ms": None, "kernels_ms": None}
    each = 1e6 * len(argument_sets)
    by_kernel = {name: busy_ns(found) / each for name, found in spans.items()}
    return {
        "device_ms": busy_ns(itertools.chain.from_iterable(spans.values())) / each,
        "kernels_ms": dict(sorted(by_kernel.items(), key=lambda item: -item[1])),
    }


def _spans(trace: Path) -> Iterator[tuple[str, tuple[float, float]]]:
    """The name and (start, end) in ns of each GPU event in a trace of jax's profiler."""
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        yield event.name, (event.start_ns, event.start_ns + event.duration_ns)


def busy_ns(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def compile_all[Name: Hashable, Result](
    jobs: Mapping[Name, Callable[[], Result]], threads: int
) -> dict[Name, Result | Exception]:
    """Runs compilation jobs in parallel; the result of a failed job is its exception.

    XLA releases the interpreter's lock while it compiles, so threads suffice.
    """
    done = {}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        names = {pool.submit(job): name for name, job in jobs.items()}
        for future in concurrent.futures.as_completed(names):
            name, error = names[future], future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            done[name] = error if error is not None else future.result()
            outcome = "compiled" if error is None else f"failed, {error!r:.200}:"
            say(f"{outcome} {name} ({len(done)} of {len(jobs)})")
    return done


def compile_passes(
    function: Callable,
    differentiated: Sequence,
    others: Sequence = (),
    names: Sequence[str] = ("forward", "residuals", "backward"),
) -> dict:
    """Compiles the forward and backward passes of a function as separate programs.

    Args:
      function: a function of all arrays, of which the differentiated ones come first.
      differentiated: shapes and dtypes of the arrays to differentiate with respect to.
      others: shapes and dtypes of the other arguments.
      names: which of the programs to compile.

    Returns:
      `forward`; `residuals`, which returns (out, pullback); and `backward`, which takes a pullback
      and the cotangent of out.
    """

    def residuals(*args):
        first, rest = args[: len(differentiated)], args[len(differentiated) :]
        return jax.vjp(lambda *first: function(*first, *rest), *first)

    def backward(pullback, cotangent):
        return pullback(cotangent)

    with jax.numpy_dtype_promotion("standard"):  # needed by jax.nn.dot_product_attention
        found = {}
        if "forward" in names:
            found["forward"] = jax.jit(function).lower(*differentiated, *others).compile()
        if "backward" not in names:
            return found
        lowered = jax.jit(residuals).lower(*differentiated, *others)
        # The tree must come from this lowering: another one holds different function objects.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)
        out, pullback = shapes
        return found | {
            "residuals": lowered.compile(),
            "backward": jax.jit(backward).lower(pullback, out).compile(),
        }


def peak_bytes(compiled) -> int | None:
    """The peak memory of a compiled program, as estimated by the compiler."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def describe_error(error: Exception) -> str:
    """Formats an error as one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def describe_machine() -> dict:
    """The date, commit, device, driver and versions, without which no measurement has meaning."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = output(*query).splitlines()
    clocks = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    clocks = output("nvidia-smi", f"--query-gpu={clocks}", "--format=csv").splitlines()
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # a copy of the tree on another machine may have no commit, or an older one
        "commit": os.environ.get("BENCHMARK_COMMIT") or commit(),
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "driver": driver[0] if driver else "unknown",
        "clocks": "; ".join(clocks) or "unknown",
        "versions": versions(),
    }
