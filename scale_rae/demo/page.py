"""The page itself: four tabs over a `Studio`. Layout, wiring and words; what is done is in work.py.

Nothing on it comes from another host, and nothing is reported to one: fonts are the system's, gradio's analytics are off.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import inspect
import io
import logging
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from scale_rae.demo.surroundings import settle, without_clients
from scale_rae.demo.work import (
    MOST_CHARACTERS,
    MOST_IMAGES,
    MOST_STEPS,
    Drawing,
    Judged,
    Progress,
    Ranked,
    Studio,
    new_seed,
)
from scale_rae.errors import InputError, ScaleRAEError, printable
from scale_rae.options import DEFAULT_STEPS, SOLVERS, Sampling
from scale_rae.prompt import DESCRIBE, QUESTION
from scale_rae.rewards import DEFAULT_REWARD, REWARDS
from scale_rae.scaling.explain import number
from scale_rae.scaling.select import METRICS
from scale_rae.wording import what_it_can

settle()
with without_clients():
    import gradio as gr

_log = logging.getLogger("scale_rae.demo")

TITLE = "Scale-RAE"
VISITORS = 100  # whose drawings and fields are held; of more, the longest idle are forgotten
REMEMBERED = 24  # drawings that a visitor can pick from
QUEUE = 32  # visitors who may wait
NO_REWARD = "none"
# What the bundled model was trained to draw, and to be asked.
SHAPES_PROMPTS = ["a red circle", "three stars", "a blue square and a pink star", "a star below a ring"]
QUESTIONS = [
    DESCRIBE,
    "How many objects are there?",
    QUESTION.format(prompt="a photo of a red circle"),
]
METRIC_NAMES = {
    "combined": "answer, then reward and confidence",
    "answer_conf": "answer and its confidence",
    "answer_logits": "answer and its logit",
    "image_reward": "reward alone",
    "prompt_loss": "prompt loss (lower is better)",
    "prompt_conf": "confidence in the prompt",
    "image_conf": "confidence in the image",
    "response_conf": "confidence in the answer",
}
SCORE_NAMES = {
    **dict.fromkeys(METRICS, "score"),
    "prompt_loss": "prompt loss",
    "prompt_conf_score": "prompt confidence",
    "image_conf_score": "image confidence",
}

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
THEME = gr.themes.Default(
    primary_hue="blue",
    neutral_hue="slate",
    font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
)


def build(studio: Studio, folder: Path) -> gr.Blocks:
    """The page of a studio's model; `server.launch` shows it. What it shows is in `folder`, which nobody else may write to."""
    settle(folder)  # read when components are made
    name = studio.choice.model_path
    with gr.Blocks(
        title=f"{TITLE}: {name}", analytics_enabled=False, fill_width=False, delete_cache=(3600, 86400)
    ) as page:
        gr.Markdown(
            f"# {TITLE}\nModel `{name}` on `{studio.model.device}`. One visitor at a time draws; others wait in line."
        )
        if able := what_it_can(studio.model.source):
            gr.HTML(note(sentence(able, escape=False)), elem_id="able")
        drawn: Any = gr.State([])  # list[Drawing], newest first
        with gr.Tabs():
            with gr.Tab("Draw", id="draw"):
                _draw_tab(studio, drawn)
            with gr.Tab("Look", id="look"):
                _look_tab(studio, drawn)
            with gr.Tab("Best of N", id="best"):
                _best_tab(studio, drawn)
            with gr.Tab("Latent", id="latent"):
                _latent_tab(studio, drawn)
        page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)
    page.state_session_capacity = VISITORS
    for block in page.blocks.values():
        _fence(block, folder)
    return page


def _fence(block: Any, folder: Path) -> None:
    """Lets a component's files be only those in `folder`: uploads, and the page's copies of drawings.

    By itself gradio also takes addresses, which it fetches, and shows files of the working and the temporary folder.
    """

    async def inside(file: str | Path | None) -> str | None:
        path = _inside(file, folder)
        if path is not None:
            block.temp_files.add(path)  # removed when it is a day old
        return path

    block.async_move_resource_to_block_cache = inside
    if isinstance(block, gr.Image | gr.File):
        # The file as it was dropped: gradio would open images before the handlers, with every decoder there is.
        block.preprocess = lambda payload: _inside(payload.path, folder) if payload else None
    elif isinstance(block, gr.Chatbot):
        block.preprocess = texts  # gradio would make components and files of what a message says


