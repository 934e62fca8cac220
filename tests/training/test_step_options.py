"""Options of the training step: accumulation, clipping, schedules, freezing, float32 masters."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import assert_same_bits

from fsa_jax.training import TrainConfig, train
from fsa_jax.training.config import check_resumable, config_from_json, config_to_json
from fsa_jax.training.mesh import Placement, check_placement
from fsa_jax.training.optimizer import (
    Masters,
    init_optimizer,
    joined,
    learning_rate_schedule,
    split_frozen,
    update,
)
from fsa_jax.training.step import init_model, init_state, make_train_step, state_shardings
from training.runs import DENSE, MODEL, saved_state, tiny

PLAIN = dataclasses.replace(DENSE, dropout_rate=0.0, num_layers=1)


def settings(**changes) -> TrainConfig:
    return tiny(Path("texts"), Path("out"), **{"model": PLAIN} | changes)


def batch(rows: int = 4):
    """Returns tokens and segment ids of rows of which some have much more padding than others."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, size=(rows, 32)).astype(np.int32)
    ids = (np.arange(32) < np.asarray([[32], [3], [20], [1]])[:rows]).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(ids)


@functools.cache
def steps(config: TrainConfig, count: int = 2, placement=None):
    """Returns the state before, and state and metrics after some steps on one batch."""
    graphdef, params = init_model(config.model, 0)
    start = init_state(params, config)
    before = jax.tree.map(np.asarray, start)
    if placement is not None:
        start = jax.device_put(start, state_shardings(config, placement))
    step = make_train_step(graphdef, config, placement)
    state, metrics = start, None
    for _ in range(count):
        state, metrics = step(state, *batch())
    return before, jax.tree.map(np.asarray, state), metrics


