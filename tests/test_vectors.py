"""Results of other projects' reference code in float64, from tests/vectors (float32 or 64)."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import IMPLEMENTATIONS, assert_close, selected

import fsa_jax
from fsa_jax.api import combine_branches

VECTORS = Path(__file__).parent / "vectors"
STORED = 3e-7  # the rounding of the stored float32 results


def load(name):
    with np.load(VECTORS / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        meta = json.loads(str(file["meta"]))
    wide = {k: v.astype(np.float64) for k, v in arrays.items() if v.dtype.kind == "f"}
    return meta, {**arrays, **wide}


def segments(meta):
    ids = np.repeat(np.arange(len(meta["lens"]), dtype=np.int32) + 1, meta["lens"])
    return jnp.asarray(ids)


def names(prefix):
    return sorted(path.stem for path in VECTORS.glob(f"{prefix}_*.npz"))


@pytest.mark.fast_cases(
    "sel_future_g4_d32_b16_t8-xla",
    "sel_g1_d64_b32_t4-reference",
    "sel_g16_d64_b16_t4-xla",
    "sel_noblock0_g4_d64_b16_t4-xla",
)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", names("sel"))
def test_selected_attention(name, implementation):
    meta, z = load(name)
    indices = jnp.asarray(z["topk_idx"].swapaxes(0, 1))
    attend = selected(
        indices, meta["block_size"], segments(meta), implementation, scale=meta["scale"]
    )

    @jax.jit
    def run(cotangent, *inputs):
        (out, lse), pullback = jax.vjp(attend, *inputs)
        return out, lse, pullback((cotangent, jnp.zeros_like(lse)))

    out, lse, gradients = run(*(jnp.asarray(z[n]) for n in ("do", "q", "k", "v")))
    wanted = (z["o"], z["lse"], (z["dq"], z["dk"], z["dv"]))
    assert_close((out, lse, gradients), wanted, STORED)


@pytest.mark.fast_cases(
    "cmp_avg_l32_d16_s32_g2_varlen-reference",
    "cmp_avg_l32_d16_s32_g2_varlen-xla",
    "cmp_lin_l32_d16_s32_g2-xla",
    "cmp_wpool_l32_d8_s64_g4-xla",
)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", names("cmp"))
def test_compressed_attention_and_selection(name, implementation):
    meta, z = load(name)
    segment_ids = segments(meta)
    method = {"avgpool": "mean", "weightedpool": "weighted", "linear": "linear"}[meta["phi"]]
    config = fsa_jax.NSAConfig(
        **{k: meta[k] for k in ("kernel_size", "kernel_stride", "block_size", "topk")},
        init_blocks=meta["init_blocks"],
        local_blocks=meta["local_blocks"],
    )
    size: dict[str, Any] = {
        "kernel_size": config.kernel_size,
        "kernel_stride": config.kernel_stride,
    }
    parameters = {k: jnp.asarray(z[k]) for k in ("wk", "wv", "pe") if k in z}

    def run(q, k, v, parameters):
        options = {**size, "method": method, "segment_ids": segment_ids}
        pe = parameters.get("pe")
        ck = fsa_jax.compress(k, weights=parameters.get("wk"), positions=pe, **options)
        cv = fsa_jax.compress(v, weights=parameters.get("wv"), **options)
        out, lse = fsa_jax.compressed_attention(
            q,
            ck,
            cv,
            **size,
            segment_ids=segment_ids,
            implementation=implementation,
            return_residuals=True,
        )
        return out, (ck, cv, lse)

    query, key, value = (jnp.asarray(z[n]) for n in "qkv")
    inputs = (query, key, value, parameters)

    @jax.jit
    def run_both_ways(cotangent, *inputs):
        out, pullback, rest = jax.vjp(run, *inputs, has_aux=True)
        return out, pullback(cotangent), rest

    result = run_both_ways(jnp.asarray(z["do"]), *inputs)
    out, (dq, dk, dv, gradients), (ck, cv, lse) = result
    windows = len(z["ck"])  # the vectors contain no empty slots
    assert_close((ck[:windows], cv[:windows]), (z["ck"], z["cv"]), STORED)
    assert not np.any(ck[windows:])
    assert_close(
        (out, lse, dq, dk, dv), tuple(z[n] for n in ("o", "lse", "dq", "dk", "dv")), STORED
    )
    assert_close(gradients, {k: z["d" + k] for k in gradients}, STORED)

    indices = fsa_jax.select_blocks(
        query, ck, lse, config=config, segment_ids=segment_ids, implementation=implementation
    )
    clear = z["topk_margin"][0] > 1e-9
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(indices)[clear, 0], z["topk_idx"][0][clear])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gates_and_window(implementation):
    meta, z = load("fla_gates_w32_g16_b2")
    counts = np.arange(meta["S"]) < z["block_counts"][..., None]
    indices = jnp.asarray(np.where(counts, z["block_indices"], -1), jnp.int32)
    options = {"implementation": implementation, "scale": meta["scale"]}

    def run(q, k, v, g_slc, g_swa):
        slc = fsa_jax.selected_attention(q, k, v, indices, block_size=meta["block_size"], **options)
        swa = fsa_jax.sliding_window_attention(q, k, v, window_size=meta["window_size"], **options)
        gates = jnp.stack([jnp.zeros_like(g_slc), g_slc, g_swa], axis=-1)
        return combine_branches(gates, jnp.zeros_like(slc), slc, swa)

    inputs = [jnp.asarray(z[n]) for n in ("q", "k", "v", "g_slc", "g_swa")]

    @jax.jit
    def run_both_ways(cotangent, *inputs):
        out, pullback = jax.vjp(run, *inputs)
        return out, pullback(cotangent)

    out, gradients = run_both_ways(jnp.asarray(z["do"]), *inputs)
    wanted = tuple(z[n] for n in ("dq", "dk", "dv", "dg_slc", "dg_swa"))
    assert_close((out, gradients), (z["o"], wanted), STORED)
