"""The attention suites: each public function by each method, and the whole operator.

Cases are compiled in parallel, a few before they are measured. The methods of one function are
timed in turns, so that they run at the same clock rates of the device.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from fsa_jax import NSAConfig
from fsa_jax.arguments.types import Implementation
from fsa_jax.bench import cases
from fsa_jax.bench.cases import TINY, Case, Subject
from fsa_jax.bench.config import BenchConfig, Run
from fsa_jax.bench.measure import correctness, peers, timing
from fsa_jax.bench.measure.correctness import WrongResult

KERNELS = (
    "selected_attention",
    "compressed_attention",
    "select_blocks",
    "sliding_window_attention",
    "native_sparse_attention",
)
OPERATOR = (
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "combine_branches",
    "native_sparse_attention",
    "full_attention",
)
#: (query heads, key heads) of realistic models, and of the kernel cases; G = 4, 16, 1, 8, 2.
HEADS = ((32, 8), (64, 4), (32, 32), (32, 4), (16, 8))
KERNEL_HEADS = ((16, 4), (4, 4), (64, 4), (32, 4), (8, 4))
#: Tokens of a sequence; as with the heads, the most informative values come first.
LENGTHS = (65536, 8192, 131072, 32768, 262144, 16384, 4096)
#: The number of cases that are compiled together, before any of them is measured.
AHEAD = 4
#: The size in bytes of all input sets of a case together: several times the L2 cache.
SETS_BYTES = 2**28


def kernels(run: Run) -> Iterator[dict]:
    """Measures kernels by length and group size, at (block size, topk) = (64, 16) and (128, 8)."""
    if run.interpret:
        found = [
            (dataclasses.replace(case, selection="skewed", packed=True), KERNELS[:1])
            for case in _tiny_cases(run.config)
        ]
    else:
        found = _kernel_cases(run.config.lengths or LENGTHS, run.config.heads or KERNEL_HEADS)
    implementation = "triton_interpret" if run.interpret else "triton"
    yield from measure_cases(run, found, implementation)


def _tiny_cases(config: BenchConfig) -> list[Case]:
    """Cases for a machine without a GPU, on which nothing is measured."""
    lengths, heads = config.lengths or (200,), config.heads or ((6, 2),)
    return [
        Case(length=length, heads=query, kv_heads=key, width=16, config=TINY)
        for length, (query, key) in itertools.product(lengths, heads)
    ]


def _kernel_cases(
    lengths: Sequence[int], heads: Sequence[tuple[int, int]]
) -> list[tuple[Case, Sequence[str]]]:
    """Cases by length; only the first has other selections and a packed sequence."""
    found: list[tuple[Case, Sequence[str]]] = []
    for length in lengths:
        main = [Case(length=length, heads=query, kv_heads=key) for query, key in heads]
        wide = NSAConfig(block_size=128, topk=8)
        found += [(case, KERNELS[:1]) for case in main]
        found += [(dataclasses.replace(case, config=wide), KERNELS[:1]) for case in main]
        found += [(case, KERNELS[1:4]) for case in main]
        if length == lengths[0]:
            found += [
                (dataclasses.replace(case, selection=name), KERNELS[:1])
                for case in main
                for name in ("uniform", "skewed")
            ]
            found += [(dataclasses.replace(main[0], packed=True), KERNELS)]
    return found


def operator(run: Run) -> Iterator[dict]:
    if run.interpret:
        found = _tiny_cases(run.config)
    else:
        found = _operator_cases(run.config.lengths or LENGTHS, run.config.heads or HEADS)
    implementation = "xla" if run.interpret else "triton"
    found = [(case, OPERATOR) for case in found]
    yield from measure_cases(run, found, implementation)


def _operator_cases(lengths: Sequence[int], heads: Sequence[tuple[int, int]]) -> list[Case]:
    """All combinations of lengths and heads, with the first lengths and heads before the others."""
    places = itertools.product(range(len(lengths)), range(len(heads)))
    return [
        Case(length=lengths[i], heads=heads[j][0], kv_heads=heads[j][1])
        for i, j in sorted(places, key=sum)
    ]


def measure_cases(run, found, implementation: Implementation) -> Iterator[dict]:
    """Compiles, checks and times the subjects of pairs (case, functions), and yields their rows."""
    for several in itertools.batched(found, AHEAD):
        tasks = [(case, _subjects(run, case, implementation, names)) for case, names in several]
        jobs = {}
        for number, (case, subjects) in enumerate(() if run.late() else tasks):
            used = {name for s in subjects for name in (*s.differentiated, *s.others)}
            names = [x for x in case.shapes() if x in used or x not in cases.BRANCHES]
            make = functools.partial(cases.compile_inputs, case, implementation, names)
            jobs[number, "inputs", ""] = make
            jobs |= {(number, s.function, s.method): _compilation(case, s) for s in subjects}
        compiled = timing.compile_all(jobs, run.config.threads)
        for number, (case, subjects) in enumerate(tasks):
            # popped, so that the programs and their memory are freed with the case
            own = {key[1:]: compiled.pop(key) for key in list(compiled) if key[0] == number}
            yield from _measure_case(run, case, subjects, own)


def _subjects(run, case: Case, implementation: Implementation, functions) -> list[Subject]:
    found = cases.subjects(case, implementation, functions)
    # cuDNN needs a GPU
    return [subject for subject in found if not (run.interpret and subject.method == "cudnn")]


def _compilation(case: Case, subject: Subject):
    shapes = case.shapes()
    arrays = [[shapes[x] for x in names] for names in (subject.differentiated, subject.others)]
    return functools.partial(timing.compile_passes, subject.call, *arrays)


def _measure_case(run, case: Case, subjects, compiled) -> Iterator[dict]:
    """Yields the rows of a case from its compiled subjects and inputs."""
    passes = [(s, name) for s in subjects for name in ("forward", "backward")]
    passes = [(s, name) for s, name in passes if s.differentiated or name == "forward"]
    rows = {
        (s.function, s.method, name): case.row()
        | {"function": s.function, "method": s.method, "pass": name}
        for s, name in passes
    }
    if run.late():
        reason = f"not run: the time budget of {run.config.minutes:g} minutes was spent"
        yield from (row | {"error": reason} for row in rows.values())
        return
    timing.say(f"{case}")
    make = compiled.pop(("inputs", ""))
    try:
        if isinstance(make, Exception):
            raise make
        sets = [make(np.uint32(0))]
        size = sum(x.nbytes for x in sets[0].values())
        count = 1 if run.interpret else min(max(-(-SETS_BYTES // size), 2), 8)
        sets += [make(np.uint32(seed)) for seed in range(1, count)]
    except Exception as error:
        yield from (row | {"error": timing.describe_error(error)} for row in rows.values())
        return
    for _, rivals in itertools.groupby(subjects, key=lambda subject: subject.function):
        for subject, measured in _measure_rivals(run, case, list(rivals), compiled, sets):
            for name, found in measured.items():
                key = (subject.function, subject.method, name)
                if key not in rows:
                    continue
                flops, moved = cases.work(case, subject.function, name == "backward")
                floor = cases.floor_ms(flops, moved, run.ceilings)
                row = rows[key] | {"flops": flops, "bytes": moved, "floor_ms": floor} | found
                yield row
                timing.say(f"{key}: {row.get('ms', row.get('error'))}")
    selected = [x for (name, _), x in compiled.items() if name == "selected_attention"]
    if selected and not case.packed:
        programs = selected[0]
        for method in run.peers:
            yield from _peer_rows(run, case, method, programs, sets)


def _peer_rows(run, case: Case, method: str, programs, sets) -> Iterator[dict]:
    """Yields the rows of another project's selected attention; any failure is recorded."""
    try:
        if isinstance(programs, Exception):
            raise programs  # there is nothing to compare with
        args = [sets[0][name] for name in ("query", "key", "value", "block_indices")]
        (out, lse), pullback = programs["residuals"](*args)
        gradients = programs["backward"](pullback, (peers.dout_of(sets[0]), jnp.zeros_like(lse)))
        measured = peers.measure(method, case, sets, (out, *gradients), run.config.rounds)
    except Exception as error:
        measured = {
            name: {"error": timing.describe_error(error)} for name in ("forward", "backward")
        }
    for name, found in measured.items():
        flops, moved = cases.work(case, "selected_attention", name == "backward")
        floor = cases.floor_ms(flops, moved, run.ceilings)
        timing.say(f"{method} {name}: {found.get('ms', found.get('error'))}")
        yield (
            case.row()
            | {"function": "selected_attention", "method": method, "pass": name}
            | {"flops": flops, "bytes": moved, "floor_ms": floor}
            | found
        )


