"""`load_pretrained`: a `Transformer` with the weights of a folder.

`plan_load` finds the model, `load_params` its parameters, for callers with shardings of their own.
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh, NamedSharding, Sharding

from fsa_jax.arguments import checks
from fsa_jax.arguments.types import LayerType
from fsa_jax.config import NSAConfig
from fsa_jax.partitioning import current_shardings, training_shardings
from fsa_jax.pretrained import keys, names, read, warm_start
from fsa_jax.pretrained.config import NAME, Source, attention_fields, read_config, read_json
from fsa_jax.transformer import Transformer
from fsa_jax.transformer_config import TransformerConfig

type Folder = str | os.PathLike[str]
#: The path of a parameter.
type Param = tuple[str, ...]


def load_pretrained(
    path: Folder,
    *,
    attention: LayerType | None = None,
    nsa: NSAConfig | None = None,
    gates: Literal["closed", "open"] = "closed",
    dtype: Dtype | None = None,
    param_dtype: Dtype | None = None,
    mesh: Mesh | None = None,
    layer_types: Sequence[LayerType] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Transformer:
    """Loads a model from a folder with a config.json and safetensors, as Hugging Face writes it.

    The model types llama, mistral, qwen2 and qwen3 are dense models; ``attention="nsa"`` or
    `layer_types` turn them into sparse ones whose start is the dense model (a *warm start*). The
    folders of `save_pretrained` and those of flash-linear-attention's model type "nsa" say
    themselves which attention they hold.

    Weights go to their devices one part of a parameter at a time: the host never holds more than
    the part of one stacked parameter that one device needs.

    Args:
      path: the folder.
      attention: ``"full"``, ``"nsa"`` or ``"window"``; None: what the folder holds, which is
        ``"full"`` for a dense model.
      nsa: sizes of a warm start; None: those of ``NSAConfig()``.
      gates: start of the gates in a warm start. ``"closed"``: the selected branch alone carries the
        output. Where `nsa.topk` blocks cover the sequence, the logits are those of the dense model
        to rounding. ``"open"``: gates of 0.05, 0.9 and 0.05, for training; see docs/pretrained.md.
        A folder that has gates keeps them.
      dtype: dtype of the computation; None: that of most weights.
      param_dtype: dtype that the weights are converted to; None: they stay as they are.
      mesh: mesh that the weights are split over: by the rules of ``sharding_rules`` where the call
        is inside that context, otherwise as in training with fsdp: heads and hidden features over
        the axis "tensor", the features of the residual stream over "data". None: the default
        device.
      layer_types: the type of each layer of a hybrid, likewise on the projections of the dense
        model: ``("full", "nsa", ...)``. Layers of type ``"window"`` see `nsa.window_size` tokens.
      progress: called after each parameter with the number of those that are loaded, and of all.

    Returns:
      The model, with the parameters of the folder.

    Raises:
      ValueError: the folder is not complete; its model type is unknown; a key of its config.json
        may change the function in a way that this package cannot compute; a tensor is missing,
        unknown, or has another shape; the arguments do not fit the folder; or a parameter does not
        divide over the mesh. The message names the key, the tensor or the argument.

    Example:
      A dense model, and a sparse one with the same weights::

          dense = load_pretrained("folder")
          sparse = load_pretrained("folder", attention="nsa", gates="open")
    """
    checks.choice("gates", gates, tuple(warm_start.STARTS))
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh or None, got {checks.short(mesh)}")
    plan = plan_load(
        path,
        attention=attention,
        nsa=nsa,
        dtype=dtype,
        param_dtype=param_dtype,
        layer_types=layer_types,
    )
    graphdef, state = _abstract(plan.config)

    def shardings(shapes: Mapping[Param, tuple[int, ...]]) -> Mapping[Param, Sharding | None]:
        return _shardings(state, mesh, shapes)

    params = load_params(plan, gates=gates, shardings=shardings, progress=progress)
    return nnx.merge(graphdef, params)


class Plan(NamedTuple):
    """What is loaded from a folder, from its config.json and the headers of its files.

    Attributes:
      folder: the folder.
      source: what its config.json says.
      tensors: the tensors to read, by canonical name.
      has_gates: whether these have the gates of sparse attention.
      config: configuration of the model.
      keeps_dtypes: whether each parameter has the dtype of its tensors.
    """

    folder: Path
    source: Source
    tensors: dict[str, read.Tensor]
    has_gates: bool
    config: TransformerConfig
    keeps_dtypes: bool


def plan_load(
    path: Folder,
    *,
    attention: LayerType | None = None,
    nsa: NSAConfig | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype | None = None,
    layer_types: Sequence[LayerType] | None = None,
) -> Plan:
    """The model that `load_pretrained` loads with these arguments, without reading any weights."""
    folder = checks.path("path", path)
    if not folder.is_dir():
        raise ValueError(f"path must be a folder, got {str(folder)!r}")
    read_json(folder / NAME)  # where there is none, that is said before anything of tensors
    tensors = {
        name: tensor
        for name, tensor in read.read_headers(folder).items()
        if not names.BUFFERS.fullmatch(name)
    }
    has_gates = any(name.endswith(names.GATE) for name in tensors)
    source = read_config(folder, has_gates=has_gates)
    fields = source.fields | attention_fields(source, attention, nsa, layer_types, has_gates)
    fields |= _fields_of_tensors(source, tensors, fields, has_gates)
    tensors = _without_tied_head(folder, tensors, fields["tie_embeddings"])
    most = (
        read.dtype_of_most((x.shape, read.DTYPES.get(x.dtype)) for x in tensors.values())
        if param_dtype is None
        else param_dtype
    )
    fields["param_dtype"] = str(checks.float_dtype("param_dtype", most))
    fields["dtype"] = str(
        checks.float_dtype("dtype", fields["param_dtype"] if dtype is None else dtype)
    )
    if fields["num_layers"] > len(tensors):  # found before the names of all layers are made
        raise ValueError(
            f"num_hidden_layers must be that of the tensors in {str(folder)!r}, of which there are "
            f"{len(tensors)}, got {fields['num_layers']}"
        )
    try:
        config = TransformerConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{str(source.path)!r} is not supported: {error}") from error
    return Plan(folder, source, tensors, has_gates, config, keeps_dtypes=param_dtype is None)


def _abstract(config: TransformerConfig) -> tuple[Any, Any]:
    """The graph definition of a model, and its state of shapes."""
    # Inside jax.set_mesh, Flax would take the names of parameter axes for those of the mesh.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def load_params(
    plan: Plan,
    *,
    gates: Literal["closed", "open"],
    shardings: Callable[[Mapping[Param, tuple[int, ...]]], Mapping[Param, Sharding | None]],
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """The parameters of a plan, as a nested dict.

    Args:
      plan: from `plan_load`.
      gates: as of `load_pretrained`.
      shardings: from the shapes of all parameters to their shardings; None: the default device.
      progress: as of `load_pretrained`.
    """
    folder, source, tensors, has_gates, config, _ = plan
    state = nnx.to_pure_dict(_abstract(config)[1])
    shapes = {param: leaf.shape for param, leaf in nnx.traversals.flatten_mapping(state).items()}
    places = names.places(config, shapes)
    made = {param for param in places if _is_made(param, source, has_gates)}
    kept = {param: place for param, place in places.items() if param not in made}
    if gates != "closed" and not any(param[-2:] == ("gate", "bias") for param in made):
        keeps = source.stored or has_gates
        hint = "its own gates are kept" if keeps else "set attention='nsa' to start gates"
        raise ValueError(
            "gates must be 'closed' where no gates are started, got "
            f"{gates!r} for {str(folder)!r}: {hint}"
        )
    read.check_tensors(folder, tensors, kept.values())
    split = shardings(shapes)

    loaded: dict[Param, jax.Array] = {}
    for param, shape in shapes.items():
        own = config.param_dtype
        if param in kept and plan.keeps_dtypes:
            own = str(checks.float_dtype("param_dtype", read.dtype_of(kept[param], tensors)))
        with contextlib.ExitStack() as stack:
            if param in made:
                part = warm_start.made(param, shape, gates, jnp.dtype(own))
            else:
                args = kept[param], tensors, jnp.dtype(own)
                part = stack.enter_context(read.reader(*args))
            loaded[param] = _placed(shape, split[param], part)
        if progress is not None:
            progress(len(loaded), len(places))
    return nnx.traversals.unflatten_mapping(loaded)


def _fields_of_tensors(
    source: Source, tensors: Mapping[str, read.Tensor], fields: Mapping[str, Any], has_gates: bool
) -> dict[str, Any]:
    """The fields that the tensors say, or a warm start."""
    found: dict[str, Any] = {}
    if source.model_type == keys.FLA:
        found |= {"head_dim": _size(tensors, "self_attn.q_proj.weight") // fields["num_heads"]}
        found |= {"mlp_dim": _size(tensors, "mlp.gate_proj.weight")}
    if source.model_type != keys.OWN and "nsa" in _types(fields):
        bias = names.GATE.replace("weight", "bias")
        started = not source.stored and not has_gates
        found["gate_bias"] = started or any(name.endswith(bias) for name in tensors)
    return found


def _size(tensors: Mapping[str, read.Tensor], name: str) -> int:
    """The first axis of a tensor of the first layer."""
    name = f"layers.0.{name}"
    if name not in tensors:
        raise ValueError(
            f"path must hold the tensor {names.in_file(name)!r}, got none of that name"
        )
    if not tensors[name].shape:
        raise ValueError(f"{tensors[name].name!r} must have two axes, got a scalar")
    return tensors[name].shape[0]


def _types(fields: Mapping[str, Any]) -> tuple[str, ...]:
    return fields.get("layer_types") or (fields["attention"],)


def _is_made(path: tuple[str, ...], source: Source, has_gates: bool) -> bool:
    """Whether a warm start makes a parameter; the others are read from the folder."""
    if source.model_type == keys.OWN or not names.is_made(path):
        return False
    return "gate" not in path or not (source.stored or has_gates)


def _without_tied_head(
    folder: Path, tensors: dict[str, read.Tensor], tied: bool
) -> dict[str, read.Tensor]:
    """The tensors without an output head that is only a copy of the embedding."""
    head, embedding = tensors.get(names.HEAD), tensors.get("embed_tokens.weight")
    if not tied and head is None:
        raise ValueError(
            f"{str(folder)!r} must hold the tensor {names.HEAD!r}, or its config.json must have "
            "tie_word_embeddings=true (false where the key is absent), got neither"
        )
    if not tied or head is None or embedding is None:
        return tensors
    if not read.same_contents(head, embedding):
        raise ValueError(
            f"{head.name!r} must equal {embedding.name!r} with tie_word_embeddings=true, got other "
            f"values in {str(head.file)!r}"
        )
    return {name: tensor for name, tensor in tensors.items() if name != names.HEAD}


def _shardings(
    state: Any, mesh: Mesh | None, shapes: Mapping[tuple[str, ...], tuple[int, ...]]
) -> dict[tuple[str, ...], NamedSharding | None]:
    """The sharding of each parameter; None without a mesh."""
    if mesh is None:
        return dict.fromkeys(shapes)
    if (shardings := current_shardings(state, mesh)) is None:
        if mesh.size > 1 and not {"data", "tensor"} & set(mesh.axis_names):
            raise ValueError(
                "mesh must have an axis data or tensor where no sharding_rules are set, got the "
                f"axes {mesh.axis_names}"
            )
        shardings = training_shardings(state, mesh, fsdp=True)
    found = nnx.traversals.flatten_mapping(shardings)
    for path, sharding in found.items():
        for axis, names_ in enumerate(sharding.spec):
            split = () if names_ is None else (names_,) if isinstance(names_, str) else names_
            devices = int(np.prod([mesh.shape[name] for name in split]))
            if shapes[path][axis] % devices:
                raise ValueError(
                    f"{'.'.join(path)} must divide over the mesh axis {', '.join(split)} of "
                    f"{devices} devices, got the shape {shapes[path]}, split along axis {axis}"
                )
    return found


def _placed(
    shape: tuple[int, ...],
    sharding: Sharding | None,
    part: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """The array whose parts `part` returns, one part on the host at a time."""
    if sharding is None:
        return jnp.array(part(tuple(slice(0, size) for size in shape)))
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index or (), shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        host = part(tuple(slice(*bound) for bound in bounds))
        # An alias of the host's memory could not be donated.
        copies = [jax.device_put(host, device, may_alias=False) for device in holders]
        arrays += jax.block_until_ready(copies)
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