def assert_close(got, expected, **tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.fast_cases("")
@pytest.mark.parametrize("mesh", ["", "data=2"])
def test_parts_of_a_batch_are_the_whole_batch(mesh):
    """Also where the parts predict very different numbers of tokens."""
    placement = Placement.build(mesh) if mesh else None
    _, expected, whole = steps(settings(batch_size=4))
    _, state, parts = steps(settings(batch_size=4, accumulate=2), placement=placement)
    assert whole is not None
    assert parts is not None
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(parts.grad_norm, whole.grad_norm, rtol=1e-5)
    assert_close(state.opt_state, expected.opt_state, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_parts_draw_dropout_of_their_own():
    rows = [jnp.tile(x[:1], (4, 1)) for x in batch()]
    model = dataclasses.replace(PLAIN, dropout_rate=0.5)
    losses = []
    for accumulate in (1, 4):
        config = settings(batch_size=4, accumulate=accumulate, model=model)
        graphdef, params = init_model(model, 0)
        _, metrics = make_train_step(graphdef, config)(init_state(params, config), *rows)
        losses.append(float(metrics.loss))
    one = [x[:1] for x in rows]
    config = settings(batch_size=1, model=model)
    graphdef, params = init_model(model, 0)
    _, metrics = make_train_step(graphdef, config)(init_state(params, config), *one)
    assert len({*losses, float(metrics.loss)}) == 3


def few(dtype: Any = jnp.float32):
    """Returns parameters of a model of two, and their gradients, whose norm is 5."""
    params = {"w": {"kernel": jnp.ones((2, 2), dtype)}, "norm": {"scale": jnp.ones(2, dtype)}}
    grads = {"w": {"kernel": jnp.full((2, 2), 2.0)}, "norm": {"scale": jnp.asarray([3.0, 0.0])}}
    return params, grads


@pytest.mark.parametrize(
    ("limit", "norm"), [(0.5, 0.5), (1.0, 1.0), (9.0, 5.0), (0.0, 5.0), (None, 5.0)]
)
def test_clipping(limit, norm):
    """Adam's first moments after one step are a tenth of the clipped gradient."""
    params, grads = few()
    config = settings(clip_norm=limit)
    state = update(config, grads, init_optimizer(params, config), params)[1]
    moments = np.concatenate([x.ravel() for x in jax.tree.leaves(state[1][0].mu)])
    assert np.linalg.norm(moments) == pytest.approx(norm / 10, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant"}, [0, 0.5, 1, 1, 1, 1, 1]),
        ({"schedule": "wsd", "cooldown_steps": 50}, [0, 0.5, 1, 1, 0.55, 0.1, 0.1]),
        ({"schedule": "wsd"}, [0, 0.5, 1, 1, 1, 0.1, 0.1]),
    ],
)
def test_schedules(changes, expected):
    config = settings(warmup_steps=10, decay_steps=110, **changes)
    schedule = learning_rate_schedule(config)
    rates = [np.asarray(schedule(step)) for step in (0, 5, 10, 60, 85, 110, 500)]
    np.testing.assert_allclose(rates, np.asarray(expected) * config.learning_rate, rtol=1e-5)


def test_the_default_cooldown_is_a_fifth():
    schedule = learning_rate_schedule(settings(warmup_steps=0, decay_steps=100, schedule="wsd"))
    rates = [np.asarray(schedule(step)) for step in (80, 90)]
    np.testing.assert_allclose(rates, [1e-2, 0.55e-2], rtol=1e-5)


def test_frozen_parameters_keep_their_bits_and_have_no_state():
    patterns = ("layers/attention/(query|key)", "embedding")
    before, state, _ = steps(settings(batch_size=4, freeze=patterns), count=3)
    frozen = split_frozen(state.params, patterns)[1]
    assert sorted(frozen) == ["embedding", "layers"]
    assert sorted(frozen["layers"]["attention"]) == ["key", "query"]
    assert_same_bits(frozen, split_frozen(before.params, patterns)[1])
    for kept in (state.opt_state[1][0].mu, state.opt_state[1][0].nu):
        assert "embedding" not in kept
        assert sorted(kept["layers"]["attention"]) == ["out", "value"]
    moved = split_frozen(state.params, patterns)[0]
    for a, b in zip(
        jax.tree.leaves(moved),
        jax.tree.leaves(split_frozen(before.params, patterns)[0]),
        strict=True,
    ):
        assert (a != b).any()


def test_splitting_and_joining():
    params = {"a": {"b": 1, "c": 2}, "ab": {"b": 3}, "d": 4}
    trained, frozen = split_frozen(params, ("a", "d"))
    assert (trained, frozen) == ({"ab": {"b": 3}}, {"a": {"b": 1, "c": 2}, "d": 4})
    assert joined(trained, frozen) == params
    trained, frozen = split_frozen(params, (".*/b",))
    assert frozen == {"a": {"b": 1}, "ab": {"b": 3}}
    assert joined(trained, frozen) == params
    with pytest.raises(ValueError, match=r"freeze must match .* got 'e', .* a/b, a/c, ab/b"):
        split_frozen(params, ("a", "e"))
    with pytest.raises(ValueError, match="freeze must leave parameters to train"):
        split_frozen(params, (".*",))


def test_masters_keep_what_16_bits_lose():
    """Updates below the precision of bfloat16 add up; what is stored is the rounded master."""
    model = dataclasses.replace(PLAIN, param_dtype="bfloat16")
    found = {}
    for masters in (True, False):
        config = settings(model=model, learning_rate=1e-3, warmup_steps=0, float32_masters=masters)
        params, grads = few(jnp.bfloat16)
        state = init_optimizer(params, config)
        for _ in range(5):  # five steps of 1e-3 from 1; bfloat16 has a spacing of 2**-8 below it
            params, state = update(config, grads, state, params)
        found[masters] = (params, state)
    params, state = found[True]
    assert isinstance(state, Masters)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
    assert_same_bits(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))
    assert params["norm"]["scale"][0] < 1
    params, state = found[False]
    assert params["norm"]["scale"][0] == 1
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((params, state[1][0].mu)))


