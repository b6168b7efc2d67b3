"""Benchmarks: peers solve the same problem, answers are judged, lines are kept, goals are told from lines."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import worlds
from benchmarks.goals import find_goals, goals_table
from benchmarks.peers import FIELDS, SOLVERS, fields, load, open_peers
from engine import Sampler
from engine.bench import solving, timing
from engine.bench.contest import Answer, Bench, Peers, Unavailable
from engine.bench.plots import PLOTS
from engine.bench.problem import Judge, Problem, Target, hard, logits, ordinary
from engine.bench.records import Log, RecordError, read
from engine.bench.report import WRONG, latest, pages, write_report
from engine.bench.solving import cost, open_field
from engine.bench.streaming import LEAVING, STATIC, STREAM_ERROR, ToTheLast, mixed
from engine.bench.timing import race
from engine.cli.bench import main
from engine.errors import LaceError

ROOT = Path(__file__).resolve().parent.parent
# One linear head a target on a mapping of one layer: so few kinks that methods agree to their tolerance.
TARGETS = (Target("smile", 1), Target("age", 0.6))
# dopri5 and tsit5 chatter over the few kinks that are left; steps of low order do not see them.
CHATTER, CLOSE = 0.3, 0.05


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "LAYERS", 1)
        return worlds.world(tmp_path_factory.mktemp("worlds"), dim=16, hidden=())


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge(tmp_path_factory.mktemp("converged"), rows=2)


@pytest.fixture
def bench(bundle, judge, tmp_path):
    def make(**changes):
        log = Log(tmp_path / "lines.jsonl", {"commit": "c"})
        given = {"bundle": bundle, "pictured": (), "log": log, "judge": judge, "peers": Peers(), "threads": 1,
                 "quick": True, "say": lambda text: None}
        return Bench(**given | changes)

    return make


# --- problems and the judge ---------------------------------------------------------------------------------------


def test_heads_of_a_world_are_calibrated(bundle):
    found = logits(bundle, np.random.default_rng(5).standard_normal((2000, 16)), ["smile", "age"])
    assert found["smile"].std(axis=0) == pytest.approx(worlds.LOGIT_STD, rel=0.15)
    assert found["age"].mean() == pytest.approx(worlds.VALUE_MEAN, abs=0.03)
    assert found["age"].std() == pytest.approx(worlds.VALUE_STD, rel=0.15)


def test_the_judges_energy_is_the_samplers(bundle):
    problem = Problem(bundle, ordinary(bundle, 12), 3)
    samples = Sampler(bundle, runtime="numpy").solve(problem.requests)
    z = np.stack([sample.z for sample in samples])
    assert problem.energies(z) == pytest.approx([sample.energy for sample in samples], rel=1e-6)


def test_the_judge_knows_the_converged_end_from_the_start(bundle, judge):
    problem = Problem(bundle, TARGETS, 5)
    end = judge.judge(problem, np.vstack([judge.converged(problem), np.zeros((3, 16))]))
    start = judge.judge(problem, problem.z0)
    assert (end.trajectory_error, end.energy) == (0, end.floor)
    assert start.trajectory_error == pytest.approx(1)
    assert start.energy > 10 * start.floor


def test_conditions_name_targets_in_order_and_hard_ones_contradict(bundle):
    assert str(Problem(bundle, ordinary(bundle, 3), 1).condition) == "smile=yes & glasses=no & age=0.7"
    smiles = {name: sum(t.attribute == "smile" for t in targets) for name, targets in hard(bundle).items()}
    assert smiles == {"rare": 1, "conflict": 2, "outside": 1}
    with pytest.raises(LaceError, match="12 attributes"):
        ordinary(bundle, 13)


def test_the_cost_of_an_evaluation_is_counted(bundle):
    problem = Problem(bundle, TARGETS, 4)
    mapping, smile, age = 16 * 16, 16 * 2, 16
    assert cost(problem) == {
        "bytes": 8 * (mapping + smile + age),
        "flops": 2 * 4 * (mapping + smile + age + 2 * mapping + smile + age),
    }


# --- peers --------------------------------------------------------------------------------------------------------


def needs(name):
    if "diffrax" in name or name == "jax":
        pytest.importorskip("diffrax")
    if "torchode" in name:
        pytest.importorskip("torchode")


def quick(name):
    """Compiling takes seconds for each."""
    is_slow = "torch.compile" in name or "diffrax" in name
    return pytest.param(name, marks=pytest.mark.slow) if is_slow else name


@pytest.mark.parametrize("name", [quick(name) for name in SOLVERS])
def test_peers_end_where_our_converged_solve_ends(bundle, judge, name):
    needs(name)
    problem = Problem(bundle, TARGETS, 1)
    file, settings, _ = SOLVERS[name]
    answer = Answer(*load(file, threads=1).open_solver(problem, **settings)(problem.z0))
    verdict = judge.judge(problem, answer.z)
    assert answer.evaluations > 50
    assert verdict.energy < 1.2 * verdict.floor
    assert verdict.trajectory_error < (CLOSE if "heun" in name or "bosh3" in name else CHATTER)


@pytest.mark.parametrize("name", FIELDS)
def test_gradients_of_peers_are_ours(bundle, name):
    needs(name)
    problem = Problem(bundle, ordinary(bundle, 12), 3)
    exact = open_field(problem, runtime="numpy")()
    error = np.linalg.norm(fields(1, problem)[name]()() - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert np.median(error) < 1e-4


def test_peers_that_would_take_minutes_say_so(bundle):
    with pytest.raises(Unavailable, match="left out"):
        open_peers(1).solvers(Problem(bundle, TARGETS, 2))["paper"]()


def test_grouped_convolutions_draw_the_same_picture():
    torch = pytest.importorskip("torch")
    from benchmarks.peers.decoders import grouped
    from tests.tiny import parts

    synthesis = parts(resolution=16).synthesis
    ws = torch.randn(3, synthesis.num_ws, 16)
    torch.testing.assert_close(grouped(synthesis)(ws), synthesis(ws), rtol=1e-4, atol=1e-4)


# --- the race and its record --------------------------------------------------------------------------------------


def test_contestants_take_turns_and_the_failed_leave(monkeypatch):
    monkeypatch.setattr(timing, "QUICK_RUN", 0.0)
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    turns = []

    def fails():
        raise ValueError("no")

    times, answers, errors = race(
        {"a": lambda: turns.append("a") or 1, "bad": fails, "b": lambda: turns.append("b")}, 3
    )
    assert turns == ["a", "b"] * 4
    assert answers == {"a": 1, "b": None}
    assert [*errors] == ["bad"]
    assert [time.repeats for time in times.values()] == [3, 3]


def test_a_slow_first_run_counts(monkeypatch):
    monkeypatch.setattr(timing, "SLOW_RUN", -1.0)
    monkeypatch.setattr(timing, "QUICK_RUN", 0.0)
    count = []
    times, _, _ = race({"a": lambda: count.append(1)}, 3)
    assert (len(count), times["a"].repeats) == (3, 3)


def test_finished_measurements_are_skipped(bench):
    opened = []

    def opener(name):
        def open_one():
            opened.append(name)
            return lambda: 0

        return open_one

    def fails():
        raise Unavailable("no compiler here")

    def contest(*names, missing=()):
        openers = {name: opener(name) for name in names} | dict.fromkeys(missing, fails)
        bench().contest({"suite": "s"}, openers, lambda answer: {"check": "passed"})

    contest("a", missing=["gone"])
    contest("a", "b", missing=["gone"])
    assert opened == ["a", "b"]
    path = bench().log.path
    assert path.read_text().count("no compiler here") == 1
    contest("gone")  # what was missing has come
    assert opened == ["a", "b", "gone"]
    assert {line["contestant"]: line.get("check") for line in read(path)} == dict.fromkeys(("a", "b", "gone"), "passed")
    assert not Log(path, {"commit": "another"}).has({"suite": "s", "contestant": "a"})


def test_a_line_that_was_cut_off_is_dropped_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    Log(path, {}).write([{"suite": "s", "contestant": "a"}])
    path.write_bytes(path.read_bytes() + b'{"suite": "s", "cont')
    log = Log(path, {})
    log.write([{"suite": "s", "contestant": "b"}])
    assert [line["contestant"] for line in read(path)] == ["a", "b"]
    path.write_text('{"suite": "s", "contestant": "a"}\n{"suite": 1}\n')
    with pytest.raises(RecordError, match="line 2"):
        read(path)


# --- goals and the report -----------------------------------------------------------------------------------------


def solve_line(contestant, median, *, attributes=3, rows=1, energy=0.01, error=0.1, check="passed"):
    return {"suite": "solve", "world": "ffhq", "attributes": attributes, "rows": rows, "condition": "smile",
            "contestant": contestant, "unit": "ms", "median": median, "q1": median, "q3": median, "repeats": 5,
            "evaluations": {"mean": 10.0, "most": 12}, "energy": energy, "floor_energy": 0.01,
            "trajectory_error": error, "check": check, "commit": "c", "threads": 2, "quick": False}


LINES = [
    solve_line("paper", 3000.0),
    solve_line("diffrax heun", 100.0),
    solve_line("torchode heun", 1.0, check="the energy is too high"),  # fast and wrong: no peer
    solve_line("ours", 10.0),
    solve_line("ours, 8 steps", 1.0, energy=0.02),  # fast and less accurate than the paper's method
    solve_line("paper", 5000.0, rows=16),
    solve_line("diffrax heun", 500.0, rows=16),
    solve_line("ours", 50.0, rows=16),
    {**solve_line("torchode heun", 0, rows=16), "unavailable": "torchode is missing", "median": None},
]


def verdicts(lines):
    return {goal.text.partition(":")[0] + goal.text.partition("against")[2][:9]: goal for goal in find_goals(lines)}


def test_goals_count_right_answers_only():
    goals = verdicts(LINES)
    assert goals["3 attributes, 1 row the pape"].met is True
    assert goals["3 attributes, 1 row the pape"].found.startswith("300 times")
    assert goals["3 attributes, 1 row the best"].found.startswith("10 times: `ours` 10 ms, `diffrax heun` 100 ms")
    assert goals["3 attributes, 16 rows the pape"].met is False
    assert goals["3 attributes, 16 rows the best"].met is False
    assert goals["12 attributes, 1 row the pape"].met is None
    worse = [*LINES[:3], solve_line("ours", 10.0, error=0.2)]
    assert verdicts(worse)["3 attributes, 1 row the pape"].met is False


def stream_line(contestant, median):
    return {"suite": "stream", "world": "ffhq", "pictures": False, "contestant": contestant, "median": median,
            "check": "passed"}


def test_a_stream_is_compared_with_both_kinds_of_static_batches():
    lines = [stream_line(STATIC, 200.0), stream_line(LEAVING, 110.0), stream_line("one queue", 100.0)]
    (goal,) = [goal for goal in find_goals(lines) if goal.text.startswith("mixed stream")]
    assert goal.met is True
    assert re.findall(r"(\S+) times: `one queue` 100 ms, `(.*?)`", goal.found) == [("2", STATIC), ("1.1", LEAVING)]
    lines[0]["median"] = 150.0
    assert [goal.met for goal in find_goals(lines) if goal.text.startswith("mixed stream")] == [False]


def test_a_batch_to_its_last_row_evaluates_all_rows_and_gives_the_same(bundle, field_calls):
    requests = mixed(bundle, 6)
    plain = Sampler(bundle, runtime="numpy")
    expected = plain.solve(requests)
    assert len(set(field_calls)) > 1
    field_calls.clear()
    samples = Sampler(bundle, runtime="numpy", solver=ToTheLast(plain.flows.solver)).solve(requests)
    assert field_calls == [6] * max(sample.evaluations for sample in expected)
    assert max(np.abs(a.w - b.w).max() for a, b in zip(samples, expected, strict=True)) <= STREAM_ERROR


def test_A8_goals_are_not_met_by_fixed_steps():
    """Six fixed steps are as accurate as the paper's method on random weights only."""
    lines = [solve_line("paper", 3000.0), solve_line("ours, 6 steps", 1.0), solve_line("ours", 30.0)]
    goal = verdicts(lines)["3 attributes, 1 row the pape"]
    assert goal.found.startswith("100 times: `ours` 30 ms")
    assert goal.met is False


