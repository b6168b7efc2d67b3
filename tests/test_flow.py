"""The field of the flow against float64 autograd."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import leaky_relu, linear, logsigmoid

from engine import Request, Sampler, attr, keep, near
from engine.batch import Batch
from engine.condition import And, Is, Keep, Near, Not, Or, Weighted, Within
from engine.reference.tape import evaluate as interpret
from tests.worlds import random_world

DIM, LABELS = 16, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return random_world(tmp_path_factory.mktemp("flow") / "b", dim=DIM, layers=2, labels=LABELS, z_head=True,
                        graphs=True)


@pytest.fixture(scope="module")
def samplers(world):
    return {name: Sampler(world, runtime=name, threads=1) for name in ("numpy", "native", "onnxruntime")}


YES_NO = st.builds(attr, st.sampled_from(["smile", "glasses", "shape"]), st.sampled_from([None, "no", "yes"]))
COLOURS = st.builds(attr, st.just("colour"), st.sampled_from(["c0", "c2", "c4"]))
# Targets are rounded: ~(u = y) has no direction at u = y, and hypothesis would look for such coincidences.
NUMBERS = st.integers(-10, 20).map(lambda n: n / 10)
VALUES = st.one_of(
    st.builds(attr, st.sampled_from(["age", "yaw"]), NUMBERS),
    st.builds(lambda name, a, above: attr(name) > a if above else attr(name) < a,
              st.sampled_from(["age", "yaw"]), NUMBERS, st.booleans()),
    st.builds(lambda name, a, b: attr(name).between(a, a + b), st.sampled_from(["age", "yaw"]), NUMBERS,
              st.sampled_from([0.1, 0.5])),
)
TERMS = st.recursive(
    st.one_of(YES_NO, COLOURS, VALUES),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(lambda k, a: k * a, st.sampled_from([0.5, 2.0]), inner),
    ),
    max_leaves=5,
)
HOLDERS = st.sampled_from([None, near(0.3), keep("*", weight=0.2), keep("smile", "age", "shape") & near(0.1)])
CONDITIONS = st.builds(lambda term, holder: term if holder is None else term & holder, TERMS, HOLDERS)


def stack(tensors, prefix, x, *, last_is_linear):
    n = sum(name.startswith(f"{prefix}.") and name.endswith(".weight") for name in tensors)
    for i in range(n):
        x = linear(x, tensors[f"{prefix}.{i}.weight"], tensors[f"{prefix}.{i}.bias"])
        x = x if last_is_linear and i == n - 1 else leaky_relu(x, 0.2)
    return x


def logits(world, z, psi, label):
    """w and the raw logits of every attribute, differentiable, from one z."""
    tensors = {name: torch.from_numpy(tensor.astype(float)) for name, tensor in world.field.items()}
    x = torch.cat([z / (z.square().mean() + 1e-8).sqrt(), tensors["mapping.embedding"][label]])
    centre = tensors["mapping.w_avg"]
    w = centre + psi * (stack(tensors, "mapping", x, last_is_linear=False) - centre)
    starts = {"w": w, "z": z}
    found = {
        name: stack(tensors, f"head.{head.name}", starts[head.space], last_is_linear=True)
        for name, head in ((a.name, world.heads[a.head]) for a in world.attributes.values())
    }
    return w, found


def truth(condition, u, attributes):
    """log-truth-value in product logic, written from the definitions: De Morgan is not used."""
    match condition:
        case Is(name, choice) if attributes[name].kind == "value":
            return -((u[name][0] - choice) ** 2) / (2 * attributes[name].sigma ** 2)
        case Is(name, choice):
            classes = attributes[name].classes
            return u[name].log_softmax(0)[len(classes) - 1 if choice is None else classes.index(choice)]
        case Within(name, low, high):
            sides = [(bound, sign) for bound, sign in ((low, 1), (high, -1)) if bound is not None]
            return sum(torch.special.log_ndtr(s * (u[name][0] - b) / attributes[name].sigma) for b, s in sides)
        case Weighted(weight, part):
            return weight * truth(part, u, attributes)
        case And(parts):
            return sum(truth(part, u, attributes) for part in parts)
        case Or(parts):
            total = truth(parts[0], u, attributes)
            for part in parts[1:]:
                total = negated(negated(total) + negated(truth(part, u, attributes)))
            return total
        case Not(Weighted(weight, part)):  # a weight is importance: it stays outside of the negation
            return weight * truth(Not(part), u, attributes)
        case Not(part):
            return negated(truth(part, u, attributes))
    raise TypeError(condition)


def negated(v):
    """log(1 - e^v) for v < 0."""
    # Each branch sees only its own v: the gradient of the branch not taken must be finite too.
    near_zero, far = v.clamp(-0.7, -1e-300), v.clamp(max=-0.7)
    return torch.where(v > -0.7, torch.log(-torch.expm1(near_zero)), torch.log1p(-torch.exp(far)))


def reference(world, condition, z, psi, label, anchor):
    """log p and its gradient at z, by autograd. anchor: z, w and logits that near and keep measure from."""
    z = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    w, u = logits(world, z, psi, label)
    terms = condition.parts if isinstance(condition, And) else (condition,)
    mentioned = {name for term in terms if not isinstance(term, Keep | Near) for name in term.attributes()}
    total = torch.zeros((), dtype=torch.float64)
    for term in terms:
        if isinstance(term, Near):
            total = total - term.weight * ((w - anchor[1]).square().sum() + (z - anchor[0]).square().sum())
        elif isinstance(term, Keep):
            names = [n for n in world.attributes if n not in mentioned] if term.names == ("*",) else term.names
            total = total - term.weight * sum((u[n] - anchor[2][n]).square().sum() for n in names)
        else:
            total = total + truth(term, u, world.attributes)
    return total.item(), torch.autograd.grad(total, z)[0].numpy()


def evaluated(sampler, requests, *, linear):
    """The field at a point away from each row's start, which is what near and keep measure from."""
    batch = Batch(len(requests), DIM, DIM, sampler.runtime.solving.dtype)
    for row, request in enumerate(requests):
        batch.admit(row, sampler.starts.start(request))
    step = np.random.default_rng(1).standard_normal(batch.z.shape) * 0.3
    rows, z = np.arange(len(requests)), (batch.z + step).astype(batch.dtype)
    return batch, z, sampler.flows.new_flow().evaluate(batch, rows, z, linear=linear)


