"""Times selected attention on one NVIDIA GPU, beside its floors and the query-outer kernels.

    python benchmarks/selected.py --out results.json               # minutes on an H200
    python benchmarks/selected.py --out results.json --peers       # and dense attention of cuDNN
    python benchmarks/selected.py --out results.json --quick       # one length, two groups
    python benchmarks/selected.py --out results.json --interpret   # no GPU: checks this script

bfloat16, one row of T tokens, 4 key heads of width 128, G query heads for each, 16 blocks of 64
tokens a query. Prints one table; the JSON holds every number. Progress goes to stderr.

Timed: the forward pass, and the backward pass alone, of the KV-outer and of the query-outer
kernels. The default choice is one of them for each pass, and its times are those. A forward pass
of the KV-outer kernels builds the query index. That of the query-outer kernels needs none, and
builds it for the backward pass alone, which is not in its time. Before that, outputs and gradients
of a short case are compared with XLA's, and those of every case with each other.

Floors, from ceilings measured on an H200: the flops of the two forward products at the fastest
matrix product, 2.5 times that backward; and partial results written and read at the speed of a
copy. A ratio to the floor takes the larger of the two, and means little on another GPU.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path

import gpu_timing
import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import PASSES, compile_passes, say

import fsa_jax
from fsa_jax import NSAConfig, triton
from fsa_jax.pallas import SelectedTuning
from fsa_jax.pallas.tuning import METHODS, make_plan

#: Matrix products in bfloat16, flop a second, and a copy, bytes read plus written a second.
H200_FLOPS, H200_BYTES = 790e12, 4.3e12
#: Flops of a pass over those of the forward products.
PRODUCTS = {"forward": 1.0, "backward": 2.5}
KINDS = ("nsa", "uniform")
DENSE = "dense causal, cuDNN"
#: Correlation of neighbouring tokens in the processes that stand for queries and keys.
CORRELATION = 0.99
#: All input sets of a case together, bytes: several times the L2 cache.
SETS_BYTES = 2**28
#: Largest relative error (rms) of the kernels against XLA, and against each other: bfloat16 partial
#: results stay well below.
TOLERANCE = 0.02
#: Tokens of the case that is compared with XLA: twice those that 16 blocks hold.
CHECKED = 2048


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What all cases have in common."""

    kv_heads: int = 4
    width: int = 128
    config: NSAConfig = dataclasses.field(default_factory=NSAConfig)

    def arrays(self, length: int, group: int):
        """Shapes of query, key, value and the lists."""
        key = jax.ShapeDtypeStruct((1, length, self.kv_heads, self.width), jnp.bfloat16)
        query = jax.ShapeDtypeStruct((1, length, self.kv_heads * group, self.width), key.dtype)
        lists = (1, length, self.kv_heads, self.config.topk)
        return query, key, key, jax.ShapeDtypeStruct(lists, jnp.int32)


TINY = Sizes(2, 16, NSAConfig(kernel_size=8, kernel_stride=4, block_size=16, topk=6))


def drifting(seed: int, length: int, sizes: Sizes):
    """Standard normal tokens [1, T, K, D], each like the one before it: an AR(1) process."""
    shape = (length, sizes.kv_heads, sizes.width)
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    x[1:] *= (1 - CORRELATION**2) ** 0.5
    for token in range(1, length):
        x[token] += CORRELATION * x[token - 1]
    return jnp.asarray(x, jnp.bfloat16)[None]


def mean_keys(key, config: NSAConfig):
    """Compressed keys [1, M, K, D]."""
    return fsa_jax.compress(
        key, kernel_size=config.kernel_size, kernel_stride=config.kernel_stride, method="mean"
    )


@functools.partial(jax.jit, static_argnames="config")
def nsa_lists(query, key, config: NSAConfig):
    """`select_blocks` on mean-pooled keys, each key head with one query head.

    The logsumexp of one head scales all scores of a query alike and never changes their order, so
    compressed attention, a slow loop on a GPU so far, need not run for it.
    """
    lse = jnp.zeros(query.shape[:3], jnp.float32)
    return fsa_jax.select_blocks(query, mean_keys(key, config), lse, config=config)


