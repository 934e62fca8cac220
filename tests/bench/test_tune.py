"""Measured tiles: which calls a table serves, what is refused, and how tiles are chosen."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fsa_jax
from fsa_jax.bench import tune as tuner
from fsa_jax.bench.tune import TuneConfig, difference, fastest, tune
from fsa_jax.cli import main
from fsa_jax.ops.block_attention import BlockSpec
from fsa_jax.ops.call import Backend
from fsa_jax.pallas import SelectedTuning, Tile, tile_tables
from fsa_jax.pallas.block_attention.plan import make_plan
from fsa_jax.pallas.block_selection import plan as select_plan
from fsa_jax.pallas.range_attention import passes as ranges
from fsa_jax.pallas.range_attention.passes import RangeTile
from fsa_jax.pallas.support import supported


def arrays(group=4, width=128, keys=1024, dtype=jnp.bfloat16):
    query = jax.ShapeDtypeStruct((1, 1024, 2 * group, width), dtype)
    key = jax.ShapeDtypeStruct((1, keys, 2, width), dtype)
    return query, key, key


WIDE = RangeTile(rows=128, keys=32, num_warps=8, num_stages=2)
PLAIN = Tile(rows=32, num_warps=2, num_stages=4)


def a_table(*tiles, **changes):
    return {"what": "fsa-jax tune", "device": "cpu", "measurement": True, "tiles": list(tiles)} | (
        changes
    )


@pytest.fixture
def user_table(tmp_path, monkeypatch):
    """Returns a function that writes the user's table."""

    def write(*tiles, **changes):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(a_table(*tiles, **changes)))
        monkeypatch.setenv(tile_tables.VARIABLE, str(path))

    return write


def test_without_a_table_the_heuristics_stay():
    assert tile_tables.table() is None
    args = arrays()
    assert tile_tables.choose("range_forward", None, WIDE, *args) is WIDE


def test_the_users_table_is_taken_for_its_device_alone(user_table):
    key = tile_tables.key_of("range_forward", *arrays())
    user_table(tile_tables.entry(key, WIDE))
    found = tile_tables.table()
    assert found is not None
    assert tile_tables.table() is found  # a new object would cause everything to be retraced
    heuristic = supported(ranges.make_plan(*arrays(), 90))
    plan = ranges.make_plan(*arrays(), 90, found)
    assert plan == dataclasses.replace(heuristic, forward=WIDE)
    user_table(tile_tables.entry(key, WIDE), device="NVIDIA H100 80GB HBM3")
    assert tile_tables.table() is None


@pytest.mark.parametrize(
    ("call", "served"),
    [
        ({}, True),
        ({"group": 8}, True),
        ({"group": 2}, True),
        ({"group": 9}, False),
        ({"group": 1}, False),
        ({"width": 64}, False),
        ({"width": 120}, True),  # the width is padded to 128
        ({"dtype": jnp.float16}, True),
        ({"dtype": jnp.float32}, False),
        ({"keys": 64}, False),  # this is another branch
    ],
)
def test_which_calls_an_entry_serves(call, served):
    with tile_tables.using({tile_tables.key_of("range_forward", *arrays()): WIDE}):
        got = tile_tables.choose("range_forward", tile_tables.table(), RangeTile(), *arrays(**call))
    assert (got == WIDE) == served
    assert served or got == RangeTile()


def test_the_nearest_group_serves_and_its_tile_holds_the_group():
    tiles = {
        tile_tables.key_of("score", *arrays(group)): dataclasses.replace(PLAIN, rows=rows)
        for group, rows in ((2, 16), (8, 32), (32, 64))
    }
    with tile_tables.using(tiles):
        chosen = {
            group: tile_tables.choose(
                "score", tile_tables.table(), Tile(rows=256), *arrays(group)
            ).rows
            for group in (1, 2, 3, 4, 6, 12, 33, 64)
        }
    assert chosen == {1: 16, 2: 16, 3: 16, 4: 16, 6: 32, 12: 32, 33: 64, 64: 64}


