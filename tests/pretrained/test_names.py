"""Layouts of tensors: parts that are read, and the way back."""

import itertools

import numpy as np
import pytest

from fsa_jax.pretrained import names

SIZES = {
    **{"V": 7, "C": 6, "N": 4, "K": 2, "D": 4, "H": 5},
    **{"G": 3, "B": 3, "F": 8, "W": 2, "M": 3},
}
PATTERNS = sorted(
    {p for table in (names.IN_LAYER, names.OUTSIDE) for x in table.values() for p in x.patterns}
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_parts_of_parameters(pattern):
    """Every part that is read from a tensor is that part of the whole parameter."""
    shape = tuple(SIZES[axis] for axis in pattern.split(" -> ")[1].split())
    place = names.Place(("x",), pattern, shape, False)
    parameter = np.arange(np.prod(shape)).reshape(shape)
    tensor = place.to_tensor(parameter)
    assert tensor.shape == place.tensor_shape
    halves = [(slice(0, n), slice(0, n // 2), slice(n // 2, n), slice(1, n)) for n in shape]
    for index in itertools.product(*halves):
        np.testing.assert_array_equal(place.read(tensor, index), parameter[index])


def test_layouts_by_loops():
    """The transposed tensors of torch's Linear: rows are outputs, ordered head by head."""
    n, d, c = 3, 4, 5
    weight = np.arange(n * d * c).reshape(n * d, c)
    whole = (slice(0, c), slice(0, n), slice(0, d))
    place = names.Place(("x",), "(N D) C -> C N D", (c, n, d), False)
    kernel = place.read(weight, whole)
    out = np.arange(c * n * d).reshape(c, n * d)
    place = names.Place(("x",), "C (N D) -> N D C", (n, d, c), False)
    out_kernel = place.read(out, (slice(0, n), slice(0, d), slice(0, c)))
    gates = np.arange(n * 3 * c).reshape(n * 3, c)
    place = names.Place(("x",), "(N G) C -> C N G", (c, n, 3), False)
    gate = place.read(gates, (slice(0, c), slice(0, n), slice(0, 3)))
    for head, channel, feature in np.ndindex(n, d, c):
        assert kernel[feature, head, channel] == weight[head * d + channel, feature]
        assert out_kernel[head, channel, feature] == out[feature, head * d + channel]
    for head, branch, feature in np.ndindex(n, 3, c):
        assert gate[feature, head, branch] == gates[head * 3 + branch, feature]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "layers.3.self_attn.q_proj.weight"),
        ("layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.embeddings.weight", "embed_tokens.weight"),
        ("model.layers.12.attn_norm.weight", "layers.12.input_layernorm.weight"),
        ("model.layers.0.mlp_norm.weight", "layers.0.post_attention_layernorm.weight"),
        ("model.layers.0.attn.g_proj.weight", "layers.0.self_attn.g_proj.weight"),
        ("model.norm.weight", "norm.weight"),
    ],
)
def test_canonical_names(name, wanted):
    assert names.canonical(name) == wanted
