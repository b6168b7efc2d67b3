"""Lowering and the numpy interpreter, against probabilities, torch autograd and scipy."""

import math
from functools import reduce
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from engine.condition import And, Condition, Is, Keep, Not, Or, Weighted, Within, attr, keep, near
from engine.errors import ConditionError
from engine.grammar import parse
from engine.reference.tape import evaluate, log_ndtr
from engine.reference.terms import terms
from engine.tape import MAX_COLUMNS, MAX_DEPTH, MAX_LEAVES, Column, lower, satisfied


def class_of(name, *classes):
    return SimpleNamespace(name=name, kind="class", classes=classes, sigma=0.1, range=(0.0, 1.0))


def value_of(name, sigma=0.1):
    return SimpleNamespace(name=name, kind="value", classes=(), sigma=sigma, range=(0.0, 1.0))


ATTRIBUTES = {
    a.name: a
    for a in (
        class_of("smile", "no", "yes"),
        class_of("glasses", "no", "yes"),
        class_of("haircolor", "black", "brown", "blond", "red", "grey"),
        value_of("age"),
        value_of("yaw", sigma=0.3),
    )
}
WIDTHS = {name: len(a.classes) or 1 for name, a in ATTRIBUTES.items()}
TREE_TEST = settings(max_examples=100, deadline=None)

LEAVES = st.one_of(
    st.builds(attr, st.sampled_from(["smile", "glasses", "haircolor"])),
    st.builds(lambda i: attr("haircolor", i), st.integers(0, 4)),
    st.builds(lambda i: attr("glasses", i), st.integers(0, 1)),
    st.builds(attr, st.sampled_from(["age", "yaw"]), st.sampled_from([-0.2, 0.31, 0.75])),
    st.builds(lambda name, a: attr(name) > a, st.sampled_from(["age", "yaw"]), st.sampled_from([0.25, 0.7])),
    st.builds(lambda name, a: attr(name) < a, st.sampled_from(["age", "yaw"]), st.sampled_from([0.25, 0.7])),
    st.just(attr("age").between(0.3, 0.6)),
)
WEIGHTS = st.sampled_from([0.5, 2.0, 3.5])
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(lambda k, a: k * a, WEIGHTS, inner),
    ),
    max_leaves=6,
)
SEEDS = st.integers(0, 2**32 - 1)


def logits_of(seed, rows=3, scale=1.0):
    """Class logits ~ 2 N(0, 1), values around their useful range, everything times `scale`."""
    random = np.random.default_rng(seed)
    return {
        name: scale * (2 * random.normal(size=(rows, width)) if width > 1 else random.uniform(-0.2, 1.2, (rows, 1)))
        for name, width in WIDTHS.items()
    }


def inputs(tape, logits):
    columns = [
        logits[c.attribute][:, 1] - logits[c.attribute][:, 0] if c.index is None else logits[c.attribute][:, c.index]
        for c in tape.columns
    ]
    rows = len(next(iter(logits.values())))
    u = np.stack(columns, axis=1) if columns else np.zeros((rows, 0))
    return np.tile(tape.parameters, (rows, 1)), u


def run(condition, logits, **options):
    tape = lower(condition, ATTRIBUTES, **options)
    anchors = {name: np.linspace(-1, 1, width) for name, width in WIDTHS.items()}
    tape = tape.anchored(anchors)
    with np.errstate(all="raise", under="ignore"):
        return tape, *evaluate(tape.program, *inputs(tape, logits))


def close(a, b, relative=1e-12, absolute=1e-15):
    np.testing.assert_allclose(a, b, rtol=relative, atol=absolute)


# An energy written without log-space, De Morgan or columns: probabilities (truth, falsity) of every node.


def side(u, bound, sign, sigma):
    x = (u[:, 0] - bound) * sign / sigma
    # Not torch.special.ndtr: it subtracts from 1 and has 8 digits left at x = -6.
    return 0.5 * torch.special.erfc(-x / math.sqrt(2)), 0.5 * torch.special.erfc(x / math.sqrt(2))


def conjunction(a, b):
    return a[0] * b[0], a[1] + b[1] - a[1] * b[1]


def swap(a):
    return a[1], a[0]


