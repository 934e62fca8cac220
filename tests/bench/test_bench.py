"""The benchmark runner without a GPU: complete runs, work counts, result checks, failures."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsa_jax.bench import cases, run
from fsa_jax.bench.cases import Case
from fsa_jax.bench.config import BenchConfig, Run
from fsa_jax.bench.measure import correctness, roofline, timing
from fsa_jax.bench.run import bench
from fsa_jax.bench.suites import attention, decode, models
from fsa_jax.pallas.decode import attention as decode_attention
from fsa_jax.pallas.decode import selection

CASE = Case(length=120, heads=6, kv_heads=2, width=16, config=cases.TINY)


def rows_of(path):
    results = json.loads(path.read_text())
    assert results["what"] == "fsa-jax bench"
    assert results["measurement"] is False
    assert results["complete"] is True
    return results["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("suite", run.SUITES)
def test_every_suite_runs_without_a_gpu_and_says_that_it_measures_nothing(suite, tmp_path):
    (path,) = bench(BenchConfig(suite=suite, out=tmp_path, rounds=1, minutes=0, threads=2))
    rows = rows_of(path)
    assert not [row for row in rows if "error" in row]
    for row in rows:
        assert row["ms"] > 0
        assert len(row["samples_ms"]) == 1
        assert row["device_ms"] is None
        assert row["peak_bytes"] > 0
        assert row["floor_ms"] is None  # the ceilings of a CPU are unknown
        checked = row["function"] not in ("combine_branches", "select_blocks", "model")
        assert (row.get("relative_error") is not None) == checked
    functions = {row["function"] for row in rows}
    if suite == "operator":
        assert functions == set(attention.OPERATOR)
    elif suite == "kernels":
        methods = {r["method"] for r in rows if r["function"] == "selected_attention"}
        assert methods == {*cases.METHODS, "triton"}
    elif suite == "decode":
        found = {(row["function"], row["method"]) for row in rows}
        assert found == {("decode_step", "triton"), ("full_attention", "xla")}
        step, full = rows
        assert step["right_lists"] == 1
        assert 0 < step["bytes"] < 2 * full["bytes"]
    else:
        assert {row["method"] for row in rows} == {"nsa", "full"}
        assert all(row["tokens_per_s"] > 0 for row in rows)


def test_a_failing_method_is_recorded_and_the_others_go_on():
    """On a CPU, cuDNN fails and its rows record the error."""
    state = Run(BenchConfig(rounds=1, threads=2), interpret=False)
    rows = list(attention.measure_cases(state, [(CASE, ("full_attention",))], "xla"))
    outcomes = {(row["method"], row["pass"]): "error" in row for row in rows}
    assert outcomes == {
        (method, name): method == "cudnn"
        for method in ("cudnn", "xla")
        for name in ("forward", "backward")
    }


@pytest.mark.fast_cases("sliding_window_attention")
@pytest.mark.parametrize("function", ["sliding_window_attention", "native_sparse_attention"])
def test_a_wrong_result_ends_the_run(function, monkeypatch):
    state = Run(BenchConfig(rounds=1, threads=2), interpret=True)
    right = cases.subjects

    def wrong(*args):
        (subject,) = right(*args)
        call = subject.call
        off = lambda *x: jax.tree.map(lambda y: 1.1 * y, call(*x))  # noqa: E731
        return [dataclasses.replace(subject, call=off)]

    monkeypatch.setattr(cases, "subjects", wrong)
    with pytest.raises(correctness.WrongResult, match=f"{function} by xla.*relative error"):
        list(attention.measure_cases(state, [(CASE, (function,))], "xla"))


@pytest.mark.slow
def test_rivals_take_turns(monkeypatch):
    """Methods alternate in every round, so that a GPU's warm-up does not favour the first one."""
    order, timed = [], timing.Clock.round

    def watched(clock, arguments):
        order.append(clock)
        timed(clock, arguments)

    monkeypatch.setattr(timing.Clock, "round", watched)
    state = Run(BenchConfig(rounds=3, threads=2), interpret=True)
    rows = list(attention.measure_cases(state, [(CASE, attention.KERNELS[:1])], "triton_interpret"))
    assert len(rows) == len(set(order)) == 2 * len({row["method"] for row in rows}) > 2
    assert order == order[: len(rows)] * 3
    assert all(len(row["samples_ms"]) == 3 for row in rows)


