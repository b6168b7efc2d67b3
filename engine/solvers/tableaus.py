"""Explicit Runge-Kutta methods as data, validated when they are made.

Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", II.2 (order conditions), II.4, II.5.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement

import numpy as np

Tree = tuple["Tree", ...]


@dataclass(frozen=True, slots=True)
class Tableau:
    """A method: ``a`` row by row below the diagonal, weights ``b``, and ``error`` = b minus embedded weights.

    error      None for a method without step control
    order      of the weights b; checked against all order conditions up to 5
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...] | None
    reference: str

    def __post_init__(self):
        stages = len(self.b)
        if [len(row) for row in self.a] != list(range(1, stages)):
            raise ValueError(f"{self.name}: {stages} weights need rows of 1 to {stages - 1} coefficients")
        if self.error is not None and (len(self.error) != stages or abs(sum(self.error)) > 1e-12):
            raise ValueError(f"{self.name}: the error weights must be {stages} and sum to zero")
        matrix, b = self.matrix, np.array(self.b, float)
        for tree in (tree for n in range(1, min(self.order, 5) + 1) for tree in trees(n)):
            if abs(b @ stage_weight(matrix, tree) - 1 / density(tree)) > 1e-12:
                raise ValueError(f"{self.name} does not have order {self.order}: it fails at the tree {tree}")

    @property
    def matrix(self) -> np.ndarray:
        """a as a strictly lower triangular matrix (stages, stages)."""
        matrix = np.zeros((len(self.b), len(self.b)))
        for i, row in enumerate(self.a):
            matrix[i + 1, : len(row)] = [float(x) for x in row]
        return matrix

    @property
    def c(self) -> np.ndarray:
        """Where each stage lies within the step."""
        return self.matrix.sum(axis=1)

    @property
    def is_fsal(self) -> bool:
        """First same as last: the last stage is evaluated at the step's end."""
        return self.b[-1] == 0 and bool(np.array_equal(self.matrix[-1], np.array(self.b, float)))


def trees(nodes: int) -> Iterator[Tree]:
    """All rooted trees with ``nodes`` nodes; a tree is the tuple of its subtrees."""
    yield from forests(nodes - 1, nodes - 1)


def forests(nodes: int, largest: int) -> Iterator[Tree]:
    if nodes == 0:
        yield ()
        return
    for size in range(min(nodes, largest), 0, -1):
        for copies in range(nodes // size, 0, -1):
            for group in combinations_with_replacement(tuple(trees(size)), copies):
                for rest in forests(nodes - size * copies, size - 1):
                    yield group + rest


def order_of(tree: Tree) -> int:
    return 1 + sum(order_of(child) for child in tree)


def density(tree: Tree) -> int:
    """The number of nodes times the densities of the subtrees."""
    product = order_of(tree)
    for child in tree:
        product *= density(child)
    return product


def stage_weight(matrix: np.ndarray, tree: Tree) -> np.ndarray:
    """Product over the subtrees of A times their own stage weight."""
    product = np.ones(len(matrix))
    for child in tree:
        product = product * (matrix @ stage_weight(matrix, child))
    return product


def _rationals(*texts: str) -> tuple[float, ...]:
    return tuple(float(Fraction(text)) for text in texts)


EULER = Tableau("euler", 1, (), (1.0,), None, "Euler 1768")

MIDPOINT = Tableau("midpoint", 2, ((0.5,),), (0.0, 1.0), None, "Runge 1895")

HEUN = Tableau("heun", 2, ((1.0,),), (0.5, 0.5), None, "Heun 1900")

RK4 = Tableau(
    "rk4", 4, ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), _rationals("1/6", "1/3", "1/3", "1/6"), None, "Kutta 1901"
)

HEUN_EULER = Tableau(
    "heun-euler", 2, ((1.0,),), (0.5, 0.5), (-0.5, 0.5), "Heun's method with Euler's as the embedded one"
)

BOSH3 = Tableau(
    "bosh3", 3,
    (_rationals("1/2"), _rationals("0", "3/4"), _rationals("2/9", "1/3", "4/9")),
    _rationals("2/9", "1/3", "4/9", "0"),
    _rationals("-5/72", "1/12", "1/9", "-1/8"),
    "Bogacki and Shampine 1989, Appl. Math. Lett. 2(4)",
)

_DOPRI5_B = _rationals("35/384", "0", "500/1113", "125/192", "-2187/6784", "11/84", "0")
# Shampine's embedded weights, which torchdiffeq uses; the classical ones start with 5179/57600.
_DOPRI5_EMBEDDED = _rationals("1951/21600", "0", "22642/50085", "451/720", "-12231/42400", "649/6300", "1/60")

DOPRI5 = Tableau(
    "dopri5", 5,
    (
        _rationals("1/5"),
        _rationals("3/40", "9/40"),
        _rationals("44/45", "-56/15", "32/9"),
        _rationals("19372/6561", "-25360/2187", "64448/6561", "-212/729"),
        _rationals("9017/3168", "-355/33", "46732/5247", "49/176", "-5103/18656"),
        _DOPRI5_B[:-1],
    ),
    _DOPRI5_B,
    tuple(b - e for b, e in zip(_DOPRI5_B, _DOPRI5_EMBEDDED, strict=True)),
    "Dormand and Prince 1980, J. Comput. Appl. Math. 6(1); Shampine 1986, Math. Comp. 46",
)

_TSIT5_B = (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774)

TSIT5 = Tableau(
    "tsit5", 5,
    (
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5_B,
    ),
    (*_TSIT5_B, 0.0),
    (-0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629,
     0.5823571654525552, -0.45808210592918697, 1 / 66),
    "Tsitouras 2011, Comput. Math. Appl. 62(2)",
)

TABLEAUS = {t.name: t for t in (EULER, MIDPOINT, HEUN, RK4, HEUN_EULER, BOSH3, DOPRI5, TSIT5)}