def equal_to_reference(length: int, sizes: Sizes) -> float:
    """Share of the entries of `nsa_lists` that the reference implementation gives too."""
    config = sizes.config
    query, key = (drifting(seed, length, sizes) for seed in (0, 1))
    compressed = mean_keys(key, config)
    _, lse = fsa_jax.compressed_attention(
        query,
        compressed,
        compressed,
        kernel_size=config.kernel_size,
        kernel_stride=config.kernel_stride,
        implementation="reference",
        return_residuals=True,
    )
    wanted = fsa_jax.select_blocks(
        query, compressed, lse, config=config, implementation="reference"
    )
    return float(jnp.mean(nsa_lists(query, key, config) == wanted))


@functools.partial(jax.jit, static_argnames=("length", "sizes"))
def uniform_lists(seed, length: int, sizes: Sizes):
    """The forced blocks of NSA, and a uniform choice among the other blocks up to the query."""
    config = sizes.config
    blocks = config.num_blocks(length)
    block = jnp.arange(blocks, dtype=jnp.int32)

    def one_query(token):
        own = token // config.block_size
        score = jax.random.uniform(jax.random.fold_in(seed, token), (sizes.kv_heads, blocks))
        forced = (block < config.init_blocks) | (block > own - config.local_blocks)
        score = jnp.where(block > own, -1, jnp.where(forced, 2, score))
        rank, best = jax.lax.top_k(score, config.topk)
        chosen = jnp.sort(jnp.where(rank >= 0, best, blocks), axis=-1)
        return jnp.where(chosen < blocks, chosen, -1)

    return jax.lax.map(one_query, jnp.arange(length, dtype=jnp.int32), batch_size=256)[None]


def describe_lists(lists) -> dict:
    """How much a list keeps of that of the token before, and how often the busiest block stands."""
    lists = np.asarray(lists)[0]
    now, before = lists[1:], lists[:-1]
    kept = (now[..., None] == before[..., None, :]).any(axis=-1)[now >= 0].mean()
    # block 0 is in every list
    counts = [np.bincount(head[head >= 0])[1:] for head in lists.swapaxes(0, 1)]
    busiest = max(head.max() / head.mean() for head in counts)
    return {"kept_of_list_before": float(kept), "busiest_block_over_mean": float(busiest)}


def make_lists(kind: str, length: int, sizes: Sizes):
    """Lists [1, T, K, S]. Those of fewer tokens are the first of them: selection is causal."""
    if kind == "uniform":
        return uniform_lists(jax.random.key(2), length, sizes)
    query, key = (drifting(seed, length, sizes) for seed in (0, 1))
    return nsa_lists(query, key, sizes.config)


def operator(method: str, sizes: Sizes, implementation: str):
    """Attention by one method, as a function of query, key, value and the lists."""
    if method == DENSE:
        return lambda query, key, value, _: jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )
    tuning = SelectedTuning(method=method) if method in METHODS else None
    return functools.partial(
        fsa_jax.selected_attention,
        block_size=sizes.config.block_size,
        implementation="xla" if method == "xla" else implementation,
        tuning=tuning,
    )


def default_choice(length: int, group: int, sizes: Sizes) -> dict[str, str]:
    """Which forced method the default equals in each pass; "default" where it equals none."""
    query, key, value, lists = sizes.arrays(length, group)
    rest = lists.shape[3], sizes.config.block_size, triton.planned_capability()

    def plan(method):
        return make_plan(SelectedTuning(method=method), query, key, value, *rest)

    def others(plan):
        return dataclasses.replace(plan, forward_method="", backward_method="")

    default = plan(None)
    chosen = {"forward": default.forward_method, "backward": default.backward_method}
    return {
        name: method if others(plan(method)) == others(default) else "default"
        for name, method in chosen.items()
    }