def test_where_the_heuristic_tile_won_the_heuristics_stay(user_table):
    entry = tile_tables.entry(tile_tables.key_of("range_forward", *arrays()), WIDE)
    for chosen, wanted in ((0, RangeTile()), (1, WIDE)):
        user_table(entry | {"chosen": chosen})
        found = tile_tables.choose("range_forward", tile_tables.table(), RangeTile(), *arrays(8))
        assert found == wanted


def test_plans_of_all_kernels_take_their_tiles():
    query, key, value = arrays()
    spec = BlockSpec(backend=Backend.TRITON, scale=1.0, block_size=64, packed=False)
    tiles = {tile_tables.key_of(kernel, *arrays(), 64): PLAIN for kernel in tile_tables.SELECTED}
    tiles[tile_tables.key_of("score", query, key, key)] = PLAIN
    with tile_tables.using(tiles):
        spec = dataclasses.replace(spec, table=tile_tables.table())
        plan = supported(spec.plan(query, key, value, 16))
        scores = supported(
            select_plan.make_plan(query, key, fsa_jax.NSAConfig(), table=tile_tables.table())
        )
        asked = SelectedTuning(forward=Tile(rows=128))
        mine = supported(dataclasses.replace(spec, tuning=asked).plan(query, key, value, 16))
    for _, _, field in tile_tables.SELECTED.values():
        assert getattr(plan, field) == PLAIN
    assert (scores.rows, scores.num_warps, scores.num_stages) == (32, 2, 4)
    assert mine.forward == mine.query_tile == asked.forward  # an explicit tuning takes precedence
    assert mine.backward == PLAIN
    assert supported(make_plan(SelectedTuning(), query, key, value, 16, 64, 90)).forward != PLAIN


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["range_forward", "range_key_gradient"])
def test_a_tile_changes_the_program_and_not_the_result(kernel):
    """No trace with the tile of the previous candidate is reused."""
    of_window = [job for job in tuner.jobs(TuneConfig(), True) if job.key.branch == "window"]
    (job,) = (job for job in of_window if job.key.kernel == kernel)
    subject = tuner.subject_of(job, True)
    first, second = (tuner.compile_with(job, subject, tile) for tile in job.tiles[:2])
    name = "forward" if kernel == "range_forward" else "backward"
    again = tuner.compile_with(job, subject, job.tiles[0])

    def instructions(programs):  # drops source locations
        lines = programs[name].as_text().splitlines()
        return [re.sub(r", metadata=.*", "", line) for line in lines if " = " in line]

    assert instructions(first) != instructions(second)
    assert instructions(first) == instructions(again)
    sets = tuner._inputs(True, job.case)
    sets = [[x[name] for name in (*subject.differentiated, *subject.others)] for x in sets]
    got, wanted = (
        run(*args[0]) for run, args in (tuner._call_of(job, x, sets) for x in (second, first))
    )
    assert difference(got, wanted) is None


GOOD = tile_tables.entry(tile_tables.key_of("range_forward", *arrays()), WIDE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 48}, "rows must be a power of two, got 48"),
        ({"keys": 0}, "bad value of key 'keys': 0"),
        ({"kernel": "other"}, "kernel must be one of"),
        ({"branch": None}, "bad value of key 'branch': None"),
        ({"group": 129}, "rows=128 must hold the 129 heads"),
        ({"num_stages": None}, "num_stages must be an integer from 1 to 8, got None"),
    ],
)
def test_a_bad_entry_is_named(user_table, changes, message):
    user_table(GOOD | changes)
    with pytest.raises(ValueError, match=f"mine.json, tile 0.*{message}"):
        tile_tables.table()


def test_a_bad_file_is_named(user_table, tmp_path, monkeypatch):
    user_table({name: size for name, size in GOOD.items() if name != "bits"})
    with pytest.raises(ValueError, match="key 'bits' is missing"):
        tile_tables.table()
    user_table(measurement=False)
    with pytest.raises(ValueError, match="measures nothing"):
        tile_tables.table()
    user_table(what="other")
    with pytest.raises(ValueError, match="'what' must be 'fsa-jax tune'"):
        tile_tables.table()
    monkeypatch.setenv(tile_tables.VARIABLE, str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match=r"FSA_JAX_TUNING must name a file.*missing\.json"):
        tile_tables.table()


