"""The benchmark cases: shapes, inputs, the functions and methods to time, and their work.

A case is a shape with a selection of blocks. `subjects` lists what is timed for a case: each public
function by each method that supports it, and full attention. `work` counts flops and bytes.

Shapes: one sequence of T tokens, N query heads, K key/value heads, D head width, M windows, S
blocks.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fsa_jax
from fsa_jax import NSAConfig
from fsa_jax.arguments.types import Implementation
from fsa_jax.ops import gated_sum
from fsa_jax.ops.call import Backend
from fsa_jax.pallas import SelectedTuning, support
from fsa_jax.pallas.block_attention.plan import METHODS

DTYPE = jnp.bfloat16
SELECTIONS = ("nsa", "uniform", "skewed")
#: Names of the inputs of combine_branches that take the place of the branch outputs.
BRANCHES = ("compressed_out", "selected_out", "window_out")
#: Correlation of neighbouring tokens in the random queries, keys and values.
CORRELATION = 0.99
#: The ratio of the flops of a backward pass to those of the forward pass.
BACKWARD = 2.5
#: The sizes of runs on a machine without a GPU, which are not measurements.
TINY = NSAConfig(kernel_size=8, kernel_stride=4, block_size=16, topk=6, window_size=40)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A shape (T = length, N = heads, K = kv_heads, D = width), a selection, and whether packed."""

    length: int
    heads: int
    kv_heads: int
    width: int = 128
    config: NSAConfig = dataclasses.field(default_factory=NSAConfig)
    selection: str = "nsa"
    packed: bool = False

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def row(self) -> dict[str, Any]:
        """The fields that describe the case in every row of the results."""
        return {
            "length": self.length,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "width": self.width,
            "block_size": self.config.block_size,
            "topk": self.config.topk,
            "selection": self.selection,
            "packed": self.packed,
            "dtype": jnp.dtype(DTYPE).name,
        }

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of the arrays that subjects take, by name."""
        tokens, windows = self.length, self.length // self.config.kernel_stride
        of = {
            "query": (tokens, self.heads, self.width),
            "key": (tokens, self.kv_heads, self.width),
            "value": (tokens, self.kv_heads, self.width),
            "compressed_key": (windows, self.kv_heads, self.width),
            "compressed_value": (windows, self.kv_heads, self.width),
            "gates": (tokens, self.heads, 3),
        }
        arrays = {name: jax.ShapeDtypeStruct((1, *shape), DTYPE) for name, shape in of.items()}
        arrays |= dict.fromkeys(BRANCHES, arrays["query"])
        arrays["lse"] = jax.ShapeDtypeStruct((1, tokens, self.heads), jnp.float32)
        lists = (1, tokens, self.kv_heads, self.config.topk)
        arrays["block_indices"] = jax.ShapeDtypeStruct(lists, jnp.int32)
        if self.packed:
            arrays["segment_ids"] = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        return arrays

    def segment_ids(self) -> np.ndarray | None:
        """Ids of documents of 100 to T/4 tokens, most of them short; None if not packed."""
        if not self.packed:
            return None
        rng = np.random.default_rng(0)
        most = max(self.length // 4, 2)
        sizes = np.exp(rng.uniform(np.log(min(100, most - 1)), np.log(most), self.length))
        ids = np.repeat(np.arange(self.length) + 1, sizes.astype(int) + 1)
        return ids[None, : self.length].astype(np.int32)

    def positions(self) -> np.ndarray:
        """The position of each token in its document."""
        ids = self.segment_ids()
        token = np.arange(self.length)
        if ids is None:
            return token
        opens = np.diff(ids[0], prepend=-1) != 0
        return token - np.maximum.accumulate(np.where(opens, token, 0))


@dataclasses.dataclass(frozen=True)
class Subject:
    """One function computed by one method.

    Attributes:
      function: name of the public function, or "full_attention".
      method: "kv_outer" or "query_outer" for selected attention by the kernels of that name, else
        the implementation ("triton" also stands for interpreted kernels; "default" stands for None,
        where that uses other kernels than "triton"); full attention has "cudnn" and "xla".
      call: the function, which takes the arrays by position.
      differentiated: names of the arrays with respect to which it is differentiated; they come
        first.
      others: names of the other arrays.
    """

    function: str
    method: str
    call: Callable
    differentiated: tuple[str, ...]
    others: tuple[str, ...] = ()


def subjects(case: Case, implementation: Implementation, functions: Sequence[str]) -> list[Subject]:
    """The subjects to time for a case: all methods of the named functions, one after another.

    Args:
      case: the shape.
      implementation: "triton", or another one on a machine without a GPU.
      functions: names of the functions.
    """
    config, packed = case.config, case.packed
    windows = {"kernel_size": config.kernel_size, "kernel_stride": config.kernel_stride}
    keys, compressed = ("query", "key", "value"), ("query", "compressed_key", "compressed_value")
    ids = ("segment_ids",) * packed

    def bound(function, count, **options):
        """Returns the function of `count` arrays, followed by segment ids if packed."""

        def call(*arrays):
            more = {"segment_ids": arrays[count]} if packed else {}
            return function(*arrays[:count], **options, **more)

        return call

    attention: dict[str, Any] = {"implementation": implementation, "return_residuals": True}
    found = []
    ours = "triton" if implementation.startswith("triton") else implementation
    for method in (*METHODS, ours) if ours == "triton" else (ours,):
        tuning = SelectedTuning(method=method) if method in METHODS else None
        options = attention | {"block_size": config.block_size, "tuning": tuning}
        call = bound(fsa_jax.selected_attention, 4, **options)
        found.append(Subject("selected_attention", method, call, keys, ("block_indices", *ids)))
    default = implementation == "triton" and support.hopper_reason() is None
    choices = {ours: implementation} | ({"default": None} if default else {})
    for method, name in choices.items():
        options = attention | windows | {"implementation": name}
        call = bound(fsa_jax.compressed_attention, 3, **options)
        found.append(Subject("compressed_attention", method, call, compressed, ids))
    options = {"config": config, "implementation": implementation}
    call = bound(fsa_jax.select_blocks, 3, **options)
    others = ("query", "compressed_key", "lse", *ids)
    found.append(Subject("select_blocks", ours, call, (), others))
    options = attention | {"window_size": config.window_size}
    call = bound(fsa_jax.sliding_window_attention, 3, **options)
    found.append(Subject("sliding_window_attention", ours, call, keys, ids))
    combine = gated_sum_by(Backend(implementation))
    found.append(Subject("combine_branches", ours, combine, ("gates", *BRANCHES)))
    arrays = (*keys, "compressed_key", "compressed_value", "gates")
    for method, name in choices.items():
        call = bound(fsa_jax.native_sparse_attention, 6, config=config, implementation=name)
        found.append(Subject("native_sparse_attention", method, call, arrays, ids))
    if not packed:
        for method in ("cudnn", "xla"):
            call = functools.partial(
                jax.nn.dot_product_attention, is_causal=True, implementation=method
            )
            found.append(Subject("full_attention", method, call, keys))
    return [subject for subject in found if subject.function in functions]


def gated_sum_by(backend: Backend) -> Callable[..., jax.Array]:
    """The sum of branch outputs weighted by gates, with its backward pass from the operator."""

    @jax.custom_vjp
    def combine(gates, *outs):
        return gated_sum.combine(gates, outs)

    def forward(gates, *outs):
        return combine(gates, *outs), (gates, outs)

    def backward(residuals, dout):
        gates, outs = residuals
        dgates, douts, _ = gated_sum.combine_gradients(backend, gates, outs, dout)
        return dgates, *douts

    combine.defvjp(forward, backward)
    return combine


# Inputs


@functools.partial(jax.jit, static_argnames="shape")
def drifting(seed, shape: tuple[int, int, int]):
    """Standard normal tokens [1, T, H, D] in which neighbours are correlated: an AR(1) process."""
    noise = jax.random.normal(seed, shape, jnp.float32)
    fresh = (1 - CORRELATION**2) ** 0.5

    def step(x, noise):
        x = CORRELATION * x + fresh * noise
        return x, x.astype(DTYPE)

    return jax.lax.scan(step, noise[0], noise)[1][None]


def make_inputs(case: Case, seed: int, implementation: Implementation) -> dict[str, jax.Array]:
    """Makes all arrays of a case, with blocks chosen according to `case.selection`."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = case.shapes()
    ids = case.segment_ids()
    packed: dict[str, Any] = {} if ids is None else {"segment_ids": jnp.asarray(ids)}
    arrays: dict[str, Any] = {
        name: drifting(key, shapes[name].shape[1:])
        for name, key in zip(("query", "key", "value"), keys, strict=False)
    }
    config = case.config
    windows = {"kernel_size": config.kernel_size, "kernel_stride": config.kernel_stride}
    for name in ("key", "value"):
        arrays[f"compressed_{name}"] = fsa_jax.compress(
            arrays[name], **windows, method="mean", **packed
        )
    gates = jax.random.normal(keys[3], shapes["gates"].shape)
    arrays["gates"] = jax.nn.sigmoid(gates).astype(DTYPE)
    arrays["compressed_out"], arrays["lse"] = fsa_jax.compressed_attention(
        *(arrays[name] for name in ("query", "compressed_key", "compressed_value")),
        **windows,
        **packed,
        implementation=implementation,
        return_residuals=True,
    )
    # any two other arrays of the output's shape will do
    arrays["selected_out"] = arrays["query"][:, ::-1]
    arrays["window_out"] = arrays["compressed_out"][:, ::-1]
    arrays["block_indices"] = choose_blocks(case, arrays, keys[4], implementation)
    return arrays | packed


