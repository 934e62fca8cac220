"""The decoding suite: one query per sequence, sparse over cache pages, beside full attention.

Both get the same keys in the same run: the sparse step through a page table in random order, full
attention as one contiguous array, which is its best case. One program runs the step on every input
set, one after another, so that neither the host's work for a call nor the L2 cache affects the
times. The times given are those of one step.

Shapes: B sequences of T tokens, N query heads, K key/value heads, D head width, J pages, M windows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import fsa_jax
from fsa_jax import NSAConfig
from fsa_jax.bench import cases
from fsa_jax.bench.cases import TINY
from fsa_jax.bench.measure import correctness, timing
from fsa_jax.bench.report.results import FULL, STEP
from fsa_jax.inference import decode_step
from fsa_jax.inference.kv_cache import Chunk
from fsa_jax.inference.nsa_cache import NSACache

BATCHES = (1, 16)
LENGTHS = (131072, 32768, 8192)
HEADS = ((32, 8), (64, 8), (32, 32), (16, 1))
#: The least bytes of keys and values that the steps of one program read: several L2 caches.
READ_BYTES = 2**28
#: The most bytes of all input sets together, except that there are always at least two sets.
SETS_BYTES = 2**34
MOST_SETS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step: B = batch, T = length including the query's token, N = heads, K = kv_heads, D."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int = 128
    config: NSAConfig = dataclasses.field(default_factory=NSAConfig)

    @property
    def pages(self) -> int:
        """The number of pages J of a sequence."""
        return self.config.num_blocks(self.length)

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def row(self) -> dict[str, Any]:
        """The fields that describe the step in every row of the results."""
        return {
            "batch": self.batch, "length": self.length, "heads": self.heads,
            "kv_heads": self.kv_heads, "width": self.width,
            "block_size": self.config.block_size, "topk": self.config.topk, "selection": "nsa",
            "packed": False, "dtype": jnp.dtype(cases.DTYPE).name, "pass": "decode",
        }  # fmt: skip

    def work(self, function: str) -> tuple[float, float]:
        """The necessary flops, and the bytes of the keys and values that must be read.

        The keys are the M windows, the selected blocks up to the query and the sliding window, or
        for full attention all tokens. Queries and results take only a few kB, and the logits of the
        windows need not leave the chip.
        """
        config, last = self.config, self.length - 1
        block = last // config.block_size
        keys = self.length
        if function == STEP:
            keys = max((self.length - config.kernel_size) // config.kernel_stride + 1, 0)
            keys += min(block, config.topk - 1) * config.block_size + last % config.block_size + 1
            keys += min(self.length, config.window_size)
        bytes_of_key = 2.0 * self.kv_heads * self.width * jnp.dtype(cases.DTYPE).itemsize
        flops_of_key = 4.0 * self.heads * self.width
        return self.batch * keys * flops_of_key, self.batch * keys * bytes_of_key


def rows(run) -> Iterator[dict]:
    """Yields the rows of the suite, one for each step and method."""
    for step in _steps(run):
        subjects = _subjects(step, run.interpret)
        if run.late():
            reason = f"not run: the time budget of {run.config.minutes:g} minutes was spent"
            yield from (step.row() | names | {"error": reason} for names, *_ in subjects)
            continue
        timing.say(f"{step}")
        try:
            sets = [make_inputs(step, seed) for seed in range(_count(step, run.interpret))]
        except Exception as error:
            failed = {"error": timing.describe_error(error)}
            yield from (step.row() | names | failed for names, *_ in subjects)
            continue
        for names, call, wanted in subjects:
            flops, moved = step.work(names["function"])
            floor = cases.floor_ms(flops, moved, run.ceilings)
            row = step.row() | names | {"flops": flops, "bytes": moved, "floor_ms": floor}
            try:
                row |= _measure(call, wanted, sets, run.config.rounds)
            except correctness.WrongResult as error:
                raise correctness.WrongResult(f"{names} at {step}: {error}") from error
            except Exception as error:
                row |= {"error": timing.describe_error(error)}
            timing.say(f"{names}: {row.get('ms', row.get('error'))}")
            yield row
        del sets  # freed before the next sets are made


def _steps(run) -> list[Step]:
    asked = run.config
    if run.interpret:
        return [
            Step(batch=2, length=length, heads=heads, kv_heads=kv_heads, width=16, config=TINY)
            for heads, kv_heads in asked.heads or ((6, 2),)
            for length in asked.lengths or (200,)
        ]
    return [
        Step(batch=batch, length=length, heads=heads, kv_heads=kv_heads)
        for heads, kv_heads in asked.heads or HEADS
        for length in asked.lengths or LENGTHS
        for batch in BATCHES
    ]


def _count(step: Step, interpret: bool) -> int:
    """The number of input sets."""
    if interpret:
        return 2
    _, read = step.work(STEP)
    _, tokens = step.work(FULL)
    fit = SETS_BYTES // round(tokens * (2 + 1 / step.config.kernel_stride))  # pages and arrays
    return int(max(2, min(MOST_SETS, -(-READ_BYTES // read), fit)))


@functools.partial(jax.jit, static_argnames="step")
def make_inputs(step: Step, seed: int) -> dict[str, Any]:
    """Makes normal queries, keys and values, and a cache of the same keys in shuffled pages.

    Returns:
      `query` [B, 1, N, D], `key` and `value` [B, T, K, D], and `cache`, whose compressed keys are
      the means of their windows.
    """
    config = step.config
    seeds = jax.random.split(jax.random.key(seed), 4)
    normal = functools.partial(jax.random.normal, dtype=cases.DTYPE)
    query = normal(seeds[0], (step.batch, 1, step.heads, step.width))
    room = step.pages * config.block_size
    shape = (step.batch, room, step.kv_heads, step.width)
    table = jax.random.permutation(seeds[3], step.batch * step.pages)
    arrays, pools = [], []
    for seed in seeds[1:3]:
        x = normal(seed, shape)
        compressed = fsa_jax.compress(
            x, kernel_size=config.kernel_size, kernel_stride=config.kernel_stride, method="mean"
        )
        arrays.append(x[:, : step.length])
        for entries in (x, compressed):
            pages = entries.reshape(step.batch * step.pages, -1, *shape[2:])
            pools.append(jnp.zeros_like(pages).at[table].set(pages, unique_indices=True))
    empty = NSACache.init(
        step.batch,
        step.pages * config.block_size,
        config=config,
        num_kv_heads=step.kv_heads,
        head_dim=step.width,
        dtype=cases.DTYPE,
    )
    cache = dataclasses.replace(
        empty,
        key=pools[0],
        value=pools[2],
        page_table=table.reshape(step.batch, step.pages).astype(jnp.int32),
        lengths=jnp.full((step.batch,), step.length, jnp.int32),
        compressed_key=pools[1],
        compressed_value=pools[3],
    )
    return {"query": query, "key": arrays[0], "value": arrays[1], "cache": cache}


def _subjects(step: Step, interpret: bool) -> list[tuple[dict[str, str], Callable, Callable]]:
    """The names of each method, its step as a function of an input set, and its check."""

    def sparse(inputs):
        cache = inputs["cache"]
        last = Chunk(cache.lengths[:, None] - 1, jnp.ones((step.batch, 1), bool))
        return decode_step.attend(
            inputs["query"], cache, last, 0, scale=step.scale, interpret=interpret
        )

    def full(method, inputs):
        arrays = (inputs[name] for name in ("query", "key", "value"))
        return jax.nn.dot_product_attention(*arrays, scale=step.scale, implementation=method)

    found: list[tuple[dict[str, str], Callable, Callable]] = [
        ({"function": STEP, "method": "triton"}, sparse, functools.partial(check_sparse, step))
    ]
    for method in ("xla",) if interpret else ("cudnn", "xla"):  # no cuDNN without a GPU
        names = {"function": FULL, "method": method}
        call = functools.partial(full, method)
        found.append((names, call, functools.partial(check_full, step)))
    return found


def _measure(call, wanted, sets, rounds: int) -> dict[str, Any]:
    """Checks and times a program that runs the step on every set; may raise WrongResult."""

    def run(sets):
        return [call(inputs) for inputs in sets]

    with jax.numpy_dtype_promotion("standard"):  # needed by jax.nn.dot_product_attention
        program = jax.jit(run).lower(sets).compile()
    found = wanted(sets[0], program(sets)[0])
    if not (error := found["relative_error"]) <= correctness.TOLERANCE:
        raise correctness.WrongResult(
            f"relative error {error:.2e} exceeds the tolerance {correctness.TOLERANCE}"
        )
    if found.get("right_lists", 1) < correctness.RIGHT_CHOICES:
        raise correctness.WrongResult(f"only {found['right_lists']:.1%} of the lists are correct")
    measured = timing.measure(program, [(sets,)], rounds)
    for name in ("ms", "dispatch_ms", "device_ms"):
        if measured[name] is not None:
            measured[name] /= len(sets)
    measured["samples_ms"] = [ms / len(sets) for ms in measured["samples_ms"]]
    if measured["kernels_ms"] is not None:
        by_kernel = measured["kernels_ms"].items()
        measured["kernels_ms"] = {name: ms / len(sets) for name, ms in by_kernel}
    return measured | found | {"steps": len(sets), "peak_bytes": timing.peak_bytes(program)}


# The definition


def check_full(step: Step, inputs, out) -> dict[str, Any]:
    """Compares full attention with a dense computation."""
    seen = jnp.ones((step.batch, 1, step.length), bool)
    wanted = _dense(inputs["query"], inputs["key"], inputs["value"], seen, step.scale)[0]
    return {"relative_error": correctness.relative_error(out[:, 0], wanted)}


def check_sparse(step: Step, inputs, result) -> dict[str, Any]:
    """Compares the branches of a step with dense ones, and its selected blocks with the scores.

    The selected branch is compared given the blocks that were chosen, since near ties may differ.
    """
    config, cache = step.config, inputs["cache"]
    branches, lists = result
    lists = np.asarray(lists)[:, 0]
    last = Chunk(cache.lengths[:, None] - 1, jnp.ones((step.batch, 1), bool))
    compressed = cache.read_compressed(0, last, cache.windows)
    window = np.arange(cache.windows)
    token = np.arange(step.length)
    block = token // config.block_size
    ended = window * config.kernel_stride + config.kernel_size <= step.length
    near = token >= step.length - config.window_size
    chosen = (block == lists[..., None]).any(axis=2)
    arrays = (inputs["key"], inputs["value"])
    errors = []
    weights = np.zeros(())
    for branch, keys, seen in zip(
        branches, (compressed, arrays, arrays), (ended[None, None], chosen, near[None, None]),
        strict=True,
    ):  # fmt: skip
        seen = jnp.broadcast_to(seen, (step.batch, *seen.shape[1:]))
        wanted, p = _dense(inputs["query"], *keys, seen, step.scale)
        errors.append(correctness.relative_error(branch[:, 0], wanted))
        if not errors[1:]:
            weights = np.asarray(p, np.float64)
    right = [
        correctness.right_list(score, blocks, (step.length - 1) // config.block_size, config)
        for score, blocks in zip(
            _scores(weights, step).reshape(-1, step.pages),
            lists.reshape(-1, config.topk),
            strict=True,
        )
    ]
    return {"relative_error": max(errors), "right_lists": float(np.mean(right))}


def _scores(weights, step: Step):
    """Block scores [B, K, J]: each window adds its weight to every stride that it covers."""
    config = step.config
    units = np.zeros(weights.shape)
    for offset in range(config.kernel_size // config.kernel_stride):
        units[..., offset:] += weights[..., : weights.shape[-1] - offset]
    per_block = config.block_size // config.kernel_stride
    return units.reshape(*weights.shape[:-1], -1, per_block).sum(axis=-1)


@functools.partial(jax.jit, static_argnames="scale")
def _dense(query, key, value, seen, scale: float) -> tuple[Array, Array]:
    """Attention in float32, one sequence at a time, to A keys: out [B, N, D], weights [B, K, A].

    `query` is [B, 1, N, D] and `seen` bool [B, K or 1, A]; the weights are summed over a group.
    """

    def one(xs):
        query, key, value, seen = xs
        query, key, value = (x.astype(jnp.float32) for x in (query[0], key, value))
        grouped = query.reshape(key.shape[1], -1, query.shape[1])
        logits = scale * jnp.einsum("kgd,akd->kga", grouped, key, precision="highest")
        p = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
        out = jnp.einsum("kga,ake->kge", p, value, precision="highest")
        return out.reshape(query.shape[0], -1), p.sum(axis=1)

    return jax.lax.map(one, (query, key, value, seen))
