"""The posterior's definition: where closed forms are known, 20,000 samples must follow them."""

import numpy as np
import pytest
from scipy.stats import kstest, norm, rayleigh, truncnorm, uniform

from engine.bundle import Attribute
from engine.errors import ConditionError, SolveError
from engine.grammar import parse
from engine.reference import posterior
from engine.reference.evidence import evidence, levels, powers
from engine.reference.noise import normals
from engine.reference.posterior import Settings, sample
from engine.reference.probability import log_probability
from engine.reference.tape import evaluate
from engine.tape import lower, lower_crisp

DRAWS = 20_000


class Half:
    """A linear-Gaussian world: the heads are sure, more or less, that the last coordinate is beyond ``bound``.

    log P = log sigmoid(sharp (x - bound)), so that P > 1/2 is the half-space x > bound: the posterior is a truncated
    normal in the last coordinate, and the prior in the other one.
    """

    noise_dim = 2

    def __init__(self, bound, sharp=8.0):
        self.bound, self.sharp = bound, sharp

    def log_p(self, rows, x):
        found = -np.logaddexp(0.0, -self.sharp * (x[:, -1].astype(float) - self.bound))
        return found, found

    def approach(self, rows, x):
        return np.concatenate([x[:, :-1], np.full((len(x), 1), self.bound, x.dtype)], axis=1)


class Band:
    """A two-dimensional toy with values: a crisp statement on the radius, of which the head knows the exact value.

    The set 1.8 <= |x| <= 2.2 has a radius of a truncated Rayleigh law and an even angle.
    """

    noise_dim = 2
    program, parameters = (("inside", 0, 0),), np.array([1.8, 2.2, 1 / 0.1])

    def log_p(self, rows, x):
        radius = np.linalg.norm(x.astype(float), axis=1)[:, None]
        parameters = np.broadcast_to(self.parameters, (len(x), 3))
        return tuple(log_probability(self.program, parameters, radius, relaxed=relaxed) for relaxed in (True, False))

    def approach(self, rows, x):
        return x


class Energy:
    """log P = -(a . x - y)^2 / 2 s^2: with guidance g the posterior is a normal that is known."""

    noise_dim = 2
    a, y, s = np.array([0.8, 0.6]), 1.5, 0.5

    def log_p(self, rows, x):
        found = -0.5 * ((x.astype(float) @ self.a - self.y) / self.s) ** 2
        return found, found

    def approach(self, rows, x):
        return x

    def law(self, guidance):
        precision = 1 + guidance / self.s**2
        return norm(guidance * self.y / self.s**2 / precision, precision**-0.5)


LEAST = 1e-3  # p-value under which a law is refused; the seeds are fixed


def follows(values, law):
    """Whether values (n,) pass a rank test and a test of the mean under a law."""
    centred = abs(values.mean() - law.mean()) < 4 * law.std() / len(values) ** 0.5
    return bool(centred and kstest(values, law.cdf).pvalue > LEAST)


def half_space_follows(bound, **settings):
    ends = sample(Half(bound), range(DRAWS), Settings(confidence=0.5, **settings))
    assert ends.entered.all()
    assert (ends.x[:, -1] > bound).all()
    first, last = ends.x.T.astype(float)
    return follows(last, truncnorm(bound, np.inf)) and follows(first, norm)


# 1 in 2, 1 in 15 with a single candidate, so that most rows are corrected; and 1 in 2,000.
@pytest.mark.parametrize(("bound", "fresh"), [(0.0, 64), (1.5, 1), (3.3, 64)])
def test_a_half_space_is_sampled_as_a_truncated_normal_down_to_1_in_2000(bound, fresh):
    assert half_space_follows(bound, fresh=fresh, steps=64)


@pytest.mark.parametrize("fresh", [1, 64])
def test_a_band_of_a_value_is_sampled_as_its_law(fresh):
    ends = sample(Band(), range(DRAWS), Settings(confidence=0.5, fresh=fresh, steps=64))
    radius, angle = np.linalg.norm(ends.x.astype(float), axis=1), np.arctan2(*ends.x.T.astype(float))
    low, high = rayleigh.cdf([1.8, 2.2])

    class Law:
        cdf = staticmethod(lambda r: (rayleigh.cdf(r) - low) / (high - low))

    assert ends.entered.all()
    assert radius.min() >= 1.8 - 1e-6
    assert radius.max() <= 2.2 + 1e-6
    assert kstest(radius, Law.cdf).pvalue > LEAST
    assert follows(angle, uniform(-np.pi, 2 * np.pi))


