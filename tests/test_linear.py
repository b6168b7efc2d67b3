"""The linear flow of a Gauss-Newton step against its definition with the full matrix."""

import numpy as np
import pytest

from engine.solvers.linear import Linear, inverses

N, D = 4, 20


def flow(r, seed=0, stiffness=1.0):
    """J, F, C, lambda and c of rows with r columns, of which the first has no curvature."""
    random = np.random.default_rng(seed)
    jacobian, gradient = random.normal(size=(N, r, D)), random.normal(size=(N, D))
    factors = random.normal(size=(N, r, max(r - 1, 0))) * np.sqrt(stiffness)
    factors[0] = 0
    shift = np.array([0.0, 0.0, 0.3, 3.0])
    return jacobian, gradient, factors @ factors.swapaxes(1, 2), shift, random.uniform(0.01, 1, N)


def matrices(jacobian, _, curvature, shift, c):
    a = -(jacobian.swapaxes(1, 2) @ curvature @ jacobian + shift[:, None, None] * np.eye(D))
    return a, np.linalg.inv(np.eye(D) - c[:, None, None] * a)


@pytest.mark.parametrize("r", [0, 1, 3, 9])
@pytest.mark.parametrize("stiffness", [1e-3, 1.0, 1e4])
def test_powers_are_those_of_the_full_matrix(r, stiffness):
    given = flow(r, r, stiffness)
    linear = Linear(*given, np.full(N, r))
    _, s = matrices(*given)
    weights = np.random.default_rng(1).normal(size=(N, 2, 3))
    found = linear.expand(linear.powers(weights))
    powers = [np.linalg.matrix_power(s, k) @ given[1][:, :, None] for k in (1, 2, 3)]
    expected = np.einsum("nkp,pnd->knd", weights, np.array(powers)[..., 0])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    x = np.random.default_rng(2).normal(size=(N, D))
    expected = (s @ s @ x[:, :, None])[..., 0] - expected[1]
    np.testing.assert_allclose(linear.twice(x, linear.powers(weights)[:, 1]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("room", [1, 2, 5, 13])
@pytest.mark.parametrize("r", [3, 6])
def test_zeros_behind_a_rows_columns_change_no_bit(r, room, dtype):
    jacobian, gradient, curvature, shift, c = flow(r)
    wide, curved = np.zeros((N, r + room, D), dtype), np.zeros((N, r + room, r + room))
    wide[:, :r], curved[:, :r, :r] = jacobian, curvature
    # The first row is wider, and the others share their calls with it.
    wide[0], curved[0] = np.random.default_rng(3).normal(size=wide[0].shape), np.eye(r + room)
    columns = np.array([r + room, r, r, r])
    weights, gradient = np.ones((N, 2, 4)), gradient.astype(dtype)
    after = gradient[::-1].copy()
    mixed = Linear(wide, gradient, curved, shift, c, columns)
    short = mixed.powers(weights)
    together = [*mixed.expand(short), mixed.twice(after, short[:, 0])]
    for row in (1, 2, 3):
        one = slice(row, row + 1)
        own = Linear(wide[one, :r], gradient[one], curved[one, :r, :r], shift[one], c[one], columns[one])
        short = own.powers(weights[one])
        alone = [*own.expand(short), own.twice(after[one], short[:, 0])]
        for x, y in zip(alone, together, strict=True):
            np.testing.assert_array_equal(x[0], y[row])


def test_a_singular_system_fails_alone():
    pull = np.array([np.eye(2), -np.eye(2)])
    found = inverses(pull, np.array([np.eye(2), np.eye(2)]), np.array([2, 2]))
    np.testing.assert_allclose(found[0], np.eye(2) / 2)
    assert np.isnan(found[1]).all()