def test_no_call_has_the_inputs_of_the_call_before():
    used = []
    clock = timing.Clock(lambda x: used.append(x) or jnp.zeros(1))
    sets = [(number,) for number in range(4)]
    for _ in range(3):
        clock.warm_up(sets)
        clock.round(sets)
    clock.profile(sets)
    assert np.all(np.diff(used) % 4 == 1)
    assert clock.calls * 3 < len(used)
    assert len(clock.row()["samples_ms"]) == 3


def test_what_the_time_budget_leaves_out_is_recorded(tmp_path):
    (path,) = bench(BenchConfig(suite="operator", out=tmp_path, minutes=1e-9))
    results = json.loads(path.read_text())
    assert results["complete"] is False
    assert all("time budget" in row["error"] for row in results["rows"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"), [("block_attention", "relative error"), ("select_blocks", "the lists")]
)
def test_a_wrong_step_of_decoding_ends_the_run(function, message, monkeypatch):
    """Covers wrong numbers, and correct attention to blocks that do not have the best scores."""
    state = Run(BenchConfig(suite="decode", rounds=1, threads=2), interpret=True)
    module = decode_attention if function == "block_attention" else selection
    right = getattr(module, function)

    def wrong(*args, **options):
        found = right(*args, **options)
        if function == "block_attention":
            return 1.1 * found[0], found[1]
        return jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None, None, None], found.shape)

    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(correctness.WrongResult, match=rf"decode_step.*{message}"):
        list(decode.rows(state))


