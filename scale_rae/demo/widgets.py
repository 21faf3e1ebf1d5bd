"""Widgets and handlers that several tabs of the demo page use: sampling fields, results, questions."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from scale_rae.demo.fence import gr
from scale_rae.demo.limits import MOST_CHARACTERS, MOST_IMAGES, MOST_STEPS
from scale_rae.demo.results import DrawResult, Preview, SavedImage
from scale_rae.demo.shared_model import SharedModel
from scale_rae.demo.streams import mapped
from scale_rae.demo.words import bar, error_note, note, sentence, whole_number, without_paths
from scale_rae.errors import ScaleRAEError, printable
from scale_rae.noise import new_seed
from scale_rae.options import SOLVERS, Sampling, SamplingOptions
from scale_rae.prompt import DESCRIBE, QUESTION
from scale_rae.student import own_options

REMEMBERED = 24  # images that a visitor can pick from
# What the bundled model was trained to be asked.
QUESTIONS = [
    DESCRIBE,
    "How many objects are there?",
    QUESTION.format(prompt="a red circle"),
]
# Scrolls to an element that begins in the lower part of the window or below it, as on a phone; passes the inputs on.
_BRING_INTO_VIEW = """(...inputs) => {{
    const element = document.getElementById("{}");
    if (element.getBoundingClientRect().top > 0.6 * innerHeight) element.scrollIntoView({{ behavior: "smooth" }});
    return inputs;
}}"""
_DEFAULTS = SamplingOptions()
_log = logging.getLogger("scale_rae.demo")


@contextlib.contextmanager
def _errors_shown() -> Iterator[None]:
    """A block whose errors are shown as sentences on the page; unexpected ones go in full to the terminal only."""
    try:
        yield
    except gr.Error:
        raise
    except ScaleRAEError as e:
        shown = without_paths(str(e))
        if shown != str(e):
            _log.warning("%s", printable(str(e)))
        raise gr.Error(sentence(shown), print_exception=False) from None
    except Exception as e:
        _log.exception("unexpected error on the page")
        raise gr.Error(
            f"Something unexpected went wrong ({type(e).__name__}). The terminal that runs the page says more.",
            print_exception=False,
        ) from None


def shows_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """The handler with its errors shown as sentences."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*args: Any) -> Any:
            with _errors_shown():
                yield from function(*args)

        return generator

    @functools.wraps(function)
    def handler(*args: Any) -> Any:
        with _errors_shown():
            return function(*args)

    return handler


@dataclass(frozen=True)
class SamplingFields:
    """The fields with sampling options; `values` has them in the order of `sampling`'s arguments."""

    images: Any
    guidance: Any
    steps: Any
    solver: Any
    seed: Any

    @property
    def values(self) -> list[Any]:
        """The fields, as inputs of a handler."""
        return [self.images, self.guidance, self.steps, self.solver, self.seed]


def sampling(images: float, guidance: float, steps: float, solver: str, seed: str) -> Sampling:
    """The sampling options in the fields; a new seed if its field is empty.

    Raises:
        InputError: naming a field without a whole number.
    """
    return Sampling(
        num_images=whole_number(images, "The number of images"),
        seed=new_seed() if not str(seed or "").strip() else whole_number(seed, "The seed"),
        options=SamplingOptions(
            guidance=float(guidance) if guidance is not None else _DEFAULTS.guidance,
            steps=whole_number(steps, "The number of steps"),
            solver=solver,
        ),
    )


def sampling_fields(model: SharedModel, images: int, prefix: str) -> SamplingFields:
    """Makes the fields, folded, with `images` as the default number of images; `prefix` begins their ids."""
    with gr.Accordion("How to draw", open=False, elem_id=f"{prefix}-how-to-draw"):
        return _open_sampling_fields(model, images, prefix)


def _open_sampling_fields(model: SharedModel, images: int, prefix: str) -> SamplingFields:
    bundled, student = model.bundled, model.model.config.student
    usual = own_options(student, _DEFAULTS)
    fixed = None if student is None else "fixed: this model is a student"
    about = fixed or ("1 is none" if model.guides else "this checkpoint has none")
    with gr.Row():
        count = gr.Slider(1, MOST_IMAGES, images, step=1, label="Images", min_width=140, elem_id=f"{prefix}-images")
        guidance = gr.Slider(
            *(0, max(10, usual.guidance)),
            2.0 if bundled and model.guides and student is None else usual.guidance,
            step=0.1,
            label="Guidance",
            info=about,
            interactive=model.guides and student is None,
            min_width=140,
            elem_id=f"{prefix}-guidance",
        )
    with gr.Row():
        steps = gr.Slider(
            *(1 if student is not None else 2, MOST_STEPS),
            usual.steps,
            step=1,
            label="Steps",
            info=fixed,
            interactive=student is None,
            min_width=140,
            elem_id=f"{prefix}-steps",
        )
        solver = gr.Dropdown(
            list(SOLVERS),
            value=usual.solver,
            label="Solver",
            info=fixed,
            interactive=student is None,
            min_width=140,
            elem_id=f"{prefix}-solver",
        )
    with gr.Row(equal_height=True, elem_classes="seed-row"):
        seed = gr.Textbox(
            label="Seed",
            placeholder="a new one each time",
            max_lines=1,
            min_width=120,
            scale=3,
            elem_id=f"{prefix}-seed",
            max_length=20,
        )
        again = gr.Button("Fix one", min_width=110, scale=1, elem_id=f"{prefix}-new-seed")
    again.click(lambda: str(new_seed()), outputs=seed, queue=False, api_visibility="private", show_progress="hidden")
    return SamplingFields(count, guidance, steps, solver, seed)


