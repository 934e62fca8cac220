"""Whole models: a training step and a prefill, sparse against full attention.

Only a few layers of a model are run, and all are alike: the time of one layer is the difference
between two depths, and the time of the whole model follows from it. The vocabulary is that of
bytes, so that embedding and logits of the real models are not in the figures. Parameters are
float32, products bfloat16, layers recomputed in the backward pass but for their attention.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fsa_jax.bench import timing
from fsa_jax.transformer import TransformerConfig

#: Sizes of decoder layers, and how many a model has.
MODELS = {
    "Llama-3-8B": (32, dict(embed_dim=4096, num_heads=32, num_kv_heads=8, mlp_dim=14336)),
    "Qwen3-14B": (40, dict(embed_dim=5120, num_heads=40, num_kv_heads=8, mlp_dim=17408)),
    "Qwen2.5-32B": (64, dict(embed_dim=5120, num_heads=40, num_kv_heads=8, mlp_dim=27648)),
}
TINY = {"tiny": (3, dict(embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=64, head_dim=8))}
DEPTHS = (1, 2)
ATTENTIONS = ("nsa", "full")


def rows(kind: str, run, ceilings) -> Iterator[dict]:
    """Rows of the suite "training" or "prefill": one a model, length and attention.

    `ms` is of the whole model, by the two depths of `DEPTHS`; `measured_ms` are theirs.
    """
    models = TINY if run.interpret else MODELS
    lengths = (64,) if run.interpret else run.config.lengths or (32768, 8192, 131072, 65536, 16384)
    for length in lengths:
        for name, (layers, sizes) in models.items():
            for attention in ATTENTIONS:
                row = {
                    "function": "model", "method": attention, "pass": PASSES[kind],
                    "model": name, "layers": layers, "length": length, "packed": False,
                    "heads": sizes["num_heads"], "kv_heads": sizes["num_kv_heads"],
                    "width": sizes.get("head_dim", 128), "block_size": 64, "topk": 16,
                    "selection": None, "dtype": "bfloat16",
                }  # fmt: skip
                if run.late():
                    reason = f"not run: the time budget of {run.config.minutes:g} minutes was spent"
                    yield row | {"error": reason}
                    continue
                try:
                    with jax.numpy_dtype_promotion("standard"):  # of which jax itself has need
                        found = _measure(kind, run, length, layers, sizes, attention)
                except Exception as error:
                    yield row | {"error": timing.describe_error(error)}
                    continue
                flops = found.pop("flops_per_token") * length
                row |= found | {"flops": flops, "bytes": None, "floor_ms": None}
                row["tokens_per_s"] = 1e3 * length / row["ms"]
                row["model_flops_utilisation"] = (
                    None if ceilings is None else 1e3 * flops / row["ms"] / ceilings["flops"]
                )
                timing.say(f"{name} {length} {attention}: {row['ms']:.2f} ms")
                yield row


PASSES = {"training": "step", "prefill": "prefill"}


def _measure(kind, run, length, layers, sizes, attention) -> dict[str, Any]:
    """Times of two depths, and of the whole model by them."""
    found, params = [], 0
    for depth in DEPTHS:
        model = TransformerConfig(
            num_layers=depth, attention=attention, remat=True, dtype="bfloat16",
            implementation=_implementation(run, attention), **{"head_dim": 128} | sizes,
        )  # fmt: skip
        program, argument_sets, count = _program(kind, model, length)
        found.append(
            timing.measure(program, argument_sets, run.config.rounds)
            | {"peak_bytes": timing.peak_bytes(program)}
        )
        params = count - params  # of the last layer alone, when the loop ends
        del program, argument_sets
    # in ascending order, so that the two depths are paired by rank
    first, second = (sorted(x["samples_ms"]) for x in found)
    samples = [a + (layers - 1) * max(b - a, 0.0) for a, b in zip(first, second, strict=True)]
    middle = sorted(samples)[len(samples) // 2]
    # 6 (or 2) flops a parameter and token; attention counts as sparse or full as it is
    per_parameter = 6 if kind == "training" else 2
    return {
        "samples_ms": samples,
        "ms": middle,
        "spread": (max(samples) - min(samples)) / middle,
        "device_ms": None,
        "kernels_ms": None,
        "measured_layers": list(DEPTHS),
        "measured_ms": [x["ms"] for x in found],
        "peak_bytes": found[-1]["peak_bytes"],
        "relative_error": None,
        "flops_per_token": per_parameter * params * layers,
    }


def _implementation(run, attention):
    if attention == "nsa":
        return "xla" if run.interpret else None
    return "xla" if run.interpret else "cudnn"


def _program(kind: str, model: TransformerConfig, length: int):
    """A compiled training step or prefill, its arguments, and the number of parameters."""
    from fsa_jax.training.config import PRESETS
    from fsa_jax.training.step import init_model, init_state, make_train_step

    config = dataclasses.replace(PRESETS["tiny"], batch_size=1, row_length=length, model=model)
    graphdef, params = init_model(model, 0)
    count = sum(x.size for x in jax.tree.leaves(params))
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, 256, jnp.int32)
    ids = jnp.ones((1, length), jnp.int32)
    if kind == "prefill":

        def prefill(params, tokens):
            return nnx.merge(graphdef, params)(tokens, None)[:, -1]

        program = jax.jit(prefill).lower(params, tokens).compile()
        return program, [(params, tokens)], count
    state = jax.jit(functools.partial(init_state, config=config))(params)
    del params
    # the state is donated and passed on, as in a run
    program = make_train_step(graphdef, config).lower(state, tokens, ids).compile()
    return _Stepper(program, state), [(tokens, ids)], count


class _Stepper:
    """Calls a training step with the state that the last call left."""

    def __init__(self, program, state):
        self.program, self.state = program, state

    def __call__(self, tokens, ids):
        self.state, metrics = self.program(self.state, tokens, ids)
        return metrics

    def memory_analysis(self):
        return self.program.memory_analysis()
