"""Decoder layers of real models: a training step and a prefill, sparse against full attention.

Each case runs a model of one layer with the shape of a real model. The layers of a model are alike,
so n of them take n times as long. The vocabulary is that of bytes, so that the times exclude the
embedding and logits of the real models. Parameters are float32 and products bfloat16. The backward
pass of a training step recomputes the layer except its attention.

Both kinds of attention get the same tokens: either one document without segment ids, where cuDNN
computes full attention, or packed documents. jax's interface to cuDNN does not support packed
documents, so `fsa_jax.causal_attention` computes full attention there. The two are timed in turns.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fsa_jax.bench.cases import Case
from fsa_jax.bench.measure import timing
from fsa_jax.transformer import TransformerConfig

#: Sizes of the decoder layers of real models.
MODELS = {
    "Llama-3-8B": dict(embed_dim=4096, num_heads=32, num_kv_heads=8, mlp_dim=14336),
    "Qwen3-14B": dict(embed_dim=5120, num_heads=40, num_kv_heads=8, mlp_dim=17408),
    "Qwen2.5-32B": dict(embed_dim=5120, num_heads=40, num_kv_heads=8, mlp_dim=27648),
}
TINY = {"tiny": dict(embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=64, head_dim=8)}
LENGTHS = (32768, 8192, 131072, 65536, 16384)
ATTENTIONS = ("nsa", "full")
PASSES = {"training": "step", "prefill": "prefill"}
#: The number of cases, of two programs each, that are compiled together.
AHEAD = 6


def rows(kind: str, run) -> Iterator[dict]:
    """Rows of suite "training" or "prefill", one per model, length, packing and attention."""
    models = TINY if run.interpret else MODELS
    lengths = run.config.lengths or ((64,) if run.interpret else LENGTHS)
    wanted = itertools.product(lengths, models.items(), (False, True))
    for several in itertools.batched(wanted, AHEAD):
        found = [_Layer(kind, run, length, name, sizes, packed)
                 for length, (name, sizes), packed in several]  # fmt: skip
        jobs = {
            (number, attention): functools.partial(layer.program, attention)
            for number, layer in enumerate(() if run.late() else found)
            for attention in ATTENTIONS
        }
        programs = timing.compile_all(jobs, run.config.threads)
        for number, layer in enumerate(found):
            mine = {name: programs.pop((number, name), None) for name in ATTENTIONS}
            yield from layer.rows(mine)


class _Layer:
    """A case: tokens, and a model of one layer with either kind of attention."""

    def __init__(self, kind: str, run, length: int, name: str, sizes: dict, packed: bool):
        self.kind, self.run, self.length, self.name, self.sizes = kind, run, length, name, sizes
        case = Case(length=length, heads=1, kv_heads=1, packed=packed)
        # passed as an argument, since the compiler could exploit a constant
        self.segment_ids = [jnp.asarray(case.segment_ids())] if packed else []

    def config(self, attention: str) -> TransformerConfig:
        implementation: Any = None
        if self.run.interpret:
            implementation = "xla"
        elif attention == "full" and not self.segment_ids:
            implementation = "cudnn"
        sizes: Any = {"attention": attention, "head_dim": 128} | self.sizes
        return TransformerConfig(
            num_layers=1, remat=self.kind == "training", dtype="bfloat16",
            implementation=implementation, **sizes,
        )  # fmt: skip

    def program(self, attention: str) -> tuple[Callable, Any, int]:
        """A compiled step or prefill, the function that makes its state, and flops per token."""
        from fsa_jax.training.step import abstract_model, init_model

        config = self.config(attention)
        graphdef, shapes = abstract_model(config)
        tokens = jax.ShapeDtypeStruct((1, self.length), jnp.int32)
        forward = lambda params, tokens, *ids: nnx.merge(graphdef, params)(tokens, *ids)  # noqa: E731
        if self.kind == "prefill":
            function, make, per_parameter = _prefill(forward), lambda params: params, 2
        else:
            function, make, per_parameter = *_training_step(forward), 6
        state = jax.eval_shape(make, shapes)
        with jax.numpy_dtype_promotion("standard"):  # needed by optax
            lowered = jax.jit(function, donate_argnums=0).lower(state, tokens, *self.segment_ids)
            program = lowered.compile()
        count = sum(x.size for x in jax.tree.leaves(shapes["layers"]))

        def start():
            return jax.jit(make)(init_model(config, 0)[1])

        return program, start, per_parameter * count

    def rows(self, programs: dict[str, Any]) -> Iterator[dict]:
        """Yields the rows of both kinds of attention, which are timed in turns."""
        clocks, errors, tokens = {}, {}, None
        if self.run.late():
            reason = f"not run: the time budget of {self.run.config.minutes:g} minutes was spent"
            errors = dict.fromkeys(ATTENTIONS, reason)
        for number, attention in itertools.product(range(self.run.config.rounds), ATTENTIONS):
            if attention in errors:
                continue
            try:
                if isinstance(programs[attention], Exception):
                    raise programs[attention]
                program, start, _ = programs[attention]
                if not number:
                    shape = (1, self.length)
                    tokens = jax.random.randint(jax.random.key(1), shape, 0, 256, jnp.int32)
                    clocks[attention] = timing.Clock(_Stepper(program, start()))
                clocks[attention].warm_up([(tokens, *self.segment_ids)])
                clocks[attention].round([(tokens, *self.segment_ids)])
            except Exception as error:
                errors[attention] = timing.describe_error(error)
        for attention in ATTENTIONS:
            yield self._row(attention, programs, clocks, errors)

    def _row(self, attention, programs, clocks, errors) -> dict:
        row = {
            "function": "model", "method": attention, "pass": PASSES[self.kind],
            "model": self.name, "layers": 1, "length": self.length,
            "packed": bool(self.segment_ids),
            "heads": self.sizes["num_heads"], "kv_heads": self.sizes["num_kv_heads"],
            "width": self.sizes.get("head_dim", 128), "block_size": 64, "topk": 16,
            "selection": None, "dtype": "bfloat16",
            "implementation": self.config(attention).implementation,
        }  # fmt: skip
        if attention in errors:
            return row | {"error": errors[attention]}
        program, _, flops_per_token = programs[attention]
        flops = flops_per_token * self.length
        found = clocks[attention].row() | {"device_ms": None, "kernels_ms": None}
        row |= found | {"flops": flops, "bytes": None, "floor_ms": None, "relative_error": None}
        row["peak_bytes"] = timing.peak_bytes(program)
        row["tokens_per_s"] = 1e3 * self.length / row["ms"]
        ceilings = self.run.ceilings
        row["model_flops_utilisation"] = (
            None if ceilings is None else 1e3 * flops / row["ms"] / ceilings["flops"]
        )
        packed = "packed " * row["packed"]
        timing.say(f"{self.kind} {self.name} {self.length} {packed}{attention}: {row['ms']:.2f} ms")
        return row


def _prefill(forward):
    def prefill(params, *arrays):
        return params, forward(params, *arrays)[:, -1]

    return prefill


def _training_step(forward):
    """The training step, and the function that makes its state from the parameters.

    Without segment ids the sequence is one document.
    """
    from fsa_jax.training.config import PRESETS
    from fsa_jax.training.optimizer import make_optimizer
    from fsa_jax.training.step import next_byte_loss

    optimizer = make_optimizer(PRESETS["tiny"])

    def step(state, tokens, *ids):
        params, opt_state = state

        def mean_loss(params):
            logits = forward(params, tokens, *ids)
            total, count = next_byte_loss(logits, tokens, *(ids or [jnp.ones_like(tokens)]))
            return total / count.astype(jnp.float32)

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step, lambda params: (params, optimizer.init(params))


class _Stepper:
    """Calls a program with the state that its last call returned, which is donated."""

    def __init__(self, program, state):
        self.program, self.state = program, state

    def __call__(self, *arrays):
        self.state, result = self.program(self.state, *arrays)
        return result