def _measure_rivals(run, case: Case, rivals, compiled, sets) -> Iterator[tuple[Subject, dict]]:
    """Yields each subject with its rows by pass. The subjects are timed in turns, round by round.

    Raises:
      WrongResult: a sample of the results is wrong.
    """
    clocks = [{} for _ in rivals]
    found: list[dict[str, dict]] = [{} for _ in rivals]
    for number in range(run.config.rounds):
        for subject, clock, rows in zip(rivals, clocks, found, strict=True):
            if any("error" in row for row in rows.values()):
                continue
            programs = compiled[subject.function, subject.method]
            try:
                if isinstance(programs, Exception):
                    raise programs
                passes, checked = _prepare(case, subject, programs, sets, check_it=not number)
                for name, arguments in passes.items():
                    timer = clock.setdefault(name, timing.Clock(programs[name]))
                    timer.warm_up(arguments)
                    timer.round(arguments)
                    if not number:
                        timer.profile(arguments)
                        peak = timing.peak_bytes(programs[name])
                        rows[name] = {"peak_bytes": peak} | checked
                passes = arguments = None  # the residuals of two methods may not fit together
            except WrongResult:
                raise
            except Exception as error:
                message = {"error": timing.describe_error(error)}
                rows |= {"forward": message, "backward": message}
    for subject, clock, rows in zip(rivals, clocks, found, strict=True):
        right = {name: row for name, row in rows.items() if "error" not in row}
        yield subject, rows | {name: clock[name].row() | row for name, row in right.items()}


