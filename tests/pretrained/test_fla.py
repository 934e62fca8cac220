"""Checkpoints of flash-linear-attention's sparse attention, against plain loops in float64."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fsa_jax import NSAConfig
from fsa_jax.pretrained import load_pretrained, save_pretrained
from pretrained.folders import ABSENT, LLAMA, changed, same, tensors_of

C, N, K, D, H, V, LAYERS = 24, 4, 2, 8, 20, 40, 2
BLOCK, TOPK, WINDOW, THETA, EPS = 8, 4, 12, 1000.0, 1e-5
CONFIG = {
    **{"model_type": "nsa", "architectures": ["NSAForCausalLM"], "hidden_act": "swish"},
    **{"hidden_size": C, "num_hidden_layers": LAYERS, "num_heads": N, "num_kv_heads": K},
    **{"head_dim": 32, "hidden_ratio": 4, "intermediate_size": None, "vocab_size": V},
    **{"block_size": BLOCK, "block_counts": TOPK, "window_size": WINDOW, "rope_theta": THETA},
    **{"norm_eps": EPS, "elementwise_affine": True, "tie_word_embeddings": False},
    **{"qkv_bias": True, "fuse_norm": True, "use_l2warp": False, "torch_dtype": "float32"},
}


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def matrix(rows, columns):
        return (rng.normal(size=(rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def vector(size, mean=0.0):
        return (mean + 0.2 * rng.normal(size=size)).astype(np.float32)

    tensors = {
        "model.embeddings.weight": matrix(V, C) * 3,
        "model.norm.weight": vector(C, 1.0),
        "lm_head.weight": matrix(V, C),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.attn_norm.weight": vector(C, 1.0),
            f"{at}.mlp_norm.weight": vector(C, 1.0),
            f"{at}.attn.q_proj.weight": 2 * matrix(N * D, C),
            f"{at}.attn.k_proj.weight": 2 * matrix(K * D, C),
            f"{at}.attn.v_proj.weight": matrix(K * D, C),
            f"{at}.attn.q_proj.bias": vector(N * D),
            f"{at}.attn.k_proj.bias": vector(K * D),
            f"{at}.attn.v_proj.bias": vector(K * D),
            f"{at}.attn.g_proj.weight": 2 * matrix(N * 3, C),
            f"{at}.attn.o_proj.weight": matrix(C, N * D),
            f"{at}.mlp.gate_proj.weight": matrix(H, C),
            f"{at}.mlp.up_proj.weight": matrix(H, C),
            f"{at}.mlp.down_proj.weight": matrix(C, H),
        }
    return tensors


@pytest.fixture
def folder(tmp_path):
    def write(tensors=None, **changes):
        path = tmp_path / "fla"
        path.mkdir(exist_ok=True)
        values = {k: v for k, v in (CONFIG | changes).items() if v is not ABSENT}
        (path / "config.json").write_text(json.dumps(values))
        save_file(tensors or weights(), path / "model.safetensors", {"format": "pt"})
        return path

    return write


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * scale


def rotate(x):
    """Rotates [T, heads, D], the channels c and c + D/2 of which are a pair."""
    frequencies = THETA ** (-np.arange(0, D, 2) / D)
    angles = np.arange(len(x))[:, None, None] * frequencies
    one, two = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def attention(q, k, v, gates):
    """The gated sum of the three branches, query by query: [T, N, D]."""
    out = np.zeros_like(q)
    count = len(k) // BLOCK
    ck, cv = (x[: count * BLOCK].reshape(count, BLOCK, K, D).mean(axis=1) for x in (k, v))
    for t in range(len(q)):
        for group in range(K):
            heads = range(group * N // K, (group + 1) * N // K)
            seen = (t + 1) // BLOCK  # whole blocks of the past
            scores = {h: ck[:seen, group] @ q[t, h] / np.sqrt(D) for h in heads}
            rank = np.zeros(t // BLOCK + 1)
            for h in heads if seen else ():
                probabilities = softmax(scores[h])
                rank[:seen] += probabilities[: len(rank)]
                out[t, h] += gates[t, h, 0] * probabilities @ cv[:seen, group]
            for forced in (0, len(rank) - 2, len(rank) - 1):
                if forced >= 0:
                    rank[forced] = np.inf
            blocks = np.sort(np.argsort(-rank, kind="stable")[:TOPK])
            chosen = [i for b in blocks for i in range(b * BLOCK, min((b + 1) * BLOCK, t + 1))]
            near = list(range(max(0, t - WINDOW + 1), t + 1))
            for h in heads:
                for gate, tokens in ((1, chosen), (2, near)):
                    probabilities = softmax(k[tokens, group] @ q[t, h] / np.sqrt(D))
                    out[t, h] += gates[t, h, gate] * probabilities @ v[tokens, group]
    return out


def logits_of(tokens):
    w = {name: x.astype(np.float64) for name, x in weights().items()}
    x = w["model.embeddings.weight"][tokens]
    for layer in range(LAYERS):
        at = {
            name.removeprefix(f"model.layers.{layer}."): value
            for name, value in w.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        y = rms(x, at["attn_norm.weight"])
        q, k, v = (
            (y @ at[f"attn.{n}_proj.weight"].T + at[f"attn.{n}_proj.bias"]).reshape(len(y), -1, D)
            for n in "qkv"
        )
        gates = 1 / (1 + np.exp(-(y @ at["attn.g_proj.weight"].T)))
        heads = attention(rotate(q), rotate(k), v, gates.reshape(len(y), N, 3))
        x = x + heads.reshape(len(y), -1) @ at["attn.o_proj.weight"].T
        y = rms(x, at["mlp_norm.weight"])
        gate = y @ at["mlp.gate_proj.weight"].T
        gate = gate / (1 + np.exp(-gate))
        x = x + (gate * (y @ at["mlp.up_proj.weight"].T)) @ at["mlp.down_proj.weight"].T
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.essential
@pytest.mark.slow
def test_logits(folder):
    tokens = np.random.default_rng(1).integers(0, V, 75)
    model = load_pretrained(folder())
    assert model.config.head_dim == D  # of the tensors: config.json says another
    want = logits_of(tokens)
    found = np.asarray(model(tokens[None].astype(np.int32)))[0]
    np.testing.assert_allclose(found, want, rtol=0, atol=5e-5 * np.abs(want).max())


def test_both_namings_and_the_way_back(folder, tmp_path):
    model = load_pretrained(folder(), attention="nsa")
    save_pretrained(model, tmp_path / "own")
    same(load_pretrained(tmp_path / "own"), model)
    renamed = {
        name.replace(".attn.", ".self_attn.")
        .replace("attn_norm", "input_layernorm")
        .replace("mlp_norm", "post_attention_layernorm")
        .replace("embeddings", "embed_tokens"): tensor
        for name, tensor in weights().items()
    }
    assert renamed.keys() & tensors_of(LLAMA).keys()
    same(load_pretrained(folder(renamed)), model)


def test_gates_beside_the_names_of_hugging_face(tmp_path):
    gates = {
        f"model.layers.{i}.self_attn.g_proj.weight": np.full((24, 64), i, np.float32)
        for i in range(2)
    }
    sizes: dict[str, Any] = {"block_size": 16, "block_counts": 4, "window_size": 32}
    path = changed(tmp_path / "x", change=lambda tensors: tensors | gates, **sizes)
    config = load_pretrained(path).config
    assert config.nsa == NSAConfig(
        kernel_size=16, kernel_stride=16, block_size=16, topk=4, window_size=32
    )
    assert (config.compression, config.compress_after_rope, config.gate_bias) == (
        *("mean", True),
        False,
    )


def test_gates_and_sizes_belong_together(folder, tmp_path):
    without = {name: x for name, x in weights().items() if "g_proj" not in name}
    with pytest.raises(ValueError, match=r"must hold the tensor .*0.self_attn.g_proj.weight'"):
        load_pretrained(folder(without))
    with pytest.raises(ValueError, match="block_size is unknown and may change"):
        load_pretrained(changed(tmp_path / "x", block_size=16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 0}, "window_size must be .* a model without the window branch"),
        ({"window_size": None}, "window_size must be"),
        ({"block_counts": 2}, "block_counts must be at least the 3 blocks always selected"),
        ({"qk_norm": True}, "qk_norm must be false"),
        ({"elementwise_affine": False}, "elementwise_affine must be true"),
        ({"hidden_act": "gelu"}, "hidden_act must be"),
        ({"attn": {"layers": [1]}}, "attn must be null"),
        ({"num_heads": ABSENT}, "num_heads must be given"),
    ],
)
def test_what_only_flash_linear_attention_computes(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder(**changes))