def probability(condition, logits):
    match condition:
        case Is(name, choice) if name in ("age", "yaw"):
            v = -((logits[name][:, 0] - choice) ** 2) / (2 * ATTRIBUTES[name].sigma ** 2)
            return torch.exp(v), -torch.expm1(v)
        case Is(name, choice):
            y = WIDTHS[name] - 1 if choice is None else choice
            p = torch.softmax(logits[name], dim=1)
            return p[:, y], p[:, [j for j in range(WIDTHS[name]) if j != y]].sum(dim=1)
        case Within(name, low, high):
            u, sigma = logits[name], ATTRIBUTES[name].sigma
            sides = [side(u, b, s, sigma) for b, s in ((low, 1), (high, -1)) if b is not None]
            return reduce(conjunction, sides)
        case Not(part):
            return swap(probability(part, logits))
        case Weighted(weight, part):
            truth, falsity = probability(part, logits)
            return truth**weight, falsity**weight
        case And(parts):
            return reduce(conjunction, [probability(part, logits) for part in parts])
        case Or(parts):
            return swap(reduce(conjunction, [swap(probability(part, logits)) for part in parts]))


def log_truth(condition: Condition, u, columns):
    """v (rows,) as a function of the tape's inputs u, by torch."""
    logits = {name: torch.zeros(len(u), width, dtype=torch.float64) for name, width in WIDTHS.items()}
    for position, column in enumerate(columns):
        pick = torch.zeros(WIDTHS[column.attribute], dtype=torch.float64)
        pick[1 if column.index is None else column.index] = 1.0
        logits[column.attribute] = logits[column.attribute] + u[:, position, None] * pick
    terms = condition.parts if isinstance(condition, And) else (condition,)
    v = torch.zeros(len(u), dtype=torch.float64)
    for term in terms:
        if isinstance(term, Keep):
            for name in term.names:
                anchor = torch.linspace(-1, 1, WIDTHS[name], dtype=torch.float64)
                v = v - term.weight * ((logits[name] - (anchor if WIDTHS[name] > 1 else -1.0)) ** 2).sum(dim=1)
        else:
            v = v + torch.log(probability(term, logits)[0])
    return v


@TREE_TEST
@given(TREES, SEEDS)
def test_value_and_gradient_equal_autograd_of_the_probabilities(condition, seed):
    tape, v, g, _ = run(condition, logits_of(seed))
    u = torch.tensor(inputs(tape, logits_of(seed))[1], requires_grad=True)
    expected = log_truth(condition, u, tape.columns)
    (gradient,) = torch.autograd.grad(expected.sum(), u)
    safe = np.isfinite(expected.detach().numpy()) & np.isfinite(gradient.numpy()).all(axis=1)
    assert (v <= 0).all()
    close(v[safe], expected.detach().numpy()[safe], 1e-9, 1e-13)
    close(g[safe], gradient.numpy()[safe], 1e-8, 1e-9)


@TREE_TEST
@given(TREES, SEEDS, st.sampled_from([1.0, 10.0, 1e3, 1e30]), st.sampled_from(["product", "lace"]))
def test_extreme_logits_give_finite_numbers_and_a_psd_curvature(condition, seed, scale, logic):
    _, v, g, c = run(condition, logits_of(seed, scale=scale), logic=logic)
    for x in (v, g, c):
        assert np.isfinite(x).all()
    close(c, c.transpose(0, 2, 1), 1e-12)
    if scale <= 1e3:
        eigenvalues = np.linalg.eigvalsh(c)
        assert (eigenvalues >= -1e-9 * (1 + np.abs(c).max())).all()


@TREE_TEST
@given(TREES, TREES, SEEDS)
def test_de_morgan_and_double_negation_hold(a, b, seed):
    logits = logits_of(seed)
    for left, right in ((~(a & b), ~a | ~b), (~(a | b), ~a & ~b), (~~a, a)):
        for x, y in zip(run(left, logits)[1:], run(right, logits)[1:], strict=True):
            close(x, y)


@TREE_TEST
@given(
    st.lists(st.one_of(LEAVES, st.builds(lambda k, a: k * a, WEIGHTS, LEAVES)), min_size=1, max_size=4),
    st.booleans(),
    SEEDS,
)
def test_curvature_of_a_conjunction_is_the_exact_hessian(leaves, kept, seed):
    condition = reduce(lambda a, b: a & b, leaves)
    if kept:
        condition = condition & keep("smile", "yaw", weight=0.2)
    tape, _, g, c = run(condition, logits_of(seed, rows=2))
    u = torch.tensor(inputs(tape, logits_of(seed, rows=2))[1])
    hessians = [
        torch.autograd.functional.hessian(lambda x: -log_truth(condition, x[None], tape.columns).sum(), row).numpy()
        for row in u
    ]
    safe = np.isfinite(hessians).all(axis=(1, 2))
    close(c[safe], np.array(hessians)[safe], 1e-6, 1e-6)
    assert c.shape == (2, g.shape[1], g.shape[1])