def _inside(file: str | Path | None, folder: Path) -> str | None:
    """A file's path as it is.

    Raises:
        gr.Error: when it is not in `folder`.
    """
    if file is None:
        return None
    if "\0" in str(file) or not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
        raise gr.Error("Only a file that was uploaded to this page can be read.", print_exception=False)
    return str(file)


def texts(payload: Any) -> list[dict[str, Any]]:
    """The messages of a conversation, as far as they are text; of each, who said it and what."""
    said = []
    for message in payload.root if payload else []:
        text = "".join(part.text for part in message.content if part.type == "text")
        if message.role in ("user", "assistant") and text:
            said.append({"role": message.role, "content": text})
    return said


# --- words and errors ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors become sentences on the page; what was not foreseen is told in full on the terminal alone."""
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


def without_paths(text: str) -> str:
    """A text with the last names of files for their whole paths, which are the server's own matter."""
    return re.sub(r"(?<![\w/\\:.])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\":,;]+[/\\])+([^\s/\\'\":,;]*)", r"\1", text)


def sentence(text: str, escape: bool = True) -> str:
    """An error's text as a sentence, safe to show as HTML unless what shows it escapes by itself."""
    text = " ".join(text.split())
    if re.match(r"[a-z]+\b[^./\\]", text):  # a word, not a file's name
        text = text[:1].upper() + text[1:]
    text = text if text.endswith((".", "?", "!", "…")) else text + "."
    return html.escape(text) if escape else text


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors are shown as sentences."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*args: Any) -> Any:
            with _told():
                yield from function(*args)

        return generator

    @functools.wraps(function)
    def handler(*args: Any) -> Any:
        with _told():
            return function(*args)

    return handler


def whole_number(text: str | int | float | None, name: str) -> int:
    """A field's whole number, of any size.

    Raises:
        InputError: naming the field.
    """
    plain = str("" if text is None else text).strip()
    if not re.fullmatch(r"-?[0-9]{1,20}", plain):
        raise InputError(f"{name} is {repr(plain) if plain else 'empty'}: it must be a whole number.")
    return int(plain)


# --- parts that several tabs have ------------------------------------------------------------------------------------


@dataclass
class _Settings:
    """The fields that say how to draw, as the handlers get them: `values` in the order of `sampling`'s arguments."""

    images: Any
    guidance: Any
    steps: Any
    solver: Any
    seed: Any

    @property
    def values(self) -> list[Any]:
        return [self.images, self.guidance, self.steps, self.solver, self.seed]


def sampling(images: float, guidance: float, steps: float, solver: str, seed: str) -> Sampling:
    """What the fields say."""
    return Sampling(
        num_images=whole_number(images, "The number of images"),
        guidance_level=float(guidance) if guidance is not None else 1.0,
        steps=whole_number(steps, "The number of steps"),
        solver=solver,
        seed=whole_number(seed, "The seed"),
    )


def _settings(studio: Studio, images: int, prefix: str) -> _Settings:
    bundled = studio.bundled
    with gr.Row():
        count = gr.Slider(1, MOST_IMAGES, images, step=1, label="Images", min_width=140, elem_id=f"{prefix}-images")
        guidance = gr.Slider(
            *(0, 10),
            3.0 if bundled and studio.guides else 1.0,
            step=0.1,
            label="Guidance",
            info="1 is none" if studio.guides else "this checkpoint has none",
            interactive=studio.guides,
            min_width=140,
            elem_id=f"{prefix}-guidance",
        )
    with gr.Row():
        steps = gr.Slider(2, MOST_STEPS, DEFAULT_STEPS, step=1, label="Steps", min_width=140, elem_id=f"{prefix}-steps")
        solver = gr.Dropdown(list(SOLVERS), value="euler", label="Solver", min_width=140, elem_id=f"{prefix}-solver")
    with gr.Row(equal_height=True, elem_classes="seed-row"):
        seed = gr.Textbox(
            "42", label="Seed", max_lines=1, min_width=120, scale=3, elem_id=f"{prefix}-seed", max_length=20
        )
        again = gr.Button("New seed", min_width=110, scale=1, elem_id=f"{prefix}-new-seed")
    again.click(lambda: str(new_seed()), outputs=seed, queue=False, api_visibility="private", show_progress="hidden")
    return _Settings(count, guidance, steps, solver, seed)


