"""What a label says: the attributes of pictures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attribute:
    """One labelled property of a picture.

    kind      'class': the label is an index into `classes`;  'value': the label lies in [0, 1]
    classes   names of the classes, empty for a value
    """

    name: str
    kind: str
    classes: tuple[str, ...] = ()
