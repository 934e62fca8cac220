"""Names and layouts: which tensor of a file is which parameter of a `Transformer`.

A tensor has one canonical name here, that of transformers without the prefix "model.", such as
"layers.3.self_attn.q_proj.weight" or "lm_head.weight". `PARAMETERS` gives for each parameter the
tensor and the layout of both as an einops pattern, which is read in both directions.

Axes: V vocabulary, C features of the residual stream, N query heads, K key/value heads, D head
width, H hidden features of the feed-forward, G the three gates, B the three branches, F the
flattened window of phi (kernel_size * D), W the same in tokens, M phi's hidden features.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import einops
import numpy as np

from fsa_jax.transformer_config import TransformerConfig


class Layout(NamedTuple):
    """The tensor of a parameter.

    Attributes:
      tensor: canonical name of the tensor; of a layer, the name within the layer.
      patterns: einops patterns from the tensor to the parameter, one for each number of axes that
        the parameter may have.
    """

    tensor: str
    patterns: tuple[str, ...]


def _projection(tensor: str, *patterns: str) -> Layout:
    return Layout(f"self_attn.{tensor}", patterns)


#: Parameters of a `Block`. The first part needs no explanation to transformers; the gates are as
#: in flash-linear-attention; phi has names of its own.
IN_LAYER = {
    "attention_norm.scale": Layout("input_layernorm.weight", ("C -> C",)),
    "mlp_norm.scale": Layout("post_attention_layernorm.weight", ("C -> C",)),
    "attention.query.kernel": _projection("q_proj.weight", "(N D) C -> C N D"),
    "attention.query.bias": _projection("q_proj.bias", "(N D) -> N D"),
    "attention.key.kernel": _projection(
        "k_proj.weight", "(K D) C -> C K D", "(B K D) C -> C B K D"
    ),
    "attention.key.bias": _projection("k_proj.bias", "(K D) -> K D", "(B K D) -> B K D"),
    "attention.value.kernel": _projection(
        "v_proj.weight", "(K D) C -> C K D", "(B K D) C -> C B K D"
    ),
    "attention.value.bias": _projection("v_proj.bias", "(K D) -> K D", "(B K D) -> B K D"),
    "attention.out.kernel": _projection("o_proj.weight", "C (N D) -> N D C"),
    "attention.out.bias": _projection("o_proj.bias", "C -> C"),
    "attention.query_norm.scale": _projection("q_norm.weight", "D -> D"),
    "attention.key_norm.scale": _projection("k_norm.weight", "D -> D"),
    "mlp.gate.kernel": Layout("mlp.gate_proj.weight", ("H C -> C H",)),
    "mlp.gate.bias": Layout("mlp.gate_proj.bias", ("H -> H",)),
    "mlp.up.kernel": Layout("mlp.up_proj.weight", ("H C -> C H",)),
    "mlp.up.bias": Layout("mlp.up_proj.bias", ("H -> H",)),
    "mlp.down.kernel": Layout("mlp.down_proj.weight", ("C H -> H C",)),
    "mlp.down.bias": Layout("mlp.down_proj.bias", ("C -> C",)),
    "attention.gate.kernel": _projection("g_proj.weight", "(N G) C -> C N G"),
    "attention.gate.bias": _projection("g_proj.bias", "(N G) -> N G"),
    "attention.compress_key.weights": _projection(
        "compress_key.weights", "K W -> K W", "K F D -> K F D"
    ),
    "attention.compress_key.weights_out": _projection("compress_key.weights_out", "K M D -> K M D"),
    "attention.compress_key.positions": _projection("compress_key.positions", "K W D -> K W D"),
    "attention.compress_value.weights": _projection(
        "compress_value.weights", "K W -> K W", "K F D -> K F D"
    ),
    "attention.compress_value.weights_out": _projection(
        "compress_value.weights_out", "K M D -> K M D"
    ),
}

#: Parameters outside the layers.
OUTSIDE = {
    "embedding.embedding": Layout("embed_tokens.weight", ("V C -> V C",)),
    "norm.scale": Layout("norm.weight", ("C -> C",)),
    "head": Layout("lm_head.weight", ("V C -> V C",)),
}

GATE = "self_attn.g_proj.weight"
HEAD = "lm_head.weight"
#: Parameters that a warm start makes, so that a folder need not hold them.
MADE = ("attention.gate.", "attention.compress_key.", "attention.compress_value.")

#: Buffers of old versions of transformers, which are computed from the configuration.
BUFFERS = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

#: The names of flash-linear-attention's models, and the canonical ones.
_FLA = (
    (re.compile(r"embeddings\."), "embed_tokens."),
    (re.compile(r"(layers\.\d+\.)attn_norm\."), r"\1input_layernorm."),
    (re.compile(r"(layers\.\d+\.)mlp_norm\."), r"\1post_attention_layernorm."),
    (re.compile(r"(layers\.\d+\.)attn\."), r"\1self_attn."),
)


def canonical(name: str) -> str:
    """The canonical name of a tensor in a file."""
    name = name.removeprefix("model.")
    for pattern, other in _FLA:
        if pattern.match(name):
            return pattern.sub(other, name, count=1)
    return name


def in_file(name: str) -> str:
    """The name of a tensor in the files of transformers."""
    return name if name == HEAD else f"model.{name}"


class Place(NamedTuple):
    """Where a parameter is in files.

    Attributes:
      tensors: canonical names: one for each layer of a stack, otherwise one.
      pattern: einops pattern from a tensor to the parameter, without the axis of the layers.
      shape: shape of the parameter, without the axis of the layers.
      stacked: whether the parameter has the axis of the layers.
    """

    tensors: tuple[str, ...]
    pattern: str
    shape: tuple[int, ...]
    stacked: bool

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes of the pattern."""
        return dict(zip(self.pattern.split(" -> ")[1].split(), self.shape, strict=True))

    @property
    def groups(self) -> list[list[str]]:
        """The axes of the parameter that each axis of the tensor consists of."""
        left = self.pattern.split(" -> ")[0]
        return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", left)]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        return tuple(math.prod(self.sizes[axis] for axis in group) for group in self.groups)

    def to_tensor(self, array: np.ndarray) -> np.ndarray:
        """The tensor of a parameter of one layer."""
        left, right = self.pattern.split(" -> ")
        return einops.rearrange(array, f"{right} -> {left}")

    def read(self, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of the parameter of one layer, from a tensor that can be sliced.

        Args:
          tensor: an object whose `tensor[slice, ...]` reads a part of the tensor.
          index: slices of the parameter's axes, with a step of 1.
        """
        sizes = self.sizes
        bounds = {
            axis: part.indices(size)[:2]
            for (axis, size), part in zip(sizes.items(), index, strict=True)
        }
        parts, inner = [], {}
        for first, *others in self.groups:
            inside = math.prod(sizes[axis] for axis in others)
            start, stop = bounds[first]
            parts.append(slice(start * inside, stop * inside))
            inner |= {axis: sizes[axis] for axis in others}
        part = einops.rearrange(tensor[tuple(parts)], self.pattern, **inner)
        # The inner axes of a group are read whole, since only the outer one is contiguous.
        return part[tuple(slice(*bounds[axis]) if axis in inner else slice(None) for axis in sizes)]


def places(
    config: TransformerConfig, shapes: Mapping[tuple[str, ...], tuple[int, ...]]
) -> dict[tuple[str, ...], Place]:
    """Where each parameter of a model is in files.

    Args:
      config: configuration of the model.
      shapes: path and shape of each parameter.
    """
    found = {}
    for path, shape in shapes.items():
        if path[0] != "layers":
            layout, layers, inside = OUTSIDE[".".join(path)], None, shape
            tensors: Iterable[str] = (layout.tensor,)
        else:
            layers, rest = _layers(config, path)
            layout, inside = IN_LAYER[".".join(rest)], shape[1:]
            tensors = (f"layers.{layer}.{layout.tensor}" for layer in layers)
        pattern = next(p for p in layout.patterns if len(p.split(" -> ")[1].split()) == len(inside))
        found[path] = Place(tuple(tensors), pattern, inside, layers is not None)
    return found


def _layers(config: TransformerConfig, path: tuple[str, ...]) -> tuple[list[int], tuple[str, ...]]:
    """The layers of a stack, and the path of a parameter within a layer."""
    if len(set(config.types)) == 1:
        return list(range(config.num_layers)), path[1:]
    _, kind, *rest = path
    return [layer for layer, other in enumerate(config.types) if other == kind], tuple(rest)


def is_made(path: tuple[str, ...]) -> bool:
    """Whether a parameter can be made by a warm start."""
    return path[0] == "layers" and any(part in ".".join(path) for part in MADE)
