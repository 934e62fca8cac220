"""Runs whose layers of sparse attention compute full attention in the first steps."""

import dataclasses
import json
import logging
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import assert_same_bits

from fsa_jax.training import RunStopped, TrainConfig, load_model, read_metrics, train
from fsa_jax.training import progress as shown
from fsa_jax.training.config import check_resumable, config_from_json, config_to_json
from fsa_jax.training.mesh import Placement
from fsa_jax.training.optimizer import decay_mask, init_optimizer, split_frozen, update
from fsa_jax.training.start import check_start
from fsa_jax.training.step import (
    abstract_model,
    init_model,
    init_state,
    make_eval_step,
    make_train_step,
)
from training.runs import MODEL, saved_state, signals_at, tiny, without_times

#: A model of one layer with every parameter that full attention reads, and biases of the gates.
SPARSE = dataclasses.replace(
    MODEL, num_layers=1, qk_norm=True, qkv_bias=True, out_bias=True, gate_bias=True
)
FULL = dataclasses.replace(SPARSE, attention="full")
#: The parameters of an attention layer that full attention does not read.
UNREAD = ".*attention/(gate|compress_key|compress_value)"


def settings(**changes) -> TrainConfig:
    return tiny(Path("texts"), Path("out"), **{"model": SPARSE} | changes)


def batch():
    """Returns tokens and segment ids of two packed sequences with padding."""
    tokens = np.random.default_rng(0).integers(0, 256, size=(2, 32)).astype(np.int32)
    ids = np.repeat([[1, 2, 3, 0]], [14, 3, 10, 5], axis=1).repeat(2, axis=0).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(ids)


def trained(config, params, *, full_attention=False):
    """Returns the state and the metrics after three steps from copies of parameters."""
    step = make_train_step(abstract_model(config.model)[0], config, full_attention=full_attention)
    state, metrics = init_state(jax.tree.map(jnp.copy, params), config), []
    for _ in range(3):
        state, row = step(state, *batch())
        metrics.append(row)
    return state, jnp.asarray(metrics)


def test_a_step_is_that_of_full_attention():
    """Same losses, gradients, moments and parameters; what is not read keeps its bits."""
    config = settings(attention_warmup="full:3", warmup_steps=0)
    _, params = init_model(SPARSE, 0)
    state, metrics = trained(config, params, full_attention=True)
    read, unread = split_frozen(params, (UNREAD,))
    dense, wanted = trained(settings(model=FULL, warmup_steps=0), read)
    np.testing.assert_allclose(metrics, wanted, rtol=1e-5)

    ours, theirs = (x.opt_state[1][0] for x in (state, dense))
    for got, expected in ((state.params, dense.params), (ours.mu, theirs.mu), (ours.nu, theirs.nu)):
        got = split_frozen(got, (UNREAD,))[0]
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)
    assert sorted(unread["layers"]["attention"]) == ["compress_key", "compress_value", "gate"]
    assert_same_bits(split_frozen(state.params, (UNREAD,))[1], unread)
    for moments in (ours.mu, ours.nu):
        assert not any(x.any() for x in jax.tree.leaves(split_frozen(moments, (UNREAD,))[1]))
    for old, new in zip(
        jax.tree.leaves(read),
        jax.tree.leaves(split_frozen(state.params, (UNREAD,))[0]),
        strict=True,
    ):
        assert (old != new).any()


@pytest.mark.slow
def test_an_evaluation_is_that_of_full_attention():
    graphdef, params = init_model(SPARSE, 0)
    read, _ = split_frozen(params, (UNREAD,))
    dense, count = make_eval_step(abstract_model(FULL)[0])(read, *batch())
    warm, sparse = (
        make_eval_step(graphdef, full_attention=full)(params, *batch()) for full in (True, False)
    )
    np.testing.assert_allclose(warm[0], dense, rtol=1e-6)
    assert abs(sparse[0] - dense) > 1e-3
    assert warm[1] == sparse[1] == count