@dataclass(frozen=True)
class ResultPanel:
    """A gallery of drawn images, with seed, command and files of the chosen one."""

    status: Any
    gallery: Any
    shown: Any  # the images in the gallery: list[SavedImage]
    details: Any
    seed: Any
    command: Any
    files: Any

    @property
    def outputs(self) -> list[Any]:
        """The components, as outputs of a handler."""
        return [self.status, self.gallery, self.shown, self.details, self.seed, self.command, self.files]


def result_panel(prefix: str, label: str) -> ResultPanel:
    """Makes the components of a panel; `prefix` begins their ids."""
    status = gr.HTML("", elem_id=f"{prefix}-status", elem_classes="status")
    gallery = gr.Gallery(
        label=label,
        show_label=False,
        columns=4,
        object_fit="contain",
        height="auto",
        interactive=False,
        buttons=["fullscreen"],
        elem_id=f"{prefix}-gallery",
        elem_classes="drawings",
    )
    shown: Any = gr.State([])
    with gr.Column(visible=False, elem_id=f"{prefix}-details") as details:
        seed = gr.Markdown(elem_id=f"{prefix}-seed-shown")
        command = gr.Code(
            language=None,  # its colours are too pale on white
            label="The command line that draws it",
            wrap_lines=True,
            show_line_numbers=False,
            interactive=False,
            lines=1,
            buttons=["copy"],
            elem_id=f"{prefix}-command",
        )
        files = gr.Files(label="Picture, latent and manifest", interactive=False, elem_id=f"{prefix}-files")
    results = ResultPanel(status, gallery, shown, details, seed, command, files)

    def choose(images: list[SavedImage], chosen: gr.SelectData) -> list[Any]:
        if not 0 <= chosen.index < len(images):  # an image that is still forming
            return [gr.skip()] * 4
        return detailed(images, chosen.index)

    gallery.select(
        shows_errors(choose),
        shown,
        [details, seed, command, files],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return results


def detailed(images: Sequence[SavedImage], i: int) -> list[Any]:
    """Updates of a panel's details for image i; hidden where there are none."""
    if not images:
        return [gr.Column(visible=False), "", "", None]
    image = images[i]
    which = f"Image {i + 1} of {len(images)} · s" if len(images) > 1 else "S"
    files = [str(image.png), str(image.latent_file), str(image.manifest)]
    return [gr.Column(visible=True), f"{which}eed **{image.seed}**", image.command, files]


def remembered(drawn: list[SavedImage], new: Sequence[SavedImage]) -> list[SavedImage]:
    """The images that a visitor can pick from, newest first."""
    return [*new, *drawn][:REMEMBERED]


def pictures(images: Sequence[SavedImage]) -> list[tuple[str, str]]:
    """Files and captions for a gallery; the captions are for screen readers."""
    return [(str(image.png), image.request) for image in images]


def draw_updates(steps: Generator[Preview, None, DrawResult], drawn: list[SavedImage]) -> Iterator[list[Any]]:
    """Updates of `ResultPanel.outputs` and of `drawn`, during and after a drawing."""
    yield [bar(0, "Reading the prompt"), [], [], *detailed([], 0), gr.skip()]

    def now(preview: Preview) -> list[Any]:
        return [bar(preview.done, preview.text), preview.pictures, [], *[gr.skip()] * 5]

    result = yield from mapped(steps, now)
    status = f"“{result.text.strip()}”" if result.text.strip() else "The model said nothing."
    if result.images:
        status += f" {len(result.images)} drawn in {result.seconds:.1f} s."
    yield [
        note(status),
        pictures(result.images),
        result.images,
        *detailed(result.images, 0),
        remembered(drawn, result.images) if result.images else gr.skip(),
    ]


def model_event(
    trigger: Any,
    function: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    status: Any,
    after_error: tuple[Callable[..., Any], list[Any]] | None = None,
) -> Any:
    """Adds a handler that uses the model; errors appear in a corner of the page for some seconds.

    After an error, `after_error` (function, outputs) sets the outputs; by default the status is emptied.
    """
    event = _one_at_a_time(trigger, shows_errors(function), inputs, outputs, status)
    set_after_error(event, *(after_error or (lambda: "", [status])))
    return event


def _one_at_a_time(
    trigger: Any, handler: Callable[..., Any], inputs: list[Any], outputs: list[Any], status: Any, js: str | None = None
) -> Any:
    """Adds a handler of which one runs at a time over all visitors and tabs; the rest wait in a queue."""
    return trigger(
        handler,
        inputs,
        outputs,
        js=js,
        concurrency_limit=1,
        concurrency_id="model",
        show_progress="minimal",
        show_progress_on=status,
        api_visibility="private",
    )


def set_after_error(event: Any, function: Callable[..., Any], outputs: list[Any]) -> None:
    """Adds a handler that sets outputs after an error, on which gradio would otherwise leave the word "Error"."""
    event.failure(function, outputs=outputs, queue=False, show_progress="hidden", api_visibility="private")


@dataclass(frozen=True)
class RunButtons:
    """The buttons that start and stop the work of a tab."""

    go: Any
    stop: Any


def run_buttons(prefix: str, label: str, width: int = 120) -> RunButtons:
    """Makes the buttons in a row; `prefix` begins their ids, `width` is the first one's least width in pixels."""
    with gr.Row():
        go = gr.Button(label, variant="primary", min_width=width, elem_id=f"{prefix}-go")
        stop = gr.Button("Stop", min_width=90, elem_id=f"{prefix}-stop")
    return RunButtons(go, stop)


def runs(
    buttons: RunButtons,
    prompt: Any,
    function: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    status: Any,
) -> None:
    """Adds a handler that uses the model: a click or Enter in `prompt` starts it, a click on Stop ends it.

    `status`, the first output, is brought into view. It also shows errors, which stay until the next start.
    """

    def handler(*args: Any) -> Iterator[list[Any]]:
        try:
            yield from shows_errors(function)(*args)
        except gr.Error as e:
            yield [error_note(e.message), *[gr.skip()] * (len(outputs) - 1)]

    js = _BRING_INTO_VIEW.format(status.elem_id)
    triggers = (buttons.go.click, prompt.submit)
    events = [_one_at_a_time(trigger, handler, inputs, outputs, status, js) for trigger in triggers]
    for event in events:
        set_after_error(event, gr.skip, [status])  # gradio calls it an error if Stop ends what still waits
    buttons.stop.click(
        lambda: note("Stopped."),
        outputs=status,
        cancels=events,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )


@contextlib.contextmanager
def removed_if_refused(file: str, model: SharedModel) -> Iterator[None]:
    """A block that removes an upload if it raises an error; the page's own copy of a drawn image stays."""
    try:
        yield
    except ScaleRAEError:
        if model.shown is None or not Path(file).is_relative_to(model.shown):
            Path(file).unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class ChatPanel:
    """Questions with answers, and the field for the next question."""

    chat: Any
    question: Any
    go: Any
    status: Any


def chat_panel(prefix: str, placeholder: str) -> ChatPanel:
    """Makes the components of a panel; `prefix` begins their ids."""
    chat = gr.Chatbot(
        label="Questions and answers",
        show_label=False,
        height=260,
        render_markdown=False,  # text is text
        placeholder=placeholder,
        buttons=["copy_all"],
        feedback_options=None,
        elem_id=f"{prefix}-chat",
    )
    status = gr.HTML("", elem_id=f"{prefix}-chat-status", elem_classes="status")
    with gr.Row(equal_height=True, elem_classes="seed-row"):
        question = gr.Textbox(
            label="Question",
            info="Each is asked by itself, without those before it.",
            placeholder=QUESTIONS[0],
            max_length=MOST_CHARACTERS,
            max_lines=4,
            scale=4,
            min_width=180,
            elem_id=f"{prefix}-question",
        )
        go = gr.Button("Ask", variant="primary", min_width=80, scale=1, elem_id=f"{prefix}-ask")
    gr.Examples(QUESTIONS, question, label="For example", api_visibility="private")
    return ChatPanel(chat, question, go, status)


def asks(panel: ChatPanel, ask: Callable[..., Any], shown: list[Any]) -> None:
    """Makes a panel's question go to the handler `ask`, which also gets the values of `shown`."""
    for trigger in (panel.go.click, panel.question.submit):
        model_event(trigger, ask, [panel.chat, panel.question, *shown], [panel.chat, panel.question], panel.status)


def conversation(
    model: SharedModel, history: list[dict[str, Any]], question: str, latent: Tensor | None, image: Path | None
) -> Iterator[tuple[list[dict[str, Any]], Any]]:
    """The chat as the answer grows, and the question's field, which is emptied once: the next one may be typed meanwhile."""
    answering = model.ask(question, latent, image)
    asked = [*history, {"role": "user", "content": question.strip()}]
    field: Any = ""
    while True:
        try:
            text = next(answering)
        except StopIteration as stop:
            text, cut_off = stop.value
            break
        yield [*asked, {"role": "assistant", "content": text.strip()}], field
        field = gr.skip()
    if cut_off:
        gr.Info("The answer is cut off at the longest the page asks for.")
    yield [*asked, {"role": "assistant", "content": text.strip() or "(no words)"}], field
