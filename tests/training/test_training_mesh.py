"""Runs that resume on another device mesh than the one they started on."""

import dataclasses

import jax
import numpy as np
import pytest

from fsa_jax.training import read_metrics, train
from training.runs import MODEL, saved_state, tiny

# Dropout depends on the position in a sequence, and zigzag order permutes the tokens.
NSA = dataclasses.replace(MODEL, num_layers=1, dropout_rate=0.0)
FULL = dataclasses.replace(MODEL, num_kv_heads=2, attention="full")
#: Every option that adds parameters, and layers of all types.
HYBRID = dataclasses.replace(
    NSA,
    num_layers=3,
    num_kv_heads=2,
    layer_types=("full", "window", "nsa"),
    qk_norm=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gate_bias=True,
    gate_bias_init=(-1.0, 1.0, 0.0),
    compress_after_rope=True,
    rope_interleaved=True,
    tie_embeddings=False,
)


def losses(config):
    rows = read_metrics(config.run_folder / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "meshes", "warmup"),
    [
        (FULL, ("data=4,tensor=2", "data=2"), None),
        (NSA, ("", "data=2,sequence=2"), None),
        (HYBRID, ("data=2,tensor=2,sequence=2", "data=2,tensor=2"), None),
        (HYBRID, ("data=2,tensor=2,sequence=2", "data=2,tensor=2"), "full:2"),
    ],
    ids=["full", "nsa", "hybrid", "warm-up"],
)
def test_a_run_goes_on_over_another_mesh(model, meshes, warmup, texts, tmp_path):
    """Losses and the final state match one device, up to float32 rounding."""
    common = {"model": model, "batch_size": 4, "steps": 4, "eval_every": 4, "checkpoint_every": 2}
    common["attention_warmup"] = warmup
    alone, moved = (tiny(texts, tmp_path / name, **common) for name in ("alone", "moved"))
    train(alone)
    first, second = meshes
    train(dataclasses.replace(moved, mesh=first, fsdp=bool(first), steps=2))
    train(dataclasses.replace(moved, mesh=second, resume=True))
    got, wanted = (losses(x) for x in (moved, alone))
    assert sorted(got) == [1, 2, 3, 4]
    np.testing.assert_allclose(*([x[step] for step in got] for x in (got, wanted)), rtol=2e-6)
    (state, position), (wanted, wanted_position) = (saved_state(x, 4) for x in (moved, alone))
    assert position.batches == wanted_position.batches
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
