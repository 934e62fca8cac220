"""`fsa-jax tune`: measures tile sizes of the kernels on this GPU and writes a table of the fastest.

One kernel is tuned at a time, while all others use the heuristic tiles. Every candidate that fits
in shared memory is compiled, its results are compared with those of the heuristic tile, and the
pass that contains the kernel is timed. A candidate replaces the heuristic tile if its slowest round
is faster than the fastest round of the heuristic tile. `fsa_jax/pallas/tile_tables.py` defines
which calls use an entry.
"""

import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsa_jax import NSAConfig
from fsa_jax.arguments import checks
from fsa_jax.bench import cases
from fsa_jax.bench.cases import Case, Subject
from fsa_jax.bench.measure import correctness, timing
from fsa_jax.bench.measure.correctness import RIGHT_CHOICES
from fsa_jax.messages import naming
from fsa_jax.pallas import support, tile_tables
from fsa_jax.pallas.block_attention.plan import SelectedTuning, make_plan
from fsa_jax.pallas.block_selection import plan as select_plan
from fsa_jax.pallas.range_attention import passes as ranges
from fsa_jax.pallas.range_attention.passes import RangeTile
from fsa_jax.pallas.support import supported
from fsa_jax.pallas.tile_config import Tile, shared_memory
from fsa_jax.pallas.tile_tables import Key