@TREE_TEST
@given(st.lists(TREES, min_size=1, max_size=3), SEEDS, st.sampled_from(["product", "lace"]))
def test_a_program_is_the_sum_of_its_terms(trees, seed, logic):
    condition, logits = reduce(lambda a, b: a & b, trees) & keep("yaw", weight=0.2), logits_of(seed)
    tape, *whole = run(condition, logits, logic=logic)
    parameters, u = inputs(tape, logits)
    found = terms(tape.program)
    v, g, c = (np.zeros_like(x) for x in whole)
    for term in found:
        read = list(term.columns)
        parts = evaluate(term.program, parameters[:, term.parameters], u[:, read])
        v, g[:, read] = v + parts[0], g[:, read] + parts[1]
        c[:, np.array(read)[:, None], read] += parts[2]
    assert len(found) > len(trees)
    for x, y in zip(whole, (v, g, c), strict=True):
        close(x, y, 1e-9, 1e-12)


def test_terms_that_say_the_same_are_the_same_program():
    tape = lower(parse("smile & haircolor=red & ~glasses & (age<0.3 | yaw=0.5) & haircolor=blond"), ATTRIBUTES)
    smile, red, glasses, either, blond = terms(tape.program)
    assert smile.program == glasses.program
    assert red.program == blond.program
    assert (smile.columns, red.columns, glasses.columns, either.columns) == ((0,), (1, 2, 3, 4, 5), (6,), (7, 8))
    assert either.program == (("side", 0, 0), ("value", 1, 2), ("or",))
    assert terms(()) == ()


def test_and_or_not_are_the_algebra_of_probabilities():
    logits = logits_of(3, rows=50)
    p, q = (np.exp(run(attr(name), logits)[1]) for name in ("smile", "haircolor"))
    close(np.exp(run(parse("smile & haircolor"), logits)[1]), p * q)
    close(np.exp(run(parse("smile | haircolor"), logits)[1]), 1 - (1 - p) * (1 - q))
    close(np.exp(run(parse("~haircolor"), logits)[1]), 1 - q)
    close(run(parse("2*smile"), logits)[1], 2 * np.log(p), 1e-10)


def test_a_negated_leaf_has_the_documented_curvature():
    _, v, g, _ = run(parse("haircolor=red"), logits_of(1))
    _, _, g_not, c_not = run(parse("~haircolor=red"), logits_of(1))
    q = (np.exp(v) / -np.expm1(v))[:, None]
    close(g_not, -q * g, 1e-10)
    close(c_not, (q * (1 + q))[:, :, None] * g[:, :, None] * g[:, None, :], 1e-10)
    _, v, g, _ = run(parse("age=0.5"), logits_of(1))
    _, v_not, g_not, c_not = run(parse("~age=0.5"), logits_of(1))
    q = (np.exp(v) / -np.expm1(v))[:, None]
    close(v_not, np.log(-np.expm1(v)), 1e-10)
    close(g_not, -q * g, 1e-10)
    close(c_not[:, :, 0], q * (1 + q) * g * g, 1e-10)


def test_not_a_value_at_the_value_itself_is_finite():
    logits = {**logits_of(0), "age": np.full((3, 1), 0.5)}
    _, v, g, c = run(parse("~age=0.5"), logits)
    close(v, math.log(1e-6), 1e-6)
    assert (g == 0).all()
    assert (c == 0).all()


def test_or_is_safe_far_from_both_alternatives():
    logits = {**logits_of(0), "age": np.full((3, 1), 100.0)}
    _, v, g, _ = run(parse("age=0.5 | age=0.5"), logits)
    _, single, g_single, _ = run(parse("age=0.5"), logits)
    close(v, single + math.log(2))
    close(g, g_single)


# LACE logic.


def smile(v):
    """Logits for which log p(smile) is v."""
    d = np.array([-np.log(np.expm1(-v)) if v > -30 else v])
    return {**logits_of(0, rows=1), "smile": np.stack([0 * d, d], axis=1), "glasses": np.stack([0 * d, d], axis=1)}


