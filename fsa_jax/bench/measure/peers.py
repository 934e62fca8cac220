"""Other projects' kernels of selected attention on the same inputs and the same GPU.

`--peer-path` names a checkout of the PyTorch and Triton code of Flash Sparse Attention
(Relaxed-System-Lab/Flash-Sparse-Attention), whose tests also call the kernels of vanilla NSA in the
package `nsa_ref`. Installed packages are found without it. This module contains none of that code;
it only imports and calls it.

Arrays are shared between jax and torch by DLPack, without copies. Times are measured by CUDA
events. Results are compared with ours: each row records the difference, and whether it is too
large.
"""

import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fsa_jax.bench.cases import Case
from fsa_jax.bench.measure import correctness
from fsa_jax.bench.measure.timing import REPS, WARM_UP

#: The module, forward function and backward function of each method.
PEERS = {
    "peer_fsa": (
        "fsa.ops.FSA_topk_sparse_attention",
        "_topk_sparse_attention_fwd_opt",
        "_topk_sparse_attention_bwd_opt",
    ),
    "peer_nsa": (
        "nsa_ref.ops.topk_sparse_attention",
        "_topk_sparse_attention_fwd",
        "_topk_sparse_attention_bwd",
    ),
}


def wanted(path: Path | None) -> tuple[str, ...]:
    """The methods to run: all if a path is given, else those whose package is installed."""
    if path is None:
        return tuple(method for method in PEERS if _installed(method))
    if not path.is_dir():
        raise ValueError(f"peer_path must be a folder, got {str(path)!r}")
    if str(path.resolve()) not in sys.path:
        sys.path.insert(0, str(path.resolve()))
    return tuple(PEERS)


def _installed(method: str) -> bool:
    try:
        return importlib.util.find_spec(PEERS[method][0]) is not None
    except ModuleNotFoundError:
        return False


def measure(
    method: str, case: Case, sets: Sequence[dict[str, jax.Array]], ours: Sequence, rounds: int
) -> dict[str, dict[str, Any]]:
    """Measures a peer and returns the results of both passes.

    Args:
      method: a key of `PEERS`.
      case: a case that is not packed.
      sets: input sets made by `cases.make_inputs`.
      ours: out, dq, dk and dv of this package for the first set, with the cotangent `dout_of`.
      rounds: number of timed rounds.

    Raises:
      Exception: any exception of the peer's import or call.
    """
    torch = _torch()
    name, *functions = PEERS[method]
    module = importlib.import_module(name)
    forward, backward = (getattr(module, function) for function in functions)
    ends = torch.from_dlpack(jnp.asarray([0, case.length], jnp.int32))
    scale = case.width**-0.5
    calls = []
    for x in sets:
        lists = jnp.transpose(x["block_indices"][0], (1, 0, 2))
        arrays = [x["query"][0], x["key"][0], x["value"][0], lists]
        arrays = [torch.from_dlpack(jax.block_until_ready(array)) for array in arrays]
        rest = (case.config.block_size, ends, ends, case.length, case.length, scale)
        calls.append((*arrays, *rest))
    kept = [forward(*args) for args in calls]
    backward_calls = []
    for x, args, (out, lse, *rest) in zip(sets, calls, kept, strict=True):
        dout = torch.from_dlpack(jax.block_until_ready(jnp.copy(dout_of(x)[0])))
        backward_calls.append((out, dout, lse, *args, *rest))
    results = [kept[0][0], *backward(*backward_calls[0])]
    torch.cuda.synchronize()
    errors = [
        correctness.relative_error(jax.dlpack.from_dlpack(got), mine[0])
        for got, mine in zip(results, ours, strict=True)
    ]
    return {
        name: _time(torch, function, arguments, rounds)
        | {"relative_error": max(error), "agrees": bool(max(error) <= correctness.TOLERANCE)}
        for name, function, arguments, error in (
            ("forward", forward, calls, errors[:1]),
            ("backward", backward, backward_calls, errors[1:]),
        )
    }


def _torch() -> Any:
    return importlib.import_module("torch")


def dout_of(arrays: dict[str, jax.Array]) -> jax.Array:
    """The cotangent that is used with a set of inputs."""
    return arrays["query"][:, ::-1]


def _time(torch: Any, function: Callable, argument_sets: Sequence[tuple], rounds: int):
    """Times calls in ms by CUDA events, which exclude the work of the host."""
    number = 0

    def call():
        nonlocal number
        function(*argument_sets[number % len(argument_sets)])
        number += 1

    for _ in range(WARM_UP):
        call()
    samples = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(REPS[1]):
            call()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / REPS[1])
    middle = statistics.median(samples)
    return {
        "samples_ms": samples,
        "ms": middle,
        "spread": (max(samples) - min(samples)) / middle,
        "device_ms": None,
        "kernels_ms": None,
        "calls": REPS[1],
        "peak_bytes": None,
    }
