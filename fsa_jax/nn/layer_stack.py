"""Runs the layers of a model, of one type or of several, in few compiled loops.

The parameters of the layers of a type are stacked along a leading axis. Layers whose types repeat,
for example four windows and one full layer, eight times over, are one `lax.scan`, whose body has
one period of them. So tracing and compilation take the time of a few layers, however many there
are.

Shapes: L layers.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Stage(NamedTuple):
    """Consecutive layers that one loop runs.

    Attributes:
      types: the types of the layers of one iteration.
      repeats: the number of iterations.
    """

    types: tuple[str, ...]
    repeats: int


@functools.cache
def stages(types: tuple[str, ...]) -> tuple[Stage, ...]:
    """Divides layers of these types into stages, so that as few layers as possible are compiled.

    Example:
      >>> stages(("full", "nsa", "nsa", "nsa", "nsa"))
      (Stage(types=('full',), repeats=1), Stage(types=('nsa',), repeats=4))
      >>> stages(("window", "full") * 3)
      (Stage(types=('window', 'full'), repeats=3),)
    """
    count = len(types)
    # best[i] has the cost of the layers from i on (layers compiled, then stages), and the stages.
    best: list[tuple[tuple[int, int], tuple[Stage, ...]]] = [((0, 0), ())] * (count + 1)
    for first in reversed(range(count)):
        options = []
        for period in range(1, count - first + 1):
            unit, stop = types[first : first + period], first + period
            while True:
                (layers, loops), rest = best[stop]
                stage = Stage(unit, (stop - first) // period)
                options.append(((layers + period, loops + 1), (stage, *rest)))
                if types[stop : stop + period] != unit:
                    break
                stop += period
        best[first] = min(options, key=lambda option: option[0])
    return best[0][1]


def run_layers(
    stacks: Mapping[str, nnx.Module],
    types: tuple[str, ...],
    body: Callable[..., tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat: Callable | None = None,
) -> tuple[Any, Any]:
    """Runs `carry, y = body(carry, layer, x)` for each layer in order.

    Args:
      stacks: for each type, the layers of that type, with parameters stacked in their order.
      types: the type of each layer.
      body: the function of a layer; `y` may be None for the layers of some types.
      carry: the first value of `carry`.
      xs: a tree of arrays [L, ...], of which each layer gets its own part `x`, or None.
      remat: a policy of ``jax.checkpoint`` for each layer; None: no recomputation.

    Returns:
      The last carry, and the outputs `y` that are not None, stacked along a leading axis in the
      order of their layers; None if there are none.
    """
    split = {kind: nnx.split(stack) for kind, stack in stacks.items()}

    def call(kind: str) -> Callable:
        def function(carry, state, x):
            return body(carry, nnx.merge(split[kind][0], state), x)

        if remat is None:
            return function
        # XLA never merges the bodies of two loops, so recomputation needs no barrier against CSE.
        return jax.checkpoint(function, policy=remat, prevent_cse=False)

    calls = {kind: call(kind) for kind in split}
    done, first, outputs = Counter(), 0, []
    for unit, repeats in stages(types):
        counts = Counter(unit)

        def step(carry, inputs, unit=unit, counts=counts):
            states, x = inputs
            seen, ys = Counter(), []
            for place, kind in enumerate(unit):
                state = _part(states[kind], seen[kind], counts[kind])
                carry, y = calls[kind](carry, state, _part(x, place, len(unit)))
                seen[kind] += 1
                ys.append(y)
            return carry, [y for y in ys if y is not None]

        states = {
            kind: _divided(split[kind][1], done[kind], repeats, each)
            for kind, each in counts.items()
        }
        xs_here = _divided(xs, first, repeats, len(unit))
        carry, ys = jax.lax.scan(step, carry, (states, xs_here), length=repeats)
        if ys:
            joined = ys[0] if len(ys) == 1 else jnp.stack(ys, axis=1)
            outputs.append(joined.reshape(-1, *ys[0].shape[1:]))
        done.update({kind: repeats * each for kind, each in counts.items()})
        first += repeats * len(unit)
    if not outputs:
        return carry, None
    return carry, outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)


def _divided(tree: Any, first: int, repeats: int, each: int) -> Any:
    """Entries first .. first + repeats * each - 1 of every array, `each` for each iteration."""

    def divide(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] != repeats * each:
            leaf = leaf[first : first + repeats * each]
        return leaf if each == 1 else leaf.reshape(repeats, each, *leaf.shape[1:])

    return jax.tree.map(divide, tree)


def _part(tree: Any, index: int, count: int) -> Any:
    """Entry `index` of what one iteration gets; with a single entry there is no axis for it."""
    return tree if count == 1 else jax.tree.map(lambda leaf: leaf[index], tree)
