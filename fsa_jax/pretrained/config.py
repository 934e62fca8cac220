"""config.json and `TransformerConfig`: each read from the other, by the tables of `keys.py`."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fsa_jax.arguments import checks
from fsa_jax.arguments.types import LayerType
from fsa_jax.config import NSAConfig
from fsa_jax.pretrained import keys
from fsa_jax.rope import scaling_from_dict
from fsa_jax.transformer_config import LAYER_TYPES, TransformerConfig

NAME = "config.json"


class Source(NamedTuple):
    """What a folder's config.json says.

    Attributes:
      path: the file.
      model_type: its model type.
      fields: fields of `TransformerConfig`; those of sizes that only tensors tell are missing.
      stored: whether the folder holds sparse attention, from `save_pretrained` or
        flash-linear-attention. Otherwise all layers are dense.
    """

    path: Path
    model_type: str
    fields: dict[str, Any]
    stored: bool


def read_config(folder: Path, *, has_gates: bool = False) -> Source:
    """Reads the config.json of a folder.

    Args:
      folder: the folder.
      has_gates: whether its tensors have the gates of sparse attention, to which the sizes of
        flash-linear-attention then belong.

    Raises:
      ValueError: there is none, it is damaged, its model type is unknown, or it has a key that may
        change the function that the model computes.
    """
    path = folder / NAME
    values = read_json(path)
    model_type = values.get("model_type")
    known = (*keys.DENSE, keys.OWN, keys.FLA)
    if model_type not in known:
        raise ValueError(
            f"model_type must be one of {known}, got {checks.short(model_type)} in {str(path)!r}"
        )
    reader = _Reader(path, model_type, values)
    if model_type == keys.OWN:
        return Source(path, model_type, _own_fields(reader), True)
    if model_type == keys.FLA:
        return Source(path, model_type, _fla_fields(reader), True)
    fields = _dense_fields(reader, model_type)
    stored = has_gates and bool(keys.FLA_SIZES.keys() & values.keys())
    if stored:  # the names of Hugging Face with the sizes of flash-linear-attention
        fields |= _fla_attention(reader)
    reader.finish()
    return Source(path, model_type, fields, stored)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a config.json; raises ValueError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(
            f"path must be a folder with a {NAME}, got {str(path.parent)!r} without one"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} must hold JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {checks.short(values)}")
    return values


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf


_SIZE = ("must be an integer of at least 1", _is_size)
#: The rule of a field's value, by the type of its default; sizes have no default, or None.
_RULES: dict[type, tuple[str, Callable[[Any], bool]]] = {
    type(keys.REQUIRED): _SIZE,
    type(None): _SIZE,
    float: ("must be a finite number above 0", _is_positive),
    bool: ("must be true or false", lambda value: isinstance(value, bool)),
}


class _Reader:
    """Takes the keys of a config.json one by one, so that those left over are known."""

    def __init__(self, path: Path, model_type: str, values: Mapping[str, Any]):
        self.path = path
        self.model_type = model_type
        self.rest = dict(values)

    def take(self, key: str, default: Any = None) -> Any:
        return self.rest.pop(key, default)

    def fields(self, table: tuple[keys.Field, ...], defaults_of: str) -> dict[str, Any]:
        """The fields of `TransformerConfig` of a table, with the defaults of a model type."""
        found = {}
        for entry in table:
            value = self.take(entry.key, entry.by_type.get(defaults_of, entry.default))
            if value is keys.REQUIRED:
                raise self.error(entry.key, "must be given", "nothing")
            if value is None and entry.default is not keys.REQUIRED:
                value = entry.default  # null stands for an absent key
            rule, fits = _RULES[type(entry.default)]
            follows = value is None and entry.default is None  # from other sizes
            if not follows and not fits(value):
                raise self.error(entry.key, rule, value)
            found[entry.field] = value
        if found.get("num_kv_heads", 0) is None:
            found["num_kv_heads"] = found["num_heads"]
        return found

    def only(self, table: Mapping[str, tuple]) -> None:
        """Checks the keys whose other values would change the function."""
        for key, allowed in table.items():
            value = self.take(key, allowed[0])
            if not any(value == other for other in allowed):
                raise self.error(key, f"must be {_or(allowed)}", value)

    def finish(self) -> None:
        """Raises ValueError if a key is left over that may change the function."""
        for key, value in self.rest.items():
            if key not in keys.HARMLESS_KEYS:
                raise self.error(key, "is unknown and may change what the model computes", value)

    def error(self, key: str, rule: str, value: Any) -> ValueError:
        got = value if value == "nothing" else checks.short(value)
        return ValueError(f"{key} {rule}, got {got} in {str(self.path)!r} ({self.model_type})")


def _or(values: tuple) -> str:
    return " or ".join("null" if value is None else json.dumps(value) for value in values)


def _dense_fields(reader: _Reader, model_type: str) -> dict[str, Any]:
    """The fields of a dense checkpoint's config.json, which must describe full attention."""
    fields = reader.fields(keys.FIELDS, model_type)
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["embed_dim"] // fields["num_heads"]
    reader.only(keys.ONLY)
    _check_no_window(reader, model_type, fields["num_layers"])
    fields |= _rope_fields(reader)
    fields |= _bias_fields(reader, model_type)
    own = reader.take(keys.OWN, {})
    if not isinstance(own, dict) or own.keys() - {"padding_id"}:
        raise reader.error(keys.OWN, "must be an object with no field but padding_id", own)
    return fields | own | {"attention": "full", "qk_norm": model_type == "qwen3"}


