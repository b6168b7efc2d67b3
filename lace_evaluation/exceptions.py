"""Where a baseline is ahead of ours, and why: each in a sentence with the numbers that it rests on.

What was measured decides which of three reasons is given:

    chance       the 95 % interval of the difference, paired by rows, contains zero
    our solver   the converged flow is better than ours by at least half of the difference
    the flow     it is not: even without a solver's error the flow leads elsewhere than the baseline

A difference without its interval, or beyond chance and without the converged flow beside it, has no reason.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lace_evaluation import OURS
from lace_evaluation.conditional import CONVERGED, RENDERS, is_farther
from lace_evaluation.methods import METHODS

BASELINES = tuple(name for name in METHODS if name != OURS)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """``why`` is empty where the data do not say; ``certain``: the difference is more than chance."""

    where: str
    why: str
    certain: bool

    def __str__(self) -> str:
        return f"{self.where}. {f'Why: {self.why}' if self.why else 'Why is not known'}"


def shortfalls(size: str, methods: Mapping[str, dict], renders: Mapping[str, float]) -> Iterator[Shortfall]:
    """What ours does not have of ACC, and of nearness to the renders, in comparison with every baseline.

    Any lead counts, be it chance; a Fréchet distance that is at most EQUAL times smaller does not.
    methods   the facts of one table of training targets;  renders: the facts of that name
    """
    ours = methods[OURS]
    for name in BASELINES:
        if methods[name]["ahead"]["mean"] < 0:
            yield in_accuracy(size, name, methods)
        if is_farther(ours, methods[name]):
            yield in_distance(size, name, methods, renders)


def in_accuracy(size: str, name: str, methods: Mapping[str, dict]) -> Shortfall:
    ours, other, exact = methods[OURS], methods[name], methods.get(CONVERGED)
    gap, low, high = (-other["ahead"][key] for key in ("mean", "high", "low"))
    where = (f"{size}: {name} has the higher ACC, {other['acc']:.4f} for ours {ours['acc']:.4f}, with "
             f"{other['evaluations']:.0f} evaluations for ours {ours['evaluations']:.0f} and energy "
             f"{other['energy']:.3g} for ours {ours['energy']:.3g}")
    why = reason(gap, low, high, name, methods, exact["acc"] - ours["acc"] if exact else None)
    context = "".join([f"; real renders have {methods[RENDERS]['acc']:.4f}" if RENDERS in methods else "",
                       f"; the converged flow has {exact['acc']:.4f}" if exact else ""])
    return Shortfall(where, why + context if why else "", low > 0)


def in_distance(size: str, name: str, methods: Mapping[str, dict], renders: Mapping[str, float]) -> Shortfall:
    ours, other, exact = methods[OURS], methods[name], methods.get(CONVERGED)
    where = (f"{size}: {name} is nearer to the renders, {other['fid']:.3f} for ours {ours['fid']:.3f}, at ACC "
             f"{other['acc']:.4f} for ours {ours['acc']:.4f}")
    gap, low, high = (other["farther"][key] for key in ("mean", "low", "high"))
    why = reason(gap, low, high, name, methods, ours["fid"] - exact["fid"] if exact else None)
    context = (f"; {ours['widest'] - other['widest']:.3f} of the difference lies in the widest direction, in which "
               f"{other['far']:.1%} of its pictures, {ours['far']:.1%} of ours and {renders['far']:.1%} of the renders "
               "are far out") + (f"; the converged flow has {exact['fid']:.3f}" if exact else "")
    return Shortfall(where, why + context if why else "", low > 0)


def reason(gap: float, low: float, high: float, name: str, methods: Mapping[str, dict], mended: float | None) -> str:
    """gap: how far ours is behind, with its interval;  mended: how much of it the converged flow makes good."""
    interval = f"{gap:.4f}, 95 % {low:.4f} to {high:.4f}"
    if low <= 0:
        return f"it may be chance (the difference is {interval})"
    if mended is None:
        return ""
    ours, other, exact = methods[OURS], methods[name], methods[CONVERGED]
    if mended >= gap / 2:
        return (f"our solver's own error makes {mended:.4f} of the difference ({interval}); without it the flow takes "
                f"{exact['evaluations']:.0f} evaluations for our {ours['evaluations']:.0f}")
    return (f"the flow itself leads elsewhere, and a solver without error would make good {mended:.4f} of the "
            f"difference ({interval}); the pictures of {name} moved {other['moved']:.2f} spreads in w, those of the "
            f"converged flow {exact['moved']:.2f}")
