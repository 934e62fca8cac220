"""The files of a folder: which are read, and what is said of those that do not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsa_jax import NSAConfig
from fsa_jax.pretrained import load_pretrained
from pretrained.folders import ABSENT, DATA, LLAMA, changed, params_of, same, tensors_of

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q) is None, f"must hold the tensor '{Q}', got none of that name$"),
        (lambda t: [t.pop(name) for name in [*t] if "k_proj" in name][:0],
         r"layers.0.self_attn.k_proj.weight', got none of that name \(1 more like it\)"),
        (lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": np.zeros(128)}),
         "must hold no tensor but those .*got 'model.layers.1.self_attn.q_proj.bias'$"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros(1)}),
         "must hold no tensor but"),
        (lambda t: t.update({Q: t[Q].T}),
         rf"'{Q}' must have the shape \[128, 64\] .*, got \[64, 128\] in .*safetensors"),
        (lambda t: t.update({Q: t[Q].astype(np.int32)}), f"'{Q}' must have one of the dtypes"),
        (lambda t: t.update({Q: t[Q].astype(np.float16)}),
         f"'{Q}' must have the dtype of 'model.layers.0.self_attn.q_proj.weight', F32"),
        (lambda t: t.update({Q.removeprefix("model."): t[Q]}), "must hold each tensor once"),
        (lambda t: t.pop("lm_head.weight") is None,
         "must hold the tensor 'lm_head.weight', or .* tie_word_embeddings=true"),
    ],
    ids=["missing", "two-missing", "bias", "layer", "shape", "integer", "mixed", "twice", "head"],
)  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path, change, message):
    folder = changed(tmp_path / "x", change=lambda t: change(t) and None)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_harmless_differences(tmp_path):
    def buffers(tensors):
        inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
        return {name.removeprefix("model."): x for name, x in (tensors | inverse).items()}

    folder = changed(tmp_path / "x", change=buffers, tie_word_embeddings=ABSENT, head_dim=ABSENT,
                     num_attention_heads=4, num_key_value_heads=1)  # fmt: skip
    with pytest.raises(ValueError, match="must have the shape"):
        load_pretrained(folder)
    folder = changed(tmp_path / "y", change=buffers, tie_word_embeddings=ABSENT)
    same(load_pretrained(folder), load_pretrained(LLAMA))


def test_tied_embeddings(tmp_path):
    tied = {"source": DATA / "qwen2"}
    copied = changed(
        tmp_path / "copied",
        change=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}),
        **tied,
    )
    model = load_pretrained(copied)
    assert model.head is None
    other = changed(
        tmp_path / "other",
        change=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        **tied,
    )
    with pytest.raises(ValueError, match=r"must equal 'model.embed_tokens.weight' with tie"):
        load_pretrained(other)


def test_dtypes(tmp_path):
    folder = changed(
        tmp_path / "bf16",
        change=lambda t: {name: x.astype(jnp.bfloat16) for name, x in t.items()},
    )
    model = load_pretrained(folder)
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
    want = tensors_of(folder)["lm_head.weight"]
    assert params_of(model)["head",].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(params_of(model)["head",]), want)
    model = load_pretrained(folder, param_dtype="float32", dtype=jnp.bfloat16)
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "float32")
    np.testing.assert_array_equal(params_of(model)["head",], want.astype(np.float32))

    def norms_in_float32(tensors):
        return {
            name: x if "norm" in name else x.astype(jnp.bfloat16) for name, x in tensors.items()
        }

    model = load_pretrained(changed(tmp_path / "mixed", change=norms_in_float32))
    assert {str(x.dtype) for path, x in params_of(model).items() if path[-1] == "scale"} == {
        "float32"
    }
    assert model.config.param_dtype == "bfloat16"
    double = changed(
        tmp_path / "double",
        change=lambda t: {name: x.astype(np.float64) for name, x in t.items()},
    )
    with pytest.raises(ValueError, match="param_dtype must not be float64 unless jax_enable_x64"):
        load_pretrained(double)
    same(load_pretrained(double, param_dtype="float32"), load_pretrained(LLAMA))


def test_damaged_folders(tmp_path):
    with pytest.raises(ValueError, match="path must be a folder"):
        load_pretrained("meta-llama/Llama-3.1-8B")
    folder = changed(tmp_path / "pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights such as pytorch_model.bin are not read"):
        load_pretrained(folder)
    folder = changed(tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        load_pretrained(folder)


def test_damaged_index(tmp_path):
    folder = changed(tmp_path / "x", DATA / "qwen3")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    third = folder / "model-00003-of-00010.safetensors"

    def load_with(**weight_map):
        files = {k: v for k, v in (whole["weight_map"] | weight_map).items() if v is not ABSENT}
        index.write_text(json.dumps({"weight_map": files}))
        return load_pretrained(folder)

    with pytest.raises(ValueError, match=r"must list the tensors .*'model.norm.weight' only in"):
        load_with(**{"model.norm.weight": ABSENT})
    with pytest.raises(ValueError, match=r"got 'x' missing from 'model-00003"):
        load_with(x=third.name)
    with pytest.raises(ValueError, match=r"must hold a weight_map: .*'x' is said to be in 3"):
        load_with(x=3)
    with pytest.raises(ValueError, match=r"must name files of its own folder, got '../y'"):
        load_with(x="../y")
    third.unlink()
    with pytest.raises(ValueError, match=r"lists 'model-00003-of.*', which is missing"):
        load_with()
    index.write_text("{}")
    with pytest.raises(ValueError, match="must hold a weight_map"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gates": "ajar"}, "gates must be one of"),
        ({"nsa": NSAConfig()}, "nsa must be None for a dense model"),
        ({"nsa": NSAConfig(), "attention": "full"}, "nsa must be None for a dense model"),
        ({"gates": "open"}, "gates must be 'closed' where no gates .* set attention='nsa'"),
        ({"layer_types": 5}, "layer_types must be None or a type for each layer.* got 5"),
        ({"layer_types": np.array(["nsa", "full"])}, "layer_types must be None or a type .* array"),
        ({"attention": ["nsa"]}, "attention must be one of"),
        ({"path": 5}, "path must be a path, got 5"),
        ({"path": ""}, "path must be a path, got ''"),
        ({"mesh": 2}, "mesh must be a jax.sharding.Mesh or None, got 2"),
        ({"attention": "linear"}, "attention must be one of"),
        ({"layer_types": ("nsa",)}, "layer_types must have one type for each"),
        ({"attention": "nsa", "layer_types": ("full", "full")}, "attention must be one of the lay"),
        ({"param_dtype": "int8"}, "param_dtype must be one of"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(**{"path": LLAMA} | arguments)


def test_more_layers_than_tensors_are_found_at_once(tmp_path):
    folder = changed(tmp_path / "x", num_hidden_layers=10**9)
    with pytest.raises(ValueError, match=r"num_hidden_layers must be .* tensors .* got 1000000000"):
        load_pretrained(folder)


def test_values_that_a_model_refuses_are_those_of_the_file(tmp_path):
    folder = changed(tmp_path / "x", num_key_value_heads=3)
    with pytest.raises(ValueError, match=r"x/config.json' is not supported: num_heads must be"):
        load_pretrained(folder)


def test_json_may_start_with_a_byte_order_mark(tmp_path):
    folder = changed(tmp_path / "x")
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    assert load_pretrained(folder).config.num_layers == 2


def test_parameters_can_be_donated():
    """They are no aliases of the memory that a file was read into."""
    model = load_pretrained(LLAMA)
    before = np.array(params_of(model)["head",])
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    step(params_of(model)["head",])
    np.testing.assert_array_equal(tensors_of(LLAMA)["lm_head.weight"], before)
