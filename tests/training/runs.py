"""Tiny training runs: their settings, what they have saved, and signals that stop them."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from fsa_jax import NSAConfig
from fsa_jax.training import Checkpoints, TrainConfig, loop
from fsa_jax.training.step import abstract_model, init_state
from fsa_jax.transformer import TransformerConfig

NSA = NSAConfig(
    kernel_size=4,
    kernel_stride=2,
    block_size=4,
    topk=3,
    init_blocks=1,
    local_blocks=1,
    window_size=6,
)
MODEL = TransformerConfig(
    vocab_size=257,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    nsa=NSA,
    dropout_rate=0.1,  # so that a lost rng is noticed
)
DENSE = dataclasses.replace(MODEL, attention="full")


def tiny(texts: Path, out: Path, **changes) -> TrainConfig:
    config = TrainConfig(
        text=(texts,),
        out=out,
        steps=6,
        eval_every=2,
        eval_sequences=3,
        checkpoint_every=3,
        batch_size=2,
        seq_len=32,
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=2,
        decay_steps=6,
        model=MODEL,
    )
    return dataclasses.replace(config, **changes)


def saved_state(config: TrainConfig, step: int):
    template = init_state(abstract_like(config), config)
    with Checkpoints(config.run_folder) as checkpoints:
        return checkpoints.read_state(step, template), checkpoints.read_position(step)


def abstract_like(config: TrainConfig):
    template = abstract_model(config.model)[1]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template)


def without_times(rows):
    """Returns rows of metrics without what differs from run to run."""
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]


def signals_at(monkeypatch, step: int, *numbers: int):
    """Sends signals during a training step."""
    advance = loop.TrainingBatches.__next__

    def batch(batches):
        found = advance(batches)
        if batches.get_state()["batches"] == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return found

    monkeypatch.setattr(loop.TrainingBatches, "__next__", batch)
