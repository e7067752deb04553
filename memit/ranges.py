"""Which values settings may have, declared in the types of their fields."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from memit.errors import InputError


@dataclass(frozen=True)
class Range:
    """The numbers from `lowest` to `highest`: `steps: Annotated[int, Range(1, 100)]`."""

    lowest: float
    highest: float
    exclusive: bool = False
    """Whether `lowest` itself is left out."""

    def __contains__(self, value: float) -> bool:
        above = self.lowest < value if self.exclusive else self.lowest <= value
        return above and value <= self.highest

    def __str__(self) -> str:
        if self.exclusive:
            return f"above {self.lowest:,} and at most {self.highest:,}"
        return f"between {self.lowest:,} and {self.highest:,}"


Seed = Annotated[int, Range(0, 2**32 - 1)]
Steps = Annotated[int, Range(1, 100_000_000)]
LearningRate = Annotated[float, Range(0, 1, exclusive=True)]


def check_settings(settings: Any) -> None:
    """Check the fields of a dataclass against their types: ranges of numbers, literal choices.

    Raises:
        InputError: the first field that does not fit; the message begins with its name.
    """
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        is_number = isinstance(value, (int, float))
        if get_origin(kind) is Union:  # a number or one of some words
            kind = get_args(kind)[0 if is_number else 1]
        if get_origin(kind) is Literal and value not in get_args(kind):
            choices = ", ".join(map(repr, get_args(kind)))
            raise InputError(f"{name} is {value!r}, but must be one of {choices}.")
        allowed = kind.__metadata__[0] if get_origin(kind) is Annotated else None
        if isinstance(allowed, Range) and is_number and value not in allowed:
            raise InputError(f"{name} is {value!r}, but must be {allowed}.")