@pytest.mark.parametrize("length", [7, 16, 90, 200])
def test_the_work_of_a_step_counts_the_keys_that_are_seen(length):
    step = decode.Step(batch=3, length=length, heads=6, kv_heads=2, width=16, config=cases.TINY)
    config, token = step.config, range(length)
    seen = sum(length - i >= config.kernel_size for i in token[:: config.kernel_stride])
    blocks = {i // config.block_size for i in token}
    # any choice gives the same count if it contains the last block
    kept = sorted(blocks)[-config.topk :]
    seen += sum(i // config.block_size in kept for i in token) + len(token[-config.window_size :])
    flops, moved = step.work("decode_step")
    assert (flops, moved) == (3 * seen * 4 * 6 * 16, 3 * seen * 2 * 2 * 16 * 2)
    assert step.work("full_attention")[1] == 3 * length * 2 * 2 * 16 * 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("selection", cases.SELECTIONS)
def test_work_counts_what_is_visible(packed, selection):
    case = dataclasses.replace(CASE, packed=packed, selection=selection)
    arrays = cases.make_inputs(case, 0, "xla")
    tokens = jnp.arange(case.length, dtype=jnp.int32)
    keys = {"compressed_attention": jnp.arange(30, dtype=jnp.int32)}  # of windows, not of tokens
    for function in ("compressed_attention", "sliding_window_attention", "selected_attention"):
        if function == "selected_attention" and selection == "skewed":
            continue  # repeated blocks count once, so there is less work
        seen = correctness.visible(case, function, arrays, tokens, keys.get(function, tokens))
        pairs = np.broadcast_to(seen, (case.kv_heads, *seen.shape[1:])).sum() * case.group
        flops, _ = cases.work(case, function, False)
        assert flops is not None
        assert flops == pytest.approx(4 * float(pairs) * case.width)
        assert cases.work(case, function, True)[0] == 2.5 * flops


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_the_check_tells_right_from_wrong_blocks(packed):
    case = dataclasses.replace(CASE, packed=packed, length=900)
    arrays = cases.make_inputs(case, 0, "xla")
    lists = arrays["block_indices"]
    assert correctness.check_blocks(case, arrays, lists) == 1
    worse = dataclasses.replace(case, selection="uniform")
    wrong = cases.choose_blocks(worse, arrays, jax.random.key(0), "xla")
    assert (
        correctness.check_blocks(case, arrays, jnp.sort(wrong, axis=-1)) < correctness.RIGHT_CHOICES
    )


def test_busy_time_is_the_union_of_the_spans():
    assert timing.busy_ns([(5, 7), (0, 3), (2, 4), (6, 6.5)]) == 6
    assert timing.busy_ns([]) == 0


def test_ceilings_are_measured():
    found = roofline.measure(2, side=64, size=2**16)
    assert found["flops"] == 1e3 * 2 * 64**3 / min(found["matmul_ms"])
    assert found["bytes"] == 1e3 * 2**17 / min(found["copy_ms"])
    assert found["source"] == "measured in this run"


def test_what_tells_most_is_measured_first():
    """The cases cover each group at both block sizes and all lengths to 256K, without repeats."""
    kernels = attention._kernel_cases(attention.LENGTHS, attention.KERNEL_HEADS)
    operators = attention._operator_cases(attention.LENGTHS, attention.HEADS)
    selected = [case for case, functions in kernels if "selected_attention" in functions]
    of = {(x.length, x.group, x.config.block_size, x.config.topk) for x in selected}
    assert of == {
        (length, group, *blocks)
        for length in (4096, 8192, 16384, 32768, 65536, 131072, 262144)
        for group in (1, 2, 4, 8, 16)
        for blocks in ((64, 16), (128, 8))
    }
    assert {(x.length, x.group) for x in operators} == {(length, g) for length, g, *_ in of}
    assert len(set(operators)) == len(operators)
    assert len({(case, functions) for case, functions in kernels}) == len(kernels)
    assert kernels[0][0].length == operators[0].length == 65536
    assert {x.selection for x in selected} == set(cases.SELECTIONS)


def test_a_floor_takes_the_larger_of_both():
    ceilings = {"flops": 1e12, "bytes": 1e9}
    assert cases.floor_ms(1e12, 1e6, ceilings) == 1000
    assert cases.floor_ms(None, 1e9, ceilings) == 1000
    assert cases.floor_ms(None, None, ceilings) is None
    assert cases.floor_ms(1e12, 1e6, None) is None


ASKED = {"lengths": (512, 1024), "heads": ((12, 4), (40, 8))}


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("suite", ["kernels", "operator", "decode"])
def test_heads_and_lengths_are_those_asked_for(suite, interpret, monkeypatch):
    monkeypatch.setattr(
        attention, "measure_cases", lambda run, found, *_: iter([case for case, _ in found])
    )
    state = Run(BenchConfig(**ASKED), interpret=interpret)
    asked = decode._steps(state) if suite == "decode" else getattr(attention, suite)(state)
    shapes = {(case.length, case.heads, case.kv_heads) for case in asked}
    assert shapes == {(t, *heads) for t in (512, 1024) for heads in ((12, 4), (40, 8))}


@pytest.mark.parametrize("interpret", [False, True])
def test_lengths_of_models_are_those_asked_for(interpret):
    state = Run(BenchConfig(lengths=(96, 160), minutes=1e-9), interpret=interpret)
    assert {row["length"] for row in models.rows("training", state)} == {96, 160}


@pytest.mark.parametrize("suite", ["training", "prefill"])
def test_heads_of_models_cannot_be_asked_for(suite):
    with pytest.raises(ValueError, match=rf"heads must be empty for suite='{suite}', .*12, 4"):
        BenchConfig(suite=suite, heads=((12, 4),))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", 0),
        ("lengths", (0,)),
        ("minutes", -1.0),
        ("heads", ((4, 3),)),
        ("heads", ((0, 0),)),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        BenchConfig(**{field: value})