def compile_inputs(case: Case, implementation: Implementation, names: Collection[str]):
    """Compiles `make_inputs` as a function of the seed that returns only the named arrays."""

    def make(seed):
        return {k: x for k, x in make_inputs(case, seed, implementation).items() if k in names}

    return jax.jit(make).lower(jax.ShapeDtypeStruct((), jnp.uint32)).compile()


def choose_blocks(case: Case, arrays, seed, implementation: Implementation) -> jax.Array:
    """Block lists [1, T, K, S]: by NSA's scores, at random, or the same blocks for every query."""
    config, kv_heads = case.config, case.kv_heads
    if case.selection == "nsa":
        return fsa_jax.select_blocks(
            *(arrays[name] for name in ("query", "compressed_key", "lse")),
            config=config,
            segment_ids=None if not case.packed else jnp.asarray(case.segment_ids()),
            implementation=implementation,
        )
    own = jnp.asarray(case.positions() // config.block_size, jnp.int32)
    if case.selection == "skewed":
        free = config.topk - config.local_blocks
        hot = jnp.broadcast_to(jnp.arange(free, dtype=jnp.int32), (case.length, free))
        local = own[:, None] - jnp.arange(config.local_blocks, dtype=jnp.int32)[None]
        lists = jnp.concatenate([hot, local], axis=1)
        return jnp.broadcast_to(lists[None, :, None], case.shapes()["block_indices"].shape)
    return uniform_lists(seed, own, config, kv_heads, config.num_blocks(case.length))


@functools.partial(jax.jit, static_argnames=("config", "kv_heads", "blocks"))
def uniform_lists(seed, own, config: NSAConfig, kv_heads: int, blocks: int):
    """The forced blocks of NSA, and a uniform random choice of other blocks up to the query."""
    block = jnp.arange(blocks, dtype=jnp.int32)

    def one_query(xs):
        token, own = xs
        score = jax.random.uniform(jax.random.fold_in(seed, token), (kv_heads, blocks))
        forced = (block < config.init_blocks) | (block > own - config.local_blocks)
        score = jnp.where((block > own)[None], -1.0, jnp.where(forced[None], 2.0, score))
        rank, best = jax.lax.top_k(score, min(config.topk, blocks))
        chosen = jnp.where(rank >= 0, best, -1)
        return jnp.pad(chosen, ((0, 0), (0, config.topk - chosen.shape[1])), constant_values=-1)

    tokens = jnp.arange(own.shape[0], dtype=jnp.int32)
    return jax.lax.map(one_query, (tokens, own), batch_size=256)[None]


# Work


def work(case: Case, function: str, backward: bool) -> tuple[float | None, float | None]:
    """The necessary flops, and the bytes that must cross device memory; None: unknown.

    Flops: for each visible (query, key) pair of a head, two products in the forward pass, one in
    the selection, and 2.5 times the forward flops in the backward pass. Bytes: queries, results and
    their cotangents once; for selected attention the partial results, one for each (query, block)
    pair, written and read.
    """
    config, position = case.config, case.positions()
    windows = (position - config.kernel_size + 1) // config.kernel_stride + 1
    block = position // config.block_size
    keys = {
        "compressed_attention": np.sum(np.maximum(windows, 0)),
        "sliding_window_attention": np.sum(np.minimum(position + 1, config.window_size)),
        "full_attention": np.sum(position + 1.0),
        # whole blocks, except the query's own block
        "selected_attention": np.sum(
            np.minimum(block, config.topk - 1) * config.block_size
            + position % config.block_size + 1
        ),
    }  # fmt: skip
    keys["select_blocks"] = keys["compressed_attention"] / 2
    branches = ("compressed_attention", "selected_attention", "sliding_window_attention")
    passes = BACKWARD if backward else 1.0
    per_pair = 4.0 * case.heads * case.width
    itemsize = jnp.dtype(DTYPE).itemsize
    rows = float(case.length * case.heads * case.width * itemsize)
    pairs = float(np.sum(np.minimum(block + 1, config.topk)))
    partial = 2 * itemsize * pairs * case.heads * case.width
    if function == "combine_branches":
        return None, rows * (7 if backward else 4)
    if function == "native_sparse_attention":
        flops = passes * per_pair * sum(float(keys[name]) for name in branches)
        if not backward:
            flops += per_pair * float(keys["select_blocks"])
        return flops, partial + (8 if backward else 4) * rows
    if function not in keys:
        return None, None
    moved = rows * (4 if backward else 2)
    if function == "selected_attention":
        moved = partial
    return passes * per_pair * float(keys[function]), moved


def floor_ms(flops: float | None, moved: float | None, ceilings: dict | None) -> float | None:
    """The larger of the times in ms that the flops and the bytes take at the ceilings."""
    if ceilings is None or (flops is None and moved is None):
        return None
    return 1e3 * max((flops or 0) / ceilings["flops"], (moved or 0) / ceilings["bytes"])
