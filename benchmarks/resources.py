"""Registers, spills, shared memory and matrix instructions of the kernels, compiled without a GPU.

    python benchmarks/resources.py                                # everything; takes some minutes
    python benchmarks/resources.py --devices H200 --groups 1 4

This script needs jax's plugin for CUDA 12 (`jax-cuda12-plugin`, `jax-cuda12-pjrt`) and NVIDIA's
assembler (`nvidia-cuda-nvcc-cu12`), but no GPU. It compiles selected attention, compressed
attention and the selection, with their gradients, at the `main` shape of fsa_jax/bench/shapes.py
with several numbers of query heads, and a decoding step at 131,072 tokens with the same numbers of
heads. It assembles each kernel with ptxas, writes what ptxas reports to a JSON file and prints it
as a table.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax

from fsa_jax.bench.ahead_of_time import (
    TARGETS,
    compile_for,
    compressed_gradients,
    decode_step,
    selected_gradients,
)
from fsa_jax.bench.shapes import KERNELS
from fsa_jax.pallas import SelectedTuning
from fsa_jax.pallas.block_attention.plan import METHODS as SELECTED_METHODS

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "resources.json"
#: There is no H100: except for measured tile sizes, it gets the same code as an H200.
DEVICES = ("A100", "L40", "H200", "B200")
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
#: Kernels to report: those of each method of selected attention (the ones whose programs own keys a
#: second time, for packed sequences), of compressed attention, which the window shares, and of
#: decoding.
METHODS = {
    "kv_outer": (
        "forward_kernel",
        "backward_kernel",
        "merge_kernel",
        "sum_gradients_kernel",
        "sum_blocks_kernel",
        "search_kernel",
    ),
    "kv_outer_packed": ("forward_kernel", "backward_kernel"),
    "query_outer": ("query_outer_kernel", "query_gradient_kernel", "block_key_gradient_kernel"),
    "query_outer_packed": ("block_key_gradient_kernel",),
    "query_tile": ("query_tile_kernel", "query_tile_gradient_kernel", "merge_lists_kernel"),
    "compressed": (
        "range_forward_kernel",
        "range_query_gradient_kernel",
        "range_key_gradient_kernel",
        "score_kernel",
        "choose_kernel",
    ),
    "decode": (
        "paged_range_kernel",
        "paged_block_kernel",
        "merge_splits_kernel",
        "take_best_kernel",
    ),
}
#: Numbers in the report of ptxas, as patterns.
REPORT = {
    "registers": r"Used (\d+) registers",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
}
#: Instructions to count, as patterns. tcgen05 instructions are those of Blackwell's tensor cores.
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma_sync": r"\bmma\.sync",
    "tcgen05_mma": r"\btcgen05\.mma\.",
    "cp_async": r"\bcp\.async\.c[ag]\.",
}


def find_ptxas() -> str:
    """The path of NVIDIA's assembler in its Python package."""
    try:
        package = importlib.util.find_spec("nvidia.cuda_nvcc")
    except ModuleNotFoundError:
        package = None
    for folder in package.submodule_search_locations or () if package else ():
        path = Path(folder) / "bin" / "ptxas"
        if path.exists():
            return str(path)
    raise SystemExit("ptxas is missing: pip install nvidia-cuda-nvcc-cu12")


def assemble(ptxas: str, path: Path) -> dict[str, int]:
    """What ptxas reports for the only kernel of a PTX file, and the instruction counts."""
    code = path.read_text()
    arch = first(r"\.target (\w+)", code)
    report = subprocess.run(
        [ptxas, "-v", f"-arch={arch}", str(path), "-o", "/dev/null"],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    return {name: int(first(pattern, report)) for name, pattern in REPORT.items()} | {
        name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()
    }


def first(pattern: str, text: str) -> str:
    """The first group of a pattern's first match in a text; raises if there is no match."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern!r} in {text[:2000]!r}")
    return match[1]


def measure(ptxas: str, device: str, group: int, method: str) -> list[dict]:
    """A row for each kernel of a method on a device, with `group` query heads per key head."""
    main = KERNELS["main"]
    shape = dataclasses.replace(main, heads=group * main.kv_heads)
    if method == "decode":
        program = decode_step(length=131072, heads=shape.heads, kv_heads=shape.kv_heads)
    elif method == "compressed":
        program = compressed_gradients(shape, implementation="triton")
    else:
        tuning = SelectedTuning(
            method=next(name for name in SELECTED_METHODS if method.startswith(name))
        )
        packed = method.endswith("_packed")
        program = selected_gradients(shape, implementation="triton", tuning=tuning, packed=packed)
    kernels = look(ptxas, device, program, METHODS[method])
    rows = [{"device": device, "method": method, "group": group} | row for row in kernels]
    missing = set(METHODS[method]).difference(row["kernel"] for row in rows)
    if missing:
        raise RuntimeError(f"{method} on {device} has no kernel {sorted(missing)}")
    return sorted(rows, key=lambda row: row["kernel"])


def look(ptxas: str, device: str, program: tuple, kernels: Sequence[str]) -> list[dict]:
    """A row for each of the named kernels of a program compiled for a device.

    A program is a tuple (function, shapes ...).
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        compile_for(device, *program, compiler_options=dump)
        launches = next(Path(folder).glob("*.thunk_sequence.txt")).read_text()
        for path in Path(folder).glob("*.ptx"):
            # The second of two kernels with the same name has a numeric suffix.
            found = re.search(r"\.entry ((\w+?)(?:__\d+)?)\(", path.read_text())
            if found is None or found[2] not in kernels:
                continue
            launch = first(rf"\b{found[1]} (grid: .*)", launches)
            rows.append(
                {"kernel": found[1]}
                | {
                    "threads": int(first(r"threads: \[(\d+), 1, 1\]", launch)),
                    "shared_bytes": int(first(r"shared_memory: (\d+) bytes", launch)),
                }
                | assemble(ptxas, path)
            )
    return rows


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; groups whose numbers all agree share a line."""
    lines = {}
    for row in rows:
        row = row.copy()
        group = row.pop("group")
        lines.setdefault(tuple(row.items()), []).append(str(group))
    columns = [name for name in rows[0] if name != "group"]
    text = [["G", *columns], ["---"] * (len(columns) + 1)]
    for line, groups in sorted(lines.items(), key=lambda item: [x[1] for x in item[0][:3]]):
        text.append([", ".join(groups), *(str(value) for _, value in line)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in text)


def main() -> None:
    """Compiles the kernels, writes the JSON file and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--devices", nargs="+", choices=TARGETS, default=DEVICES)
    parser.add_argument("--groups", nargs="+", type=int, default=GROUPS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the CUDA plugin would look for a driver
    ptxas = find_ptxas()
    rows = [
        row
        for device in flags.devices
        for method in flags.methods
        for group in flags.groups
        for row in measure(ptxas, device, group, method)
    ]
    version = subprocess.run([ptxas, "--version"], check=True, capture_output=True, text=True)
    results = {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "ptxas": first(r"(V[\d.]+)", version.stdout),
        "shape": dataclasses.asdict(KERNELS["main"]) | {"heads": "kv_heads * group"},
        "dtype": "bfloat16",
        "rows": rows,
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
