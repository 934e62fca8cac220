"""The report of a benchmark, built from made-up result files of all suites."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from fsa_jax.bench.report.markdown import MARK, report
from fsa_jax.bench.report.plots import PLOTS
from fsa_jax.bench.report.results import BRANCHES, Run, load

H200 = {"flops": 790e12, "bytes": 4.3e12, "source": "measured: products and a copy"}
LENGTHS = (8192, 32768)
BUDGET = "not run: the time budget of 10 minutes was spent"


def a_file(suite: str, rows: list, **changes) -> dict:
    return {
        "what": "fsa-jax bench", "suite": suite, "measurement": True, "complete": True,
        "date": "2026-01-02T03:04:05+00:00", "commit": "c0ffee", "device": "NVIDIA H200",
        "driver": "570.1", "clocks": "1980 MHz", "platform": "cuda", "arguments": {},
        "versions": {"jax": "0.11.2", "python": "3.12.1"}, "ceilings": H200, "seconds": 1.0,
        "rows": rows,
    } | changes  # fmt: skip


def a_row(function: str, method: str, name: str, ms: float | None, **changes) -> dict:
    row = {
        "function": function, "method": method, "pass": name, "length": 8192, "heads": 16,
        "kv_heads": 4, "width": 128, "block_size": 64, "topk": 16, "selection": "nsa",
        "packed": False, "dtype": "bfloat16",
    } | changes  # fmt: skip
    if ms is None:
        return {"error": BUDGET} | row
    measured = {
        "samples_ms": [ms], "ms": ms, "spread": 0.02, "device_ms": None, "flops": 1e12 * ms,
        "bytes": 2e9 * ms, "floor_ms": ms / 2, "peak_bytes": 2**17 * row["length"],
        "relative_error": None,
    }  # fmt: skip
    return measured | row


def kernels(**changes) -> dict:
    rows = []
    for length in LENGTHS:
        for group in (1, 4, 16):
            for name in ("forward", "backward"):
                shape = {"length": length, "heads": 4 * group}
                times = {"kv_outer": group, "query_outer": 9.0, "triton": min(group, 9.0)}
                rows += [
                    a_row("selected_attention", method, name, ms * length / 8192, **shape)
                    for method, ms in times.items()
                ]
    rows += [a_row("select_blocks", "triton", "forward", 0.0625)]
    rows += [a_row("selected_attention", "kv_outer", "forward", 5.5, packed=True)]
    rows += [a_row("selected_attention", "peer_fsa", "forward", 11.0, packed=True)]
    rows += [a_row("selected_attention", "triton", "backward", None, selection="skewed")]
    return a_file("kernels", rows, complete=False, **changes)


def operator(full: str = "cudnn", **changes) -> dict:
    rows = []
    for length, name in ((t, name) for t in LENGTHS for name in ("forward", "backward")):
        for function in BRANCHES:
            if (function, name) != ("select_blocks", "backward"):
                rows.append(a_row(function, "triton", name, length / 8192, length=length))
        whole, dense = 6 * length / 8192, 3 * (length / 8192) ** 2
        rows.append(a_row("native_sparse_attention", "triton", name, whole, length=length))
        rows.append(a_row("full_attention", full, name, dense, length=length))
    return a_file("operator", rows, **changes)


def models(suite: str, name: str) -> dict:
    rows = []
    for length in LENGTHS:
        for method, ms in (("nsa", 100.0), ("full", 50.0 * length / 8192)):
            more = {"model": "Llama|8B", "layers": 32, "selection": None, "length": length}
            row = a_row("model", method, name, ms, **more, bytes=None, floor_ms=None)
            mfu = 0.5 if method == "nsa" else None
            rows.append(row | {"tokens_per_s": 1e3 * length / ms, "model_flops_utilisation": mfu})
    return a_file(suite, rows)


def decode() -> dict:
    rows = []
    for batch in (1, 16):
        shape = {"batch": batch, "length": 131072, "heads": 32, "kv_heads": 8}
        for function, method, ms in (
            ("decode_step", "triton", 0.25), ("full_attention", "cudnn", 0.5 * batch),
            ("full_attention", "xla", 4.0),
        ):  # fmt: skip
            rows.append(a_row(function, method, "decode", ms * batch, **shape))
    return a_file("decode", rows)


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def everything() -> dict:
    return {
        "kernels": kernels(),
        "operator": operator(),
        "training": models("training", "step"),
        "prefill": models("prefill", "prefill"),
        "decode": decode(),
        "small": operator("xla", device="cpu", measurement=False, ceilings=None),
        "other": {"what": "something else"},
    }


def sections(text: str) -> dict[str, str]:
    """Returns the text under the heading of each device."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Builds a report from results of all suites on two devices."""
    folder = tmp_path_factory.mktemp("bench")
    report(write(folder / "results", **everything()), folder / "out")
    return folder