@dataclass
class _Results:
    """Where drawings are shown: a gallery, and of the chosen one the seed, command and files."""

    status: Any
    gallery: Any
    shown: Any  # the drawings in the gallery
    details: Any
    seed: Any
    command: Any
    files: Any

    @property
    def outputs(self) -> list[Any]:
        return [self.status, self.gallery, self.shown, self.details, self.seed, self.command, self.files]


def _results(prefix: str, label: str) -> _Results:
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
    results = _Results(status, gallery, shown, details, seed, command, files)

    def choose(drawings: list[Drawing], chosen: gr.SelectData) -> list[Any]:
        if not 0 <= chosen.index < len(drawings):  # a picture that is still forming
            return [gr.skip()] * 4
        return detailed(drawings, chosen.index)

    gallery.select(
        told(choose),
        shown,
        [details, seed, command, files],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    return results


def detailed(drawings: Sequence[Drawing], i: int) -> list[Any]:
    """What the details show of a drawing."""
    if not drawings:
        return [gr.Column(visible=False), "", "", None]
    drawing = drawings[i]
    which = f"Image {i + 1} of {len(drawings)} · s" if len(drawings) > 1 else "S"
    files = [str(drawing.png), str(drawing.latent_file), str(drawing.manifest)]
    return [gr.Column(visible=True), f"{which}eed **{drawing.seed}**", drawing.command, files]


def bar(share: float, text: str) -> str:
    """A progress bar that screen readers read too."""
    percent = round(100 * share)
    return (
        f'<div class="bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-label="{html.escape(text, quote=True)}"><div style="width: {percent}%"></div></div>'
        f'<p class="said">{html.escape(text)}</p>'
    )


def note(text: str) -> str:
    """A line of the status."""
    return f'<p class="said" role="status">{html.escape(text)}</p>'


def remembered(drawn: list[Drawing], new: Sequence[Drawing]) -> list[Drawing]:
    """The drawings a visitor can pick from, newest first."""
    return [*new, *drawn][:REMEMBERED]


def pictures(drawings: Sequence[Drawing]) -> list[tuple[str, str]]:
    """Files and captions for a gallery; the captions are for screen readers."""
    return [(str(d.png), d.request) for d in drawings]


def _drawing_updates(steps: Generator[Progress, None, Any], drawn: list[Drawing]) -> Iterator[list[Any]]:
    """`_Results.outputs` and `drawn`, while something is drawn and when it is done."""
    yield [bar(0, "Reading the prompt"), [], [], *detailed([], 0), gr.skip()]
    while True:
        try:
            progress = next(steps)
        except StopIteration as stop:
            result = stop.value
            break
        yield [bar(progress.done, progress.text), progress.pictures, [], *[gr.skip()] * 5]
    said = f"“{result.text.strip()}”" if result.text.strip() else "The model said nothing."
    if result.drawings:
        said += f" {len(result.drawings)} drawn in {result.seconds:.1f} s."
    yield [
        note(said),
        pictures(result.drawings),
        result.drawings,
        *detailed(result.drawings, 0),
        remembered(drawn, result.drawings) if result.drawings else gr.skip(),
    ]


def _model_event(
    trigger: Any,
    function: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    status: Any,
    after_error: tuple[Callable[..., Any], list[Any]] | None = None,
) -> Any:
    """A handler that uses the model: one at a time over all visitors and tabs, others queue. `after_error`: `_after_error`'s
    function and outputs; by default the status is emptied."""
    event = trigger(
        told(function),
        inputs,
        outputs,
        concurrency_limit=1,
        concurrency_id="model",
        show_progress="minimal",
        show_progress_on=status,
        api_visibility="private",
    )
    _after_error(event, *(after_error or (lambda: "", [status])))
    return event


def _after_error(event: Any, function: Callable[..., Any], outputs: list[Any]) -> None:
    """Has outputs as they are to be after an event's error, which else would stay on them as a word."""
    event.failure(function, outputs=outputs, queue=False, show_progress="hidden", api_visibility="private")


def _stop(button: Any, events: list[Any], status: Any) -> None:
    button.click(
        lambda: note("Stopped."),
        outputs=status,
        cancels=events,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )


@contextlib.contextmanager
def _not_kept(file: str, studio: Studio) -> Iterator[None]:
    """Removes an upload that is refused; a drawing of the page's own stays."""
    try:
        yield
    except ScaleRAEError:
        if studio.shown is None or not Path(file).is_relative_to(studio.shown):
            Path(file).unlink(missing_ok=True)
        raise


# --- Draw ----------------------------------------------------------------------------------------------------------


def _draw_tab(studio: Studio, drawn: Any) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                label="Prompt",
                lines=2,
                placeholder="a red circle",
                elem_id="draw-prompt",
                autofocus=True,
                max_length=MOST_CHARACTERS,
            )
            if studio.bundled:
                gr.Examples(
                    SHAPES_PROMPTS, prompt, label="This model knows shapes, and nothing else", api_visibility="private"
                )
            fields = _settings(studio, 4, "draw")
            with gr.Row():
                go = gr.Button("Draw", variant="primary", min_width=120, elem_id="draw-go")
                stop = gr.Button("Stop", min_width=90, elem_id="draw-stop")
        with gr.Column(scale=3, min_width=300):
            results = _results("draw", "Drawings")

    def draw(text: str, *rest: Any) -> Iterator[list[Any]]:
        *values, before = rest
        yield from _drawing_updates(studio.draw(text, sampling(*values)), before)

    outputs = [*results.outputs, drawn]
    events = [
        _model_event(trigger, draw, [prompt, *fields.values, drawn], outputs, results.status)
        for trigger in (go.click, prompt.submit)
    ]
    _stop(stop, events, results.status)