def test_the_first_update_after_the_switch():
    """Adam counts the steps of the warm-up for moments that are still 0 too."""
    changes = {"schedule": "constant", "warmup_steps": 0, "clip_norm": None}
    config = settings(**changes, weight_decay=0.5)
    start = {"layers": {"attention": {x: {"kernel": jnp.ones(2)} for x in ("gate", "query")}}}
    grads = {"layers": {"attention": {"gate": {"kernel": jnp.zeros(2)}}}}
    grads["layers"]["attention"]["query"] = {"kernel": jnp.full(2, 3.0)}
    params, state = start, init_optimizer(start, config)
    for _ in range(3):
        params, state = update(config, grads, state, params, full_attention=True)
    warm = params["layers"]["attention"]
    assert_same_bits(warm["gate"], start["layers"]["attention"]["gate"])
    np.testing.assert_allclose(warm["query"]["kernel"], 1 - 3e-2, rtol=0.02)

    grads["layers"]["attention"]["gate"] = grads["layers"]["attention"]["query"]
    params, _ = update(settings(**changes, weight_decay=0.0), grads, state, params)
    share = 0.1 / (1 - 0.9**4) / np.sqrt(0.05 / (1 - 0.95**4))  # 0.45 after a long warm-up
    gate = params["layers"]["attention"]["gate"]["kernel"]
    np.testing.assert_allclose(gate, 1 - share * config.learning_rate, rtol=1e-6)


@pytest.mark.parametrize("layer_types", [None, ("full", "nsa")])
def test_weight_decay_spares_what_is_not_read(layer_types):
    model = dataclasses.replace(SPARSE, num_layers=2, layer_types=layer_types)
    _, params = abstract_model(model)
    flat = {
        full: {
            "/".join(str(key.key) for key in path): value
            for path, value in jax.tree_util.tree_leaves_with_path(
                decay_mask(params, full_attention=full)
            )
        }
        for full in (False, True)
    }
    spared = {path for path, value in flat[False].items() if value and not flat[True][path]}
    layer = "layers/attention/" if layer_types is None else "layers/nsa/attention/"
    names = ("gate/kernel", "compress_key/weights", "compress_key/positions")
    assert spared == {layer + name for name in (*names, "compress_value/weights")}
    assert all(flat[False][path] for path, value in flat[True].items() if value)


@pytest.mark.parametrize(
    ("value", "changes", "message"),
    [
        *((text, {}, "None or full:STEPS, .* positive") for text in ("full:0", "full:-1")),
        *((text, {}, "None or full:STEPS") for text in ("full:x", "window:5", "full", "")),
        (5, {}, "None or full:STEPS"),
        ("full:7", {}, "end within the run, .* steps=6"),
        ("full:3", {"model": FULL}, "None for a model without .* attention='full'"),
        ("full:3", {"model": dataclasses.replace(SPARSE, kv_per_branch=True)}, "kv_per_branch"),
    ],
)
def test_bad_settings(value, changes, message):
    with pytest.raises(ValueError, match=rf"attention_warmup .*{message}") as error:
        settings(attention_warmup=value, **changes)
    assert f"got {value!r}" in str(error.value)


def test_freezing_all_that_full_attention_reads():
    rest = ("embedding", "norm", "layers/(mlp|mlp_norm|attention_norm)")
    attention = "layers/attention/(query|key|value|out|query_norm|key_norm)"
    config = settings(attention_warmup="full:3", freeze=(*rest, attention))
    with pytest.raises(ValueError, match=r"attention_warmup must .* layers/attention/gate/bias"):
        check_start(config, Placement.build(""))
    check_start(dataclasses.replace(config, freeze=rest), Placement.build(""))
    check_start(dataclasses.replace(config, attention_warmup=None), Placement.build(""))