def test_sections_and_plots(made):
    text = (made / "out/benchmarks.md").read_text()
    devices = sections(text)
    assert list(devices) == ["NVIDIA H200", "cpu"]
    images = {path.name for path in (made / "out/images").iterdir()}
    plots = ("speedup", "selected", "split", "memory", "roofline", "models")
    wanted = {f"nvidia-h200-{name}.png" for name in plots}
    wanted |= {f"cpu-{name}.png" for name in ("speedup", "split", "memory", "roofline")}
    assert images == wanted
    assert set(re.findall(r"\]\(images/(.*?)\)", text)) == images
    gpu, cpu = devices.values()
    for name in ("kernels", "operator", "training", "prefill", "decode"):
        assert f"Raw figures: `{name}.json`, commit c0ffee." in gpu
    for fact in ("570.1", "jax 0.11.2", "790 TFLOP/s, 4.30 TB/s (measured: products and a copy)"):
        assert fact in gpu
    assert "unknown: no floors" in cpu
    text = "not a measurement: kernels interpreted on a CPU, tiny sizes"
    assert f"**`small.json`: {text}.**" in cpu
    assert "not a measurement" not in gpu
    assert "**`kernels.json` is incomplete" in gpu
    assert "other.json" not in text


def test_the_plot_of_models_keeps_packed_sequences_apart():
    """Packed and plain sequences of one length are drawn in separate figures."""
    content = models("training", "step")
    packed = [r | {"packed": True, "tokens_per_s": 9 * r["tokens_per_s"]} for r in content["rows"]]
    content["rows"] += packed
    figure = PLOTS["models"][1]([Run("training", content, content["rows"])])
    assert figure is not None
    heights = {
        axes.get_title(): list(np.asarray(axes.lines[0].get_ydata())) for axes in figure.axes
    }
    assert list(heights) == ["step, one document", "step, packed documents"]
    one, many = heights.values()
    assert many == [9 * height for height in one]


def test_tables(made):
    gpu, cpu = sections((made / "out/benchmarks.md").read_text()).values()
    # The columns are triton, kv_outer, query_outer and peer_fsa, the time over the floor, and our
    # time over that of the best peer.
    same = "selected_attention | forward | 8,192 | 4 | 4 | no |"
    assert f"| {same} 1.00 (2%) | 1.00 (2%) | 9.00 (2%) | - | 2.00 | 0.111 (query_outer) |" in gpu
    packed = "selected_attention | forward | 8,192 | 16 | 4 | yes |"
    assert f"| {packed} - | 5.50 (2%) | - | 11.0 (2%) | 2.00 | 0.500 (peer_fsa) |" in gpu
    assert "| select_blocks | forward | 8,192 | 16 | 4 | no | 0.0625 (2%) |" in gpu
    assert "All rows: D 128, block size 64, blocks 16, selection nsa, bfloat16." in gpu
    one = "1.00 / 1.00"
    branches = f"| 8,192 | 16 | 4 | {one} | 1.00 / - | {one} | {one} | {one} | 6.00 / 6.00 |"
    full = "3.00 / 3.00 | {} | 0.500 | 0.500 | 0.500 |"
    assert f"{branches} {full.format('cudnn')}" in gpu
    assert f"{branches} {full.format('xla')}" in cpu
    step = "| decode_step | decode | {} | 131,072 | 32 | 8 | {} (2%) | - | - | 2.00 | {} |"
    assert step.format(1, "0.250", "0.500 (full attention, cudnn)") in gpu
    assert step.format(16, "4.00", "0.0625 (full attention, xla)") in gpu
    model = r"| Llama\|8B | 8,192 | 32 | 16 | 4 |"
    assert f"{model} step | nsa | 100 (2%) | 81,920 | 50.0% | 1.00 | 0.500 |" in gpu
    assert f"{model} step | full | 50.0 (2%) | 163,840 | - | 1.00 | - |" in gpu