def test_the_tables_of_the_package_are_whole():
    shipped = tile_tables._shipped()
    assert all(found.tiles and found.device == device for device, found in shipped.items())


def test_a_candidate_must_win_every_round():
    def times(*samples):
        return [{"ms": sorted(x)[1], "samples_ms": list(x)} for x in samples]

    assert fastest(times((1.0, 1.05, 1.02), (0.94, 0.95, 0.93), (0.96, 0.96, 0.97))) == 1
    assert fastest(times((1.0, 1.05, 1.02), (0.94, 1.01, 0.94))) == 0
    assert fastest(times((1.0, 1.01, 1.7), (0.94, 0.95, 0.94))) == 1  # one round was disturbed
    assert fastest(times((1.0, 1.0, 1.0), (0.9, 0.9, 0.9), (0.9, 0.9, 0.9))) == 1
    assert fastest([*times((1.0, 1.0, 1.0)), {"error": "too large"}]) == 0


def test_wrong_results_are_told():
    x, lists = np.linspace(-1, 1, 100), np.arange(40, dtype=np.int32).reshape(20, 2)
    assert difference((x, lists), (x + 1e-3, lists)) is None
    assert "relative error" in (difference(x, 1.2 * x) or "")
    assert "finite" in (difference(np.where(x > 0, np.nan, x), x) or "")
    assert "0.0% of the lists" in (difference(lists + 1, lists) or "")


@pytest.mark.slow
def test_the_command_without_a_gpu_measures_nothing_and_says_so(tmp_path, monkeypatch):
    """The whole command runs with interpreted kernels, and drops a wrong candidate."""
    some = [
        job
        for job in tuner.jobs(TuneConfig(), True)
        if job.key.kernel in ("range_key_gradient", "score")
    ][1:]
    assert len(tuner.jobs(TuneConfig(), True)) == len(tile_tables.SELECTED) + 2 * 3 + 1
    monkeypatch.setattr(tuner, "jobs", lambda *args: some)
    right, calls = difference, []

    def wrong(got, wanted):
        calls.append(got)
        return right(jax.tree.map(lambda x: x + 1, got), wanted) if len(calls) == 2 else None

    monkeypatch.setattr(tuner, "difference", wrong)
    out = tmp_path / "tiles.json"
    assert main(["tune", "--out", str(out), "--rounds", "1", "--threads", "2"]) == 0
    content = json.loads(out.read_text())
    assert content["measurement"] is False
    assert len(content["tiles"]) == len(some) == 2
    first, second = content["tiles"]
    assert first["candidates"][1]["error"].startswith("WRONG RESULT, dropped: relative error")
    assert first["chosen"] == 0
    assert all(x["ms"] > 0 for x in second["candidates"])
    with pytest.raises(ValueError, match="measures nothing"):
        tile_tables.read(out.read_text(), "tiles.json")


@pytest.mark.parametrize(("interpret", "key_heads"), [(False, 4), (True, 2)])
def test_sizes_are_those_asked_for(interpret, key_heads):
    config = TuneConfig(widths=(32, 64), groups=(3,), length=96)
    cases = {job.case for job in tuner.jobs(config, interpret)}
    assert {(x.width, x.heads, x.kv_heads, x.length) for x in cases} == {
        (width, 3 * key_heads, key_heads, 96) for width in (32, 64)
    }
    groups = {job.case.group for job in tuner.jobs(TuneConfig(), interpret)}
    assert groups == ({2} if interpret else {1, 2, 4, 8, 16})


def test_the_time_budget_of_tuning_is_kept(tmp_path):
    path = tune(TuneConfig(out=tmp_path / "x.json", minutes=1e-9))
    content = json.loads(path.read_text())
    assert content["tiles"] == []
    assert len(content["left_out"]) == len(tuner.jobs(TuneConfig(), True))
    with pytest.raises(ValueError, match="groups"):
        TuneConfig(groups=(0,))
