"""Option groups of the command line only: output folder and files, and questions about drawn images (--post-qa-…)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from scale_rae.options import DEFAULT_ANSWER_TOKENS, OUTPUT, POST_QA_MODES, QUESTIONS, Knob, check_options

Debug = Annotated[bool, Knob("Show tracebacks and the libraries' own messages.", OUTPUT)]


@dataclass(frozen=True)
class OutputOptions:
    """The files that a run writes, and what it prints."""

    folder: Annotated[Path, Knob("Folder for results; made if missing.", OUTPUT, name="output_dir")] = Path("outputs")
    save_latent: Annotated[bool, Knob("Also save the latent of each drawn image.", OUTPUT)] = False
    skip_decoder: Annotated[bool, Knob("Make no pixels; save the latent.", OUTPUT)] = False
    json: Annotated[bool, Knob("Print the manifest, one line of JSON, and nothing else.", OUTPUT)] = False
    debug: Debug = False


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

    def check(self) -> None:
        """Raises OptionError, naming the option, for values that no question can use."""
        check_options(self)
