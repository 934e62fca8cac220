"""Rewinding a cache: rejected tokens leave no trace, and a rewind too far is reported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsa_jax.layers import FullAttention, NativeSparseAttention
from inference.cached_layers import BATCH, LENGTH, extend, inputs, make, numbers, whole


@pytest.mark.fast_cases("FullAttention")
@pytest.mark.parametrize("cls", [NativeSparseAttention, FullAttention])
def test_rewinding_takes_back_drafts(cls):
    """Rejected draft tokens leave no trace, whichever windows and blocks they were in."""
    options = {"rollback": 5} if cls is NativeSparseAttention else {}
    layer, x = make(cls), inputs()
    cache, out = layer.init_cache(BATCH, LENGTH, **options), []
    wrong = jax.random.normal(jax.random.key(1), x.shape)
    for start in range(0, LENGTH, 3):  # two of every five drafts are wrong
        drafts = jnp.concatenate([x[:, start : start + 3], wrong[:, :2]], axis=1)
        counts = jnp.minimum(LENGTH - start, 5) * jnp.ones(BATCH, jnp.int32)
        y, cache = extend(layer, drafts, cache, counts)
        cache = cache.rewind(counts - 3)
        out.append(y[:, :3])
    np.testing.assert_allclose(np.concatenate(out, axis=1), whole(layer, x), atol=1e-5)
    with pytest.raises(ValueError, match=r"count must be in 0 \.\. .* got \[0, 73\]"):
        cache.rewind(jnp.asarray([0, 73], jnp.int32))
    with pytest.raises(ValueError, match=r"count must be in 0 \.\. .* got \[-1, 0\]"):
        cache.rewind(jnp.asarray([-1, 0], jnp.int32))


def test_rewinding_further_than_the_cache_keeps():
    cache = make().init_cache(1, LENGTH, rollback=2)
    cache = dataclasses.replace(cache, lengths=jnp.asarray([9], jnp.int32))
    with pytest.raises(ValueError, match=r"rollback=2, lengths=\[9\]\), got \[3\]"):
        cache.rewind(jnp.asarray([3], jnp.int32))
    assert cache.rewind(jnp.asarray([2], jnp.int32)).lengths.tolist() == [7]


@pytest.mark.slow
def test_all_rewinds_together_take_back_what_the_cache_keeps():
    """Rewound tokens count against the limit until other tokens replace them."""
    layer, x = make(), inputs()
    want, wrong = whole(layer, x), jax.random.normal(jax.random.key(1), x.shape)

    def add(cache, tokens, *counts):
        return extend(layer, tokens[:, :24], cache, numbers(*counts))

    _, cache = add(layer.init_cache(BATCH, LENGTH, rollback=4), x, 17, 20)
    _, cache = add(cache, wrong, 4, 2)  # the first 17 and 20 tokens are right
    cache = cache.rewind(numbers(1, 2))
    for count in ((4, 0), (0, 3)):
        with pytest.raises(ValueError, match=r"count must be in 0 \.\. \[3, 2\] .*rollback=4, "):
            cache.rewind(numbers(*count))
    cache = cache.rewind(numbers(3, 0))
    assert cache.lengths.tolist() == [17, 20]
    _, cache = add(cache, wrong, 1, 1)  # after rewinding four and two tokens, one of each was added
    with pytest.raises(ValueError, match=r"count must be in 0 \.\. \[1, 3\]"):
        cache.rewind(numbers(2, 0))
    cache = cache.rewind(numbers(1, 3))  # the most that the cache can rewind
    out = []
    for row, (start, count) in enumerate(((17, 24), (18, 24))):
        y, new = add(cache, x[:, start:], *(count * (row == i) for i in range(BATCH)))
        np.testing.assert_allclose(y[row], want[row, start : start + 24], atol=1e-5)
        out.append(new)
    # Only tokens added since can be rewound, and no more than the limit.
    assert out[0]._removable.tolist() == [4, 0]
    fresh = extend(layer, x[:, :24], cache, numbers(3, 9), fresh=True)[1]
    assert fresh._removable.tolist() == [3, 4]


@pytest.mark.fast_cases("NativeSparseAttention-counts1", "FullAttention-counts3")
@pytest.mark.parametrize(
    ("cls", "counts"),
    [
        (NativeSparseAttention, [(2, 2), (1, 2)]),  # four in total, of at most three
        (NativeSparseAttention, [(0, 4)]),
        (NativeSparseAttention, [(0, -1)]),
        (FullAttention, [(3, 8), (1, 2)]),  # ten in total, of nine
        (FullAttention, [(0, -1)]),
    ],
)
def test_rewinding_too_far_inside_jit_loses_the_sequence_and_says_so(cls, counts):
    layer, x = make(cls), inputs()
    options = {"rollback": 3} if cls is NativeSparseAttention else {}
    _, cache = extend(layer, x[:, :24], layer.init_cache(BATCH, LENGTH, **options), numbers(9, 9))
    # Sequence 0 is rewound as far as allowed, sequence 1 further.
    back = sum(count for count, _ in counts)

    @jax.jit
    def rewound(cache):
        for count in counts:
            cache = cache.rewind(numbers(*count))
        return cache

    cache = rewound(cache)
    assert cache.lost.tolist() == [False, True]
    y, after = extend(layer, x[:, 9 - back : 33 - back], cache, numbers(24, 24))
    np.testing.assert_allclose(y[0], whole(layer, x)[0, 9 - back : 33 - back], atol=1e-5)
    assert np.all(np.isnan(y[1]))
    assert after.lengths.tolist() == [33 - back, cache.lengths[1]]
    with pytest.raises(ValueError, match="cache must know the tokens of sequence 1, got one that"):
        layer(x[:, :1], cache=after)
    with pytest.raises(
        ValueError, match=r"sequence 1, .* start it anew with fresh=True or release"
    ):
        after.rewind(numbers(0, 1))
    # The other sequence continues, and the lost one can start again from the beginning.
    assert after.rewind(numbers(1, 0)).lost.tolist() == [False, True]
    y, new = extend(layer, x[:, :24], after, numbers(24, 24), fresh=True)
    np.testing.assert_allclose(y[1], whole(layer, x)[1, :24], atol=1e-5)
    assert not np.any(new.lost)
