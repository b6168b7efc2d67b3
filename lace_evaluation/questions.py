"""What lace-eval asks of a bundle, and whether a judge can tell."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from engine.bundle import Attribute
from engine.classifier import ImageClassifier
from engine.condition import And, Condition, Is, Keep, Near, Weighted
from engine.errors import LaceError
from engine.grammar import parse
from engine.sampler import Sampler
from lace_evaluation.world import is_rendered, judged, singles

# Asked of a bundle of the demonstration world. Combinations that its faces hardly ever show (bald or bearded women,
# a hair colour under a hat or on a bald head) are left out: they would measure the generator, not the sampler.
SINGLE_CLASSES = (
    "smile", "~smile", "glasses", "~glasses", "beard", "bald", "hat", "gender=female", "gender=male",
    "haircolor=black", "haircolor=brown", "haircolor=blond", "haircolor=red", "haircolor=grey",
)
SINGLE_VALUES = tuple(f"{n}={y}" for n in ("yaw", "pitch", "age", "light", "width") for y in (0.25, 0.5, 0.75))
PAIRS = (
    "smile & ~glasses", "smile & gender=female", "gender=male & beard", "glasses & age=0.7",
    "~smile & haircolor=red", "hat & yaw=0.7", "age=0.3 & light=0.7",
)
TRIPLES = (
    "smile & ~glasses & haircolor=blond", "gender=male & beard & age=0.6", "hat & smile & yaw=0.7",
    "glasses & haircolor=grey & age=0.75", "gender=male & bald & age=0.65", "gender=female & yaw=0.3 & light=0.3",
    "~smile & haircolor=black & pitch=0.6",
)
TOLERANCE = 0.1  # within which a single picture meets a value
SHOWN = 8  # pictures of a condition that are kept for the contact sheets
CONDITIONS = (*SINGLE_CLASSES, *SINGLE_VALUES, *PAIRS, *TRIPLES)


class Known(Protocol):
    """What is asked of an attribute, a bundle's or a judge's."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...


class Judge(Protocol):
    """A classifier of lace-train, or anybody's: uint8 pictures (n, R, R, 3) -> labels (n, attributes)."""

    attributes: tuple

    def predict(self, pictures): ...


def statements(condition: Condition) -> list[Condition]:
    """The terms that must all hold. An alternative, or a negated group, is one statement."""
    match condition:
        case And(parts):
            return list(dict.fromkeys(leaf for part in parts for leaf in statements(part)))
        case Weighted(_, part):
            return statements(part)
        case Near() | Keep():
            return []
    return [condition]


def asked(condition: Condition) -> tuple[str, ...]:
    """Names of the attributes about which the condition states something: near and keep state nothing."""
    return tuple(dict.fromkeys(name for leaf in statements(condition) for name in leaf.attributes()))


def default_conditions(attributes: Mapping[str, Known]) -> list[Condition]:
    """The conditions of CONDITIONS that these attributes can serve, values inside their range."""

    def served(leaf: Condition) -> bool:
        attribute = attributes.get(leaf.attributes()[0])
        if attribute is None or not isinstance(leaf, Is) or attribute.kind == "class":
            return attribute is not None
        low, high = getattr(attribute, "range", (0.0, 1.0))
        return low <= leaf.choice <= high

    return [c for c in map(parse, CONDITIONS) if all(map(served, statements(c)))]


def check_judge(judge: Judge, attributes: Mapping[str, Known], names: Iterable[str]) -> None:
    """Refuse attributes that the judge cannot see, or that mean something else to it."""
    known = {a.name: a for a in judge.attributes}
    for name in names:
        ours, theirs = attributes[name], known.get(name)
        low, high = getattr(ours, "range", (0.0, 1.0))
        same = theirs is not None and (ours.kind, tuple(ours.classes)) == (theirs.kind, tuple(theirs.classes))
        if not same or (ours.kind == "value" and not (low >= 0 and high <= 1)):
            raise LaceError(
                f"the judge cannot tell {describe(ours)}; it knows: {'; '.join(map(describe, known.values()))}. Give "
                "--judge a classifier of the bundle's attributes, or --condition only what this judge knows"
            )


def describe(attribute: Known) -> str:
    if attribute.kind == "class":
        return f"{attribute.name} ({', '.join(attribute.classes)})"
    low, high = getattr(attribute, "range", (0.0, 1.0))
    return f"{attribute.name} ({low:g} to {high:g})"


def served_by(judge: Judge, attributes: Mapping[str, Attribute]) -> list[Condition]:
    """What to ask without being told: the default conditions, or every single statement of a bundle that is not of the
    demonstration world, about what the judge can tell."""
    shared = judged(attributes, judge)
    return default_conditions(shared) if is_rendered(attributes) else list(map(parse, singles(shared)))


def conditions_for(sampler: Sampler, judge: Judge, wanted: Sequence[str]) -> list[Condition]:
    """What to ask: ``wanted``, or else the defaults; refused where the bundle or the judge cannot serve it."""
    attributes = sampler.bundle.attributes
    if wanted:
        conditions = list(map(parse, wanted))
        for condition in conditions:
            sampler.starts.lower(condition)
            if not asked(condition):
                raise LaceError(f"the condition {condition} states nothing that a picture could show")
        check_judge(judge, attributes, [name for condition in conditions for name in asked(condition)])
        return conditions
    if isinstance(judge, ImageClassifier):
        return served_by(judge, attributes)
    check_judge(judge, attributes, attributes)
    if not (conditions := default_conditions(attributes)):
        raise LaceError("the bundle has no attribute that the default conditions ask for: give some with --condition")
    return conditions