# --- Look ----------------------------------------------------------------------------------------------------------


@dataclass
class _Chat:
    """Questions and answers, and where the next is written."""

    chat: Any
    question: Any
    go: Any
    status: Any


def _chat(prefix: str, placeholder: str) -> _Chat:
    chat = gr.Chatbot(
        label="Questions and answers",
        show_label=False,
        height=320,
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
    return _Chat(chat, question, go, status)


def _asked_by(talk: _Chat, ask: Callable[..., Any], shown: list[Any]) -> None:
    for trigger in (talk.go.click, talk.question.submit):
        _model_event(trigger, ask, [talk.chat, talk.question, *shown], [talk.chat, talk.question], talk.status)


def conversation(
    studio: Studio, history: list[dict[str, Any]], question: str, latent: Tensor | None, image: Path | None
) -> Iterator[tuple[list[dict[str, Any]], Any]]:
    """The chat as the answer grows, and the question's field: emptied once, for the next may be typed meanwhile."""
    answering = studio.ask(question, latent, image)
    said = [*history, {"role": "user", "content": question.strip()}]
    field: Any = ""
    while True:
        try:
            text = next(answering)
        except StopIteration as stop:
            text, cut_off = stop.value
            break
        yield [*said, {"role": "assistant", "content": text.strip()}], field
        field = gr.skip()
    if cut_off:
        gr.Info("The answer is cut off at the longest the page asks for.")
    yield [*said, {"role": "assistant", "content": text.strip() or "(no words)"}], field


_NO_PICTURE = "Drop a picture above, or pick one that was drawn: they appear below."
_NO_LATENT = "Drop a latent that was saved here or by --save-latent."


def _look_tab(studio: Studio, drawn: Any) -> None:
    chosen: Any = gr.State(None)  # the latent of a drawing; None when the picture is the visitor's own
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            picture = gr.Image(
                label="Picture",
                type="filepath",
                sources=["upload", "clipboard"],
                height=280,
                buttons=[],
                elem_id="look-picture",
                alt_text="The picture that is asked about",
            )
            source = gr.HTML(note(_NO_PICTURE), elem_id="look-source")
            gallery = gr.Gallery(
                label="Drawn on this page",
                show_label=False,
                columns=4,
                height="auto",
                allow_preview=False,
                interactive=False,
                object_fit="contain",
                buttons=[],
                elem_id="look-gallery",
                elem_classes="drawings",
            )
        with gr.Column(scale=3, min_width=300):
            talk = _chat("look", "Ask about the picture.")

    drawn.change(pictures, drawn, gallery, queue=False, show_progress="hidden", api_visibility="private")

    def pick(drawings: list[Drawing], event: gr.SelectData) -> list[Any]:
        drawing = drawings[event.index]
        words = f"The latent of this drawing is read as it is (seed {drawing.seed})."
        return [str(drawing.png), drawing.latent, note(words), []]

    gallery.select(
        told(pick),
        drawn,
        [picture, chosen, source, talk.chat],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )

    def own(file: str | None) -> list[Any]:
        if file:
            with _not_kept(file, studio):
                studio.picture(Path(file))
        words = "The picture is read through the encoder." if file else _NO_PICTURE
        return [None, note(words), []]

    places = [chosen, source, talk.chat]
    for change in (picture.upload, picture.clear):
        # In the queue, for elsewhere an error has no words.
        event = change(told(own), picture, places, show_progress="hidden", api_visibility="private")
        _after_error(event, lambda: [None, *own(None)], [picture, *places])

    def ask(history: list[dict[str, Any]], text: str, file: str | None, latent: Tensor | None) -> Iterator[Any]:
        yield from conversation(studio, history, text, latent, Path(file) if file else None)

    _asked_by(talk, ask, [picture, chosen])


# --- Best of N -------------------------------------------------------------------------------------------------------


def _best_tab(studio: Studio, drawn: Any) -> None:
    bundled = studio.bundled
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                label="Prompt", lines=2, placeholder="a red circle", elem_id="best-prompt", max_length=MOST_CHARACTERS
            )
            with gr.Row():
                keep = gr.Slider(1, MOST_IMAGES, 2, step=1, label="Keep", min_width=140, elem_id="best-keep")
                reward = gr.Dropdown(
                    [*REWARDS, NO_REWARD],
                    value="siglip" if bundled else DEFAULT_REWARD,
                    label="Reward model",
                    min_width=140,
                    elem_id="best-reward",
                )
            metric = gr.Dropdown(
                [(METRIC_NAMES[name], name) for name in METRICS],
                value="combined",
                label="Rank by",
                elem_id="best-metric",
            )
            fields = _settings(studio, 6, "best")
            with gr.Row():
                go = gr.Button("Draw and rank", variant="primary", min_width=140, elem_id="best-go")
                stop = gr.Button("Stop", min_width=90, elem_id="best-stop")
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML("", elem_id="best-status", elem_classes="status")
            board = gr.HTML("", elem_id="best-board")
            files = gr.Files(
                label="Pictures, latents and manifests of those kept",
                interactive=False,
                visible=False,
                elem_id="best-files",
            )

    def rank_them(text: str, count: int, metric_name: str, reward_name: str, *rest: Any) -> Iterator[list[Any]]:
        *values, before = rest
        how = sampling(*values)
        steps = studio.best_of(
            text,
            how,
            whole_number(count, "The number to keep"),
            metric_name,
            None if reward_name == NO_REWARD else reward_name,
        )
        yield [bar(0, "Starting"), "", gr.Files(value=None, visible=False), gr.skip()]
        while True:
            try:
                ranked = next(steps)
            except StopIteration as stop:
                ranked = stop.value
                break
            yield [bar(len(ranked.images) / ranked.total, ranked.progress), leaderboard(ranked), gr.skip(), gr.skip()]
        kept = [drawing for judged, drawing in zip(ranked.images, ranked.drawings, strict=True) if judged.kept]
        paths = [str(path) for d in kept for path in (d.png, d.latent_file, d.manifest)]
        yield [
            note(ranked.progress + "."),
            leaderboard(ranked),
            gr.Files(value=paths, visible=True),
            remembered(before, ranked.drawings),
        ]

    inputs = [prompt, keep, metric, reward, *fields.values, drawn]
    events = [
        _model_event(trigger, rank_them, inputs, [status, board, files, drawn], status)
        for trigger in (go.click, prompt.submit)
    ]
    _stop(stop, events, status)