def test_a_report_has_tables_plots_and_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    front = write_report(path, tmp_path / "report", goals=goals_table).read_text()
    assert "torchode is missing" in front
    assert front.count("**not met**") == 2
    assert "- [Solves](solving.md)" in front
    solves = (tmp_path / "report" / "solving.md").read_text()
    assert "| `ours` | 10.0 | 50.0 |" in solves
    assert f"| `torchode heun` | 1.00{WRONG} |  |" in solves
    assert "![latency against rows](latency.png)" in solves
    assert (tmp_path / "report" / "latency.png").stat().st_size > 10_000
    assert (tmp_path / "report" / "energy.png").is_file()
    assert not (tmp_path / "report" / "pictures.md").exists()


def test_the_report_of_the_docs_is_that_of_the_results():
    plots = [(section, alt, file) for section, alt, file, _ in PLOTS]
    lines = latest(ROOT / "benchmarks/results/speed.jsonl")
    for file, text in pages(lines, plots, goals_table(lines)).items():
        assert (ROOT / "docs/benchmarks/speed" / file).read_text(encoding="utf-8") == text, (
            "run: python -m benchmarks.report benchmarks/results/speed.jsonl --out docs/benchmarks/speed --overwrite")


def test_lines_of_another_commit_are_left_out_of_a_report(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = [{**solve_line("ours", 777.0), "commit": "old"}, *LINES]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "777" not in "".join(pages(latest(path), []).values())


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_measures_a_bundle_and_resumes(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(solving, "SHORT", {2: (1,)})
    monkeypatch.setitem(sys.modules, "openvino", None)
    out, arguments = tmp_path / "lines.jsonl", ["--quick", "--threads", "1", "--cache", str(tmp_path / "cache")]
    command = ["run", str(bundle.path), "--suite", "solve", "memory", "--out", str(out), *arguments]
    assert main(command) == 0
    lines = out.read_bytes()
    found = read(out)
    assert {line["suite"] for line in found} == {"solve", "memory"}
    assert all(line["check"] == "passed" for line in found if line["contestant"] == "ours")
    assert main(command) == 0
    assert out.read_bytes() == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--suite", "speed", "--out", "x.jsonl"], "invalid choice"),
        (["run", "demo"], "--out"),
        (["run", "no-such.lace", "--out", "x.jsonl"], "no bundle"),
        (["report", "no-such.jsonl", "--out", "report"], "cannot read"),
        (["report"], "FILE"),
        (["run", "demo", "--out", "x.jsonl", "--suit", "solve"], "unrecognised argument"),
    ],
)
def test_bad_usage_ends_with_2_and_a_reason(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_needs_no_torch():
    code = "import engine.cli.bench, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "onnxruntime", "openvino", "jax", "matplotlib"} & set(json.loads(done.stdout))