def energy_follows(guidance, fresh):
    world = Energy()
    ends = sample(world, range(DRAWS), Settings(None, guidance, fresh=fresh, steps=64))
    along, across = ends.x.astype(float) @ world.a, ends.x.astype(float) @ [-0.6, 0.8]
    return follows(along, world.law(guidance)) and follows(across, norm)


@pytest.mark.parametrize(("guidance", "fresh"), [(1.0, 64), (6.0, 64), (6.0, 1)])
def test_guidance_samples_the_normal_that_it_says(guidance, fresh):
    assert energy_follows(guidance, fresh)


def test_a_wrong_acceptance_fails_these_tests(monkeypatch):
    right = posterior.accepts
    with monkeypatch.context() as patch:
        patch.setattr(posterior, "accepts", lambda s, log_p, chance: right(s, 1.2 * log_p, chance))
        assert not energy_follows(6.0, 64)
    with monkeypatch.context() as patch:
        patch.setattr(posterior, "moves", lambda power, before, after, chance: after > before)
        assert not energy_follows(6.0, 1)
    with monkeypatch.context() as patch:  # a random walk does not leave the prior alone
        patch.setattr(posterior, "proposal", lambda x, noise, size: x + size[:, None].astype(x.dtype) * noise)
        assert not half_space_follows(1.5, fresh=1, steps=64)


def test_a_row_does_not_depend_on_its_neighbours_or_on_how_many_candidates_are_tried_at_once():
    settings = Settings(confidence=0.5, fresh=40)
    whole = sample(Half(2.0), range(200), settings)
    assert 0 < whole.exact.sum() < 200
    for waves in ((1,), (7,), (64,), (2, 6, 24)):
        again = sample(Half(2.0), range(200), settings, waves=waves)
        for name in ("x", "exact", "candidates", "corrections", "accepted"):
            assert np.array_equal(getattr(again, name), getattr(whole, name)), (waves, name)
    alone = [sample(Half(2.0), [seed], settings).x[0] for seed in range(20)]
    assert np.array_equal(alone, whole.x[:20])


def test_candidate_0_is_where_the_flow_would_begin():
    ends = sample(Half(-9.0), [5, 6], Settings())
    assert ends.exact.all()
    assert (ends.candidates == 1).all()
    assert np.array_equal(ends.x[1], normals(6, 0, 2))


def test_a_row_that_never_enters_says_so():
    ends = sample(Half(60.0), range(4), Settings(patience=5))
    assert not ends.entered.any()
    assert (ends.candidates == 64).all()
    assert (ends.corrections == 5).all()


@pytest.mark.parametrize(("given", "message"), [
    ({"guidance": 2.0}, "give one of them"), ({"confidence": None}, "give one of them"),
    ({"confidence": 1.0}, "between 0 and 1"), ({"confidence": None, "guidance": -1.0}, "greater than 0"),
    ({"fresh": 0}, "fresh is 0"), ({"steps": -1}, "steps is -1"),
])
def test_settings_that_cannot_be_are_refused(given, message):
    with pytest.raises((SolveError, ConditionError), match=message):
        Settings(**given)


# --- evidence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.5, 2.3, 3.0, 4.0])  # 1 in 3, 93, 740, counted; 1 in 32,000, in levels
def test_evidence_of_a_half_space_is_its_share(bound):
    found = evidence(Half(bound), Settings(confidence=0.5))
    assert abs(found.log_p - norm.logsf(bound)) < 0.1
    assert found.error <= 0.1
    assert found.counted == (bound < 4)
    assert found.evaluations < 2_500_000


def test_levels_agree_with_counting_where_both_can_be_had():
    for bound in (1.5, 3.0):
        log_p = np.mean([levels(Half(bound), Settings(confidence=0.5), seed)[0] for seed in range(3)])
        assert abs(log_p - norm.logsf(bound)) < 0.1


@pytest.mark.parametrize("guidance", [2.0, 40.0])
def test_evidence_under_guidance_is_the_mean_of_the_power(guidance):
    world = Energy()
    variance = world.s**2 + guidance
    expected = 0.5 * np.log(world.s**2 / variance) - world.y**2 * guidance / (2 * variance)
    found = evidence(world, Settings(None, guidance))
    assert abs(found.log_p - expected) < 0.1
    assert abs(powers(world, Settings(None, guidance), 0)[0] - expected) < 0.1


