# SPDX-License-Identifier: BSD-3-Clause
"""Everything wrong with a dataset, gathered into one error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LISTED_PROBLEMS = 20
"""How many problems an error text spells out; the total is always given."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a dataset.

    Attributes:
        where: what to open to mend it: ``train.txt:12`` (file and line, counted from 1) or a path.
        kind: one of a few fixed phrases, counted in the error's first line: "malformed line", "missing image", ...
        detail: what came and what was expected.
    """

    where: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}: {self.detail}"


class DataError(ValueError):
    """A dataset that can't be used as it is.

    Attributes:
        problems: all of them; the text lists the first `LISTED_PROBLEMS`.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.problems)

    @classmethod
    def from_problems(cls, name: str, problems: Sequence[Problem], hint: str = "") -> DataError:
        """An error whose text counts the problems by kind and lists the first of them, one a line."""
        lines = [f"{name}: {summary(problems)}", *listing(problems)] if problems else [name]
        if hint:
            lines.append(hint)
        return cls("\n".join(lines), problems)


def summary(problems: Sequence[Problem]) -> str:
    """For example ``3 problems (2 malformed line, 1 missing image)``."""
    counts = Counter(problem.kind for problem in problems)
    noun = "problem" if len(problems) == 1 else "problems"
    return f"{len(problems)} {noun} ({', '.join(f'{count} {kind}' for kind, count in counts.items())})"


def listing(problems: Sequence[Problem], limit: int = LISTED_PROBLEMS) -> Iterable[str]:
    """The first `limit` problems, one indented line each, and how many are left out."""
    yield from (f"  {problem}" for problem in problems[:limit])
    if len(problems) > limit:
        yield f"  ... and {len(problems) - limit} more"
