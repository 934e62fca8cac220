"""The optimiser: its schedules, parameters that stay frozen, and float32 copies of the others."""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fsa_jax.layers import SPARSE_PARTS
from fsa_jax.semantics.precision import narrow
from fsa_jax.training.config import FINAL_LEARNING_RATE, TrainConfig

_ADAM_B2 = 0.95  # the usual choice for language models: a shorter average than with 0.999

# These parameters are vectors. In a stack of layers they have a layer axis too, so their rank alone
# does not tell them from matrices.
_NOT_DECAYED = frozenset({"scale", "bias"})


class Masters(NamedTuple):
    """The state of an optimiser that keeps parameters of 16 bits in float32 too.

    Attributes:
      params: the float32 parameters, which the updates are added to.
      inner: the state of the optimiser of these.
    """

    params: Any
    inner: Any


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warmup to the peak, and then what `config.schedule` says; see `TrainConfig`."""
    peak, last = config.learning_rate, config.last_decay_step
    final = peak * FINAL_LEARNING_RATE
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=config.warmup_steps,
            decay_steps=last,
            end_value=final,
        )
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    if config.schedule == "constant":
        parts, ends = [warmup, optax.constant_schedule(peak)], [config.warmup_steps]
    else:
        cooldown = config.last_cooldown_steps
        fall = optax.linear_schedule(peak, final, cooldown)
        parts = [warmup, optax.constant_schedule(peak), fall]
        ends = [config.warmup_steps, last - cooldown]
    return optax.join_schedules(parts, ends)


def make_optimizer(
    config: TrainConfig, *, full_attention: bool = False
) -> optax.GradientTransformation:
    """AdamW after clipping by global norm, with weight decay on matrices only.

    Args:
      config: the run.
      full_attention: whether the step is one of the attention warm-up. Parameters that full
        attention does not read then keep their bits and their moments of zero: their gradient is 0,
        and they have no weight decay. The state has the same tree either way.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            learning_rate_schedule(config),
            b2=_ADAM_B2,
            weight_decay=config.weight_decay,
            mask=functools.partial(decay_mask, full_attention=full_attention),
        ),
    )


def decay_mask(params: Any, *, full_attention: bool = False) -> Any:
    """True at the parameters that weight decay applies to: all but norm scales and biases.

    With `full_attention`, also all but those that only sparse attention reads.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: (
            str(path[-1].key) not in _NOT_DECAYED and not (full_attention and _only_sparse(path))
        ),
        params,
    )


def _only_sparse(path: Any) -> bool:
    """Whether a parameter is one that sparse attention reads and full attention does not."""
    return any(
        layer.key == "attention" and part.key in SPARSE_PARTS
        for layer, part in itertools.pairwise(path)
    )


def check_full_attention_trains(trained: Any) -> None:
    """Raises ValueError unless some of the trained parameters are read by full attention."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    if all(_only_sparse(path) for path in paths):
        raise ValueError(
            "attention_warmup must have parameters to train, but full attention reads none of "
            "those that freeze leaves: "
            + ", ".join("/".join(key.key for key in path) for path in paths)
        )


def init_optimizer(params: Any, config: TrainConfig) -> Any:
    """The optimiser's state, of the parameters that are trained."""
    trained, _ = split_frozen(params, config.freeze)
    optimizer = make_optimizer(config)
    if not config.has_masters:
        return optimizer.init(trained)
    masters = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    return Masters(masters, optimizer.init(masters))


@narrow
def update(
    config: TrainConfig,
    grads: Any,
    opt_state: Any,
    trained: Any,
    *,
    full_attention: bool = False,
) -> tuple[Any, Any]:
    """The trained parameters and the optimiser's state after a step.

    Args:
      config: the run.
      grads: gradients of the trained parameters, in their dtype or in float32.
      opt_state: the state before.
      trained: the trained parameters.
      full_attention: as in `make_optimizer`.
    """
    optimizer = make_optimizer(config, full_attention=full_attention)
    masters, state = opt_state if isinstance(opt_state, Masters) else (trained, opt_state)
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, masters)
    # optax raises float32 numbers to the power of int32 steps, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(grads, state, masters)
    masters = optax.apply_updates(masters, updates)
    if not isinstance(opt_state, Masters):
        return masters, state
    params = jax.tree.map(lambda x, wide: wide.astype(x.dtype), trained, masters)
    return params, Masters(masters, state)


@narrow
def learning_rate(config: TrainConfig, step: Array) -> Array:
    """The learning rate of the update after `step` steps."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(learning_rate_schedule(config)(step))


def split_frozen(params: Any, patterns: Sequence[str]) -> tuple[Any, Any]:
    """The parameters that are trained, and those that a pattern freezes, as nested dicts.

    Args:
      params: nested dict of parameters.
      patterns: regular expressions. One freezes a parameter if it matches its path, such as
        layers/attention/query/kernel, or the beginning of the path up to a slash.

    Raises:
      ValueError: a pattern matches nothing, or nothing is left to train.
    """
    if not patterns:
        return params, {}
    paths = _paths(params)
    found = [re.compile(f"(?:{pattern})(?:/.*)?") for pattern in patterns]
    for pattern, rule in zip(patterns, found, strict=True):
        if not any(rule.fullmatch(path) for path in paths):
            raise ValueError(
                f"freeze must match parameters, got {pattern!r}, which matches none of "
                + ", ".join(paths)
            )
    frozen = {path for path in paths if any(rule.fullmatch(path) for rule in found)}
    if len(frozen) == len(paths):
        raise ValueError(f"freeze must leave parameters to train, got {list(patterns)}")
    return _kept(params, set(paths) - frozen), _kept(params, frozen)


def joined(trained: Any, frozen: Any) -> Any:
    """The parameters that `split_frozen` has divided."""
    if not isinstance(trained, dict) or not isinstance(frozen, dict):
        return trained
    both = {key: joined(trained[key], frozen[key]) for key in trained.keys() & frozen.keys()}
    return trained | frozen | both


def _paths(params: Any, prefix: str = "") -> list[str]:
    if not isinstance(params, dict):
        return [prefix]
    start = f"{prefix}/" if prefix else ""
    return [path for key, value in params.items() for path in _paths(value, f"{start}{key}")]


def _kept(params: Any, paths: set[str], prefix: str = "") -> Any:
    """The parts of nested dicts that have one of these paths below them."""
    kept = {}
    for key, value in params.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, dict):
            if inner := _kept(value, paths, path):
                kept[key] = inner
        elif path in paths:
            kept[key] = value
    return kept