def floors(length: int, group: int, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Milliseconds that the products, and the traffic of partial results, take at the ceilings."""
    config = sizes.config
    pairs = length * config.topk * sizes.kv_heads * group
    products = 1e3 * 4 * pairs * config.block_size * sizes.width / H200_FLOPS
    traffic = 1e3 * 2 * 2 * pairs * sizes.width / H200_BYTES
    return {
        name: {"products": factor * products, "partial_results": traffic}
        for name, factor in PRODUCTS.items()
    }


def measure_case(case, methods, compiled, lists, rounds: int) -> list[dict]:
    """A row for each selection and method; dense attention knows no selections and gets one row."""
    make = compiled["inputs", *case]
    inputs = [make(jax.random.key(0))]
    count = min(max(-(-SETS_BYTES // sum(x.nbytes for x in inputs[0])), 2), 8)
    inputs += [make(jax.random.key(seed)) for seed in range(1, count)]
    rows = []
    for kind, listed in lists.items():
        arguments = [(*arrays, listed[:, : case[0]]) for *arrays, _ in inputs]
        cotangents = [dout for *_, dout in inputs]
        wanted = None  # results of the first method, which the others' are compared with
        for method in methods:
            if method == DENSE and any(row["method"] == DENSE for row in rows):
                continue
            selection = "all" if method == DENSE else kind
            row = {"length": case[0], "group": case[1], "selection": selection, "method": method}
            times, results = gpu_timing.measure_passes(
                compiled[method, *case], arguments, cotangents, rounds
            )
            row |= times
            if wanted is None:
                wanted = results
            elif results is not None and method != DENSE:
                row["relative_error"] = float(gpu_timing.relative_error(results, wanted))
            rows.append(row)
            gpu_timing.say_row(row)
    return rows


def finish(rows: list[dict], choice: dict[str, str], floor: dict) -> list[dict]:
    """Adds the row of the default choice, and the ratios, to the rows of one case and selection."""
    by_method = {row["method"]: row for row in rows}
    if "default" not in by_method:
        default = {key: rows[0][key] for key in ("length", "group", "selection")}
        default["method"] = "default"
        for name, method in choice.items():
            if name in by_method[method]:
                default[name] = {"time_of": method, **by_method[method][name]}
        rows = [*rows, default]
    for row, name in itertools.product(rows, PASSES):
        if name in row:
            row[name]["floors_ms"] = floor[name]
            row[name]["over_floor"] = row[name]["ms"] / max(floor[name].values())
            if name in by_method["query_outer"]:
                baseline = by_method["query_outer"][name]["ms"]
                row[name]["over_query_outer"] = row[name]["ms"] / baseline
    return rows


def table(rows: list[dict]) -> str:
    """The default choice of every case, and dense attention where it was asked for."""
    dense = {(r["length"], r["group"]): r for r in rows if r["method"] == DENSE}
    titles = ["T", "G", "selection"]
    for name in ("fwd", "bwd"):
        titles += [f"{name} ms", "x floor", "x query-outer", *([f"dense {name} ms"] * bool(dense))]
    lines = []
    for row in (row for row in rows if row["method"] == "default"):
        line = [row["length"], row["group"], row["selection"]]
        other = dense.get((row["length"], row["group"]), {})
        for name in PASSES:
            times = row.get(name, {})
            line += [times.get(key, "failed") for key in ("ms", "over_floor", "over_query_outer")]
            line += [other.get(name, {}).get("ms", "none")] * bool(dense)
        lines.append(line)
    return gpu_timing.markdown(titles, lines)


def report(results: dict) -> int:
    """Prints the table and what it takes to believe it; 1 where kernels failed or disagreed."""
    rows, (again,) = results["rows"], results["first_case_again"]
    machine = results["device"], "jax " + results["versions"]["jax"], "commit " + results["commit"]
    print("selected_attention, default choice; x: time over that of the floor and of query-outer")
    print(", ".join(machine))
    same_lists = results.get("lists_equal_to_reference", 1.0)
    if not results["measurement"]:
        print("NOT A MEASUREMENT: kernels interpreted, tiny sizes")
        print(f"lists equal to the reference: {same_lists:.2%}")
    print(table(rows))
    first = next(row for row in rows if row["method"] == again["method"])
    if "error" not in again and "error" not in first:
        ratios = ", ".join(f"{name} {again[name]['ms'] / first[name]['ms']:.2f}" for name in PASSES)
        print(f"first case measured again, second time over first: {ratios}")
    rows = rows + results["check"]
    error = np.max([row.get("relative_error", 0) for row in rows])
    print(f"largest relative error of out and gradients, to XLA and between methods: {error:.1e}")
    wrong = [row for row in rows if not row.get("relative_error", 0) <= TOLERANCE]
    failed = [row for row in rows if "error" in row]
    for row in wrong + failed:
        print("wrong or failed:", {key: x for key, x in row.items() if key not in PASSES})
    kernels_failed = any(row["method"] != DENSE for row in failed)
    return int(bool(wrong) or kernels_failed or same_lists < 0.99)


def command_line() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--lengths", type=int, nargs="+", help="default 8192 32768 65536")
    parser.add_argument("--groups", type=int, nargs="+", help="default 1 2 4 8 16")
    parser.add_argument("--selections", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=7, help="rounds of 3 to 10 calls")
    parser.add_argument("--threads", type=int, default=8, help="functions compiled at a time")
    parser.add_argument("--peers", action="store_true", help="also time cuDNN's dense attention")
    parser.add_argument("--quick", action="store_true", help="8192 tokens, groups of 1 and 4")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="tiny sizes, kernels interpreted on any device: checks results, measures nothing",
    )
    flags = parser.parse_args()
    full = [8192, 32768, 65536], [1, 2, 4, 8, 16]
    lengths, groups = (
        ([200], [1, 4]) if flags.interpret else ([8192], [1, 4]) if flags.quick else full
    )
    flags.lengths, flags.groups = flags.lengths or lengths, flags.groups or groups
    if not flags.interpret and (reason := triton.device_reason()):
        parser.error(f"{reason}; --interpret runs this script without one")
    return flags


def main() -> int:
    """Compiles, chooses the blocks, measures, writes the JSON, prints the table."""
    flags = command_line()
    sizes = TINY if flags.interpret else Sizes()
    implementation = "triton_interpret" if flags.interpret else "triton"
    cases = list(itertools.product(flags.lengths, flags.groups))
    choices = {case: default_choice(*case, sizes) for case in cases}
    methods = ["query_outer", "kv_outer"]
    methods += ["default"] * any("default" in choice.values() for choice in choices.values())
    # both methods share the kernel of dK and dV, so a case is compared with XLA before all else
    check, check_methods = (min(CHECKED, *flags.lengths), max(flags.groups)), ["xla", *methods]
    methods += [DENSE] * flags.peers
    results = gpu_timing.describe_machine() | {
        "what": "fsa_jax.selected_attention: times in ms",
        "measurement": not flags.interpret,
        "complete": False,
        "arguments": vars(flags) | {"out": flags.out.name},  # not where it lies
        "sizes": dataclasses.asdict(sizes) | {"dtype": "bfloat16", "batch": 1},
        "ceilings": {"flops": H200_FLOPS, "bytes": H200_BYTES, "products": PRODUCTS},
        "rows": [],
    }
    say(f"{results['device']}: {len(cases)} cases, methods {methods}")
    jobs = {}
    for case in dict.fromkeys([check, *cases]):
        *arrays, listed = sizes.arrays(*case)
        normal = (*arrays, arrays[0])
        jobs["inputs", *case] = functools.partial(gpu_timing.compile_normal, normal)
        for method in [*check_methods, *methods] if case == check else methods:
            attend = operator(method, sizes, implementation)
            jobs[method, *case] = functools.partial(compile_passes, attend, arrays, [listed])
    compiled = gpu_timing.compile_all(jobs, flags.threads)
    results["compiled_after_s"] = gpu_timing.seconds()
    lists = {}
    for kind in flags.selections:
        lists[kind] = jax.block_until_ready(make_lists(kind, max(flags.lengths), sizes))
        say(f"chose blocks: {kind}")
    results["selections"] = [
        {"selection": kind, "length": length} | describe_lists(x[:, :length])
        for kind, x in lists.items()
        for length in flags.lengths
    ]
    if flags.interpret:
        results["lists_equal_to_reference"] = equal_to_reference(max(flags.lengths), sizes)

    def write():
        flags.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    results["check"] = measure_case(check, check_methods, compiled, lists, rounds=1)
    for case in cases:
        rows = measure_case(case, methods, compiled, lists, flags.rounds)
        floor = floors(*case, sizes)
        for kind in lists:
            chosen = [row for row in rows if row["selection"] == kind]
            results["rows"] += finish(chosen, choices[case], floor)
        results["rows"] += [row for row in rows if row["method"] == DENSE]
        write()
    first = flags.selections[0]
    again = measure_case(cases[0], ["kv_outer"], compiled, {first: lists[first]}, flags.rounds)
    results |= {"first_case_again": again, "complete": True, "seconds": gpu_timing.seconds()}
    write()
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