@pytest.mark.parametrize("v", [-0.01, -0.5, -3.0, -120.0])
def test_lace_or_weighs_its_left_side_twenty_times(v):
    _, value, g, _ = run(parse("smile | smile"), smile(v), logic="lace")
    _, _, g_single, _ = run(parse("smile"), smile(v), logic="lace")
    close(value, v + math.log(21), 1e-9)
    close(g, g_single)
    _, value, g, _ = run(parse("smile | glasses"), smile(v), logic="lace")
    close(value, v + math.log(21), 1e-9)
    close(g[0, 0], 20 * g[0, 1])
    assert np.isfinite(g).all()


def test_lace_or_goes_left_to_right():
    logits = logits_of(5)
    a, b, c = (run(parse(text), logits, logic="lace")[1] for text in ("smile", "glasses", "age=0.5"))
    close(
        run(parse("smile | glasses | age=0.5"), logits, logic="lace")[1],
        np.logaddexp(np.logaddexp(a + math.log(20), b) + math.log(20), c),
    )
    close(
        run(parse("smile | (glasses | age=0.5)"), logits, logic="lace")[1],
        np.logaddexp(a + math.log(20), np.logaddexp(b + math.log(20), c)),
    )


@pytest.mark.parametrize("v", [-0.01, -0.1, -0.5, -120.0])
def test_lace_not_pulls_with_a_tenth(v):
    _, value, g, c = run(parse("~smile"), smile(v), logic="lace")
    _, single, g_single, c_single = run(parse("smile"), smile(v), logic="lace")
    alpha = min(1.0, 0.1 / abs(v))
    close(value, -alpha * single)
    close(g, -alpha * g_single, 1e-9)
    assert (c == 0).all()
    _, _, g_twice, c_twice = run(parse("~~smile"), smile(v), logic="lace")
    close(g_twice, alpha * min(1.0, 0.1 / (alpha * abs(v))) * g_single, 1e-9)
    close(c_twice, alpha * min(1.0, 0.1 / (alpha * abs(v))) * c_single, 1e-9)


def test_lace_curvature_under_not_of_or_is_the_spread_of_the_two():
    logits = logits_of(7)
    tape, _, _, c = run(parse("~(smile | glasses)"), logits, logic="lace")
    a = run(parse("smile"), logits, logic="lace")[1]
    _, v, g, _ = run(parse("smile | glasses"), logits, logic="lace")
    r = np.exp(a + math.log(20) - v)
    apart = g / np.stack(
        [r, -(1 - r)], axis=1
    )  # gradients of the two, one column each, with the sign of their difference
    alpha = np.minimum(0.1 / np.abs(v), 1)
    close(c, (alpha * r * (1 - r))[:, None, None] * apart[:, :, None] * apart[:, None, :], 1e-9)
    assert len(tape.columns) == 2


def test_lace_temperature_divides_the_chosen_logit_only():
    logits = logits_of(2)
    for name in ("smile", "haircolor"):
        _, v, g, c = run(attr(name), logits, logic="lace", temperature=0.7)
        close(v, logits[name][:, -1] / 0.7 - special.logsumexp(logits[name], axis=1))
        p = special.softmax(logits[name], axis=1)
        close(g, np.eye(WIDTHS[name])[-1] / 0.7 - p)
        close(c, p[:, :, None] * np.eye(WIDTHS[name]) - p[:, :, None] * p[:, None, :], absolute=1e-12)
    with pytest.raises(ConditionError, match="lace"):
        lower(attr("smile"), ATTRIBUTES, temperature=0.7)


# The normal distribution.


def test_log_ndtr_equals_scipys_and_its_slope_is_the_ratio():
    x = np.concatenate([np.linspace(-60, 36, 20001), -np.logspace(-12, 4, 500), np.logspace(-12, 1.5, 500), [0.0]])
    value, slope, bend = log_ndtr(x)
    close(value, special.log_ndtr(x), 1e-12, 0)
    bell = np.exp(-0.5 * np.maximum(x, 0) ** 2)
    expected = (
        np.sqrt(2 / np.pi) * bell / np.where(x < 0, special.erfcx(-np.minimum(x, 0) / 2**0.5), 2 * special.ndtr(x))
    )
    close(slope, expected, 1e-12, 0)
    near_zero = np.abs(x) < 20
    close(bend[near_zero], (expected * (x + expected))[near_zero], 1e-11, 0)
    assert (bend >= 0).all()
    assert (bend <= 1).all()


