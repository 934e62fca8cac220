"""What benchmarks on a GPU share: compiling in threads, timing both passes, naming the machine."""

import concurrent.futures
import datetime
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fsa_jax.environment import versions

PASSES = ("forward", "backward")
#: Calls before the first measured one.
WARM_UP = 2
#: Length of a round that is long against the clock and against one synchronisation, seconds.
ROUND = 0.1
#: Fewest and most calls of a round.
REPS = (3, 10)

_BEGAN = time.perf_counter()


def say(message: str) -> None:
    """Progress with the seconds since the start, on stderr: stdout is for the result alone."""
    print(f"[{time.perf_counter() - _BEGAN:6.1f} s] {message}", file=sys.stderr, flush=True)


def say_row(row: dict) -> None:
    """A row of results as progress: of measurements the median alone."""
    short = {key: f"{x['ms']:.3f} ms" if isinstance(x, dict) else x for key, x in row.items()}
    say(", ".join(f"{key} {value}" for key, value in short.items()))


def seconds() -> float:
    """Seconds since the start."""
    return round(time.perf_counter() - _BEGAN, 1)


def measure(function: Callable, argument_sets: Sequence[tuple], rounds: int) -> dict:
    """Milliseconds a call, over rounds of calls that are issued together and waited for once.

    Args:
      function: compiled; its results are dropped.
      argument_sets: used in turn, so that no call finds its inputs in a cache that the one before
        it has filled.
      rounds: how many rounds.

    Returns:
      `ms` (median of the rounds), `min_ms`, `spread` ((slowest - fastest) / median), `dispatch_ms`
      (how long the host took to issue a call: where it comes near `ms`, the GPU may have waited for
      the host), `reps` (calls of a round).
    """
    arguments = itertools.cycle(argument_sets)
    for args in itertools.islice(arguments, WARM_UP):
        jax.block_until_ready(function(*args))
    began = time.perf_counter()
    jax.block_until_ready(function(*next(arguments)))
    once = time.perf_counter() - began
    reps = min(max(round(ROUND / once), REPS[0]), REPS[1])
    times, issues = [], []
    for _ in range(rounds):
        result = None
        began = time.perf_counter()
        for args in itertools.islice(arguments, reps):
            result = function(*args)
        issued = time.perf_counter()
        jax.block_until_ready(result)
        times.append(1e3 * (time.perf_counter() - began) / reps)
        issues.append(1e3 * (issued - began) / reps)
    middle = statistics.median(times)
    return {
        "ms": middle,
        "min_ms": min(times),
        "spread": (max(times) - min(times)) / middle,
        "dispatch_ms": statistics.median(issues),
        "reps": reps,
    }


def compile_all[Name: Hashable, Result](
    jobs: Mapping[Name, Callable[[], Result]], threads: int
) -> dict[Name, Result | Exception]:
    """Runs the jobs, each of which compiles something, side by side; a failed one gives its error.

    XLA compiles without the interpreter's lock, so threads are enough.
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


def compile_passes(function: Callable, differentiated: Sequence, others: Sequence = ()) -> dict:
    """Compiles both passes of a function of arrays, each as a function of its own.

    Args:
      function: of all arrays, those that it is differentiated by first.
      differentiated: their shapes and dtypes.
      others: shapes and dtypes of the other arguments.

    Returns:
      `forward`; `residuals`, which gives (out, pullback); `backward`, of a pullback and the
      cotangent of out.
    """

    def residuals(*args):
        first, rest = args[: len(differentiated)], args[len(differentiated) :]
        return jax.vjp(lambda *first: function(*first, *rest), *first)

    def backward(pullback, cotangent):
        return pullback(cotangent)

    lowered = jax.jit(residuals).lower(*differentiated, *others)
    # the tree of this very lowering: that of another one holds other function objects
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)
    out, pullback = shapes
    return {
        "forward": jax.jit(function).lower(*differentiated, *others).compile(),
        "residuals": lowered.compile(),
        "backward": jax.jit(backward).lower(pullback, out).compile(),
    }


def compile_normal(arrays: Sequence):
    """Compiled: standard normal arrays of these shapes and dtypes, from a random key."""

    def make(seed):
        pairs = zip(jax.random.split(seed, len(arrays)), arrays, strict=True)
        return [jax.random.normal(seed, x.shape, x.dtype) for seed, x in pairs]

    return jax.jit(make).lower(jax.random.key(0)).compile()


def measure_passes(
    compiled: dict | Exception, argument_sets: Sequence[tuple], cotangents, rounds: int
) -> tuple[dict, Any]:
    """Times of both passes of `compile_passes`, and (out, gradients) of the first argument set.

    What does not compile or does not run gives {"error": ...} and None: the other measurements of
    the same run are worth having all the same.
    """
    try:
        if isinstance(compiled, Exception):
            raise compiled
        kept = [compiled["residuals"](*args) for args in argument_sets]
        results = kept[0][0], compiled["backward"](kept[0][1], cotangents[0])
        pullbacks = [(pullback, x) for (_, pullback), x in zip(kept, cotangents, strict=True)]
        return {
            "forward": measure(compiled["forward"], argument_sets, rounds),
            "backward": measure(compiled["backward"], pullbacks, rounds),
        }, results
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}, None


@jax.jit
def relative_error(got, wanted):
    """Largest over the arrays of two trees of rms(got - wanted) / rms(wanted)."""

    def rms(x):
        return jnp.sqrt(jnp.mean(jnp.square(x)))

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    wide = [(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in pairs]
    return jnp.max(jnp.stack([rms(x - y) / rms(y) for x, y in wide]))


def markdown(titles: Sequence[str], lines: Sequence[Sequence]) -> str:
    """A table; numbers with two decimals."""
    lines = [titles, ["---"] * len(titles), *lines]
    texts = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in texts)


def describe_machine() -> dict:
    """Date, commit, device, driver and versions: what a number is worth nothing without."""
    folder = Path(__file__).resolve().parent
    # the hash alone, with -dirty where tracked files differ from it
    commit = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = _output(*query).splitlines()
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # a copy of the tree on another machine may know no commit, or an older one
        "commit": os.environ.get("BENCHMARK_COMMIT") or _output(*commit, cwd=folder) or "unknown",
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "driver": driver[0] if driver else "unknown",
        "versions": versions(),
    }


def _output(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()