def test_evidence_of_what_cannot_be_says_so():
    with pytest.raises(SolveError, match="ask for less"):
        evidence(Half(60.0), Settings())
    with pytest.raises(SolveError, match="greater than 0"):
        evidence(Half(0.0), Settings(), error=0)


# --- probabilities ------------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "smile": Attribute("smile", "class", "smile", (0, 2), ("no", "yes")),
    "hair": Attribute("hair", "class", "hair", (0, 3), ("black", "red", "grey")),
    "age": Attribute("age", "value", "age", (0, 1)),
}
PLACES = {"smile": slice(0, 2), "hair": slice(2, 5), "age": slice(5, 6)}


def read(tape, logits):
    """What a tape reads of logits (n, 6)."""
    parts = [logits[:, PLACES[c.attribute]] for c in tape.columns]
    return np.stack([p[:, 1] - p[:, 0] if c.index is None else p[:, c.index]
                     for c, p in zip(tape.columns, parts, strict=True)], axis=1)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)


def brute_force(text, logits, tolerance=0.05):
    """P of conditions by product logic, written down once more from its definition."""
    smile, hair, age = softmax(logits[:, :2])[:, 1], softmax(logits[:, 2:5]), logits[:, 5]
    either = lambda a, b: 1 - (1 - a) * (1 - b)  # noqa: E731
    near = (np.abs(age - 0.7) <= tolerance).astype(float)
    return {
        "smile & hair=red": smile * hair[:, 1],
        "~(smile | hair=red) & age=0.7": (1 - smile) * (1 - hair[:, 1]) * near,
        "smile | age>0.6": either(smile, age > 0.6),
        "~(age=0.7) & hair=grey": (1 - near) * hair[:, 2],
        "3 * smile & 0.3<age<0.6": smile * ((age > 0.3) & (age < 0.6)),
        "~(0.3<age<0.6) | ~smile": either((age <= 0.3) | (age >= 0.6), 1 - smile),
    }[text]


@pytest.mark.parametrize("text", ["smile & hair=red", "~(smile | hair=red) & age=0.7", "smile | age>0.6",
                                  "~(age=0.7) & hair=grey", "3 * smile & 0.3<age<0.6", "~(0.3<age<0.6) | ~smile"])
def test_crisp_conditions_have_the_probability_of_product_logic(text):
    rng = np.random.default_rng(3)
    logits = np.concatenate([3 * rng.normal(size=(500, 5)), rng.uniform(size=(500, 1))], axis=1)
    tape = lower_crisp(parse(text), ATTRIBUTES, {"age": 0.05})
    parameters = np.broadcast_to(tape.parameters, (500, len(tape.parameters)))
    crisp = log_probability(tape.program, parameters, read(tape, logits))
    relaxed = log_probability(tape.program, parameters, read(tape, logits), relaxed=True)
    assert np.allclose(np.exp(crisp), brute_force(text, logits), rtol=1e-9, atol=1e-300)
    assert (relaxed >= crisp - 1e-12).all()
    assert (relaxed[crisp < -1e3] > -1e3).all()  # there is a way to where it would be true


def test_without_crisp_leaves_the_probability_is_the_value_of_the_tape():
    rng = np.random.default_rng(4)
    logits = np.concatenate([3 * rng.normal(size=(300, 5)), rng.uniform(size=(300, 1))], axis=1)
    tape = lower(parse("2 * (smile | hair=red) & ~hair=grey & age=0.7 & (age>0.2 | ~(age=0.4))"), ATTRIBUTES)
    parameters = np.broadcast_to(tape.parameters, (300, len(tape.parameters)))
    expected, *_ = evaluate(tape.program, parameters, read(tape, logits))
    assert np.allclose(log_probability(tape.program, parameters, read(tape, logits)), expected, rtol=1e-12)


@pytest.mark.parametrize("text", ["smile & near(0.1)", "smile & keep(age)"])
def test_a_condition_that_holds_on_to_an_anchor_has_no_probability(text):
    with pytest.raises(ConditionError, match="anchor"):
        lower_crisp(parse(text), ATTRIBUTES, {"age": 0.05})
