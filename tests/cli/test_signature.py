"""Options dataclasses as flags: an option of the sampler is one field, and flag, record and check follow from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from scale_rae.cli.signature import expanded
from scale_rae.errors import OptionError
from scale_rae.options import Knob, Sampling, SamplingOptions, from_record, options_of, to_record


@dataclass(frozen=True, kw_only=True)
class MoreOptions(SamplingOptions):
    """The sampler's options and a new one."""

    churn: Annotated[float, Knob("Noise added again at each step.", "Sampling", name="churn_level", least=0)] = 0.5


@dataclass(frozen=True)
class MoreSampling(Sampling):
    options: MoreOptions = field(default_factory=MoreOptions)


FEWER = MoreSampling(num_images=3, options=MoreOptions(churn=0.25))


def run(function: Any, *argv: str) -> Any:
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return CliRunner().invoke(app, list(argv), env={"COLUMNS": "200"})


def test_a_new_option_is_one_field() -> None:
    seen: list[MoreSampling] = []

    @expanded
    def command(*, sampling: MoreSampling, text: Annotated[str, typer.Option(help="A text.")] = "x") -> None:
        seen.append(sampling)

    text = run(command, "--help").output
    assert "--churn-level" in text
    assert "Noise added again at each step." in text
    assert "[default: 0.5]" in text
    for option in options_of(Sampling):
        assert f"--{option.name.replace('_', '-')} " in text
    assert "--image-seeds" not in text  # a field without a Knob is no option
    assert run(command, "--churn-level", "2", "--steps", "7", "--num-images", "4").exit_code == 0
    assert seen == [MoreSampling(num_images=4, options=MoreOptions(churn=2.0, steps=7))]
    assert run(command, "--solver", "rk4").exit_code == 2

    record = to_record(seen[0])
    assert record["churn_level"] == 2.0
    assert list(to_record(seen[0].options)) == [*to_record(SamplingOptions()), "churn_level"]
    assert from_record(MoreSampling, record) == seen[0]
    del record["churn_level"]  # written before the option existed
    assert from_record(MoreSampling, record).options == MoreOptions(steps=7)
    with pytest.raises(OptionError, match=r"churn level -1: must be at least 0"):
        MoreOptions(churn=-1).check()


def test_defaults_of_a_command_and_of_a_class() -> None:
    seen: list[Any] = []

    @expanded
    def command(*, sampling: MoreSampling = FEWER) -> None:
        seen.append(sampling)

    assert run(command).exit_code == 0
    assert run(command, "--guidance-interval", "0.1", "0.9").exit_code == 0
    interval = dataclasses.replace(FEWER.options, interval=(0.1, 0.9))
    assert seen == [FEWER, dataclasses.replace(FEWER, options=interval)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": "many"}, "steps is 'many'"),
        ({"steps": True}, "steps is True"),
        ({"steps": None}, "steps is missing"),
        ({"guidance_interval": [0.5]}, r"guidance_interval is \[0.5\]"),
        ({"guidance_interval": [0, "1"]}, "guidance_interval is '1'"),
        ({"solver": 3}, "solver is 3"),
    ],
)
def test_records_of_other_types(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        from_record(SamplingOptions, to_record(SamplingOptions()) | change)


def test_whole_numbers_and_lists_of_json() -> None:
    options = from_record(SamplingOptions, {"guidance_level": 2, "guidance_interval": [0, 1]})
    assert options == SamplingOptions(guidance=2.0, interval=(0.0, 1.0))
    assert isinstance(options.guidance, float)
    assert to_record(options)["guidance_interval"] == [0.0, 1.0]


@dataclass(frozen=True)
class Buffer:
    size: Annotated[int, Knob("KiB.", name="max_size", least=2048, unit=1024, show_range=True)] = 4096


def test_units_and_ranges() -> None:
    seen: list[Any] = []

    @expanded
    def command(*, buffer: Buffer) -> None:
        seen.append(buffer)

    text = run(command, "--help").output
    assert "[x>=2]" in text
    assert "[default: 4]" in text
    assert run(command).exit_code == run(command, "--max-size", "3").exit_code == 0
    assert seen == [Buffer(), Buffer(3 * 1024)]
    assert run(command, "--max-size", "1").exit_code == 2
