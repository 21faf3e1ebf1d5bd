"""Students: distilled models with a time grid of their own, which takes the place of the sampler's options. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from scale_rae.errors import OptionError, counted
from scale_rae.jsonio import Fields
from scale_rae.options import Option, SamplingOptions, options_of

FIELD = "student"  # of a student's config.json
MOST_STEPS = 8


@dataclass(frozen=True)
class Student:
    """How a distilled model is sampled: one evaluation at each of `times` but the last, guidance folded in.

    Each step is Euler's, since the network predicts the mean velocity up to the next time.
    """

    times: tuple[float, ...]  # 1 > … > 0
    guidance: float  # of the teacher
    base: str | None = None  # the model that all weights but the student's own are read from
    base_revision: str | None = None  # its commit on the hub

    @property
    def steps(self) -> int:
        """The number of evaluations."""
        return len(self.times) - 1

    @property
    def windows(self) -> list[tuple[float, float]]:
        """The (from, to) times of each step."""
        return list(itertools.pairwise(self.times))

    def __str__(self) -> str:
        evaluations = counted(self.steps, "evaluation")
        return f"a student of {self.base or 'another model'}: {evaluations} per image, guidance {self.guidance:g} folded in"

    def sampling(self, options: SamplingOptions, given: Collection[str] | None = None) -> SamplingOptions:
        """The options with the student's own steps, guidance and solver.

        `given` are the names of the options that the user chose; None where this is not known, and those that differ from their
        defaults count as chosen.

        Raises:
            OptionError: for an option that was chosen and is not the student's.
        """
        for option, why in self.refused(options, given):
            raise OptionError(f"{option.label} {why}")
        return self._own(options)

    def refused(self, options: SamplingOptions, given: Collection[str] | None = None) -> Iterator[tuple[Option, str]]:
        """The options that `sampling` does not take, each with its value and why."""
        own = self._own(options)
        for option in options_of(SamplingOptions):
            name = option.path[0]
            value, fixed = getattr(options, name), getattr(own, name)
            is_chosen = value != option.default if given is None else option.name in given
            if is_chosen and value != fixed:
                other = f", or draw with its base model, {self.base}" if self.base else ""
                why = f"this model is a student and takes only {_shown(fixed)}; leave it out{other}"
                yield option, f"{_shown(value)}: {why}"

    def _own(self, options: SamplingOptions) -> SamplingOptions:
        # With one step, ab2 is Euler's method; the published schedule of "euler" needs two.
        solver = "euler" if self.steps > 1 else "ab2"
        return replace(options, guidance=self.guidance, interval=None, steps=self.steps, solver=solver)

    def record(self) -> dict[str, Any]:
        """The field of config.json."""
        found: dict[str, Any] = {"times": list(self.times), "guidance": self.guidance}
        if self.base is not None:
            found["base"] = self.base
        if self.base_revision is not None:
            found["base_revision"] = self.base_revision
        return found


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def own_options(
    student: Student | None, options: SamplingOptions, given: Collection[str] | None = None
) -> SamplingOptions:
    """The options as a model takes them: unchanged, or a student's own (`Student.sampling`).

    Raises:
        OptionError: for an option that the student does not take.
    """
    return options if student is None else student.sampling(options, given)


def parse_student(fields: Fields) -> Student | None:
    """The student that a config.json describes; None without the field.

    Raises:
        ConfigError: naming file and field, for values that no student has.
    """
    raw = fields.get(FIELD, dict, None)
    if raw is None:
        return None
    own = Fields(raw, f"{fields.where}: {FIELD}", fields.error)
    times = own.get("times", list)
    numbers = all(isinstance(t, int | float) and not isinstance(t, bool) for t in times)
    if not numbers or not 2 <= len(times) <= MOST_STEPS + 1 or times[0] != 1 or times[-1] != 0:
        raise own.fail("times", f"is {str(times)[:80]}; must be 2 to {MOST_STEPS + 1} times from 1 down to 0")
    if not all(then < now for now, then in itertools.pairwise(times)):  # no comparison holds for NaN
        raise own.fail("times", f"is {str(times)[:80]}; must fall")
    guidance = own.number("guidance")
    if guidance < 0:
        raise own.fail("guidance", f"is {guidance}; must be at least 0")
    base, revision = own.get("base", str, None), own.get("base_revision", str, None)
    return Student(tuple(float(t) for t in times), float(guidance), base, revision)
