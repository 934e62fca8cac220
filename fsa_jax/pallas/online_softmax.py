"""Online softmax of the Triton kernels over tiles of logits, and float32 sums of many tiles."""

import dataclasses

import jax
import jax.numpy as jnp

from fsa_jax.pallas.intrinsics import LOG2_E, await_mma, dot, exp2, log2, multiply_add, reciprocal


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A softmax over scale * logits, with the fewest possible instructions per logit.

    float32 inputs (`exact`) take a few instructions more: the largest weight of a row is exactly 1,
    so that a query that attends to one key returns its value, and exponents are kept in natural
    units, in which they are also rounded.
    """

    scale: float
    exact: bool

    @property
    def factor(self) -> float:
        """Factor from the logits that `signed` returns to exponents."""
        return (abs(self.scale) or 1.0) * (1 if self.exact else LOG2_E)

    def signed(self, logits: jax.Array) -> jax.Array:
        """The logits, negated if the scale is negative: larger logits then get larger weights."""
        if self.scale == 0:
            return logits * 0.0
        return logits if self.scale > 0 else -logits

    def row_max(self, logits: jax.Array) -> jax.Array:
        """The largest exponent of each row."""
        return jnp.max(logits, axis=1) * self.factor

    def weights(self, logits: jax.Array, row_max: jax.Array) -> jax.Array:
        """exp(scale * logits), relative to the weight of the exponent `row_max`."""
        if self.exact:
            return exp2((logits * self.factor - row_max) * LOG2_E)
        return exp2(multiply_add(logits, self.factor, -row_max))

    def decay(self, row_max: jax.Array, new_max: jax.Array) -> jax.Array:
        """Factor that rescales weights relative to `row_max` to weights relative to `new_max`."""
        return exp2((row_max - new_max) * (LOG2_E if self.exact else 1.0))

    def fold(self, row_max: jax.Array, logits: jax.Array, whole: bool = False):
        """A step of an online softmax: the new largest exponents, the weights, and the decay.

        A row whose logits are all -inf so far gets weights and decay 2^-inf = 0; if there is no
        such row, `whole` omits the instructions for this case.
        """
        new_max = jnp.maximum(row_max, self.row_max(logits))
        safe = new_max if whole else jnp.where(new_max == -jnp.inf, 0.0, new_max)
        return new_max, self.weights(logits, safe[:, None]), self.decay(row_max, safe)

    def attend(self, state, logits: jax.Array, values):
        """The next state: largest exponents, sums of weights, tiles of sums of weighted values."""
        row_max, row_sum, out = state
        row_max, p, decay = self.fold(row_max, logits)
        p_cut = p.astype(values[0].dtype)
        out = [x * decay[:, None] + dot(p_cut, v, (1, 0)) for x, v in zip(out, values, strict=True)]
        return row_max, row_sum * decay + jnp.sum(p, axis=1), out

    def mean(self, x: jax.Array, row_sum: jax.Array) -> jax.Array:
        """Divides sums x [R, D] of weighted values by the sums of the weights [R]."""
        return x / row_sum[:, None] if self.exact else x * reciprocal(row_sum)[:, None]

    def lse(self, row_max: jax.Array, row_sum: jax.Array) -> jax.Array:
        """Natural logarithm of a sum of weights; `row_sum` is that sum relative to `row_max`."""
        if self.exact:
            return row_max + jnp.log(row_sum)
        return (row_max + log2(row_sum)) * (1 / LOG2_E)


def softmax_weights(logits: jax.Array, lse: jax.Array, scale: float, dtype) -> jax.Array:
    """Weights exp(scale * logits - lse) of a softmax whose natural logsumexp is known."""
    if dtype == jnp.float32:
        return exp2((logits * scale - lse) * LOG2_E)
    return exp2(multiply_add(logits, scale * LOG2_E, lse * -LOG2_E))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
    """A float32 sum of many tiles, with an optional Kahan compensation term.

    float32 products are so accurate that the order of long sums matters: the error of thousands of
    terms added in sequence is several times that of dense attention, which adds them in trees.
    """

    total: jax.Array
    compensation: jax.Array | None

    @staticmethod
    def zeros(shape: tuple[int, ...], exact: bool) -> "Sum":
        zeros = jnp.zeros(shape, jnp.float32)
        return Sum(zeros, zeros if exact else None)

    def add(self, part: jax.Array, decay: jax.Array | None = None) -> "Sum":
        """The sum times `decay`, plus `part`."""
        total = self.total if decay is None else self.total * decay
        if self.compensation is None:
            return Sum(total + part, None)
        part = part - (self.compensation if decay is None else self.compensation * decay)
        new = total + part
        return Sum(new, (new - total) - part)

    def await_mma(self) -> "Sum":
        """The same sum, once its products have completed; see `await_mma`."""
        return self if self.compensation is not None else Sum(await_mma(self.total), None)
