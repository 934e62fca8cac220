"""config.json: what its keys mean, and which of them are refused."""

import json

import pytest

from fsa_jax import NSAConfig
from fsa_jax.pretrained.config import read_config, write_config
from fsa_jax.rope import LinearScaling, Llama3Scaling, YarnScaling
from fsa_jax.transformer_config import TransformerConfig
from pretrained.folders import ABSENT, DATA, config_of


@pytest.fixture
def read(tmp_path):
    """Reads the config.json of a checkpoint with some keys changed."""

    def read(base, **changes):
        values = config_of(DATA / base) if isinstance(base, str) else dict(base)
        values = {k: v for k, v in (values | changes).items() if v is not ABSENT}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return read_config(tmp_path)

    return read


MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}


def test_fields_of_llama(read):
    fields = read("llama3").fields
    assert TransformerConfig(**fields) == TransformerConfig(
        vocab_size=512,
        num_layers=2,
        embed_dim=64,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=96,
        attention="full",
        rope_theta=500000.0,
        rope_scaling=Llama3Scaling(factor=8.0, original_max_position=64),
        tie_embeddings=False,
        norm_eps=1e-5,
    )


def test_fields_of_other_types(read):
    fields = read(MISTRAL).fields
    assert (fields["head_dim"], fields["tie_embeddings"], fields["qk_norm"]) == (8, False, False)
    assert read(MISTRAL, num_key_value_heads=ABSENT).fields["num_kv_heads"] == 8
    assert read("qwen2", num_key_value_heads=None).fields["num_kv_heads"] == 6
    assert read("qwen2", num_key_value_heads=ABSENT).fields["num_kv_heads"] == 32
    fields = read("qwen2").fields
    assert [fields[x] for x in ("qkv_bias", "out_bias", "qk_norm", "head_dim")] == [
        *(True, False, False),
        16,
    ]
    fields = read("qwen3", head_dim=ABSENT, attention_bias=True).fields
    assert [fields[x] for x in ("qkv_bias", "out_bias", "qk_norm", "head_dim")] == [
        *(True, True, True),
        128,
    ]
    fields = read("llama3", attention_bias=None, mlp_bias=None, tie_word_embeddings=None).fields
    assert [fields[x] for x in ("qkv_bias", "mlp_bias", "tie_embeddings")] == [False] * 3
    assert read("llama3", rope_interleaved=False, is_llama_config=True).fields["num_layers"] == 2
    assert read("llama3", fsa_jax={"padding_id": -1}).fields["padding_id"] == -1
    fields = read("llama3", attention_bias=True, mlp_bias=True, num_key_value_heads=ABSENT).fields
    assert [fields[x] for x in ("qkv_bias", "out_bias", "mlp_bias", "num_kv_heads")] == [
        *(True, True, True),
        8,
    ]


YARN = YarnScaling(factor=4.0, original_max_position=1024)
YARN_VALUES = {"factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, LinearScaling(factor=2.0)),
        ({"rope_scaling": {"rope_type": "yarn", **YARN_VALUES}, "rope_theta": 7.0}, 7.0, YARN),
        ({"rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 4.0},
          "max_position_embeddings": 1024}, 1e4, YARN),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 9.0, "factor": None,
                              "original_max_position_embeddings": 1024}}, 9.0, YARN),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
         1e4, Llama3Scaling(factor=8.0, original_max_position=64)),
    ],
)  # fmt: skip
def test_rope(read, keys, theta, scaling):
    fields = read("llama3", **{"rope_parameters": ABSENT} | keys).fields
    assert (fields["rope_theta"], fields["rope_scaling"]) == (theta, scaling)


REFUSED = [
    ("llama3", "hidden_act", "gelu", r'must be "silu" or "swish", got \'gelu\''),
    ("llama3", "attention_dropout", 0.1, "must be 0 or null, got 0.1"),
    ("llama3", "partial_rotary_factor", 0.5, "must be 1 or null"),
    ("llama3", "quantization_config", {"bits": 4}, "must be null"),
    ("llama3", "num_local_experts", 8, "is unknown and may change what the model computes, got 8"),
    ("llama3", "logit_scale", 0.5, "is unknown and may change"),
    ("llama3", "mlp_bias", "yes", "must be true or false"),
    ("llama3", "tie_word_embeddings", "true", "must be true or false, got 'true'"),
    ("llama3", "rms_norm_eps", 0, "must be a finite number above 0, got 0"),
    ("llama3", "rope_interleaved", True, "must be false or null, got True"),
    ("llama3", "fsa_jax", {"gate": "head"}, "must be an object with no field but padding_id"),
    ("llama3", "hidden_size", ABSENT, "must be given, got nothing"),
    ("llama3", "num_attention_heads", None, "must be an integer of at least 1, got None"),
    ("llama3", "vocab_size", "512", "must be an integer of at least 1, got '512'"),
    ("llama3", "rope_theta", 1e6, "must not differ from that of rope_parameters, 500000.0"),
    ("llama3", "rope_scaling", {"type": "linear", "factor": 2}, "must not differ from rope_param"),
    ("qwen3", "mlp_bias", True, "must be true or false, and true only for llama"),
    ("llama3", "sliding_window", 4096, "must be null"),
    (MISTRAL, "sliding_window", 4096, "must be null"),
    (MISTRAL, "sliding_window", ABSENT, "is 4096 where the key is absent"),
    (MISTRAL, "attention_bias", True, "must be true or false, and true only for llama, qwen2"),
    ("qwen2", "layer_types", ["full_attention", "sliding_attention"], 'must be "full_att'),
    ("qwen3", "per_layer_config", {"0": {"head_dim": 8}}, "must be null"),
]


