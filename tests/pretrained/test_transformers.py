"""transformers reads what is written here, and computes the same from it; opt-in.

CONTRIBUTING.md says how to run these tests, which need torch.
"""

import json
import os

import jax
import numpy as np
import pytest
from flax import nnx
from util import python_of

from fsa_jax import NSAConfig
from fsa_jax.pretrained import load_pretrained, save_pretrained
from fsa_jax.rope import LinearScaling, YarnScaling
from fsa_jax.transformer import Transformer, TransformerConfig
from pretrained.folders import DATA, tensors_of

pytestmark = [
    pytest.mark.transformers,
    # torch and transformers warn of their own use of other libraries.
    pytest.mark.filterwarnings("default"),
]

TOKENS = np.random.default_rng(0).integers(0, 512, (2, 90))
SIZES = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}


@pytest.fixture(scope="module")
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers", reason="run with --with torch --with transformers")


def logits_of(transformers, folder):
    torch = pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model, model(torch.asarray(TOKENS)).logits.numpy()


def close(found, want):
    np.testing.assert_allclose(found, want, rtol=0, atol=5e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_files_of_others_are_read_by_transformers(transformers, tmp_path, name):
    model = load_pretrained(DATA / name)
    for like in (DATA / name, None):
        folder = tmp_path / str(like is None)
        save_pretrained(model, folder, like=like, max_shard_size="200KB")
        loaded, want = logits_of(transformers, folder)
        close(np.asarray(model(TOKENS.astype(np.int32))), want)
        written = {name: x.numpy() for name, x in loaded.state_dict().items()}
        for key, tensor in tensors_of(DATA / name).items():
            np.testing.assert_array_equal(written[key], tensor)


@pytest.mark.parametrize(
    "options",
    [
        {"tie_embeddings": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {"rope_scaling": LinearScaling(factor=3.0)},
        {"rope_scaling": YarnScaling(factor=4.0, original_max_position=32)},
        {"qk_norm": True, "qkv_bias": True, "out_bias": True, "norm_eps": 1e-4},
    ],
    ids=["tied", "biases", "linear", "yarn", "qwen3"],
)
def test_models_of_this_package_are_read_by_transformers(transformers, tmp_path, options):
    config = TransformerConfig(vocab_size=512, attention="full", head_dim=24, **options)
    model = Transformer(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    rng = np.random.default_rng(0)

    def noisy(leaf):  # so that no bias is 0 and no scale of a norm is 1
        return leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)

    model = nnx.merge(graphdef, jax.tree.map(noisy, params))
    save_pretrained(model, tmp_path / "x")
    close(np.asarray(model(TOKENS.astype(np.int32))), logits_of(transformers, tmp_path / "x")[1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Mistral", {"sliding_window": None}),
        ("Mistral", {"sliding_window": None, "head_dim": 32, "rope_theta": 1e6}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("Llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0,
                                    "original_max_position_embeddings": 64}}),
        ("Llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7,
                                    "mscale_all_dim": 1.1, "truncate": False,
                                    "original_max_position_embeddings": 64}}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 24, "attention_bias": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_of_transformers_are_read_here(transformers, tmp_path, kind, options, dtype):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor += 0.05 * torch.randn_like(tensor)
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path / "x")
    ours = load_pretrained(tmp_path / "x", dtype="float32")
    assert ours.config.param_dtype == dtype
    want = logits_of(transformers, tmp_path / "x")[1]
    close(np.asarray(ours(TOKENS.astype(np.int32))), want)
    save_pretrained(ours, tmp_path / "y", like=tmp_path / "x")
    written = tensors_of(tmp_path / "y")
    for name, tensor in tensors_of(tmp_path / "x").items():
        assert written[name].tobytes() == tensor.tobytes()


def test_transformers_refuses_sparse_models(transformers, tmp_path):
    sizes = NSAConfig(block_size=16, topk=4)
    save_pretrained(load_pretrained(DATA / "llama3", attention="nsa", nsa=sizes), tmp_path / "x")
    with pytest.raises((ValueError, KeyError), match="fsa_jax"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["architectures"] is None


def test_the_page(transformers, monkeypatch):
    """All blocks of docs/pretrained.md, one after the other."""
    root = DATA.parent.parent.parent
    monkeypatch.chdir(root)
    blocks = python_of(root / "docs" / "pretrained.md")
    with jax.numpy_dtype_promotion("standard"):
        exec(compile("\n".join(blocks), "pretrained.md", "exec"), {})
