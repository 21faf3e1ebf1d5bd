"""Options of the command line only: devices, output files, questions about drawn images, and searches (--until-accepted)."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from scale_rae.errors import OptionError, need
from scale_rae.options import (
    AUTO_REWARD,
    DEFAULT_ANSWER_TOKENS,
    OUTPUT,
    POST_QA_MODES,
    QUESTIONS,
    REWARDS,
    SEARCH,
    Knob,
    SearchOptions,
    check_device_name,
    check_options,
)
from scale_rae.outputs import FIELDS, FORMATS, FileNames, check_folder, check_free

if TYPE_CHECKING:
    from PIL import Image

_TEMPLATE_HELP = (
    'Names of files in the output folder, as in "{index:05}-{prompt}-{seed}" or "{time}.webp". '
    f"Fields: {', '.join(FIELDS)}."
)
LANCZOS = 1  # Pillow's Resampling.LANCZOS, without importing Pillow

Debug = Annotated[bool, Knob("Show tracebacks and the libraries' own messages.", OUTPUT)]


def device_names(device: str | None, devices: str | None) -> list[str | None] | None:
    """The devices that two flags name: one, several, or None for the default.

    Raises:
        OptionError: for both flags, and for names that no device has.
    """
    if device is not None and devices is not None:
        raise OptionError("--device, --devices: give one of them")
    names: list[str | None] | None = [device] if device is not None else None
    if devices is not None:
        names = [name.strip() for name in devices.split(",")]
        if not all(names):
            raise OptionError(f"--devices {devices!r}: must be device names with commas between, like cuda:0,cuda:1")
    for name in names or ():
        check_device_name(name)
    return names


@dataclass(frozen=True)
class OutputOptions:
    """The files that a run writes, and what it prints."""

    folder: Annotated[Path, Knob("Folder for results; made if missing.", OUTPUT, name="output_dir")] = Path("outputs")
    file: Annotated[
        Path | None,
        Knob(
            "Write the picture to this file: .png, .jpg or .webp. Several get _00, _01, … before the dot.",
            OUTPUT,
            name="output",
            metavar="FILE",
            aliases=("o",),
        ),
    ] = None
    overwrite: Annotated[bool, Knob("Replace the file of --output if it exists.", OUTPUT)] = False
    template: Annotated[
        str | None,
        Knob(_TEMPLATE_HELP, OUTPUT, name="filename_template", metavar="TEXT"),
    ] = None
    upscale: Annotated[
        int,
        Knob(
            "Save pictures N times as wide and high (4 if no number is given).",
            OUTPUT,
            metavar="[N]",
            least=1,
            most=16,
            bare=4,
        ),
    ] = 1
    preview: Annotated[bool, Knob("Show pictures in the terminal (extra: preview).", OUTPUT)] = False
    save_latent: Annotated[bool, Knob("Also save the latent of each drawn image.", OUTPUT)] = False
    skip_decoder: Annotated[bool, Knob("Make no pixels; save the latent.", OUTPUT)] = False
    json: Annotated[bool, Knob("Print the manifest, one line of JSON, and nothing else.", OUTPUT)] = False
    quiet: Annotated[bool, Knob("Show no progress and no notes.", OUTPUT, aliases=("q",))] = False
    debug: Debug = False

    @property
    def place(self) -> Path:
        """The folder that files are written to."""
        return self.folder if self.file is None else self.file.parent

    @property
    def names(self) -> FileNames:
        """How files are named."""
        if self.file is not None:
            literal = self.file.stem.replace("{", "{{").replace("}", "}}")
            return FileNames(literal, self.file.suffix, exact=True, overwrite=self.overwrite)
        if self.template is not None:
            suffix = Path(self.template).suffix
            if suffix.lower() in FORMATS:
                return FileNames(self.template.removesuffix(suffix), suffix)
            return FileNames(self.template)
        return FileNames()

    def enlarged(self, image: Image.Image) -> Image.Image:
        """The picture as it is saved."""
        if self.upscale == 1:
            return image
        return image.resize((image.width * self.upscale, image.height * self.upscale), LANCZOS)

    def check(self, given: Set[str]) -> None:
        """Raises OptionError for flags that cannot be used together; `given` are the names of those on the command line.

        Raises:
            MissingExtraError: for a preview without the package that makes it.
        """
        check_options(self, flags=True)
        if self.file is not None:
            for name in ("output_dir", "filename_template"):
                if name in given:
                    raise OptionError(
                        f"--output {self.file}: names the file already; leave out --{name.replace('_', '-')}"
                    )
        elif self.overwrite:
            raise OptionError("--overwrite: goes with --output")
        if self.skip_decoder:
            for name, is_set in (("output", self.file), ("upscale", self.upscale > 1), ("preview", self.preview)):
                if is_set:
                    raise OptionError(f"--{name}: needs the picture that --skip-decoder leaves out")
        if self.preview:
            if self.json:
                raise OptionError("--preview: not with --json, which prints nothing else")
            need("preview", "--preview", "textual_image")
        self.names.check()

    def check_place(self) -> None:
        """Raises OutputError for a folder that cannot be written to, or a file that exists and is not to be replaced."""
        check_folder(self.place)
        check_free(self.place, self.names)


@dataclass(frozen=True)
class PostQA:
    """The question about drawn images: `prompt` as it is, or put into the template in the file `template_path`."""

    prompt: Annotated[
        str | None,
        Knob(
            "Ask this about each drawing; {prompt} in it becomes the drawing's prompt. With a template: what the "
            "template's {prompt} becomes.",
            QUESTIONS,
            name="post_qa_prompt",
        ),
    ] = None
    template_path: Annotated[
        Path | None,
        Knob(
            "Ask the text of this file, {prompt} in it replaced by the drawing's prompt (or the prompt put at its "
            "end), as in ./assets/qa_prompt_template.txt.",
            QUESTIONS,
            name="post_qa_template_path",
        ),
    ] = None
    mode: Annotated[
        str,
        Knob(
            "latent: show the model its latent; image: show it the decoded image, encoded again.",
            QUESTIONS,
            name="post_qa_mode",
            choices=POST_QA_MODES,
        ),
    ] = "latent"
    max_new_tokens: Annotated[
        int,
        Knob(
            "Longest answer, in tokens.",
            QUESTIONS,
            name="max_new_tokens_qa",
            label="max new tokens of an answer",
            least=1,
        ),
    ] = DEFAULT_ANSWER_TOKENS
    template: str | None = None  # the text of the file at `template_path`

    @property
    def asked(self) -> bool:
        """Whether there is a question."""
        return self.prompt is not None or self.template_path is not None

    def question(self, prompt: str) -> str:
        """The question about a drawing of `prompt`."""
        from scale_rae.prompt import ask_question, put_prompt

        if self.template is not None:
            return ask_question(self.template, self.prompt or prompt)
        assert self.prompt is not None
        return put_prompt(self.prompt, prompt)

    def record(self, answers: list[dict[str, str]]) -> dict[str, Any]:
        """What a manifest says of the questions about one prompt's images."""
        return {"mode": self.mode, "max_new_tokens": self.max_new_tokens, "answers": answers}

    def check(self) -> None:
        """Raises OptionError, naming the option, for values that no question can use."""
        check_options(self)