def _prepare(case: Case, subject: Subject, programs, sets, *, check_it: bool):
    """The arguments of each pass for each input set, and the result of checking a sample."""
    arguments = [[x[name] for name in (*subject.differentiated, *subject.others)] for x in sets]
    if not subject.differentiated:
        if not check_it:
            return {"forward": arguments}, {}
        share = correctness.check_blocks(case, sets[0], programs["forward"](*arguments[0]))
        if share < correctness.RIGHT_CHOICES:
            raise WrongResult(
                f"{subject.function}: only {share:.1%} of the sampled lists are correct"
            )
        return {"forward": arguments}, {"right_lists": share}
    kept = [programs["residuals"](*args) for args in arguments]
    # any cotangent will do, and the query has the shape of the output
    douts = [x["query"][:, ::-1] for x in sets]
    with_lse = isinstance(kept[0][0], tuple)
    backward = [
        (pullback, (dout, jnp.zeros_like(out[1])) if with_lse else dout)
        for (out, pullback), dout in zip(kept, douts, strict=True)
    ]
    passes = {"forward": arguments, "backward": backward}
    if not check_it:
        return passes, {}
    out, gradients = kept[0][0], programs["backward"](*backward[0])
    result, lse = out if with_lse else (out, None)
    error = correctness.check(case, subject, sets[0], result, lse, douts[0], gradients)
    if error is not None and not error <= correctness.TOLERANCE:
        raise WrongResult(
            f"{subject.function} by {subject.method} at {case}: relative error {error:.2e} of a "
            f"sample exceeds the tolerance {correctness.TOLERANCE}"
        )
    return passes, {"relative_error": error}
