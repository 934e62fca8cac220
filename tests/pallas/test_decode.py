"""The decoding kernels in interpret mode, against float64 attention over the gathered pages.

Interpret mode fills the output buffers of a kernel with NaN, and the pools contain NaN except at
entries to which some query attends. An element that a kernel leaves unwritten, or an entry that it
reads although no query attends to it, fails every comparison here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import (
    assert_close,
    assert_errors_are_at_most_twice_those_of_dense,
    assert_same_bits,
    normal,
    numbers,
)

import fsa_jax
from fsa_jax import NSACache, NSAConfig, PageAllocator, reference, xla
from fsa_jax.inference.decode_step import attend
from fsa_jax.inference.kv_cache import Chunk
from fsa_jax.pallas.decode import attention, selection
from fsa_jax.semantics.segments import describe_segments, describe_windows

SCALE = 0.3
#: gpu/test_gpu_paged.py runs these tests on a GPU.
INTERPRET = jax.default_backend() == "cpu"
DENSE = jax.jit(reference._attend, static_argnums=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes: B sequences, n queries, K heads of G, widths D, E, J pages of p entries, S blocks."""

    batch: int = 2
    tokens: int = 1
    kv_heads: int = 2
    group: int = 4
    width: int = 16
    value_width: int = 16
    page: int = 4
    columns: int = 40
    slots: int = 5
    dtype: str = "float32"

    @property
    def entries(self):
        return self.columns * self.page


CASES = {
    "g4": Case(),
    "g1_bf16": Case(group=1, dtype="bfloat16", width=32, value_width=64, page=16, columns=11),
    "g3_three_queries": Case(group=3, tokens=3, width=24, value_width=40, page=8, columns=20),
    "g16_f16": Case(group=16, dtype="float16", kv_heads=1, page=64, columns=5, width=80),
    "g5_wide": Case(batch=1, group=5, kv_heads=1, width=96, value_width=192, columns=30),
    "g12_rows_of_two_tiles": Case(
        batch=1, group=12, tokens=8, dtype="bfloat16", page=32, columns=6
    ),
    "odd_pages": Case(batch=3, group=2, tokens=2, page=9, columns=9, width=5, value_width=7),
    "one_page": Case(batch=3, page=16, columns=1, slots=2, kv_heads=1),
}


def pools(case, seen, seed=0):
    """Pools, their page table, and the keys and values of each sequence in order.

    Pages are scattered over pools that have additional pages. Entries that are not in `seen`
    [B, J*p] hold NaN, and the page table has -1 or an out-of-range number for empty pages.
    """
    rng = np.random.default_rng(seed)
    count = case.batch * case.columns + 7
    table = rng.permutation(count)[: case.batch * case.columns].reshape(case.batch, case.columns)
    flat = []
    for number, width in enumerate((case.width, case.value_width)):
        x = numbers(seed + number, case.batch, case.entries, case.kv_heads, width)
        x = x.astype(jnp.dtype(case.dtype))
        pool = np.full((count, case.page, *x.shape[2:]), np.nan, x.dtype)
        dirty = np.where(np.asarray(seen)[:, :, None, None], x, x.dtype.type(np.nan))
        pool[table] = dirty.reshape(case.batch, case.columns, *pool.shape[1:])
        flat += [jnp.asarray(pool), jnp.asarray(x)]
    used = np.asarray(seen).reshape(case.batch, case.columns, case.page).any(axis=2)
    wild = rng.choice([-1, -7, count, 2**31 - 1, -(2**31)], table.shape)
    key_pool, key, value_pool, value = flat
    return key_pool, value_pool, jnp.asarray(np.where(used, table, wild), jnp.int32), key, value


def query_of(case, seed=5):
    shape = (case.batch, case.tokens, case.kv_heads * case.group, case.width)
    return normal(seed, *shape, dtype=case.dtype)