def test_what_stands_by_hand_is_kept(tmp_path):
    write(tmp_path, kernels=kernels())
    report(tmp_path, tmp_path)
    path = tmp_path / "benchmarks.md"
    text = path.read_text()
    assert text.startswith("# Benchmarks\n\n<!-- ")
    generated = text.partition(MARK)[2]
    path.write_text(f"# Mine\n\nA word.\n\n{MARK}\n\nold figures\n")
    report(tmp_path, tmp_path)
    assert path.read_text() == f"# Mine\n\nA word.\n\n{MARK}{generated}"


def test_docs_are_made_from_the_committed_results(tmp_path):
    root = Path(__file__).parents[2]
    shutil.copy(root / "docs/benchmarks.md", tmp_path)
    report(root / "benchmarks/results", tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert text == (root / "docs/benchmarks.md").read_text()
    for image in re.findall(r"\]\((images/.*?)\)", text):
        assert (root / "docs" / image).exists()


def test_time_by_kernel(tmp_path):
    row = a_row("selected_attention", "triton", "backward", 3.0, device_ms=2.9)
    names = ("backward_kernel", "void cub::RadixSort<a, b>(int)", "loop_transpose_fusion_1",
             "backward_kernel__1", "memcpy32_post", "void lib::f<int>(x)", "loop_add_fusion",
             "g")  # fmt: skip
    row["kernels_ms"] = {name: 2.0**-i for i, name in enumerate(names)}
    peer = row | {"method": "query_outer"}
    report(write(tmp_path, kernels=a_file("kernels", [row, peer])), tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    kinds = "backward_kernel 1.12, sort 0.500, fusions 0.266, copies 0.0625, lib::f 0.0312, others "
    line = f"| selected_attention | triton | backward | 8,192 | 16 | 4 | 3.00 | 2.90 | {kinds}"
    assert text.count(line) == 1
    assert text.count("| 2.90 |") == 1


def test_errors_are_listed_with_their_reason(made):
    gpu, cpu = sections((made / "out/benchmarks.md").read_text()).values()
    shape = "T 8,192, N 16, K 4, D 128, block size 64, blocks 16, selection skewed, not packed"
    line = f"* {shape}, bfloat16: selected_attention by triton backward\n"
    assert f"No result: `{BUDGET}`\n\n{line}" in gpu
    assert BUDGET not in cpu


def test_losses_are_listed_and_sorted(made):
    gpu, cpu = (
        text.split("### Where it loses\n")[1]
        for text in sections((made / "out/benchmarks.md").read_text()).values()
    )
    lines = [line.split(" | ") for line in gpu.splitlines() if re.match(r"\| [\d.]+ \|", line)]
    slower = [float(line[0].strip("| ")) for line in lines]
    # These are kv_outer at G = 16 (16 against 9), and the operator and the models at the shorter
    # length.
    assert slower == [2.0] * 4 + [1.78] * 4
    assert {line[1] for line in lines[:4]} == {"native_sparse_attention", "model"}
    assert {(line[4], line[6]) for line in lines[4:]} == {("kv_outer", "query_outer")}
    assert "full attention, cudnn" in gpu
    assert "full attention, xla" in cpu
    assert "8 of " in gpu


def test_no_losses(tmp_path):
    rows = [
        a_row("selected_attention", method, "forward", ms)
        for method, ms in (("kv_outer", 1.0), ("query_outer", 2.0))
    ]
    report(write(tmp_path, one=a_file("kernels", rows)), tmp_path)
    assert "Nowhere: none of 1 pairs." in (tmp_path / "benchmarks.md").read_text()
    report(write(tmp_path, one=a_file("kernels", rows[:1])), tmp_path)
    assert "No peer was run beside ours." in (tmp_path / "benchmarks.md").read_text()


def test_only_rows_of_the_same_run_are_compared(tmp_path):
    ours = a_file("kernels", [a_row("selected_attention", "kv_outer", "forward", 2.0)])
    peer = a_file("kernels", [a_row("selected_attention", "query_outer", "forward", 1.0)])
    report(write(tmp_path, ours=ours, peer=peer), tmp_path)
    assert "No peer was run beside ours." in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.slow
def test_same_json_gives_the_same_bytes(made, tmp_path):
    copied = shutil.copytree(made / "results", tmp_path / "elsewhere")
    report(copied, tmp_path / "again")
    paths = [path for path in (made / "out").rglob("*") if path.is_file()]
    assert len(paths) == 11
    for path in paths:
        assert (
            path.read_bytes() == (tmp_path / "again" / path.relative_to(made / "out")).read_bytes()
        )
    text = (made / "out/benchmarks.md").read_text()
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert str(made) not in text


def test_newest_run_comes_last_and_devices_keep_their_images(tmp_path):
    rows = [a_row("sliding_window_attention", "triton", "forward", 1.0)]
    old, new = (a_file("kernels", rows, date=f"2026-0{x}-01", commit=f"c{x}") for x in (1, 2))
    twin = a_file("kernels", rows, device="nvidia h200")
    report(write(tmp_path / "deep/er", a=new, b=old, c=twin), tmp_path)
    assert [run.name for run in load(tmp_path)] == [
        "deep/er/b.json",
        "deep/er/c.json",
        "deep/er/a.json",
    ]
    devices = sections((tmp_path / "benchmarks.md").read_text())
    assert "* commit: c1, c2\n" in devices["NVIDIA H200"]
    images = [set(re.findall(r"\(images/(.*?)\)", text)) for text in devices.values()]
    assert images[0]
    assert not images[0] & images[1]


def test_files_without_measured_rows(tmp_path):
    rows = [a_row("select_blocks", "triton", "forward", None)]
    files = {"a": a_file("kernels", rows), "b": a_file("operator", [], complete=False)}
    report(write(tmp_path / "results", **files), tmp_path / "out")
    text = (tmp_path / "out/benchmarks.md").read_text()
    assert text.count("No measured rows.") == 2
    assert BUDGET in text
    assert not (tmp_path / "out/images").exists()


def test_operator_that_failed_or_has_no_rival(tmp_path):
    content = operator()
    for row in content["rows"]:
        if row["function"] == "full_attention" and row["pass"] == "backward":
            row["error"] = "out of memory | `\n`"
        if row["function"] == "native_sparse_attention" and row["length"] == 32768:
            row["error"] = "too | long"
    report(write(tmp_path, operator=content), tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| 3.00 / - | cudnn | 0.500 | - | - |" in text
    assert "| - / - | 48.0 / - | cudnn | - | - | - |" in text
    assert r"No result: `out of memory | ' '`" in text


def test_folder_without_results(tmp_path):
    write(tmp_path, other={"what": "something else"}, a_list=[1])
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=re.escape(f"{folder} holds no results")):
            report(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "", "\xff"])
def test_broken_json_names_the_file(tmp_path, text):
    (tmp_path / "broken.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        report(tmp_path, tmp_path)


@pytest.mark.parametrize("key", ["ms", "length", "floor_ms", "spread", "packed", "pass", "method"])
def test_a_missing_key_of_a_row_is_named(tmp_path, key):
    content = kernels()
    del content["rows"][3][key]
    with pytest.raises(ValueError, match=rf"kernels\.json, row 3: key '{key}' is missing"):
        report(write(tmp_path, kernels=content), tmp_path)


def test_a_missing_key_of_a_model_or_a_file_is_named(tmp_path):
    content = models("training", "step")
    broken = copy.deepcopy(content)
    del broken["rows"][1]["tokens_per_s"]
    with pytest.raises(ValueError, match=r"t\.json, row 1: key 'tokens_per_s' is missing"):
        report(write(tmp_path, t=broken), tmp_path)
    for key in ("device", "ceilings", "rows"):
        broken = {name: value for name, value in content.items() if name != key}
        with pytest.raises(ValueError, match=rf"t\.json: key '{key}' is missing"):
            report(write(tmp_path, t=broken), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("ms", float("nan")), ("ms", 0), ("ms", "1"), ("length", True), ("packed", 1),
     ("spread", -1.0), ("pass", "sideways")],
)  # fmt: skip
def test_a_bad_value_is_named(tmp_path, key, value):
    content = kernels()
    content["rows"][0][key] = value
    with pytest.raises(ValueError, match=rf"kernels\.json, row 0: bad value of key '{key}'"):
        report(write(tmp_path, kernels=content), tmp_path)
    with pytest.raises(ValueError, match=r"kernels\.json: bad value of key 'suite'"):
        report(write(tmp_path, kernels=kernels() | {"suite": "other"}), tmp_path)
    with pytest.raises(ValueError, match=r"row 0: must be an object"):
        report(write(tmp_path, kernels=kernels() | {"rows": [1]}), tmp_path)