def _bias_fields(reader: _Reader, model_type: str) -> dict[str, bool]:
    """Which projections have a bias. Qwen2's are fixed; only Llama has the key of the MLP."""
    attention_bias, mlp_bias = (  # null stands for false
        False if (value := reader.take(key)) is None else value
        for key in ("attention_bias", "mlp_bias")
    )
    for key, value, types in (
        ("attention_bias", attention_bias, ("llama", "qwen2", "qwen3")),
        ("mlp_bias", mlp_bias, ("llama",)),
    ):
        if not isinstance(value, bool) or (value and model_type not in types):
            rule = f"must be true or false, and true only for {', '.join(types)}"
            raise reader.error(key, rule, value)
    if model_type == "qwen2":
        return {"qkv_bias": True, "out_bias": False, "mlp_bias": False}
    return {"qkv_bias": attention_bias, "out_bias": attention_bias, "mlp_bias": mlp_bias}


def _check_no_window(reader: _Reader, model_type: str, num_layers: int) -> None:
    """Raises ValueError if some layer sees only a sliding window of tokens."""
    window = reader.take("sliding_window", 4096 if model_type == "mistral" else None)
    switch = reader.take("use_sliding_window", False)
    first = reader.take("max_window_layers", 28)
    types = reader.take("layer_types")
    if types is not None and types != ["full_attention"] * num_layers:
        raise reader.error(
            "layer_types", 'must be "full_attention" for each layer, or absent', types
        )
    if window is None or (model_type.startswith("qwen") and switch is False):
        return
    # Qwen's layers before max_window_layers are full, unless layer_types says so of all.
    full = types is not None or (isinstance(first, int) and first >= num_layers)
    if model_type.startswith("qwen") and full:
        return
    rule = "must be null: layers with a sliding window are not supported"
    if model_type == "mistral":
        rule += " (Mistral's default is 4096 where the key is absent)"
    raise reader.error("sliding_window", rule, window)


def _rope_fields(reader: _Reader) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, in the old keys of that name or in `rope_parameters`."""
    old, new = reader.take("rope_scaling"), reader.take("rope_parameters")
    outer = reader.take("rope_theta")
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise reader.error(key, "must be an object or null", value)
    if old and new and dict(new, rope_theta=None) != dict(old, rope_theta=None):
        raise reader.error("rope_scaling", f"must not differ from rope_parameters={new}", old)
    values = dict(new or old or {})
    inner = values.pop("rope_theta", None)
    if outer is not None and inner is not None and outer != inner:
        raise reader.error(
            "rope_theta", f"must not differ from that of rope_parameters, {inner}", outer
        )
    if values.pop("partial_rotary_factor", None) not in (None, 1):
        raise reader.error("partial_rotary_factor", "must be 1", (new or old))
    length: Any = reader.rest.get("max_position_embeddings")
    kind = values.get("rope_type", values.get("type"))
    if kind in keys.ROPE_LENGTHS and values.get("original_max_position_embeddings") is None:
        values["original_max_position_embeddings"] = length
    if kind == "yarn" and values.get("factor") is None:
        with contextlib.suppress(TypeError, ZeroDivisionError):  # then the factor is missing
            values["factor"] = length / values["original_max_position_embeddings"]
    try:
        # An object without a type has only rope_theta, or is empty.
        scaling = scaling_from_dict(values) if values else None
    except ValueError as error:
        raise ValueError(
            f"the RoPE scaling of {str(reader.path)!r} is not supported: {error}"
        ) from error
    theta = next((x for x in (inner, outer) if x is not None), keys.ROPE_THETA)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _own_fields(reader: _Reader) -> dict[str, Any]:
    """The fields that `save_pretrained` wrote where transformers has no key for some."""
    base = reader.take("base_model_type", "llama")
    if base not in keys.DENSE:
        raise reader.error("base_model_type", f"must be one of {keys.DENSE}", base)
    own = reader.take(keys.OWN)
    if not isinstance(own, dict) or "attention" not in own:
        raise reader.error(keys.OWN, "must be an object with the fields of the attention", own)
    fields = reader.fields(keys.FIELDS, base)
    reader.only(keys.ONLY)
    fields |= _rope_fields(reader)
    reader.finish()
    if others := sorted(own.keys() & (fields.keys() | keys.OF_A_RUN)):
        raise reader.error(keys.OWN, f"must not have the field {others[0]!r}", own)
    try:
        return vars(TransformerConfig.from_dict(fields | own))
    except ValueError as error:
        raise ValueError(f"{keys.OWN} of {str(reader.path)!r} is not supported: {error}") from error


def _fla_fields(reader: _Reader) -> dict[str, Any]:
    """The fields of flash-linear-attention's model type "nsa"."""
    fields = reader.fields(keys.FLA_FIELDS, keys.FLA)
    # Its block builds the attention layer without the key head_dim, and the layer has a default of
    # its own: only the tensors tell the width of the heads.
    reader.take("head_dim")
    reader.take("intermediate_size")
    reader.only(keys.FLA_ONLY)
    fields |= _fla_attention(reader)
    reader.finish()
    return fields | {"qk_norm": False, "out_bias": False, "mlp_bias": False, "rope_scaling": None}