def anchor_of(world, request, start):
    start = torch.tensor(start, dtype=torch.float64)
    w, u = logits(world, start, request.truncation, request.label)
    return start, w, u


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(CONDITIONS, min_size=1, max_size=3))
def test_the_gradient_is_autograds(world, samplers, conditions):
    requests = [Request(c, seed=i, truncation=(0.7, 1.0, 0.4)[i], label=i) for i, c in enumerate(conditions)]
    batch, z, point = evaluated(samplers["numpy"], requests, linear=True)
    plain = evaluated(samplers["numpy"], requests, linear=False)[2]
    for row, request in enumerate(requests):
        anchor = anchor_of(world, request, batch.anchor_z[row])
        logp, gradient = reference(world, request.condition, z[row], request.truncation, request.label, anchor)
        scale = max(np.linalg.norm(gradient), 1e-3)
        assert point.logp[row] == pytest.approx(logp, rel=1e-6, abs=1e-6)
        assert np.linalg.norm(point.gradient[row] - gradient) < 1e-5 * scale
        assert np.linalg.norm(plain.gradient[row] - point.gradient[row]) < 1e-9 * scale
    np.testing.assert_allclose(plain.logp, point.logp)


def test_the_rows_of_the_jacobian_are_autograds(world, samplers):
    request = Request("smile & colour=c1 & age=0.5 & shape", seed=3, truncation=0.6, label=2)
    batch, z, point = evaluated(samplers["numpy"], [request], linear=True)
    for slot, column in enumerate(batch.tapes[0].columns):
        start = torch.tensor(z[0], requires_grad=True)
        u = logits(world, start, 0.6, 2)[1][column.attribute]
        value = u[1] - u[0] if column.index is None else u[column.index]
        expected = torch.autograd.grad(value, start)[0].numpy()
        np.testing.assert_allclose(point.jacobian[0, slot], expected, atol=1e-10)


def test_the_curvature_of_a_conjunction_is_its_hessian(world, samplers):
    """Within a linear region of the network w -> u; the Hessian of -log p by the logits is exact."""
    request = Request("smile & colour=c1 & age=0.5 & yaw>0.4", seed=3, truncation=0.6, label=2)
    batch, _, point = evaluated(samplers["numpy"], [request], linear=True)
    columns = batch.tapes[0].columns
    u = torch.tensor(np.random.default_rng(0).standard_normal(len(columns)))

    def energy(u):
        position = {column: i for i, column in enumerate(columns)}
        smile = logsigmoid(u[position[columns[0]]])
        colour = u[1:6].log_softmax(0)[1]
        return -(smile + colour - (u[6] - 0.5) ** 2 / 0.02 + torch.special.log_ndtr((u[7] - 0.4) / 0.1))

    _, _, curvature = interpret(batch.tapes[0].program, batch.tapes[0].parameters[None], u.numpy()[None])
    np.testing.assert_allclose(curvature[0], torch.autograd.functional.hessian(energy, u).numpy(), atol=1e-8)
    assert point.curvature.shape[1:] == curvature.shape[1:]


@pytest.mark.parametrize("runtime", ["native", "onnxruntime"])
def test_it_gives_the_gradients_of_the_definition(samplers, runtime):
    texts = ["smile", "age=0.7 & ~glasses", "colour=c2 | yaw>0.6", "shape & near(0.1)", "keep(*) & 2*smile=no"]
    requests = [Request(texts[i % 5], seed=i, label=i % LABELS, truncation=0.8) for i in range(60)]
    ours, judge = (evaluated(samplers[name], requests, linear=True)[2] for name in (runtime, "numpy"))
    norm = np.linalg.norm(judge.gradient, axis=1)
    errors = np.linalg.norm(ours.gradient - judge.gradient, axis=1) / np.maximum(norm, 1e-6)
    # By quantiles: rounding may move a unit across its kink, and then that gradient differs by a slope.
    assert np.median(errors) < 1e-5
    assert np.quantile(errors, 0.9) < 1e-3
    np.testing.assert_allclose(ours.logp, judge.logp, rtol=1e-3, atol=1e-4)