def leaderboard(ranked: Ranked) -> str:
    """Cards of all images, best first."""
    commands: list[str | None] = [d.command for d in ranked.drawings] or [None] * len(ranked.images)
    cards = "".join(_card(judged, command) for judged, command in zip(ranked.images, commands, strict=True))
    return f'<ol class="board">{cards}</ol>' if cards else ""


def _card(judged: Judged, command: str | None) -> str:
    rows = "".join(
        f"<div><dt>{html.escape(SCORE_NAMES.get(name, name))}</dt><dd>{'–' if value is None else number(value)}</dd></div>"
        for name, value in judged.scores.items()
    )
    state = "kept" if judged.kept else "dropped"
    why = f'<p class="why">{html.escape(judged.why)}</p>' if judged.why else ""
    how = ""
    if command is not None:
        how = f"<details><summary>Command line</summary><code>{html.escape(command)}</code></details>"
    return (
        f'<li class="{state}"><img src="{thumbnail(judged.image)}" alt="Image in place {judged.place + 1}, {state}">'
        f'<div><p class="head"><b>{judged.place + 1}</b> <span class="state">{state}</span> '
        f'<span class="answer {judged.answer}">model says {judged.answer if judged.answer != "uncertain" else "neither"}</span></p>'
        f"{why}<dl>{rows}</dl><p class='seed'>seed {judged.seed}</p>{how}</div></li>"
    )