def test_the_warm_up_may_not_change_on_resume():
    saved = settings(attention_warmup="full:3")
    for value in (None, "full:4"):
        with pytest.raises(ValueError, match=r"resume must keep .* got attention_warmup="):
            check_resumable(saved, dataclasses.replace(saved, attention_warmup=value))
    check_resumable(saved, dataclasses.replace(saved, steps=9))


def test_runs_of_earlier_versions_have_none():
    values = json.loads(json.dumps(config_to_json(settings())))
    assert values.pop("attention_warmup") is None
    check_resumable(config_from_json(values), settings())


def test_the_switch_is_shown_at_once(capfd):
    row = {"loss": 1.0, "tokens_per_s": 5.0}
    with shown.Progress(0, 9, show=True) as progress:
        progress.steps([{"step": 3, "attention": "full"} | row])
        progress.steps([{"step": 4, "attention": "nsa"} | row])
        progress.steps([{"step": 5, "attention": "nsa"} | row])
    (line,) = (x for x in capfd.readouterr().err.splitlines() if x.startswith("step"))
    assert line.startswith("step 4/9: attention nsa, loss 1.000")


@pytest.mark.slow
def test_a_run_goes_on_bitwise_from_every_phase(texts, tmp_path, monkeypatch, capfd, caplog):
    """Stopped in the warm-up, at the switch and after it; each program is compiled once."""
    options = {
        "attention_warmup": "full:3",
        "model": dataclasses.replace(SPARSE, param_dtype="bfloat16"),
        "eval_every": 1,
        "accumulate": 2,
        "freeze": ("layers/mlp",),
    }
    straight, stopped = (tiny(texts, tmp_path / name, **options) for name in ("a", "b"))

    def compiled(config):
        """Trains, and returns how often the two steps were compiled."""
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            train(config)
        messages = [x.getMessage() for x in caplog.records]
        done = [x for x in messages if x.startswith("Finished XLA compilation of jit(")]
        return [sum(f"jit({name}_step)" in x for x in done) for name in ("train", "eval")]

    assert compiled(straight) == [2, 2]
    for step in (2, 3, 4):
        with monkeypatch.context() as patch:
            signals_at(patch, step, signal.SIGTERM)
            with pytest.raises(RunStopped):
                train(dataclasses.replace(stopped, resume=step > 2))
        capfd.readouterr()
        config = load_model(stopped.run_folder)[1]
        warned = f"at step {step} of attention_warmup='full:3'" in capfd.readouterr().err
        assert (config.attention_warmup, warned) == ("full:3", step <= 3)
    assert compiled(dataclasses.replace(stopped, resume=True)) == [1, 1]

    states = [saved_state(config, 6)[0] for config in (straight, stopped)]
    assert_same_bits(*states)
    rows, others = (
        without_times(read_metrics(config.run_folder / "metrics.jsonl"))
        for config in (straight, stopped)
    )
    assert rows == others
    for name in ("loss", "val_loss"):
        found = {row["step"]: row["attention"] for row in rows if name in row}
        assert found == {step: "full" if step <= 3 else "nsa" for step in range(1, 7)}
    values = json.loads((straight.run_folder / "run.json").read_text())
    assert values["result"]["attention"] == "nsa"


@pytest.mark.slow
def test_another_run_starts_from_the_end_of_the_warm_up(texts, tmp_path, capfd):
    """With the weights of the model of sparse attention, whose gates are the first ones."""
    source = tiny(texts, tmp_path / "source", model=SPARSE, steps=3, attention_warmup="full:3")
    train(source)
    state, _ = saved_state(source, 3)
    _, params = init_model(SPARSE, source.seed)
    assert_same_bits(*(split_frozen(x, (UNREAD,))[1] for x in (state.params, params)))
    capfd.readouterr()
    target = tiny(texts, tmp_path / "target", model=SPARSE, init=source.run_folder, steps=1)
    train(dataclasses.replace(target, learning_rate=1e-9))
    assert "at step 3 of attention_warmup='full:3'" in capfd.readouterr().err
    assert_same_bits(saved_state(target, 1)[0].params, state.params)