def test_log_ndtr_has_its_limits():
    x = np.array([-1e38, -1e4, -201.0, -199.0, 1e4, 1e38])
    with np.errstate(all="raise", under="ignore"):
        value, slope, bend = log_ndtr(x)
    close(value[:2], [-0.5e76, -0.5e8 - math.log(1e4) - 0.5 * math.log(2 * math.pi) - 1e-8])
    close(slope[:2], [1e38, 1e4 + 1e-4 - 2e-12])
    close(bend[:2], [1, 1 - 1e-8])
    close(bend[2:4], [1 - 201.0**-2 + 6 * 201.0**-4, 1 - 199.0**-2 + 6 * 199.0**-4], 1e-10)  # the branches join
    assert (value[4:] == 0).all()
    assert (slope[4:] == 0).all()
    assert (bend[4:] == 0).all()


# Tapes.


def test_rows_do_not_see_their_neighbours():
    condition = parse("(haircolor=red | ~haircolor=blond & age>0.4) & 2*smile & 0.1<yaw<0.4 & ~age=0.5 & keep(*)")
    tape = lower(condition, ATTRIBUTES).anchored({name: np.zeros(width) for name, width in WIDTHS.items()})
    parameters, u = inputs(tape, logits_of(11, rows=33))
    together = evaluate(tape.program, parameters, u)
    for row in (0, 5, 32):
        alone = evaluate(tape.program, parameters[row : row + 1], u[row : row + 1])
        for x, y in zip(together, alone, strict=True):
            assert (x[row] == y[0]).all()


def test_targets_are_parameters_and_not_part_of_the_program():
    pairs = [
        ("haircolor=blond", "haircolor=red"),
        ("smile", "~smile"),
        ("age=0.1 & smile", "age=0.9 & smile=no"),
        ("age>0.7", "age<0.2"),
        ("2*smile | glasses", "3*smile | ~glasses"),
    ]
    for left, right in pairs:
        a, b = (lower(parse(text), ATTRIBUTES) for text in (left, right))
        assert a.program == b.program
        assert hash(a.program) == hash(b.program)
        assert a.columns == b.columns
        assert a.parameters.tolist() != b.parameters.tolist()


def test_columns_are_differences_unless_raw_logits_are_needed():
    assert lower(parse("smile & ~smile"), ATTRIBUTES).columns == (Column("smile", None),)
    both = lower(parse("smile & age=0.5 & keep(smile)"), ATTRIBUTES)
    assert both.columns == (Column("smile", 0), Column("smile", 1), Column("age", 0))
    assert lower(attr("smile"), ATTRIBUTES, logic="lace", temperature=0.7).columns == both.columns[:2]
    raw, plain = (run(parse(text), logits_of(4))[1:3] for text in ("~smile & keep(smile)", "~smile"))
    kept = run(parse("keep(smile)"), logits_of(4))[1:3]
    close(raw[0] - kept[0], plain[0])
    close((raw[1] - kept[1])[:, 1], plain[1][:, 0], 1e-10)


def test_no_condition_is_the_empty_tape():
    tape = lower(None, ATTRIBUTES)
    assert tape.program == ()
    assert tape.columns == ()
    assert tape.near == 0.0
    v, g, c = evaluate(tape.program, np.zeros((4, 0)), np.zeros((4, 0)))
    assert (v == 0).all()
    assert v.shape == (4,)
    assert g.shape == (4, 0)
    assert c.shape == (4, 0, 0)
    assert satisfied(None, ATTRIBUTES, logits_of(0)).all()


def test_near_and_keep_are_weighed_and_only_allowed_at_the_top():
    tape = lower(parse("smile & near(0.1) & 2*(near(0.2) & age=0.5)"), ATTRIBUTES)
    assert tape.near == pytest.approx(0.5)
    assert tape.columns == (Column("smile", None), Column("age", 0))
    assert lower(near(0.3), ATTRIBUTES).program == ()
    for text in ("~near(1)", "smile | near(1)", "~keep(smile)", "smile | glasses & keep(*)", "2*(smile | near(1))"):
        with pytest.raises(ConditionError, match="at the top"):
            lower(parse(text), ATTRIBUTES)