@pytest.mark.slow
def test_all_options_resume_bitwise(texts, tmp_path):
    options = {
        "model": dataclasses.replace(MODEL, param_dtype="bfloat16"),
        "accumulate": 2,
        "clip_norm": 0.5,
        "schedule": "wsd",
        "cooldown_steps": 2,
        "freeze": ("layers/attention/key",),
    }
    straight, stopped = (tiny(texts, tmp_path / name, **options) for name in ("a", "b"))
    train(straight)
    train(dataclasses.replace(stopped, steps=3))
    train(dataclasses.replace(stopped, resume=True))
    assert_same_bits(saved_state(straight, 6)[0], saved_state(stopped, 6)[0])


@pytest.mark.slow
def test_state_of_all_options_over_a_mesh(texts, tmp_path):
    model = dataclasses.replace(PLAIN, param_dtype="bfloat16", num_kv_heads=2)
    options = {"model": model, "batch_size": 4, "accumulate": 2, "freeze": ("embedding",)}
    alone, moved = (tiny(texts, tmp_path / name, **options) for name in ("alone", "moved"))
    train(alone)
    train(dataclasses.replace(moved, mesh="data=2,tensor=2", fsdp=True))
    states = [saved_state(x, 6)[0] for x in (moved, alone)]
    assert_close(states[0].opt_state.params, states[1].opt_state.params, atol=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "accumulate must be .* got 0"),
        ({"accumulate": 4}, "batch_size must be a multiple of accumulate=4, got 2"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0 .* got -1.0"),
        ({"schedule": "step"}, "schedule must be .* got 'step'"),
        ({"cooldown_steps": 2}, "cooldown_steps must come with schedule='wsd', got 2"),
        (
            {"schedule": "wsd", "cooldown_steps": 5},
            r"warmup_steps \+ cooldown_steps must be at most decay_steps, got 2 \+ 5 and 6",
        ),
        ({"freeze": ("(",)}, r"freeze must hold regular expressions, got '\('"),
        ({"freeze": "layers"}, "freeze must be a tuple of regular expressions, got 'layers'"),
        ({"float32_masters": 1}, "float32_masters must be .* got 1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_parts_must_divide_over_the_mesh():
    placement = Placement.build("data=2")
    with pytest.raises(ValueError, match=r"batch_size .* accumulate=2 times .* data=2, got 2"):
        check_placement(placement, PLAIN, batch_size=2, seq_len=32, accumulate=2)


def test_a_pattern_that_matches_nothing(texts, tmp_path):
    config = tiny(texts, tmp_path / "out", freeze=("layers/query",), model=DENSE)
    with pytest.raises(ValueError, match=r"freeze must match .*'layers/query'.*layers/attention/q"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_files_of_earlier_versions():
    """They have none of these fields; parameters of 16 bits had no masters."""
    new = {"accumulate", "clip_norm", "schedule", "cooldown_steps", "freeze", "float32_masters"}
    new |= {"tensorboard", "config", "attention_warmup"}
    for dtype, masters in (("float32", True), ("bfloat16", False)):
        model = dataclasses.replace(MODEL, param_dtype=dtype)
        config = settings(model=model, float32_masters=masters)
        values = json.loads(json.dumps(config_to_json(config)))
        old = {name: value for name, value in values.items() if name not in new}
        assert config_from_json(old) == config
        check_resumable(config_from_json(old), config)


def test_the_step_may_not_change_on_resume():
    saved = settings(batch_size=4)
    for changes in ({"accumulate": 2}, {"clip_norm": 0.0}, {"schedule": "wsd"}, {"freeze": ("a",)}):
        with pytest.raises(ValueError, match=f"resume must keep .* got {next(iter(changes))}="):
            check_resumable(saved, dataclasses.replace(saved, **changes))
    check_resumable(saved, dataclasses.replace(saved, tensorboard=True, config=Path("run.json")))
