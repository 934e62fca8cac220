"""The training step: loss, optimiser and state, as pure functions of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Wrapped
from jaxtyping import Float32, Int32, UInt32

from fsa_jax.arguments import checks
from fsa_jax.losses import cross_entropy
from fsa_jax.semantics.precision import accumulation_dtype, narrow
from fsa_jax.semantics.segments import cut
from fsa_jax.sequence_parallel.zigzag import to_zigzag
from fsa_jax.training.config import TrainConfig
from fsa_jax.training.mesh import Placement
from fsa_jax.training.optimizer import (
    Masters,
    init_optimizer,
    joined,
    learning_rate,
    make_optimizer,
    split_frozen,
    update,
)
from fsa_jax.transformer import Transformer, TransformerConfig


class TrainState(NamedTuple):
    """Everything that a training step updates or draws random numbers from.

    Attributes:
      params: pure nested dict of parameters.
      opt_state: state of the optax optimiser, of the parameters that are not frozen; with
        `TrainConfig.has_masters` a `Masters`.
      step: number of completed steps.
      rng: data of the run's random key; a step folds its number into the key for dropout.
    """

    params: Any
    opt_state: Any
    step: Int32[Array, ""]
    rng: UInt32[Array, " words"]


class StepMetrics(NamedTuple):
    """The metrics of one step.

    Attributes:
      loss: mean loss in nats per byte, before the update.
      grad_norm: global norm of the gradient before clipping.
      learning_rate: learning rate of the update.
    """

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]
    learning_rate: Float32[Array, ""]


def init_model(config: TransformerConfig, seed: int, shardings: Any = None) -> tuple[Any, Any]:
    """Builds the model: its graph definition, and its parameters as a pure nested dict."""
    # A single compiled function: to compile each small operation alone takes three times as long.
    params = jax.jit(lambda: _split_model(config, seed)[1], out_shardings=shardings)()
    return abstract_model(config)[0], params


def abstract_model(config: TransformerConfig) -> tuple[Any, Any]:
    """Like `init_model`, with `jax.ShapeDtypeStruct`s in place of the parameters."""
    graphdefs = []

    def params():
        graphdef, params = _split_model(config, 0)
        graphdefs.append(graphdef)
        return params

    template = jax.eval_shape(params)
    return graphdefs[0], template


def _split_model(config: TransformerConfig, seed: int) -> tuple[Any, Any]:
    graphdef, state = nnx.split(Transformer(config, rngs=nnx.Rngs(seed)))
    return graphdef, nnx.to_pure_dict(state)


def init_state(params: Any, config: TrainConfig) -> TrainState:
    """The state before the first step."""
    return TrainState(
        params=params,
        opt_state=init_optimizer(params, config),
        step=jnp.zeros((), jnp.int32),
        # A key of its own: dropout must be independent of the parameters' initialisation.
        rng=jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), 1)),
    )


def next_byte_loss(
    logits: Float32[Array, "B T V"], tokens: Int32[Array, "B T"], segment_ids: Int32[Array, "B T"]
) -> tuple[Float32[Array, ""], Int32[Array, ""]]:
    """Summed cross-entropy of the next byte, and the number of predicted bytes.

    The sum over t of -log softmax(logits[t])[tokens[t + 1]], with the natural logarithm, over the
    positions whose next token is in the same segment. Positions at padding predict nothing; their
    logits may have any value.

    Args:
      logits: float32 [B, T, V].
      tokens: int32 [B, T].
      segment_ids: int32 [B, T], 0 at padding.

    Returns:
      The sum in nats, float32, and the number of predicted bytes, int32.

    Raises:
      ValueError: outside jit, a token that is to be predicted is not in the vocabulary. Inside jit,
        such a token makes the sum NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> ids = jnp.asarray([[1, 1, 2, 0]], jnp.int32)
      >>> total, count = next_byte_loss(jnp.zeros((1, 4, 257)), ids, ids)
      >>> int(count)
      1
    """
    return _summed_loss(logits, *_targets(tokens, segment_ids))


def _targets(tokens, segment_ids):
    """The token after each position, and whether it is predicted; int32 and bool [B, T]."""
    targets = jnp.roll(tokens, -1, axis=1)
    following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return targets, (segment_ids == following) & (segment_ids > 0)


@narrow
def _summed_loss(logits, targets, counted):
    targets = checks.tokens("tokens", targets, logits.shape[-1], counted)
    # The inputs are zeroed before the loss: otherwise its gradient would be 0 times their values
    # at uncounted positions, which may be NaN.
    losses = optax.softmax_cross_entropy_with_integer_labels(
        cut(logits, counted), cut(targets, counted)
    )
    return cut(losses, counted).sum(), counted.sum(dtype=jnp.int32)


def _model_loss(model: Transformer, inputs, ids, targets, counted, *, key, placement):
    """Like `_summed_loss`, of a model's logits, which are never all held at once."""
    x = model.hidden_states(inputs, ids, dropout_key=key)
    place = {}
    if placement is not None and placement.mesh.size > 1:
        # Otherwise XLA may split the tokens of the whole model as the loss does.
        states = NamedSharding(placement.mesh, PartitionSpec(*placement.tokens.spec, None))
        x = jax.lax.with_sharding_constraint(x, states)
        place = {"mesh": placement.mesh, "spec": placement.loss_tokens(inputs.shape)}
    losses = cross_entropy(x, model.head_weight, targets, counted, **place)
    return losses.sum(), counted.sum(dtype=jnp.int32)