def exact(query, key, value, sees, scale=SCALE):
    """(out, lse, logits) in float64; `sees` is the mask, bool [B, K or 1, n, A], of A keys."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, _ = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, tokens, kv_heads, heads // kv_heads, -1)
    logits = scale * np.einsum("btkgd,bakd->btkga", grouped, key)
    hidden = ~np.asarray(sees).transpose(0, 2, 1, 3)[:, :, :, None]
    shown = np.where(hidden, -np.inf, logits)
    top = np.maximum(shown.max(axis=-1, keepdims=True), -1e300)
    weight = np.exp(shown - top)
    total = weight.sum(axis=-1, keepdims=True)
    out = np.einsum("btkga,bake->btkge", weight / np.where(total == 0, 1, total), value)
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, -np.inf, top + np.log(total))
    shape = (batch, tokens, heads)
    return out.reshape(*shape, -1), lse.reshape(shape), logits.reshape(*shape, -1)


def assert_right(case, got, key, value, sees):
    """Asserts that errors are at most twice those of dense attention in the same dtype."""
    wanted = exact(query_of(case), key, value, sees)[:2]
    dense = DENSE(query_of(case), key, value, jnp.asarray(sees), SCALE)
    assert got[0].dtype == case.dtype
    assert got[1].dtype == jnp.float32
    assert_errors_are_at_most_twice_those_of_dense(got, dense, wanted)


def ranges_of(case, seed=3):
    """Ragged, empty, whole and out-of-bounds ranges; those of the first sequence are long."""
    rng = np.random.default_rng(seed)
    low = rng.integers(-3, case.entries, (case.batch, case.tokens))
    high = rng.integers(0, case.entries + 3, low.shape)
    low[0], high[0, -1] = rng.integers(-2, 2, case.tokens), case.entries + 2
    if case.batch > 1:
        high[1, -1] = low[1, -1]
    return low.astype(np.int32), high.astype(np.int32)


def sees_range(case, low, high):
    entry = np.arange(case.entries)
    return ((entry >= low[..., None]) & (entry < high[..., None]))[:, None]


@functools.partial(jax.jit, static_argnames=("logits", "most", "scale"))
def attend_range(*args, logits=True, most=None, scale=SCALE):
    return attention.range_attention(
        *args, scale=scale, logits=logits, most=most, interpret=INTERPRET
    )


@functools.partial(jax.jit, static_argnames="scale")
def attend_blocks(*args, scale=SCALE):
    return attention.block_attention(*args, scale=scale, interpret=INTERPRET)


@pytest.mark.fast_cases("g4", "g3_three_queries", "one_page")
@pytest.mark.parametrize("name", CASES)
def test_a_query_sees_a_range(name):
    case = CASES[name]
    low, high = ranges_of(case)
    sees = sees_range(case, low, high)
    key_pool, value_pool, pages, key, value = pools(case, sees.any(axis=(1, 2)))
    query = query_of(case)
    out, lse, logits = attend_range(query, key_pool, value_pool, pages, low, high)
    assert_right(case, (out, lse), key, value, sees)
    assert logits is not None
    assert logits.dtype == jnp.float32
    shown = np.broadcast_to(sees[:, 0, :, None], logits.shape)
    wanted = exact(query, key, value, sees)[2]
    assert_close(np.asarray(logits)[shown], wanted[shown], 1e-5)


def test_nothing_between_the_ranges_of_two_queries_is_read():
    case = Case(batch=1, tokens=2, page=8, columns=20)
    low, high = (np.array([x], np.int32) for x in ((3, 150), (20, 155)))
    sees = sees_range(case, low, high)
    key_pool, value_pool, pages, key, value = pools(case, sees.any(axis=(1, 2)))
    got = attend_range(query_of(case), key_pool, value_pool, pages, low, high)
    assert_right(case, got[:2], key, value, sees)


def lists_of(case, seed=4):
    """Lists with -1 anywhere, out-of-range numbers, and empty lists; no block appears twice."""
    rng = np.random.default_rng(seed)
    shape = (case.batch, case.tokens, case.kv_heads)
    lists = np.full((*shape, case.slots), -1)
    for place in np.ndindex(shape):
        count = min(case.slots, case.columns)
        lists[place][:count] = rng.permutation(case.columns)[:count]
        rng.shuffle(lists[place])
    lists = np.where(rng.random(lists.shape) < 0.2, -1, lists)
    # block 2^30 of 4 or more entries starts at entry 0 in 32-bit arithmetic
    wild = rng.choice([case.columns, 2**30, 2**31 - 1, -(2**31)], lists.shape)
    lists = np.where(rng.random(lists.shape) < 0.2, wild, lists)
    several = lists[..., 0].size > 1
    if several:
        lists[-1, 0, -1] = -1
    last = rng.integers(0, case.entries, shape[:2])
    last[0, 0], last[-1, -1] = case.entries - 1, -1 if case.batch > 1 else case.entries // 2
    return lists.astype(np.int32), last.astype(np.int32)


@pytest.mark.fast_cases("g4", "g3_three_queries", "one_page")
@pytest.mark.parametrize("name", CASES)
def test_a_query_sees_its_blocks(name):
    case = CASES[name]
    lists, last = lists_of(case)
    entry = np.arange(case.entries)
    listed = (entry[:, None] // case.page == lists[..., None, :]).any(axis=-1)
    sees = (listed & (entry <= last[..., None, None])).transpose(0, 2, 1, 3)
    has_keys = sees.any(axis=-1)
    assert has_keys.any()
    assert not has_keys.all() or has_keys.size == 1  # some queries attend to nothing
    key_pool, value_pool, pages, key, value = pools(case, sees.any(axis=(1, 2)))
    got = attend_blocks(query_of(case), key_pool, value_pool, pages, lists, last)
    assert_right(case, got, key, value, sees)


@pytest.mark.fast_cases("sizes1")
@pytest.mark.parametrize(
    "sizes",
    [
        {"PROGRAMS": 1, "SPLIT_TILES": 1000},  # one split
        {"MOST_SPLITS": 2, "TILE_BYTES": 1},
        {"TILE_BYTES": 1},  # one split for each tile of 16 entries
    ],
)
def test_splits_and_tiles_change_rounding_alone(sizes, monkeypatch):
    args, _, case = split_arguments()
    wanted, before = by_both_kernels(), attention._make_plan(*args[:3], case.entries, False)
    for name, size in sizes.items():
        monkeypatch.setattr(attention, name, size)
    assert attention._make_plan(*args[:3], case.entries, False) != before
    assert_close(by_both_kernels.__wrapped__(), wanted, 2e-6)


def split_arguments():
    case = dataclasses.replace(CASES["g3_three_queries"], columns=50)
    low, high = ranges_of(case)
    key_pool, value_pool, pages, *_ = pools(case, np.ones((case.batch, case.entries), bool))
    return (query_of(case), key_pool, value_pool, pages, low, high), lists_of(case), case


@functools.cache
def by_both_kernels():
    """Results of both functions on the same arrays, compiled again at each call."""
    (*arrays, low, high), lists, _ = split_arguments()
    low, high, blocks, last = (jnp.asarray(x, jnp.int32) for x in (low, high, *lists))

    def run(query, key, value, pages):
        args, options = (query, key, value, pages), {"scale": SCALE, "interpret": INTERPRET}
        ranges = attention.range_attention(*args, low, high, **options)[:2]
        return ranges, attention.block_attention(*args, blocks, last, **options)

    return jax.jit(run)(*arrays)


def test_a_bound_on_the_entries_changes_rounding_alone():
    """This holds even for a wrong bound, which only affects the number of splits."""
    case = Case(columns=60, page=8)
    low, high = ranges_of(case)
    key_pool, value_pool, pages, *_ = pools(case, sees_range(case, low, high).any(axis=(1, 2)))
    args = (query_of(case), key_pool, value_pool, pages, low, high)
    wanted = attend_range(*args, logits=False)
    assert wanted[2] is None
    assert_close(attend_range(*args, logits=False, most=70)[:2], wanted[:2], 2e-6)


@pytest.mark.parametrize("kind", ["range", "blocks"])
def test_pages_outside_the_pool_count_as_nothing(kind):
    case = Case(columns=20, page=16)
    everything = np.ones((case.batch, case.entries), bool)
    key_pool, value_pool, pages, key, value = pools(case, everything)
    gone = np.random.default_rng(0).random(pages.shape) < 0.3
    wild = np.resize([-1, len(key_pool), 2**31 - 1, -(2**31)], pages.shape)
    pages = jnp.where(gone, wild, pages).astype(jnp.int32)
    lists, last = lists_of(case)
    entry = np.arange(case.entries)
    there = np.repeat(~gone, case.page, axis=1)[:, None, None]
    args = (query_of(case), key_pool, value_pool, pages)
    if kind == "range":
        low, high = ranges_of(case)
        sees = sees_range(case, low, high)
        got = attend_range(*args, low, high)[:2]
    else:
        listed = (entry[:, None] // case.page == lists[..., None, :]).any(axis=-1)
        sees = (listed & (entry <= last[..., None, None])).transpose(0, 2, 1, 3)
        got = attend_blocks(*args, lists, last)
    assert (sees & ~there).any()
    assert_right(case, got, key, value, sees & there)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_ten_thousand(dtype, sign):
    """Logits are integers near 10,000, which are exact, so only the softmax can lose precision."""
    case = Case(columns=40, page=8, dtype=dtype, tokens=2)
    sees = np.ones((case.batch, 1, case.tokens, case.entries), bool)
    key_pool, value_pool, pages, key, value = pools(case, sees[:, 0, 0])
    small = np.random.default_rng(0).integers(-4, 5, (case.batch, case.entries))

    def integers(pool, numbers):
        zeros = jnp.zeros_like(pool)
        return zeros.at[..., 0].set(1).at[..., 1].set(jnp.asarray(numbers, dtype)[..., None])

    in_pool = np.zeros(key_pool.shape[:2])
    in_pool[np.asarray(pages)] = small.reshape(case.batch, case.columns, case.page)
    key_pool, key = integers(key_pool, in_pool), integers(key, small)
    query = jnp.zeros_like(query_of(case)).at[..., 0].set(sign * 9984.0).at[..., 1].set(1)
    low, high = np.zeros((case.batch, 2), np.int32), np.full((case.batch, 2), case.entries)
    args = (query, key_pool, value_pool, pages)
    out, lse, logits = attend_range(*args, low, high.astype(np.int32), scale=1.0)
    wanted = exact(query, key, value, sees, scale=1.0)
    assert_close((out, lse), wanted[:2], {"float32": 1e-6, "bfloat16": 5e-3}[dtype])
    np.testing.assert_array_equal(logits, wanted[2])


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_any_scale(scale):
    case = Case(page=8, columns=20)
    low, high = ranges_of(case)
    sees = sees_range(case, low, high)
    key_pool, value_pool, pages, key, value = pools(case, sees.any(axis=(1, 2)))
    query = query_of(case)
    got = attend_range(query, key_pool, value_pool, pages, low, high, scale=scale)[:2]
    assert_close(got, exact(query, key, value, sees, scale)[:2], 2e-6)


def test_bitwise_the_same_on_every_rerun():
    case = CASES["g3_three_queries"]
    low, high = ranges_of(case)
    key_pool, value_pool, pages, *_ = pools(case, sees_range(case, low, high).any(axis=(1, 2)))
    args = (query_of(case), key_pool, value_pool, pages, low, high)
    shown = sees_range(case, low, high)[:, 0, :, None]  # the other logits are unwritten

    def run():
        out, lse, logits = attend_range(*args)
        return out, lse, jnp.where(shown, logits, 0)

    first = run()
    for _ in range(3):
        assert_same_bits(run(), first)


# Selection


CONFIG = NSAConfig(
    kernel_size=8, kernel_stride=4, block_size=16, topk=5, init_blocks=1, local_blocks=2,
    window_size=20,
)  # fmt: skip
WIDE_WINDOWS = dataclasses.replace(CONFIG, kernel_size=24, init_blocks=0, local_blocks=1, topk=7)


@pytest.mark.fast_cases("False-paper", "True-wide")
@pytest.mark.parametrize("config", [CONFIG, WIDE_WINDOWS], ids=["paper", "wide"])
@pytest.mark.parametrize("ties", [False, True])
def test_selection_is_that_of_the_portable_path(config, ties, monkeypatch):
    """Includes cases where all scores are equal, and where there are fewer blocks than slots."""
    batch, length, group, kv_heads = 2, 200, 3, 2
    slots = -(-length // config.block_size) * config.block_size // config.kernel_stride
    query = normal(1, batch, length, group * kv_heads, 8) * (0.0 if ties else 1.0)
    key = normal(2, batch, slots, kv_heads, 8)
    segments = describe_segments(None, batch, length)
    windows = describe_windows(segments, config.kernel_size, config.kernel_stride)
    visible = (np.arange(length) + 1 - config.kernel_size) // config.kernel_stride + 1
    visible = np.broadcast_to(np.maximum(visible, 0), (batch, length))
    grouped = query.reshape(batch, length, kv_heads, group, 8)
    logits = SCALE * jnp.einsum("btkgd,bmkd->btkgm", grouped, key)
    logits = logits.reshape(batch, length, group * kv_heads, slots)
    sees = np.arange(slots) < visible[:, :, None, None]
    lse = jax.nn.logsumexp(jnp.where(sees, logits, -jnp.inf), axis=-1)
    logits = jnp.where(sees, logits, jnp.nan)
    position = np.arange(length)
    there = np.random.default_rng(0).random((batch, length)) < 0.9
    own = jnp.asarray(np.where(there, position // config.block_size, -1), jnp.int32)

    def select():
        arrays = (logits, lse, jnp.asarray(visible, jnp.int32), own)
        return selection.select_blocks(
            *arrays, config=config, kv_heads=kv_heads, interpret=INTERPRET
        )

    got = jax.jit(select)()
    real = length // config.kernel_stride
    wanted = xla.select_blocks(
        query, key[:, :real], lse, segments, windows, config=config, scale=SCALE
    )
    wanted = np.where(there[:, :, None, None], np.asarray(wanted), -1)
    np.testing.assert_array_equal(got, wanted)
    assert (np.asarray(got) == -1).any()
    monkeypatch.setattr(selection, "MOST_BLOCKS", 1)  # the path for very long sequences
    np.testing.assert_array_equal(jax.jit(lambda: select())(), wanted)


# The whole step


def mean_windows(x):
    """Compressed keys, as the cache expects them, of the complete windows of consecutive tokens."""
    size, stride = CONFIG.kernel_size, CONFIG.kernel_stride
    return fsa_jax.compress(x, kernel_size=size, kernel_stride=stride, method="mean")


def filled(arrays, lengths, window_of_its_own, layers):
    """A cache with those tokens in every layer, whose sequences get non-adjacent pages in turn."""
    key, value, window_key, window_value = arrays
    batch, length, kv_heads, width = key.shape
    options = {"config": CONFIG, "num_kv_heads": kv_heads, "head_dim": width, "layers": layers}
    pages = -(-length // CONFIG.block_size)
    cache = NSACache.init(
        batch, length, num_pages=batch * pages, window_of_its_own=window_of_its_own, **options
    )
    allocator = PageAllocator(cache)
    for size in range(CONFIG.block_size, length + CONFIG.block_size, CONFIG.block_size):
        for row in range(batch):
            cache = allocator.reserve(cache, row, min(size, lengths[row]))
    chunk = cache.place(length, jnp.asarray(lengths, jnp.int32))
    for layer in range(layers):
        factor = 1.0 if layer == layers - 1 else jnp.nan  # other layers hold NaN
        cache = cache.append(factor * key, factor * value, layer, chunk)
        if window_of_its_own:
            both = (factor * window_key, factor * window_value)
            cache = cache.append_window(*both, layer, chunk)
        compress = (lambda x, _: mean_windows(x), mean_windows)
        cache = cache.append_compressed(factor * key, factor * value, layer, chunk, *compress)
    return cache.advance(chunk)


def whole_branches(query, arrays, window_of_its_own):
    """The outputs of the branches for all tokens of whole sequences, by the reference functions."""
    key, value, *window = arrays
    compressed = [mean_windows(x) for x in (key, value)]
    windows = {"kernel_size": CONFIG.kernel_size, "kernel_stride": CONFIG.kernel_stride}
    options = {"implementation": "reference", "scale": SCALE}
    out, lse = fsa_jax.compressed_attention(
        query, *compressed, **windows, return_residuals=True, **options
    )
    blocks = fsa_jax.select_blocks(query, compressed[0], lse, config=CONFIG, **options)
    block_size, window_size = CONFIG.block_size, CONFIG.window_size
    return (
        out,
        fsa_jax.selected_attention(query, key, value, blocks, block_size=block_size, **options),
        fsa_jax.sliding_window_attention(
            query,
            *(window if window_of_its_own else (key, value)),
            window_size=window_size,
            **options,
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "window_of_its_own"), [(1, False), (3, True)])
def test_a_step_is_the_end_of_the_whole_sequence(tokens, window_of_its_own):
    batch, length, kv_heads, group, width, layers = 4, 150, 2, 3, 8, 2
    lengths = [150, 99, 3, 21]  # the second one ends with a window
    arrays = [normal(i, batch, length, kv_heads, width) for i in range(4)]
    query = normal(9, batch, length, group * kv_heads, width)
    cache = filled(arrays, lengths, window_of_its_own, layers)
    valid = np.ones((batch, tokens), bool)
    valid[1, 0] = tokens == 1
    valid[3] = False
    position = np.asarray(lengths)[:, None] - tokens + np.arange(tokens)
    row = np.arange(batch)[:, None]
    got, _ = jax.jit(functools.partial(attend, scale=SCALE, interpret=INTERPRET))(
        query[row, position],
        cache,
        Chunk(jnp.asarray(position, jnp.int32), jnp.asarray(valid)),
        jnp.int32(layers - 1),
    )
    whole = jax.jit(whole_branches, static_argnames="window_of_its_own")
    wanted = whole(query, arrays, window_of_its_own=window_of_its_own)
    there = jnp.asarray(valid)[..., None, None]
    wanted = tuple(jnp.where(there, x[row, position], 0) for x in wanted)
    assert_close(got, wanted, 2e-6)
    assert all(np.any(x) for x in wanted)
