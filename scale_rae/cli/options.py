"""Options that several commands share, and the values they are gathered in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from scale_rae.options import COMPILE, DTYPES, PUBLISHED_DECODERS, QUANTIZE, SOLVERS
from scale_rae.options import DEFAULT_MODEL as DEFAULT_MODEL
from scale_rae.options import DEFAULT_STEPS as DEFAULT_STEPS
from scale_rae.options import POST_QA_MODES as POST_QA_MODES
from scale_rae.options import REWARDS as REWARDS
from scale_rae.options import ModelChoice as ModelChoice
from scale_rae.options import Sampling as Sampling

MODEL, SAMPLING, QUESTIONS, OUTPUT = "Model", "Sampling", "Questions about what was drawn", "Output"


def one_of(*values: str) -> Callable[[str | None], str | None]:
    """A check that an option is one of `values`."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in values:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(values)}")
        return value

    return check


ModelPath = Annotated[
    str,
    typer.Option("--model-path", help='Hub id, folder, or "shapes" (the bundled model).', rich_help_panel=MODEL),
]
DecoderRepo = Annotated[
    str | None,
    typer.Option(
        "--decoder-repo",
        help="Pixel decoder: hub id or folder. Default: the one that matches the model, which is a folder `decoder` "
        f"inside or beside it, else {PUBLISHED_DECODERS['siglip']} (SigLIP-2) or {PUBLISHED_DECODERS['dinov2']} (WebSSL).",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a model on the hub.", rich_help_panel=MODEL)
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:N or mps. Default: the best there is.", rich_help_panel=MODEL),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        callback=one_of(*DTYPES),
        help="float32, bfloat16 or float16. Default: float32 on the CPU, bfloat16 elsewhere.",
        rich_help_panel=MODEL,
    ),
]
Compile = Annotated[
    str,
    typer.Option(
        callback=one_of(*COMPILE),
        help="Compile the networks: takes seconds, then draws faster. auto: on CUDA, when many images are to be drawn.",
        rich_help_panel=MODEL,
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        callback=one_of(*QUANTIZE),
        help="fp8: draw with float8 matrix products; faster, a little less exact. Needs a GPU that has them (Ada, Hopper, "
        "Blackwell).",
        rich_help_panel=MODEL,
    ),
]
NumImages = Annotated[int, typer.Option(help="Images of each prompt.", rich_help_panel=SAMPLING)]
Seed = Annotated[int, typer.Option(help="The same seed draws the same image.", rich_help_panel=SAMPLING)]
GuidanceLevel = Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.", rich_help_panel=SAMPLING)]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LO HI", help="Guide only where t is in [LO, HI]; noise is t = 1.", rich_help_panel=SAMPLING),
]
Steps = Annotated[int, typer.Option(help="Steps of the solver.", rich_help_panel=SAMPLING)]
Solver = Annotated[
    str,
    typer.Option(
        callback=one_of(*SOLVERS),
        help="euler (the published schedule), heun, dpmpp_2m or ab2.",
        rich_help_panel=SAMPLING,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Images drawn at once. Default: 8 on the CPU, 32 elsewhere.", rich_help_panel=SAMPLING),
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest reply, in tokens.", rich_help_panel=SAMPLING)]
OutputDir = Annotated[Path, typer.Option(help="Folder for results; made if missing.", rich_help_panel=OUTPUT)]
SaveLatent = Annotated[
    bool, typer.Option("--save-latent", help="Also save the latent of each drawn image.", rich_help_panel=OUTPUT)
]
SkipDecoder = Annotated[
    bool, typer.Option("--skip-decoder", help="Make no pixels; save the latent.", rich_help_panel=OUTPUT)
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the manifest, one line of JSON, and nothing else.", rich_help_panel=OUTPUT),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.", rich_help_panel=OUTPUT)
]


@dataclass(frozen=True)
class Output:
    """What is left behind and printed."""

    folder: Path
    save_latent: bool = False
    skip_decoder: bool = False
    json: bool = False
    debug: bool = False


@dataclass(frozen=True)
class PostQA:
    """What to ask the model about its own drawings: `prompt` as it is, or put into `template`."""

    prompt: str | None
    template: str | None
    mode: str  # latent or image
    max_new_tokens: int

    def question(self, prompt: str) -> str:
        """The question about a drawing of `prompt`."""
        from scale_rae.prompt import ask_question, put_prompt

        if self.template is not None:
            return ask_question(self.template, self.prompt or prompt)
        assert self.prompt is not None
        return put_prompt(self.prompt, prompt)
