"""The Hopper kernels in interpret mode: numbers, races, queries without keys, unattended keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from util import assert_close, normal

import fsa_jax
from fsa_jax.pallas.range_attention import hopper_key_kernel, hopper_pipeline, hopper_query_kernels
from fsa_jax.semantics import segments

WINDOWS = {"kernel_size": 8, "kernel_stride": 4}
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A branch on sequences of T tokens, packed or not."""

    length: int
    group: int
    window: int = 0  # 0 means compressed attention
    kv_heads: int = 1
    batch: int = 1
    dtype: str = "bfloat16"
    packed: bool = False
    scale: float = 0.1

    def segment_ids(self):
        """Segment ids of documents, some of one token, and padding at both ends."""
        if not self.packed:
            return None
        ids = np.repeat([0, 1, 2, 2, 3, 0], [9, 40, 1, 60, self.length, 5])
        return jnp.asarray(np.stack([np.roll(ids, 7 * i) for i in range(self.batch)]))[
            :, : self.length
        ].astype(jnp.int32)

    def ranges(self):
        """The range of keys that each token attends to, and of tokens that attend to each key."""
        segment_info = segments.describe_segments(self.segment_ids(), self.batch, self.length)
        if self.window:
            seen, by = segments.visible_tokens, segments.query_range_of_tokens
            return seen(segment_info, self.window), by(segment_info, self.window)
        windows = segments.describe_windows(segment_info, *WINDOWS.values())
        query_range = segments.query_range_of_windows(segment_info, windows, WINDOWS["kernel_size"])
        return segments.visible_windows(windows), query_range

    def reference(self, *arrays):
        sizes = {"window_size": self.window} if self.window else WINDOWS
        function = fsa_jax.sliding_window_attention if self.window else fsa_jax.compressed_attention
        return function(
            *arrays,
            **sizes,
            scale=self.scale,
            segment_ids=self.segment_ids(),
            implementation="reference",
            return_residuals=True,
        )


CASES = {
    "g1": Case(length=200, group=1, kv_heads=2, dtype="float16"),
    "g2_long": Case(length=700, group=2),  # two tiles of keys, and three in the gradients
    "g4_packed": Case(length=300, group=4, kv_heads=2, packed=True),
    "g4_window": Case(length=330, group=4, window=150),
    "g8_packed_window": Case(length=90, group=8, window=30, packed=True, batch=2),
    "g16": Case(length=90, group=16),
    "g32_negative": Case(length=70, group=32, scale=-0.3),
    "one_token": Case(length=1, group=2, window=4),
    "no_scale": Case(length=150, group=2, window=140, scale=0.0),
}


@pytest.mark.fast_cases("no_scale")
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_reference(name, monkeypatch):
    """Uses two programs, so that one has several work items; unattended keys are NaN."""
    monkeypatch.setattr(hopper_pipeline, "PROGRAMS", 2)
    case = CASES[name]
    visible, query_range = case.ranges()
    shapes = [(case.length, case.group * case.kv_heads), (query_range[0].shape[1], case.kv_heads)]
    dtype = jnp.dtype(case.dtype)
    query, key, value = (
        normal(i, case.batch, *shapes[min(i, 1)], hopper_pipeline.WIDTH, dtype=dtype)
        for i in range(3)
    )
    dout = normal(3, *query.shape, dtype=dtype)
    dlse = normal(4, *query.shape[:3])
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (query, key, value)]
        wanted, pull = jax.vjp(case.reference, *wide)
        wanted_gradients = pull((dout.astype(jnp.float64), dlse.astype(jnp.float64)))
        out, lse = wanted = jax.tree.map(np.asarray, wanted)
        delta = np.sum(out * np.asarray(dout, np.float64), axis=-1) - np.asarray(dlse, np.float64)
    no_keys = (visible[0] >= visible[1])[:, :, None]
    unseen = (query_range[0] >= query_range[1])[:, :, None, None]
    query, dout = (jnp.where(no_keys[..., None], jnp.nan, x) for x in (query, dout))
    key, value = (jnp.where(unseen, jnp.nan, x) for x in (key, value))
    delta = jnp.where(no_keys, jnp.nan, jnp.asarray(delta, jnp.float32))
    static = {"scale": case.scale, "interpret": InterpretGPUParams(detect_races=True)}
    arrays = (query, key, value, visible, query_range)
    got = jax.jit(functools.partial(hopper_query_kernels.attention, **static))(*arrays)
    assert_close(got, wanted, TOLERANCE[case.dtype])
    assert not gpu_callbacks.get_races().races_found
    rest = (jnp.asarray(lse, jnp.float32), delta, dout)
    got = jax.jit(functools.partial(hopper_query_kernels.query_gradient, **static))(*arrays, *rest)
    assert_close(got, np.asarray(wanted_gradients[0]), TOLERANCE[case.dtype])
    assert not gpu_callbacks.get_races().races_found
    if not case.scale:
        return
    arrays = (query, key, value, query_range, *rest)
    for splits in (1, 2):
        run = functools.partial(hopper_key_kernel.key_gradients, splits=splits, **static)
        got = jax.jit(run)(*arrays)
        assert_close(got, jax.tree.map(np.asarray, wanted_gradients[1:]), TOLERANCE[case.dtype])
        assert not gpu_callbacks.get_races().races_found


def test_what_it_serves():
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    key = array(1, 64, 2, 128)
    assert hopper_pipeline.unsupported_reason(array(1, 64, 8, 128), key, key) is None
    for query, keys, why in (
        (array(1, 64, 8, 64), array(1, 64, 2, 64), "head widths must be 128, got 64"),
        (array(1, 64, 8, 128, dtype=jnp.float32), key, "dtype must be .* float32"),
    ):
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(hopper_pipeline.unsupported_reason(query, keys, keys))


def test_what_is_profitable():
    """The measured thresholds; a group of five is split into parts if there are enough pairs."""
    array = lambda *shape: jax.ShapeDtypeStruct((1, *shape, 128), jnp.bfloat16)  # noqa: E731

    def profitable(tokens, heads, keys, window=False):
        key = array(keys, 8)
        return hopper_pipeline.is_profitable(array(tokens, heads), key, key, window=window)

    assert profitable(32768, 32, 2048)
    assert profitable(32768, 40, 2048)
    assert not profitable(8192, 40, 512)
    assert profitable(32768, 32, 32768, window=True)
    assert not profitable(32768, 40, 32768, window=True)
    assert not profitable(32768 + 1, 32, 2048)