@pytest.mark.parametrize(("base", "key", "value", "rule"), REFUSED)
def test_refused_keys(read, base, key, value, rule):
    with pytest.raises(ValueError, match=f"^{key} .*{rule}.* in .*config.json"):
        read(base, **{key: value})


def test_sliding_windows_that_are_off(read):
    assert read("qwen2", sliding_window=4096, use_sliding_window=False)
    on = {"sliding_window": 4096, "use_sliding_window": True}
    assert read("qwen3", **on)  # layer_types says full_attention
    assert read("qwen3", **on, layer_types=ABSENT, max_window_layers=2)
    with pytest.raises(ValueError, match="sliding_window must be null"):
        read("qwen3", **on, layer_types=ABSENT, max_window_layers=1)


@pytest.mark.parametrize(
    ("scaling", "rule"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type must be one of"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "rope_type must be one of"),
        ({"type": "mrope", "mrope_section": [1]}, "rope_type must be one of"),
        ({"rope_type": "linear"}, "needs the key 'factor'"),
        ({"rope_type": "linear", "factor": 2.0, "ramp": 1}, "'ramp' .*is not a key"),
    ],
)
def test_refused_rope(read, scaling, rule):
    with pytest.raises(ValueError, match=f"RoPE scaling of .*config.json.*{rule}"):
        read("llama3", rope_parameters=scaling)


def test_other_files_are_refused(read, tmp_path):
    for kind in ("gemma3", None, ["llama"]):
        with pytest.raises(ValueError, match="model_type must be one of"):
            read("llama3", model_type=kind)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must hold JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"must be a folder with a config.json"):
        read_config(tmp_path / "absent")


@pytest.mark.parametrize("base", ["llama3", "qwen2", "qwen3", MISTRAL])
def test_written_files_are_read_again(read, base):
    source = read(base)
    like = config_of(DATA / base) if isinstance(base, str) else MISTRAL
    config = TransformerConfig(**source.fields)
    for other in (like, {}):
        written = write_config(config, "float32", other)
        again = read(written)
        assert TransformerConfig(**again.fields) == config
    # Without the file that it came from, a model of type mistral is one of type llama.
    assert written["model_type"] == source.model_type.replace("mistral", "llama")
    written = write_config(config, "float32", like)
    assert written["model_type"] == source.model_type
    # These two only matter with a sliding window.
    kept = {key: like[key] for key in like.keys() - {"layer_types", "max_window_layers"}}
    if base is not MISTRAL:  # a file of an old version: the keys of RoPE and dtype have new names
        assert {key: written.get(key) for key in kept} == kept


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_bias": False, "out_bias": True},
        {"qk_norm": True, "qkv_bias": True},
        {"qk_norm": True, "mlp_bias": True},
        {"rope_interleaved": True},
    ],
)
def test_dense_models_that_transformers_lacks(options):
    config = TransformerConfig(attention="full", **options)
    with pytest.raises(ValueError, match="transformers"):
        write_config(config, "float32", {})


def test_all_options_of_sparse_models_are_stored(read):
    config = TransformerConfig(
        num_layers=3,
        layer_types=("nsa", "full", "window"),
        nsa=NSAConfig(window_size=128),
        gate="token",
        gate_bias=True,
        kv_per_branch=True,
        compression="mlp",
        compress_after_rope=True,
        qk_norm=True,
        qkv_bias=True,
        mlp_bias=True,
        rope_interleaved=True,
        rope_scaling=YARN,
        padding_id=-1,
    )
    again = read(write_config(config, "float32", {}))
    assert again.stored
    assert TransformerConfig(**again.fields) == config
    values = write_config(config, "float32", {})
    with pytest.raises(ValueError, match="no field 'colour'"):
        read(values | {"fsa_jax": values["fsa_jax"] | {"colour": 1}})