@dataclass(frozen=True)
class UntilAccepted:
    """A search of each prompt: candidates are drawn until `keep` are accepted. None: images are drawn without a search."""

    keep: Annotated[
        int | None,
        Knob(
            "Draw candidates of each prompt until N of them (1 if no number is given) are accepted, and save those.",
            SEARCH,
            name="until_accepted",
            metavar="[N]",
            show_default=False,
            least=1,
            bare=1,
        ),
    ] = None
    search: SearchOptions = field(default_factory=SearchOptions)
    reward: Annotated[
        str,
        Knob(
            "What scores candidates besides the model: imagereward, siglip, pickscore, or none. auto: siglip for a model that "
            "brings it, as the bundled one does; else imagereward.",
            SEARCH,
            choices=(AUTO_REWARD, *REWARDS, "none"),
        ),
    ] = AUTO_REWARD
    reward_path: Annotated[Path | None, Knob("Folder with the reward's weights, instead of the hub.", SEARCH)] = None

    def check(self) -> None:
        """Raises OptionError, naming the flag, for values that no search can use."""
        check_options(self, flags=True)
        self.search.check()
        if self.keep is not None:
            self.search.check_keep(self.keep, "--until-accepted, which is")
        if self.reward == "none" and self.reward_path is not None:
            raise OptionError(f"--reward-path {self.reward_path}: --reward none has no weights")
        if self.reward == "none" and self.search.accept_reward is not None:
            raise OptionError(f"--accept-reward {self.search.accept_reward:g}: needs a reward, and --reward is none")