def thumbnail(image: Image.Image, side: int = 256) -> str:
    """A small copy as a data URL."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# --- Latent ----------------------------------------------------------------------------------------------------------


def _latent_tab(studio: Studio, drawn: Any) -> None:
    latent: Any = gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            file = gr.File(label="Latent (.pt)", file_types=[".pt"], height=150, elem_id="latent-file")
            picture = gr.Image(
                label="Decoded",
                interactive=False,
                height=280,
                buttons=["download"],
                format="png",
                elem_id="latent-picture",
            )
            loaded = gr.HTML(note(_NO_LATENT), elem_id="latent-loaded")
        with gr.Column(scale=3, min_width=300), gr.Tabs():
            with gr.Tab("Ask", id="latent-ask"):
                talk = _chat("latent", "Ask about the latent; it is not decoded for that.")
            with gr.Tab("Continue", id="latent-continue"):
                prompt = gr.Textbox(
                    label="Message",
                    lines=2,
                    placeholder="Can you generate a photo of a red circle?",
                    elem_id="latent-prompt",
                    max_length=MOST_CHARACTERS,
                )
                with gr.Accordion("How to draw", open=False):
                    fields = _settings(studio, 1, "latent")
                with gr.Row():
                    go = gr.Button("Continue", variant="primary", min_width=120, elem_id="latent-go")
                    stop = gr.Button("Stop", min_width=90, elem_id="latent-stop")
                results = _results("latent", "Drawn after the latent")

    def load(path: str | None) -> list[Any]:
        if not path:
            return [None, None, note(_NO_LATENT), []]
        with _not_kept(path, studio):
            tensor = studio.latent(Path(path))
        image = studio.decode(tensor)
        words = f"{Path(path).name}: {tensor.shape[0]} tokens of {tensor.shape[1]} channels."
        return [tensor, image, note(words), []]

    def forget() -> list[Any]:
        return [None, None, note(_NO_LATENT), []]

    places = [latent, picture, loaded, talk.chat]
    _model_event(file.upload, load, [file], places, loaded, (lambda: [None, *forget()], [file, *places]))
    file.clear(forget, outputs=places, queue=False, show_progress="hidden", api_visibility="private")

    def ask(history: list[dict[str, Any]], text: str, tensor: Tensor | None) -> Iterator[Any]:
        if tensor is None:
            raise InputError("Load a latent first: a .pt file.")
        yield from conversation(studio, history, text, tensor, None)

    _asked_by(talk, ask, [latent])

    def go_on(text: str, path: str | None, *rest: Any) -> Iterator[list[Any]]:
        *values, before = rest
        if not path:
            raise InputError("Load a latent first: a .pt file.")
        if not text.strip():
            raise InputError("Write a message first: how is it to go on?")
        yield from _drawing_updates(studio.draw(text, sampling(*values), Path(path)), before)

    outputs = [*results.outputs, drawn]
    events = [
        _model_event(trigger, go_on, [prompt, file, *fields.values, drawn], outputs, results.status)
        for trigger in (go.click, prompt.submit)
    ]
    _stop(stop, events, results.status)