def _fla_attention(reader: _Reader) -> dict[str, Any]:
    """The attention of flash-linear-attention: phi is the mean of whole blocks of rotated keys."""
    sizes = {key: reader.take(key, default) for key, default in keys.FLA_SIZES.items()}
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            hint = ": a model without the window branch is not supported" * (key == "window_size")
            raise reader.error(key, f"must be an integer of at least 1{hint}", value)
    block, topk, window = sizes.values()
    if topk < 3:
        raise reader.error("block_counts", "must be at least the 3 blocks always selected", topk)
    return {
        "attention": "nsa",
        "nsa": NSAConfig(
            kernel_size=block,
            kernel_stride=block,
            block_size=block,
            topk=topk,
            init_blocks=1,
            local_blocks=2,
            window_size=window,
        ),
        "compression": "mean",
        "compress_after_rope": True,
        "gate": "head",
    }


def write_config(config: TransformerConfig, dtype: str, like: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model.

    Args:
      config: the configuration of the model.
      dtype: dtype of most of its tensors.
      like: a config.json of the same sizes, whose harmless keys are kept.

    Raises:
      ValueError: no model type of transformers computes the function of a dense model.
    """
    dense = set(config.types) == {"full"}
    base = _model_type(config, like, dense)
    values = {entry.key: getattr(config, entry.field) for entry in keys.FIELDS}
    rope: dict[str, Any] = {"rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    rope |= {"rope_type": "default"} if scaling is None else scaling.to_dict()
    values |= {"rope_parameters": rope, "hidden_act": "silu", "attention_dropout": 0.0}
    values |= {"dtype": dtype, **_length(scaling), **_kept(like)}
    if not dense:
        values |= {"model_type": keys.OWN, "base_model_type": base, "architectures": None}
        return values | {keys.OWN: _own_values(config)}
    if base in ("llama", "qwen3"):
        values["attention_bias"] = config.qkv_bias
    if base == "llama":
        values["mlp_bias"] = config.mlp_bias
    if base != "llama":
        values["sliding_window"] = None
    if base.startswith("qwen"):
        values["use_sliding_window"] = False
    if (
        config.padding_id
    ):  # transformers, which has no segment ids, keeps a key that it does not know
        values[keys.OWN] = {"padding_id": config.padding_id}
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[base]
    return values | {"model_type": base, "architectures": [f"{name}ForCausalLM"]}


def _length(scaling: Any) -> dict[str, int]:
    """The context length of a scaled RoPE, against which transformers checks the scaling."""
    original = getattr(scaling, "original_max_position", None)
    return (
        {}
        if original is None
        else {"max_position_embeddings": math.ceil(scaling.factor * original)}
    )


def _kept(like: Mapping[str, Any]) -> dict[str, Any]:
    """The harmless keys of another config.json, except those of the type and the dtype."""
    written = {"model_type", "base_model_type", "architectures", "dtype", "torch_dtype"}
    kept = keys.HARMLESS_KEYS - written
    return {key: value for key, value in like.items() if key in kept}


def _model_type(config: TransformerConfig, like: Mapping[str, Any], dense: bool) -> str:
    """The model type of transformers that computes the function of a dense model."""
    wanted = (config.qk_norm, config.qkv_bias, config.out_bias, config.mlp_bias)
    fits = {
        "llama": not config.qk_norm and config.qkv_bias == config.out_bias,
        "mistral": wanted == (False, False, False, False),
        "qwen2": wanted == (False, True, False, False),
        "qwen3": config.qk_norm and config.qkv_bias == config.out_bias and not config.mlp_bias,
    }
    named = like.get("base_model_type", like.get("model_type"))
    order = (*((named,) if named in fits else ()), "llama", "qwen2", "qwen3")
    found = next((name for name in order if fits[name]), None)
    if not dense:  # all fields are in the file, whatever the type
        return found or "llama"
    if found is None:
        raise ValueError(
            "no model type of transformers has the biases and norms of this model, got "
            f"qk_norm={config.qk_norm}, qkv_bias={config.qkv_bias}, out_bias={config.out_bias} and "
            f"mlp_bias={config.mlp_bias}"
        )
    if config.rope_interleaved:
        raise ValueError(
            "rope_interleaved must be False for a dense model, since transformers pairs the "
            "channels of RoPE across the halves of a head, got True"
        )
    return found


def _own_values(config: TransformerConfig) -> dict[str, Any]:
    """The fields that config.json has no key for, as JSON values."""
    elsewhere = {entry.field for entry in keys.FIELDS} | {"rope_theta", "rope_scaling"}
    omitted = elsewhere | keys.OF_A_RUN
    return {name: value for name, value in config.to_dict().items() if name not in omitted}


def attention_fields(
    source: Source,
    attention: LayerType | None,
    nsa: NSAConfig | None,
    layer_types: Sequence[str] | None,
    has_gates: bool,
) -> dict[str, Any]:
    """The fields of the attention that the caller asks for, on top of those of the folder.

    Args:
      source: what the folder says.
      attention: the argument of `load_pretrained`.
      nsa: likewise.
      layer_types: likewise.
      has_gates: whether the folder holds weights of gates.

    Raises:
      ValueError: what the caller asks for and what the folder holds do not fit together.
    """
    checks.choice("attention", attention, (None, *LAYER_TYPES))
    if nsa is not None:
        checks.config(nsa, "nsa")
    if layer_types is not None:
        if not isinstance(layer_types, list | tuple):
            raise ValueError(
                "layer_types must be None or a type for each layer, such as ('full', 'nsa'), got "
                f"{checks.short(layer_types)}"
            )
        layer_types = tuple(layer_types)
    if source.stored:
        _check_stored(source, attention, nsa, layer_types)
        return {}
    where = str(source.path.parent)
    if layer_types is None:
        types = (attention or "full",)
    elif attention in (None, *layer_types):
        types = layer_types
        attention = attention or ("nsa" if "nsa" in types else "full")
    else:
        raise ValueError(
            f"attention must be one of the layer_types, got {attention!r} and {layer_types}"
        )
    if has_gates and "nsa" not in types:
        raise ValueError(
            f"attention must be 'nsa', with the sizes nsa=NSAConfig(...), for {where!r}, which has "
            f"the gates self_attn.g_proj but no sizes in its {NAME}: without its gates it computes "
            f"another function. Got attention={attention!r}"
        )
    if nsa is not None and set(types) == {"full"}:
        raise ValueError(
            f"nsa must be None for a dense model, got {nsa}: set attention='nsa' to start sparse "
            "attention from its weights"
        )
    sizes = {} if nsa is None else {"nsa": nsa}
    return {"attention": attention or "full", "layer_types": layer_types, **sizes}


def _check_stored(source: Source, attention: Any, nsa: Any, layer_types: Any) -> None:
    """Raises ValueError if the caller asks for other attention than a folder of its own types."""
    where = str(source.path.parent)
    one = (source.fields["attention"],) * source.fields["num_layers"]
    held = source.fields.get("layer_types") or one
    if attention is not None and attention not in {*held} - {"full"}:
        raise ValueError(
            "attention must be None or that of a folder whose layers have gates and phi of their "
            "own, since without them it computes another function: got "
            f"attention={attention!r} and {where!r}, which holds {', '.join(dict.fromkeys(held))}"
        )
    for name, value, stored in (
        ("nsa", nsa, source.fields.get("nsa")),
        ("layer_types", layer_types, held),
    ):
        if value is not None and value != stored:
            raise ValueError(
                f"{name} must be None or that of the folder, got {value} and {where!r}, which "
                f"holds {stored}"
            )