#: The tile sizes, warps and stages of the candidates.
ROWS, KEYS, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (2, 3)
#: Pairs of the block size and the number of blocks per query.
BLOCKS = ((64, 16), (128, 8))
#: The number of key heads, and the default groups, widths, length and configurations.
_SIZES = (
    4,
    (4, 1, 8, 2, 16),
    (128,),
    32768,
    [NSAConfig(block_size=block_size, topk=topk) for block_size, topk in BLOCKS],
)
_TINY_SIZES = (2, (2,), (16,), 200, [cases.TINY])
_RANGES = {
    "range_forward": "forward",
    "range_query_gradient": "backward",
    "range_key_gradient": "backward",
}
_FUNCTIONS = {"compressed": "compressed_attention", "window": "sliding_window_attention"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Measures tile sizes of the kernels on this GPU and writes a table of the fastest.

    `FSA_JAX_TUNING=FILE` makes the kernels use the table; a table in `fsa_jax/pallas/devices/` is
    used on every device of that kind. Without an NVIDIA GPU the same code runs with interpreted
    kernels, on tiny sizes unless others are given. Such a run is not a measurement: the file says
    so, and the kernels do not use it.

    Attributes:
      out: the file to write.
      groups: numbers of query heads per key head to measure, the most important first. Default:
        4 1 8 2 16; without a GPU 2.
      widths: head widths of queries, keys and values. Default: 128; without a GPU 16.
      length: sequence length in tokens. Default: 32768; without a GPU 200.
      minutes: no new kernel starts after this many minutes; 0: no limit.
      rounds: number of timed rounds, of 3 to 10 calls each.
      threads: number of candidates compiled in parallel.
    """

    out: Path = Path("runs/tuning.json")
    groups: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    length: int | None = None
    minutes: float = 20.0
    rounds: int = 5
    threads: int = 8

    def __post_init__(self):
        for name in ("rounds", "threads"):
            checks.size(name, getattr(self, name))
        if self.length is not None:
            checks.size("length", self.length)
        for name in ("groups", "widths"):
            for size in getattr(self, name):
                checks.size(name, size)
        if self.minutes < 0:
            raise ValueError(f"minutes must not be negative, got {self.minutes}")


@dataclasses.dataclass(frozen=True)
class _Job:
    """A kernel of a case: the function that runs it, its key, and its tiles, heuristic first."""

    case: Case
    function: str
    method: str
    name: str
    key: Key
    tiles: tuple[Tile, ...]


def tune(config: TuneConfig) -> Path:
    """Measures all kernels and returns the path of the file written."""
    interpret = support.device_reason() is not None
    began = time.perf_counter()
    results: dict[str, Any] = {"what": tile_tables.WHAT} | timing.describe_machine()
    results |= {
        "measurement": not interpret,
        "arguments": dataclasses.asdict(config) | {"out": config.out.name},
        "left_out": [],
        "tiles": [],
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    inputs = functools.lru_cache(1)(functools.partial(_inputs, interpret))
    for job in jobs(config, interpret):
        if config.minutes and time.perf_counter() - began > 60 * config.minutes:
            results["left_out"].append(dataclasses.asdict(job.key))
        else:
            results["tiles"].append(_measure(job, config, inputs(job.case), interpret))
        results["seconds"] = round(time.perf_counter() - began, 1)
        with naming(config.out):
            config.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return config.out


def jobs(config: TuneConfig, interpret: bool) -> list[_Job]:
    """The kernels to measure, in order."""
    key_heads, groups, widths, length, configs = _TINY_SIZES if interpret else _SIZES
    found = [
        Case(
            length=config.length or length,
            heads=key_heads * group,
            kv_heads=key_heads,
            width=width,
            config=sparse,
        )
        for width, group, sparse in itertools.product(
            config.widths or widths, config.groups or groups, configs
        )
    ]
    listed = [job for case in found for job in _jobs_of(case)]
    # kernels that do not depend on the blocks are measured once
    once = {job.key: job for job in reversed(listed)}
    return [job for job in listed if once[job.key] is job]


def _jobs_of(case: Case) -> list[_Job]:
    shapes, capability = case.shapes(), support.planned_capability()
    query, key, value = (shapes[name] for name in ("query", "key", "value"))
    group, block_size = case.group, case.config.block_size
    tuning, topk = SelectedTuning(), case.config.topk
    plan = supported(make_plan(tuning, query, key, value, topk, block_size, capability))
    found = []
    plain = [
        Tile(rows=rows, num_warps=warps, num_stages=stages)
        for rows, warps, stages in itertools.product(ROWS, WARPS, STAGES)
        if rows >= group
    ]

    def add(function, method, name, kernel, arrays, heuristic, others, block=None):
        tiles = tuple(dict.fromkeys([heuristic, *others]))
        query, key, value = arrays
        of = tile_tables.key_of(kernel, query, key, value, block)
        found.append(_Job(case, function, method, name, of, tiles))

    for kernel, (method, name, field) in tile_tables.SELECTED.items():
        heuristic, arrays = getattr(plan, field), (query, key, value)
        add("selected_attention", method, name, kernel, arrays, heuristic, plain, block_size)
    for branch, function in _FUNCTIONS.items():
        arrays = (query, key, value)
        if branch == "compressed":
            arrays = (query, shapes["compressed_key"], shapes["compressed_value"])
        heuristics = supported(ranges.make_plan(*arrays, capability))
        for kernel, name in _RANGES.items():
            short = kernel.removeprefix("range_")
            tiles = [
                RangeTile(rows=rows, keys=keys, num_warps=warps, num_stages=stages)
                for rows, keys, warps, stages in itertools.product(ROWS, KEYS, WARPS, STAGES)
                if rows >= group
            ]
            fits = shared_memory(capability)
            tiles = [t for t in tiles if ranges.shared_bytes(short, t, *arrays) <= fits]
            add(function, "triton", name, kernel, arrays, getattr(heuristics, short), tiles)
    compressed = shapes["compressed_key"]
    scores = supported(select_plan.make_plan(query, compressed, case.config, capability=capability))
    heuristic = Tile(rows=scores.rows, num_warps=scores.num_warps, num_stages=scores.num_stages)
    arrays = (query, compressed, compressed)
    add("select_blocks", "triton", "forward", "score", arrays, heuristic, plain)
    return found


def _inputs(interpret: bool, case: Case) -> list[dict[str, jax.Array]]:
    implementation = "triton_interpret" if interpret else "triton"
    with tile_tables.using({}):
        seeds = range(1 if interpret else 2)
        return [cases.make_inputs(case, seed, implementation) for seed in seeds]


def subject_of(job: _Job, interpret: bool) -> Subject:
    """The function that runs the kernel."""
    implementation = "triton_interpret" if interpret else "triton"
    found = cases.subjects(job.case, implementation, (job.function,))
    return next(subject for subject in found if subject.method == job.method)


def compile_with(job: _Job, subject: Subject, tile: Tile) -> dict[str, Any]:
    """Compiles the pass of a job with a tile."""
    shapes = job.case.shapes()
    with tile_tables.using({job.key: tile}):
        return timing.compile_passes(
            # a new function, since jax caches traces of the same function with other tiles
            lambda *args: subject.call(*args),
            [shapes[name] for name in subject.differentiated],
            [shapes[name] for name in subject.others],
            names=("forward",) if job.name == "forward" else ("residuals", "backward"),
        )


def _measure(job: _Job, config: TuneConfig, sets, interpret: bool) -> dict[str, Any]:
    """The entry of a kernel: the chosen tile, and the measurements of every candidate."""
    subject = subject_of(job, interpret)
    tiles = job.tiles[:2] if interpret else job.tiles
    todo = {tile: functools.partial(compile_with, job, subject, tile) for tile in tiles}
    programs = timing.compile_all(todo, config.threads)
    names = (*subject.differentiated, *subject.others)
    sets = [tuple(x[name] for name in names) for x in sets]
    wanted, candidates = None, []
    for tile in tiles:
        found: dict[str, Any] = {"tile": dataclasses.asdict(tile)}
        candidates.append(found)
        try:
            if isinstance(program := programs[tile], Exception):
                raise program
            run, arguments = _call_of(job, program, sets)
            got = run(*arguments[0])
        except Exception as error:
            if wanted is None:
                raise  # there is no comparison without the heuristic tile
            found["error"] = timing.describe_error(error)
            continue
        wanted = got if wanted is None else wanted
        if (wrong := difference(got, wanted)) is not None:
            found["error"] = f"WRONG RESULT, dropped: {wrong}"
            timing.say(f"{job.key} {tile}: {found['error']}")
            continue
        found |= {
            name: value
            for name, value in timing.measure(run, arguments, config.rounds).items()
            if name in ("samples_ms", "ms", "spread", "device_ms")
        }
    best = fastest(candidates)
    timing.say(f"{job.key}: {tiles[best]}, {candidates[best]['ms']:.3f} ms")
    return tile_tables.entry(job.key, tiles[best]) | {"chosen": best, "candidates": candidates}


def _call_of(job: _Job, program, sets):
    """The compiled pass and its sets of arguments."""
    if job.name == "forward":
        return program["forward"], sets
    arguments = []
    for args in sets:
        out, pullback = program["residuals"](*args)
        cotangent = jax.tree.map(jnp.zeros_like, out)
        arguments.append((pullback, (args[0][:, ::-1], *cotangent[1:])))
    return program["backward"], arguments


def difference(got, wanted) -> str | None:
    """Describes how results (block lists or floating point) are wrong; None if they are right."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == np.int32:
            share = float(np.mean((a == b).all(axis=-1)))
            if share < RIGHT_CHOICES:
                return f"{share:.1%} of the lists are those of the heuristic tile"
            continue
        a, b = (x.astype(np.float64) for x in (a, b))
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return "the finite entries differ"
        error = correctness.relative_error(
            np.where(np.isfinite(a), a, 0), np.where(np.isfinite(b), b, 0)
        )
        if not error <= correctness.TOLERANCE:
            return f"relative error {error:.2e} exceeds the tolerance {correctness.TOLERANCE}"
    return None


def fastest(candidates: list[dict[str, Any]]) -> int:
    """The index of the tile to use: 0, the heuristic tile, unless one beats it in every round.

    Rounds are compared with the fastest round of the heuristic tile, since slower ones may have
    been disturbed.
    """
    best = min(candidates[0]["samples_ms"])
    numbers = [
        i
        for i, x in enumerate(candidates)
        if i and "error" not in x and max(x["samples_ms"]) < best
    ]
    return min(numbers, key=lambda i: (candidates[i]["ms"], i), default=0)
