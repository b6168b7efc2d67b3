"""Two clocks for one flow.

LACE integrates ``dz/dt = -1/2 beta(t) grad log p`` from t = 1 to 1e-3. With ``tau = 1/2 * integral of beta``
that is the autonomous gradient flow ``dz/dtau = grad log p`` of length 5.0249: beta only re-times it.

Nie, Vahdat, Anandkumar, NeurIPS 2021; Song et al., ICLR 2021 (the VP schedule).
"""

import numpy as np
from numpy import ndarray as Array

BETA = (0.1, 20.0)
T_START, T_END = 1.0, 1e-3


def beta(t: Array | float) -> Array | float:
    return BETA[0] + (BETA[1] - BETA[0]) * t


def elapsed(t: float) -> float:
    """tau at t: half the integral of beta from t to 1."""
    return 0.5 * (BETA[0] * (1 - t) + 0.5 * (BETA[1] - BETA[0]) * (1 - t**2))


# name: (length of the clock, rate of the flow at clock time s)
CLOCKS = {
    "flow": (elapsed(T_END), lambda s: np.ones_like(s)),
    "paper": (T_START - T_END, lambda s: 0.5 * beta(T_START - s)),
}