def test_keep_waits_for_its_anchor():
    tape = lower(parse("smile & keep(*, weight=0.5) & age>0.5"), ATTRIBUTES)
    assert {name for _, name, _ in tape.anchors} == {"glasses", "haircolor", "yaw"}
    logits = logits_of(9, rows=1)
    assert np.isnan(evaluate(tape.program, *inputs(tape, logits))[0]).all()
    anchors = {name: value[0] + 1.0 for name, value in logits.items()}
    v = evaluate(tape.anchored(anchors).program, *inputs(tape.anchored(anchors), logits))[0]
    close(v, run(parse("smile & age>0.5"), logits)[1] - 0.5 * (2 + 5 + 1))
    assert np.isnan(tape.parameters).any()
    assert not tape.parameters.flags.writeable
    with pytest.raises(ConditionError, match="glasses"):
        tape.anchored({"haircolor": np.zeros(5), "yaw": np.zeros(1)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("smlie", "did you mean 'smile'"),
        ("beard", "this bundle has: smile, glasses, haircolor, age, yaw"),
        ("keep(beard)", "no attribute 'beard'"),
        ("haircolor=blonde", "did you mean 'blond'"),
        ("glasses=2", "0 no, 1 yes"),
        ("glasses=-1", "0 no, 1 yes"),
        ("glasses=0.5", "0 no, 1 yes"),
        ("glasses>0.5", "write glasses=yes"),
        ("age", "value from about 0 to 1"),
        ("age=old", "not 'old'"),
        ("age=nan", "not 'nan'"),
    ],
)
def test_what_does_not_fit_the_bundle_is_refused_with_advice(text, words):
    with pytest.raises(ConditionError) as caught:
        lower(parse(text), ATTRIBUTES)
    assert words in str(caught.value)
    if not text.startswith("keep"):
        with pytest.raises(ConditionError):
            satisfied(parse(text), ATTRIBUTES, logits_of(0))


def test_limits_are_enforced():
    lower(reduce(lambda a, b: a | b, [attr("smile")] * MAX_LEAVES), ATTRIBUTES)
    with pytest.raises(ConditionError, match=f"more than {MAX_LEAVES} terms"):
        lower(reduce(lambda a, b: a | b, [attr("smile")] * (MAX_LEAVES + 1)), ATTRIBUTES)
    deep = reduce(lambda a, _: ~a, range(MAX_DEPTH - 1), attr("smile"))
    lower(deep, ATTRIBUTES)
    for levels in (1, 5000):
        with pytest.raises(ConditionError, match="nested deeper"):
            lower(reduce(lambda a, _: ~a, range(levels), deep), ATTRIBUTES)
    wide = {"wide": class_of("wide", *(f"c{i}" for i in range(MAX_COLUMNS + 1)))}
    with pytest.raises(ConditionError, match="logits"):
        lower(attr("wide"), wide)
    for options in ({"logic": "fuzzy"}, {"logic": "lace", "temperature": 0.0}):
        with pytest.raises(ConditionError):
            lower(attr("smile"), ATTRIBUTES, **options)
    with pytest.raises(ConditionError, match="parse"):
        lower("smile", ATTRIBUTES)  # type: ignore[arg-type]


def test_out_of_range_targets_are_the_solvers_business():
    assert lower(attr("age", 40), ATTRIBUTES).parameters[0] == 40.0


def test_satisfied_is_the_crisp_formula():
    logits = {
        "smile": np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]),
        "haircolor": np.eye(5)[[2, 2, 3]],
        "age": np.array([[0.5], [0.58], [0.75]]),
    }
    for text, expected in {
        "smile": [1, 0, 1],
        "~smile": [0, 1, 0],
        "haircolor=blond": [1, 1, 0],
        "age=0.5": [1, 1, 0],
        "age>0.58": [0, 0, 1],
        "0.4<age<0.58": [1, 0, 0],
        "smile & haircolor=blond | 2*age=0.75": [1, 0, 1],
        "~(smile & haircolor=2) & near(1) & keep(*)": [0, 1, 1],
    }.items():
        assert satisfied(parse(text), ATTRIBUTES, logits).tolist() == [bool(x) for x in expected], text
    assert satisfied(parse("age=0.5"), ATTRIBUTES, logits, tolerance=0.01).tolist() == [True, False, False]