def _arrange(placement: Placement | None, *arrays):
    """Arrays [B, T] in the token order of the model, which sequence parallelism permutes."""
    if placement is None or placement.sequence_devices == 1:
        return arrays
    devices = placement.sequence_devices
    return tuple(
        jax.lax.with_sharding_constraint(to_zigzag(x, devices), placement.tokens) for x in arrays
    )


def state_shardings(config: TrainConfig, placement: Placement) -> TrainState:
    """The shardings of the training state."""
    params = placement.params(config.model)
    template = abstract_model(config.model)[1]
    trained, template = (split_frozen(x, config.freeze)[0] for x in (params, template))
    opt_state = placement.opt_state(make_optimizer(config), trained, template)
    if config.has_masters:
        opt_state = Masters(trained, opt_state)
    rest: Any = placement.replicated
    return TrainState(params, opt_state, step=rest, rng=rest)


def _merged(graphdef: Any, params: Any, full_attention: bool) -> Transformer:
    """The model, whose layers of sparse attention compute full attention if that is asked for."""
    model = nnx.merge(graphdef, params)
    if full_attention:
        model.set_attributes(full_attention=True)
    return model


def make_train_step(
    graphdef: Any,
    config: TrainConfig,
    placement: Placement | None = None,
    *,
    full_attention: bool = False,
) -> Wrapped:
    """Builds the step (state, tokens [B, T], segment_ids [B, T]) -> (state, metrics).

    The state is donated: the old one must not be used afterwards. With a `placement`, the state is
    split by `state_shardings` and the batch by `Placement.batch`; without one, everything is on one
    device. With `full_attention` it is a step of the attention warm-up, of the same state.
    """

    def train_step(state: TrainState, tokens: Array, segment_ids: Array):
        key = None
        if config.model.dropout_rate > 0:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        arrays = (tokens, segment_ids, *_targets(tokens, segment_ids))
        arrays = _arrange(placement, *arrays)
        count = jnp.maximum(arrays[-1].sum(dtype=jnp.int32), 1).astype(jnp.float32)
        trained, frozen = split_frozen(state.params, config.freeze)

        def loss(trained, arrays, key):
            """The part's share of the mean over the predicted tokens of the whole batch."""
            model = _merged(graphdef, joined(trained, frozen), full_attention)
            return _model_loss(model, *arrays, key=key, placement=placement)[0] / count

        if config.accumulate == 1:
            value, grads = jax.value_and_grad(loss)(trained, arrays, key)
        else:
            parts = tuple(_parts(x, config.accumulate, placement) for x in arrays)
            value, grads = _summed_gradients(loss, trained, parts, key)
        trained, opt_state = update(
            config, grads, state.opt_state, trained, full_attention=full_attention
        )
        rate = learning_rate(config, state.step)
        metrics = StepMetrics(value, optax.tree.norm(grads), rate)
        params = joined(trained, frozen)
        return TrainState(params, opt_state, state.step + 1, state.rng), metrics

    if placement is None:
        return jax.jit(train_step, donate_argnums=0)
    state = state_shardings(config, placement)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state, placement.batch, placement.batch),
        out_shardings=(state, placement.replicated),
    )


def _parts(x: Array, count: int, placement: Placement | None) -> Array:
    """The array [B, T] as `count` parts [count, B / count, T], without moving rows of a device."""
    devices = 1 if placement is None else placement.mesh.shape["data"]
    x = x.reshape(devices, count, -1, x.shape[1]).swapaxes(0, 1)
    x = x.reshape(count, -1, x.shape[-1])
    if placement is None or placement.mesh.size == 1:
        return x
    split = NamedSharding(placement.mesh, PartitionSpec(None, *placement.tokens.spec))
    return jax.lax.with_sharding_constraint(x, split)


@narrow
def _summed_gradients(loss, params, parts, key):
    """The sums of a loss and of its gradients over parts of a batch, in float32.

    Args:
      loss: function of the parameters, the arrays of a part, and a random key or None.
      params: the parameters.
      parts: arrays whose first axis is that of the parts.
      key: random key of dropout, or None; each part folds its number into it.
    """

    def step(sums, part):
        number, arrays = part
        own = None if key is None else jax.random.fold_in(key, number)
        found = jax.value_and_grad(loss)(params, arrays, own)
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, found), None

    wide = lambda x: jnp.zeros(x.shape, accumulation_dtype(x))  # noqa: E731
    start = (jnp.zeros((), jnp.float32), jax.tree.map(wide, params))
    numbers = jnp.arange(parts[0].shape[0], dtype=jnp.int32)
    return jax.lax.scan(step, start, (numbers, parts))[0]


def make_eval_step(
    graphdef: Any, placement: Placement | None = None, *, full_attention: bool = False
) -> Wrapped:
    """Builds the step (params, tokens [B, T], segment_ids [B, T]) -> `next_byte_loss`'s results.

    With `full_attention`, the loss is that of the model in the attention warm-up.
    """

    def eval_step(params, tokens: Array, segment_ids: Array):
        arrays = (tokens, segment_ids, *_targets(tokens, segment_ids))
        arrays = _arrange(placement, *arrays)
        model = _merged(graphdef, params, full_attention)
        return _model_loss(model, *arrays, key=None, placement=placement)

    return jax.jit(eval_step, out_shardings=None if placement is None else placement.replicated)
