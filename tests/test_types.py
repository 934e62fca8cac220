"""What a type checker infers about the package: correct and wrong calls in user code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsa_jax

#: The checker must reject exactly the lines that end with "# wrong".
USER = """
from typing import assert_type

import jax
import numpy as np
from flax import nnx
from jax import Array

import fsa_jax
from fsa_jax import (
    KVCache, NSAConfig, NSACache, RoPE, compress, compressed_attention, explain, generate,
    native_sparse_attention, select_blocks, selected_attention, sliding_window_attention,
    token_positions, window_positions,
)
from fsa_jax.layers import FullAttention, NativeSparseAttention
from fsa_jax.pallas import SelectedTuning
from fsa_jax.transformer import Transformer, TransformerConfig


def user(x: Array, y: np.ndarray, ids: Array, which: fsa_jax.Implementation, some: bool, text: str):
    sizes = NSAConfig(topk=8)
    c = compress(x, kernel_size=32, kernel_stride=16, method="mean", segment_ids=[[1, 1, 2]])
    assert_type(c, Array)
    assert_type(compressed_attention(x, c, c, kernel_size=32, kernel_stride=16), Array)
    assert_type(sliding_window_attention(y, y, y, window_size=np.int64(4), segment_ids=ids), Array)
    both = sliding_window_attention(x, x, x, window_size=4, return_residuals=True)
    assert_type(both, tuple[Array, Array])
    assert_type(
        compressed_attention(x, c, c, kernel_size=8, kernel_stride=4, return_residuals=True),
        tuple[Array, Array],
    )
    assert_type(
        selected_attention(x, x, x, ids, block_size=64, return_residuals=some),
        Array | tuple[Array, Array],
    )
    options = SelectedTuning()
    assert_type(
        selected_attention(x, x, x, ids, block_size=64, tuning=options, scale=np.float32(1)), Array
    )
    assert_type(select_blocks(x, c, both[1], config=sizes, implementation=which), Array)
    out = native_sparse_attention(x, x, x, c, c, x, config=sizes, implementation="xla")
    assert_type(out, Array)
    assert_type(window_positions(ids, kernel_size=32, kernel_stride=16), Array)
    assert_type(RoPE().apply(x, token_positions([1, 1])), Array)
    assert_type(explain("triton"), dict[str, tuple[str, str]])

    native_sparse_attention(1, 2, wrong=3)  # wrong
    native_sparse_attention(x, x, x, c, c, x)  # wrong
    native_sparse_attention(x, x, x, c, c, x, config={"topk": 8})  # wrong
    native_sparse_attention(x, x, x, c, c, x, sizes)  # wrong
    native_sparse_attention(x, x, x, c, c, x, config=sizes, implementation="cuda")  # wrong
    native_sparse_attention(x, x, x, c, c, x, config=sizes, implementation=text)  # wrong
    native_sparse_attention(x, x, x, c, c, x, config=sizes, sequence_axis=0)  # wrong
    compress(x, kernel_size=32, kernel_stride=16, method="max")  # wrong
    compress(x, kernel_size="32", kernel_stride=16)  # wrong
    compress(x, kernel_size=32)  # wrong
    compressed_attention(x, c, c, kernel_size=32, kernel_stride=16, return_residual=True)  # wrong
    sliding_window_attention(x, x, x, window_size=4.0)  # wrong
    sliding_window_attention(x, x, x, window_size=4, implementation="cudnn")  # wrong
    selected_attention(x, x, x, ids, block_size=64, tuning="kv_outer")  # wrong
    selected_attention(x, x, x, ids, block_size=64, scale="1")  # wrong
    SelectedTuning(method="outer")  # wrong
    select_blocks(x, c, both[1], config=sizes, return_residuals=True)  # wrong
    window_positions(ids, kernel_size=32)  # wrong
    window_positions("ids", kernel_size=32, kernel_stride=16)  # wrong
    token_positions(ids, axis="x")  # wrong
    explain("cuda")  # wrong
    NSAConfig(top_k=8)  # wrong
    RoPE(theta="big")  # wrong
    sliding_window_attention(x, x, x, window_size=4).shapes  # wrong
    sliding_window_attention(x, x, x, window_size=4, return_residuals=True).shape  # wrong

    layer = NativeSparseAttention(4, 64, compression="mlp", rngs=nnx.Rngs(0))
    assert_type(layer(x, [[1, 1, 2]]), Array)
    assert_type(layer.init_cache(1, 64), NSACache)
    assert_type(layer(x, cache=layer.init_cache(1, 64)), tuple[Array, NSACache])
    NativeSparseAttention(4, 64, compression="max", rngs=nnx.Rngs(0))  # wrong
    NativeSparseAttention(4, 64, wrong=3, rngs=nnx.Rngs(0))  # wrong
    NativeSparseAttention(4, 64, implementation="cudnn", rngs=nnx.Rngs(0))  # wrong
    FullAttention(4, 64, implementation="cuda", rngs=nnx.Rngs(0))  # wrong
    layer(x, segment_ids="ids")  # wrong
    layer(x, wrong=3)  # wrong
    layer.init_cache(1, 64, page_size=8)  # wrong

    config = TransformerConfig(embed_dim=64, num_heads=np.int64(4))  # wrong
    assert_type(TransformerConfig(embed_dim=64, num_heads=4).head_dim, int)
    model = Transformer(config, rngs=nnx.Rngs(0))
    assert_type(model([[1, 2, 3]]), Array)
    assert_type(model.init_cache(1, 64, rollback=2), KVCache)
    assert_type(generate(model, [b"text"], max_tokens=3), list[list[int]])
    TransformerConfig(attention="dense")  # wrong
    TransformerConfig(width=64)  # wrong
    model.init_cache(1, 64, wrong=3)  # wrong
    model.init_cache(1)  # wrong
    model(x, cache=3)  # wrong
    generate(model, [b"text"])  # wrong
    generate(model, [b"text"], max_tokens="3")  # wrong
    generate(model, [b"text"], max_tokens=3, wrong=3)  # wrong
"""


def test_the_package_says_that_it_has_types():
    assert (Path(fsa_jax.__file__).parent / "py.typed").exists()


def test_right_calls_pass_a_type_checker_and_wrong_ones_do_not(tmp_path):
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent))
    assert pyright is not None
    file = tmp_path / "user.py"
    file.write_text(USER, encoding="utf-8")
    command = [pyright, "--outputjson", "--pythonpath", sys.executable, str(file)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    errors = {
        x["range"]["start"]["line"]: x["message"]
        for x in json.loads(found.stdout)["generalDiagnostics"]
        if x["severity"] == "error"
    }
    lines = USER.splitlines()
    wrong = {number for number, line in enumerate(lines) if line.endswith("# wrong")}
    assert [lines[i] for i in sorted(wrong - errors.keys())] == []
    assert [(lines[i], errors[i]) for i in sorted(errors.keys() - wrong)] == []
