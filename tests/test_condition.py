"""Conditions as values, and their text form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.condition import And, Condition, Is, Not, Or, Weighted, Within, attr, keep, near
from engine.errors import ConditionError
from engine.grammar import parse

NAMES = st.one_of(
    st.from_regex(r"[A-Za-z_0-9][A-Za-z0-9_-]{0,6}", fullmatch=True),
    st.sampled_from(["and", "near", "keep", "weight", "dark brown", "1e5", "-3", "2-door", "é", "a=b", "'", "NOT"]),
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
WEIGHTS = st.floats(1e-6, 1e6)


@st.composite
def intervals(draw):
    low, high = sorted(draw(st.lists(FINITE, min_size=2, max_size=2, unique=True)))
    return attr(draw(NAMES)).between(low, high)


LEAVES = st.one_of(
    st.builds(attr, NAMES, st.one_of(st.none(), NAMES, st.integers(-5, 5), FINITE)),
    st.builds(
        lambda name, bound, above: attr(name) > bound if above else attr(name) < bound, NAMES, FINITE, st.booleans()
    ),
    intervals(),
    st.builds(near, WEIGHTS),
    st.builds(lambda names, weight: keep(*names, weight=weight), st.lists(NAMES, min_size=1, max_size=3), WEIGHTS),
    st.just(keep("*")),
)
CONDITIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(lambda k, a: k * a, WEIGHTS, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(CONDITIONS)
def test_text_and_python_form_build_the_same_tree_again(condition):
    assert parse(str(condition)) == condition
    again = eval(repr(condition), {"attr": attr, "near": near, "keep": keep})
    assert again == condition
    assert hash(again) == hash(condition)
    assert str(parse(str(condition))) == str(condition)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet='ab01.-e&|~()*=<>," nearkp', max_size=24))
def test_any_text_is_read_or_refused_with_a_condition_error(text):
    try:
        condition = parse(text)
    except ConditionError:
        return
    assert parse(str(condition)) == condition


A, B, C = attr("a"), attr("b"), attr("c")


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("a | b & c", A | (B & C)),
        ("~a & b", (~A) & B),
        ("2*a & b", (2 * A) & B),
        ("2*~a", 2 * (~A)),
        ("~(2*a)", ~(2 * A)),
        ("2*3*a", 6 * A),
        ("~~a", Not(Not(A))),
        ("a | b | c", Or((A, B, C))),
        ("a | (b | c)", Or((A, Or((B, C))))),
        ("a & (b & c)", And((A, B, C))),
        ("a & age>0.7 | b", (A & (attr("age") > 0.7)) | B),
        ("~age<.5", ~(attr("age") < 0.5)),
        ("2*0.3<age<0.6", 2 * attr("age").between(0.3, 0.6)),
        ("0.6>age>0.3", attr("age").between(0.3, 0.6)),
        ("0.7<age", attr("age") > 0.7),
        ("age=1e-3", Is("age", 0.001)),
        ("yaw=-0.2 & yaw>-1", Is("yaw", -0.2) & (attr("yaw") > -1)),
        ("haircolor=dark-blond_2", Is("haircolor", "dark-blond_2")),
        ("glasses=1", Is("glasses", 1)),
        ('breed="Maine Coon"', Is("breed", "Maine Coon")),
        ("near(0.04)", near(0.04)),
        ("near()", near()),
        ("keep(smile, gender, weight=0.01)", keep("smile", "gender", weight=0.01)),
        ("keep(*)", keep("*")),
        ("a\n & b", A & B),
    ],
)
def test_precedence_is_pythons(text, condition):
    assert parse(text) == condition


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        ((A | B) & C, "(a | b) & c"),
        ((A & B) | C, "a & b | c"),
        (~(A & B), "~(a & b)"),
        (2 * (A | B), "2*(a | b)"),
        (0.5 * ~A, "0.5*~a"),
        (~(attr("age") > 0.7), "~(age>0.7)"),
        ((attr("age") > 0.7) & A, "age>0.7 & a"),
        (attr("age", 1.0), "age=1"),
        (keep("a", weight=2), "keep(a, weight=2)"),
    ],
)
def test_text_has_only_the_parentheses_it_needs(condition, text):
    assert str(condition) == text


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("smile and hat", 6, "write & for and"),
        ("smile or hat", 6, "write | for or"),
        ("not hat", 0, "write ~ for not"),
        ("smile && hat", 6, "write a single &"),
        ("smile || hat", 6, "write a single |"),
        ("age == 0.5", 4, "write a single ="),
        ("glasses != yes", 8, "write ~name=class"),
        ("!glasses", 0, "write ~ for not"),
        ("age >= 0.5", 4, "values are continuous: write >"),
        ("smile + hat", 6, "write & for and"),
        ("hat*2", 3, "a weight comes first"),
        ("~2*hat", 1, "~(2*hat)"),
        ("(smile & hat", 12, "opened at column 1 is not closed"),
        ("smile & hat)", 11, "closed that was never opened"),
        ("smile hat", 6, "joined with & or |"),
        ("haircolor=", 10, "expected a class name or a number after ="),
        ("smile &", 7, "expected an attribute, but the text ends here"),
        ("age>old", 4, "expected a number, but found old"),
        ("age>1e999", 4, "double precision"),
        ("0.6<age<0.3", 0, "the lower bound comes first"),
        ("0.3<age>0.6", 7, "0.3<age<0.6"),
        ("smile & 0*hat", 8, "greater than 0"),
        ("near", 4, "expected ( after near"),
        ("near=1", 4, "expected ( after near"),
        ("keep()", 5, "expected an attribute, * or weight="),
        ("keep(*, a)", 5, "alone"),
        ('"smile', 0, "closing quote"),
        ("smile $ hat", 6, "letters, digits"),
        ("(" * 200 + "a" + ")" * 200, 17, "nested deeper than 16 levels"),
    ],
)
def test_a_wrong_text_is_answered_with_the_place_and_advice(text, column, words):
    with pytest.raises(ConditionError) as caught:
        parse(text)
    lines = str(caught.value).split("\n")
    assert lines[1] == f"    {text}"
    assert lines[2] == " " * (4 + column) + "^"
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "  \n", None, 3])
def test_an_empty_text_is_refused(text):
    with pytest.raises(ConditionError):
        parse(text)


def test_a_condition_has_no_truth_value():
    with pytest.raises(ConditionError, match="write & for and"):
        bool(A)
    with pytest.raises(ConditionError, match="between"):
        _ = 0.3 < attr("age") < 0.6
    with pytest.raises(ConditionError):
        _ = A and B


def test_conditions_are_values():
    assert attr("age", 0.5) == attr("age", 0.5) != attr("age", 0.6)
    assert len({A & B, A & B, B & A}) == 2
    assert attr("glasses", 1) == attr("glasses", 1.0)  # equal in Python, so equal here
    assert str(attr("glasses", 1.0)) == "glasses=1"
    with pytest.raises(AttributeError):
        A.name = "b"  # type: ignore[misc]
    assert isinstance(np.float64(2.0) * A, Weighted)
    assert (attr("age") > np.float32(0.5)) == Within("age", 0.5, None)


def test_names_are_listed_once_and_in_order():
    condition = parse("b & (a | ~b) & 0.1<c<0.2 & keep(d, a) & near(1)")
    assert condition.attributes() == ("b", "a", "c", "d")
    assert keep("*").attributes() == ()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: A & True,
        lambda: A | "b",
        lambda: 0 * A,
        lambda: -1 * A,
        lambda: float("nan") * A,
        lambda: "2" * A,
        lambda: A * 2,
        lambda: attr(""),
        lambda: attr('a"b'),
        lambda: attr("*"),
        lambda: attr(3),
        lambda: attr("a", float("inf")),
        lambda: attr("a", True),
        lambda: attr("a", [1]),
        lambda: attr("age") >= 0.5,
        lambda: attr("age", 0.5) > 0.4,
        lambda: A & B > 0.7,
        lambda: attr("age").between(0.6, 0.3),
        lambda: attr("age") > float("nan"),
        lambda: near(0),
        lambda: keep(),
        lambda: keep("*", "a"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_condition_error(wrong):
    with pytest.raises(ConditionError):
        wrong()


def test_every_node_is_a_condition():
    assert all(isinstance(part, Condition) for part in (A, near(1), keep("*"), ~A, 2 * A, A & B, A | B, attr("x") > 1))
