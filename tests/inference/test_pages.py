"""Pages shared by sequences over time: freed pages are never read, missing ones are reported."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from small_layers import CONFIG, perturbed
from util import assert_same_bits

from fsa_jax import KVCache, NSACache, OutOfPages, PageAllocator
from fsa_jax.layers import FullAttention, NativeSparseAttention

ROWS, CAPACITY, PAGES, WIDTH = 3, 48, 11, 20
PAGE = CONFIG.block_size
TEXTS = np.asarray(jax.random.normal(jax.random.key(7), (5, CAPACITY, 16)))


def make(cls: Any = NativeSparseAttention) -> Any:
    options = {"config": CONFIG, "kv_per_branch": True} if cls is NativeSparseAttention else {}
    layer = cls(
        4, 16, num_kv_heads=2, head_dim=8, implementation="xla", rngs=nnx.Rngs(0), **options
    )
    return perturbed(layer)


LAYERS = {"nsa": make(), "full": make(FullAttention)}


def init_cache(name):
    options = {} if name == "nsa" else {"page_size": PAGE}
    return LAYERS[name].init_cache(ROWS, CAPACITY, num_pages=PAGES, **options)


@nnx.jit
def extend(layer, x, cache, num_tokens):
    return layer(x, cache=cache, num_tokens=num_tokens)


@nnx.jit
def whole(layer, x):
    return layer(x)


WANTED = {name: np.asarray(whole(layer, jnp.asarray(TEXTS))) for name, layer in LAYERS.items()}


def poisoned(cache, pages=None, rows=None):
    """Fills pages (all, or `pages`) and tails of sequences (all, or `rows`) with NaN."""
    changes = {}
    for field in dataclasses.fields(cache):
        x = getattr(cache, field.name)
        if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        if field.name.startswith("tail"):
            at = (slice(None), slice(None) if rows is None else np.asarray(rows, int))
        else:
            at = slice(None) if pages is None else np.asarray(pages, int)
        new = np.array(x)
        new[at] = np.nan
        changes[field.name] = jnp.asarray(new)
    return dataclasses.replace(cache, **changes)


class Server(RuleBasedStateMachine):
    """Sequences start, grow, get truncated and end in any order; free pages contain NaN."""

    name = "nsa"

    @initialize()
    def start(self):
        self.layer, self.wanted = LAYERS[self.name], WANTED[self.name]
        cache = init_cache(self.name)
        self.allocator = PageAllocator(cache)
        self.cache = poisoned(cache)
        self.texts, self.done = [0] * ROWS, [0] * ROWS
        self.held = [0] * ROWS

    @rule(counts=st.tuples(*[st.integers(0, WIDTH)] * ROWS), data=st.data())
    def grow(self, counts, data):
        rows, there = np.full((ROWS, WIDTH, 16), np.nan, np.float32), [0] * ROWS
        for row, count in enumerate(counts):
            if not self.done[row]:
                self.texts[row] = data.draw(st.integers(0, len(TEXTS) - 1))
            start = self.done[row]
            count = min(count, CAPACITY - start)
            needed = -(-(start + count) // PAGE) - self.held[row]
            before = self.cache
            if needed > self.allocator.free_pages:
                with pytest.raises(OutOfPages, match=f"sequence {row} needs {needed} more pages"):
                    self.allocator.reserve(self.cache, row, start + count)
                assert self.cache is before
                continue
            self.cache = self.allocator.reserve(self.cache, row, start + count)
            self.held[row] += max(needed, 0)
            rows[row, :count] = TEXTS[self.texts[row], start : start + count]
            there[row] = count
        counts = jnp.asarray(there, jnp.int32)
        y, self.cache = extend(self.layer, jnp.asarray(rows), self.cache, counts)
        for row, count in enumerate(there):
            start = self.done[row]
            want = self.wanted[self.texts[row], start : start + count]
            np.testing.assert_allclose(np.asarray(y)[row, :count], want, atol=1e-5)
            self.done[row] += count

    @rule(row=st.integers(0, ROWS - 1))
    def leave(self, row):
        pages = np.asarray(self.cache.page_table)[row]
        self.cache = self.allocator.release(self.cache, row)
        self.cache = poisoned(self.cache, pages[pages >= 0], [row])
        self.done[row] = self.held[row] = 0

    @invariant()
    def every_page_has_one_owner(self):
        if not hasattr(self, "cache"):
            return
        table = np.asarray(self.cache.page_table)
        used = table[table >= 0]
        assert len(set(used.tolist())) == used.size == sum(self.held)
        assert self.allocator.free_pages == PAGES - used.size
        assert self.cache.lengths.tolist() == self.done
        assert self.cache.room.tolist() == [PAGE * held for held in self.held]


class FullServer(Server):
    name = "full"


for _machine in (Server, FullServer):
    _machine.TestCase.settings = settings(
        max_examples=20, stateful_step_count=12, deadline=None, database=None
    )
TestServer, TestFullServer = pytest.mark.slow(Server.TestCase), FullServer.TestCase


def test_one_token_at_a_time_in_pages_of_others():
    """Single-token calls gather blocks by page, and must not read what a page held before."""
    layer, cache = LAYERS["nsa"], init_cache("nsa")
    allocator = PageAllocator(cache)
    for row in (2, 0):
        cache = allocator.reserve(cache, row, 5 * PAGE)
    for row in (0, 2):
        cache = allocator.release(cache, row)
    cache = poisoned(cache)
    out = []
    for start in range(0, 3 * PAGE):
        for row in (1, 0, 2):
            cache = allocator.reserve(cache, row, start + 1)
        y, cache = extend(layer, jnp.asarray(TEXTS[:3, start : start + 1]), cache, None)
        out.append(y)
    want = WANTED["nsa"][:3, : 3 * PAGE]
    np.testing.assert_allclose(np.concatenate(out, axis=1), want, atol=1e-5)


@pytest.mark.slow
def test_out_of_pages_harms_no_other_sequence():
    layer, cache = LAYERS["nsa"], init_cache("nsa")
    allocator = PageAllocator(cache)
    cache = allocator.reserve(cache, 1, CAPACITY)
    x = jnp.asarray(TEXTS[:3, :WIDTH])
    counts = jnp.asarray([0, WIDTH, 0], jnp.int32)
    _, cache = extend(layer, x, cache, counts)
    with pytest.raises(
        OutOfPages, match=r"sequence 0 needs 6 more pages for 48 tokens, 5 of 11 are free"
    ):
        allocator.reserve(cache, 0, CAPACITY)
    # Sequence 0 has no page, so its tokens are not stored, and no other sequence's page changes.
    y, after = extend(layer, x, cache, jnp.asarray([WIDTH, 0, WIDTH], jnp.int32))
    assert not np.any(y)
    assert_same_bits(after, cache)
    with pytest.raises(ValueError, match="room for 0 tokens of sequence 0, which holds 0"):
        layer(x, cache=cache)
    with pytest.raises(ValueError, match=r"length must be in 0 \.\. 48, got 49"):
        allocator.reserve(cache, 0, CAPACITY + 1)
    with pytest.raises(ValueError, match=r"length must be in 0 \.\. 48, got -1"):
        allocator.reserve(cache, 0, -1)
    assert allocator.reserve(cache, 0, 40).room.tolist() == [40, 48, 0]
    assert allocator.free_pages == 0


def test_a_page_that_is_not_there_is_never_written():
    cache = init_cache("full")
    table = np.full_like(cache.page_table, -1)
    table[0, 1] = 4  # the first page is missing
    cache = dataclasses.replace(cache, page_table=jnp.asarray(table))
    x, there = jnp.ones((ROWS, 1, 2, 8)), jnp.asarray([[True], [True], [False]])
    at = jnp.asarray([[PAGE + 3], [0], [0]], jnp.int32)
    got = np.asarray(cache.write(cache.key, x, 0, at, there))
    assert np.argwhere(got[..., 0, 0]).tolist() == [[4, 3]]
    assert not np.any(cache.write(cache.key, x, 0, at - PAGE, there))


def test_a_page_is_handed_out_once_whatever_cache_comes():
    cache = init_cache("nsa")
    allocator, other = PageAllocator(cache), PageAllocator(cache)
    before = allocator.reserve(cache, 0, 2 * PAGE)
    after = allocator.release(before, 0)
    for stale, held in ((before, r"\[0, 1\]"), (other.reserve(cache, 0, 1), r"\[0\]")):
        for use in (allocator.reserve, lambda *x: allocator.release(*x[:2])):
            with pytest.raises(
                ValueError, match=rf"last, \[\] for sequence 0, got {held}: it is another"
            ):
                use(stale, 1, 2 * PAGE)
    assert allocator.free_pages == PAGES
    assert allocator.release(after, 0).room.tolist() == [0, 0, 0]  # releasing twice changes nothing
    row, length = np.int64(0), np.int32(1)  # numpy integers are accepted
    both = allocator.reserve(allocator.reserve(after, 1, 2 * PAGE), row, length)  # type: ignore
    assert both.room.tolist() == [PAGE, 2 * PAGE, 0]
    with pytest.raises(ValueError, match=r"last, \[2\] for sequence 0, got \[\]"):
        allocator.reserve(cache, 0, 1)  # this cache is from before both calls


def test_a_released_sequence_has_no_past():
    cache = init_cache("nsa")
    allocator = PageAllocator(cache)
    cache = allocator.reserve(allocator.reserve(cache, 0, 2 * PAGE), 1, PAGE)
    x = jnp.asarray(TEXTS[:3, :WIDTH])
    cache = extend(LAYERS["nsa"], x, cache, jnp.asarray([3, 2, 0], jnp.int32))[1]
    cache = jax.jit(lambda cache: cache.rewind(jnp.full(3, 1, jnp.int32)))(cache)
    assert cache.lost.tolist() == [True] * 3  # rollback=0
    cache = allocator.release(cache, 0)
    assert cache.lost.tolist() == [False, True, True]
    assert cache.lengths.tolist() == [0, 2, 0]
    cache = allocator.reserve(cache, 0, PAGE)
    y, _ = extend(LAYERS["nsa"], x, cache, jnp.asarray([PAGE, 0, 0], jnp.int32))
    np.testing.assert_allclose(y[0, :PAGE], WANTED["nsa"][0, :PAGE], atol=1e-5)


def test_bad_pages():
    cache = init_cache("nsa")
    allocator = PageAllocator(cache)
    for row in (3, -1):
        with pytest.raises(ValueError, match=rf"row must be in 0 \.\. 2, got {row}"):
            allocator.release(cache, row)
        with pytest.raises(ValueError, match=rf"row must be in 0 \.\. 2, got {row}"):
            allocator.reserve(cache, row, 1)
    with pytest.raises(ValueError, match="cache must be made with num_pages, and be empty"):
        PageAllocator(allocator.reserve(cache, 0, 1))
    with pytest.raises(ValueError, match="cache must be made with num_pages, and be empty"):
        PageAllocator(LAYERS["nsa"].init_cache(1, 8))
    with pytest.raises(ValueError, match="config must be an NSAConfig, got 3"):
        NSACache.init(1, 8, config=3, num_kv_heads=1, head_dim=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="page_size must be an integer of at least 1, got 0"):
        KVCache.init(1, 8, num_kv_heads=1, head_dim=8, page_size=0)
    smaller = LAYERS["nsa"].init_cache(ROWS, CAPACITY, num_pages=PAGES - 1)
    two = LAYERS["nsa"].init_cache(2, CAPACITY, num_pages=PAGES)
    large = LAYERS["full"].init_cache(ROWS, CAPACITY, num_pages=PAGES, page_size=2 * PAGE)
    allocator = PageAllocator(cache)
    for arguments, message in [
        ((3, 0, 1), "cache must be what init_cache gives, got int"),
        ((smaller, 0, 1), "cache must have num_pages=11, got num_pages=10"),
        ((two, 0, 1), "cache must have sequences=3, got sequences=2"),
        ((large, 0, 1), "cache must have page_size=8, got page_size=16"),
        ((cache, "0", 1), r"row must be an integer in 0 \.\. 2, got '0'"),
        ((cache, True, 1), r"row must be an integer in 0 \.\. 2, got True"),
        ((cache, 0, 1.0), r"length must be an integer in 0 \.\. 48, got 1\.0"),
        ((cache, 0, None), r"length must be an integer in 0 \.\. 48, got None"),
    ]:
        with pytest.raises(ValueError, match=message):
            allocator.reserve(*arguments)
    with pytest.raises(ValueError, match="cache must be what init_cache gives, got NoneType"):
        PageAllocator(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache must not be traced, as inside jit"):
        jax.jit(lambda cache: allocator.release(cache, 0))(cache)
    for name, value in (("num_kv_heads", 0), ("head_dim", 1.5), ("layers", "2")):
        options: Any = {"num_kv_heads": 1, "head_dim": 8} | {name: value}
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got"):
            KVCache.init(1, 8, **options)
