"""lace-eval --compare: intervals, what counts as a change, and what cannot be compared."""

import json
from pathlib import Path

import numpy as np
import pytest

from engine.cli.console import BAD_INPUT, CHECK_FAILED, OK
from engine.errors import LaceError
from lace_evaluation import cli as cli_eval
from lace_evaluation.compare import FORM, MOMENTS, compare, load, packed, unpacked
from lace_evaluation.nearness import frechet_change, weighted_moments, widest
from lace_evaluation.statistics import bootstrap, bootstrap_rms, half_width
from lace_trainer.judges import metrics

SETTINGS = {"protocol": 1, "count": 200, "seed": 0, "label": None, "truncation": 0.7, "attributes": {}, "judge": "j",
            "identity": "i"}
RNG = np.random.default_rng(0)
REAL = RNG.standard_normal((500, 4))
FAKE = RNG.standard_normal((200, 4)) + 0.2


def written(folder: Path, rows: dict, **settings) -> Path:
    folder.mkdir()
    facts = {"form": FORM, "settings": {**SETTINGS, **settings}}
    (folder / "report.json").write_text(json.dumps(facts))
    with open(folder / "rows.npz", "wb") as file:
        np.savez(file, **{MOMENTS: packed(metrics.moments(REAL))}, **rows)
    return folder / "report.json"


def rows(acc, features=FAKE) -> dict:
    return {"conditional/all/training/ours/acc": acc, "conditional/all/training/ours/features": features,
            "conditional/all/training/ours/moved": acc}


def test_intervals_cover_a_known_difference():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        low, high, _ = bootstrap(rng.normal(0.3, 1.0, 80), seed=trial)
        covered += low <= 0.3 <= high
    assert 87 <= covered <= 100
    x = rng.normal(0, 2.0, 400)
    assert bootstrap(x)[2] == pytest.approx(2 / 20, rel=0.2)
    assert half_width(x) == pytest.approx(1.96 * 2 / 20, rel=0.1)


def test_a_change_is_told_from_chance(tmp_path):
    rng = np.random.default_rng(2)
    before = rng.random(200)
    same = before + rng.normal(0, 0.1, 200)
    worse = before - 0.1 + rng.normal(0, 0.1, 200)
    first = load(written(tmp_path / "a", rows(before)))
    chance = compare(first, load(written(tmp_path / "b", rows(same))))
    assert [(c.cell, c.metric) for c in chance] == [("conditional/all/training/ours", m) for m in ("acc", "fid")]
    assert not any(c.significant for c in chance)
    assert chance[0].low < 0 < chance[0].high
    assert chance[1].difference == 0
    acc, fid = compare(first, load(written(tmp_path / "c", rows(worse, FAKE + 0.5))))
    assert acc.worse
    assert acc.low < -0.1 < acc.high
    assert fid.worse
    assert fid.low > 0
    better = compare(load(tmp_path / "c"), first)
    assert [(c.significant, c.worse) for c in better] == [(True, False)] * 2


def test_the_interval_of_a_difference_of_errors_is_paired():
    rng = np.random.default_rng(3)
    before = np.abs(rng.normal(0, 1, 64))
    low, high = bootstrap_rms(before, 0.8 * before)
    whole = -0.2 * np.sqrt(np.mean(before**2))
    assert low < whole < high < 0
    assert bootstrap_rms(before, before) == (0, 0)


def test_what_decides_a_distance_from_renders():
    rng = np.random.default_rng(4)
    real = rng.standard_normal((4000, 3)) * (0.1, 3.0, 0.1) + (0, 1, 0)
    found = widest(metrics.moments(real))
    assert found.share > 0.99
    assert found.far(real) == pytest.approx(0.0455, abs=0.01)  # of a normal law
    assert found.distance(real) < 1e-6
    assert found.distance(real * (1, 0.5, 1)) == pytest.approx(0.25 + 2.25, rel=0.05)
    near, far = real[:100], real[:100] * (1, 0.5, 1)
    low, high, _ = frechet_change(metrics.moments(real), near, far)
    assert 0 < low < high
    only = np.zeros(100)
    only[:50] = 1
    other = far.copy()
    other[50:] = 1e3  # rows without a picture do not count
    counted = (1.0, only)
    assert frechet_change(metrics.moments(real), near, other, counted) == pytest.approx(
        frechet_change(metrics.moments(real), near, far, counted)
    )


def test_moments_of_resampled_rows():
    np.testing.assert_allclose(weighted_moments(REAL, np.ones(500)).covariance, metrics.moments(REAL).covariance)
    weights = np.zeros(500)
    weights[:100] = 2
    twice = metrics.moments(np.repeat(REAL[:100], 2, axis=0))
    np.testing.assert_allclose(weighted_moments(REAL, weights).covariance, twice.covariance)
    np.testing.assert_allclose(unpacked(packed(twice)).mean, twice.mean, rtol=1e-6)


def test_the_exit_code_tells_of_a_change_for_the_worse(tmp_path, capsys):
    a = written(tmp_path / "a", rows(np.full(200, 0.9)))
    b = written(tmp_path / "b", rows(np.full(200, 0.8)))
    assert cli_eval.main(["--compare", str(a), str(b)]) == CHECK_FAILED
    assert "worse" in capsys.readouterr().out
    assert cli_eval.main(["--compare", str(b), str(a), "--json"]) == OK
    (acc, fid) = json.loads(capsys.readouterr().out)
    assert (acc["metric"], acc["significant"], acc["worse"], fid["difference"]) == ("acc", True, False, 0)


def test_reports_that_asked_for_something_else_are_refused(tmp_path, capsys):
    a = written(tmp_path / "a", rows(np.ones(200)))
    b = written(tmp_path / "b", rows(np.ones(200)), count=100)
    assert cli_eval.main(["--compare", str(a), str(b)]) == BAD_INPUT
    assert "they differ in count: 200 and 100" in " ".join(capsys.readouterr().err.split())
    c = written(tmp_path / "c", {"logic/0/product/true": np.ones(3)})
    with pytest.raises(LaceError, match="no cell in common"):
        compare(load(a), load(c))
    (tmp_path / "a/rows.npz").unlink()
    with pytest.raises(LaceError, match="keep both together"):
        load(a)
    (tmp_path / "b/report.json").write_text('{"summary": []}')
    with pytest.raises(LaceError, match="not a report of the suites"):
        load(b)
    with pytest.raises(LaceError, match="cannot read the report"):
        load(tmp_path / "nowhere.json")
