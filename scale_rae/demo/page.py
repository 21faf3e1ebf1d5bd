"""The demo page in gradio: four tabs over a `SharedModel`, which does the work.

The page loads nothing from other hosts and sends nothing to them: it uses the system's fonts, and gradio's analytics are off.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from scale_rae.demo.board import candidate_board, leaderboard
from scale_rae.demo.fence import fence, gr
from scale_rae.demo.limits import MOST_CANDIDATES, MOST_CHARACTERS, MOST_IMAGES
from scale_rae.demo.results import RankingState, SavedImage, SearchState
from scale_rae.demo.shared_model import SharedModel
from scale_rae.demo.streams import mapped
from scale_rae.demo.surroundings import settle
from scale_rae.demo.widgets import (
    asks,
    chat_panel,
    conversation,
    draw_updates,
    model_event,
    pictures,
    remembered,
    removed_if_refused,
    result_panel,
    run_buttons,
    runs,
    sampling,
    sampling_fields,
    set_after_error,
    shows_errors,
)
from scale_rae.demo.words import bar, folded, header, note, sentence, whole_number
from scale_rae.errors import InputError
from scale_rae.ranking import TABLE
from scale_rae.rewards import DEFAULT_REWARD, REWARDS
from scale_rae.wording import what_it_can

TITLE = "Scale-RAE"
VISITORS = 100  # whose images and fields are kept; beyond that, those of the visitor idle the longest are dropped
QUEUE = 32  # requests of all visitors that may wait
NO_REWARD = "none"
# What the bundled model was trained to draw.
SHAPES_PROMPTS = ["three stars", "a star below a ring", "a blue square and a pink star"]
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
THEME = gr.themes.Default(
    primary_hue="indigo",
    secondary_hue="amber",
    neutral_hue="slate",
    radius_size="lg",
    font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    button_primary_background_fill="linear-gradient(90deg, *primary_600, *primary_500)",
    button_primary_background_fill_dark="linear-gradient(90deg, *primary_600, *primary_500)",
    button_primary_text_color="white",
    body_text_color_subdued="*neutral_500",  # gradio's are too pale on white to be read by all
    block_info_text_color="*neutral_500",
    input_placeholder_color="*neutral_500",
    block_shadow="0 1px 2px rgb(15 23 42 / 6%)",
)


def build(model: SharedModel, folder: Path) -> gr.Blocks:
    """The page of a model, for `server.launch`. All files that it shows are in `folder`, which only this user may write to."""
    settle(folder)  # gradio reads the variables when components are made
    name = model.choice.model_path
    with gr.Blocks(
        title=f"{TITLE}: {name}", analytics_enabled=False, fill_width=False, delete_cache=(3600, 86400)
    ) as page:
        gr.HTML(header(name, str(model.model.device)), elem_id="header")
        if able := what_it_can(model.model.source):
            gr.HTML(folded("What this model draws", sentence(able, escape=False)), elem_id="able")
        drawn: Any = gr.State([])  # list[SavedImage], newest first
        with gr.Tabs():
            with gr.Tab("Draw", id="draw"):
                gr.HTML(note("Write a prompt. The model draws; watch the pictures form."), elem_classes="what")
                _draw_tab(model, drawn)
            with gr.Tab("Look", id="look"):
                words = (
                    "Ask about a picture: one of your own, or one that was drawn here, whose latent the model reads."
                )
                gr.HTML(note(words), elem_classes="what")
                _look_tab(model, drawn)
            with gr.Tab("Best of N", id="best"):
                words = "Several pictures of one prompt: the model and a reward judge them, and the best are kept."
                gr.HTML(note(words), elem_classes="what")
                _best_tab(model, drawn)
            with gr.Tab("Latent", id="latent"):
                words = "A saved latent: decode it, ask about it, or let the model go on from it."
                gr.HTML(note(words), elem_classes="what")
                _latent_tab(model, drawn)
        page.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)
    page.state_session_capacity = VISITORS
    for block in page.blocks.values():
        fence(block, folder)
    return page


# --- Draw ----------------------------------------------------------------------------------------------------------


def _draw_tab(model: SharedModel, drawn: Any) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                label="Prompt",
                lines=1,
                max_lines=6,
                placeholder="a red circle",
                elem_id="draw-prompt",
                autofocus=True,
                max_length=MOST_CHARACTERS,
            )
            if model.bundled:
                gr.Examples(
                    SHAPES_PROMPTS, prompt, label="This model knows shapes, and nothing else", api_visibility="private"
                )
            buttons = run_buttons("draw", "Draw")
            fields = sampling_fields(model, 4, "draw")
        with gr.Column(scale=3, min_width=300):
            results = result_panel("draw", "Drawings")

    def draw(text: str, *rest: Any) -> Iterator[list[Any]]:
        *values, before = rest
        yield from draw_updates(model.draw(text, sampling(*values)), before)

    runs(buttons, prompt, draw, [prompt, *fields.values, drawn], [*results.outputs, drawn], results.status)


# --- Look ----------------------------------------------------------------------------------------------------------


_NO_PICTURE = "Drop a picture above, or pick one that was drawn: they appear below."
_NO_LATENT = "Drop a latent that was saved here or by --save-latent."


def _look_tab(model: SharedModel, drawn: Any) -> None:
    chosen: Any = gr.State(None)  # the latent of a drawn image; None when the picture is the visitor's own
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
            panel = chat_panel("look", "Ask about the picture.")

    drawn.change(pictures, drawn, gallery, queue=False, show_progress="hidden", api_visibility="private")

    def pick(images: list[SavedImage], event: gr.SelectData) -> list[Any]:
        image = images[event.index]
        words = f"The latent of this drawing is read as it is (seed {image.seed})."
        return [str(image.png), image.latent, note(words), []]

    gallery.select(
        shows_errors(pick),
        drawn,
        [picture, chosen, source, panel.chat],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )

    def own(file: str | None) -> list[Any]:
        if not file:  # from no browser
            raise InputError("Choose a picture first: drop one.")
        with removed_if_refused(file, model):
            model.picture(Path(file))
        return [None, note("The picture is read through the encoder."), []]

    def forget() -> list[Any]:
        return [None, None, note(_NO_PICTURE), []]

    places = [chosen, source, panel.chat]
    # In the queue, since gradio shows the text of an error only there.
    event = picture.upload(shows_errors(own), picture, places, show_progress="hidden", api_visibility="private")
    set_after_error(event, forget, [picture, *places])
    # Without the picture as an input: gradio still gives it when a drawn one is cleared.
    picture.clear(forget, outputs=[picture, *places], queue=False, show_progress="hidden", api_visibility="private")

    def ask(history: list[dict[str, Any]], text: str, file: str | None, latent: Tensor | None) -> Iterator[Any]:
        yield from conversation(model, history, text, latent, Path(file) if file else None)

    asks(panel, ask, [picture, chosen])


# --- Best of N -------------------------------------------------------------------------------------------------------


ALL, UNTIL = "all", "until"  # the choices of "How" in Best of N


def _best_tab(model: SharedModel, drawn: Any) -> None:
    bundled = model.bundled
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(
                SHAPES_PROMPTS[-1] if bundled else "",
                label="Prompt",
                lines=1,
                max_lines=6,
                placeholder="a red circle",
                elem_id="best-prompt",
                max_length=MOST_CHARACTERS,
            )
            if bundled:
                gr.Examples(SHAPES_PROMPTS, prompt, label="For example", api_visibility="private")
            buttons = run_buttons("best", "Draw and rank", 140)
            how = gr.Radio(
                [("Draw all N, then rank them", ALL), ("Draw until enough are accepted", UNTIL)],
                value=ALL,
                label="How",
                info="The second way drops a half-formed picture when the model says it will be wrong.",
                elem_id="best-how",
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
                [(metric.label, name) for name, metric in TABLE.items()],
                value="combined",
                label="Rank by",
                elem_id="best-metric",
            )
            most = gr.Slider(
                *(1, MOST_CANDIDATES, MOST_CANDIDATES),
                step=1,
                label="Candidates",
                info="Begin at most this number; if too few are accepted by then, the best of the others are kept too.",
                visible=False,
                elem_id="best-candidates",
            )
            fields = sampling_fields(model, 6, "best")
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML("", elem_id="best-status", elem_classes="status")
            board = gr.HTML("", elem_id="best-board")
            files = gr.Files(
                label="Pictures, latents and manifests of those kept",
                interactive=False,
                visible=False,
                elem_id="best-files",
            )

    def choose(way: str) -> list[Any]:
        until = way == UNTIL
        return [
            gr.Slider(visible=until),
            gr.Dropdown(visible=not until),
            gr.Slider(visible=not until),
            gr.Button("Search" if until else "Draw and rank"),
        ]

    how.change(
        choose,
        how,
        [most, metric, fields.images, buttons.go],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )

    def run(
        text: str, way: str, count: int, most_begun: int, metric_name: str, reward_name: str, *rest: Any
    ) -> Iterator[list[Any]]:
        *values, before = rest
        options, kept = sampling(*values), whole_number(count, "The number to keep")
        judge = None if reward_name == NO_REWARD else reward_name
        yield [bar(0, "Starting"), "", gr.Files(value=None, visible=False), gr.skip()]
        if way == UNTIL:
            begun = whole_number(most_begun, "The number of candidates")
            yield from search_updates(model.search(text, options, kept, begun, judge), before)
        else:
            yield from ranking_updates(model.best_of(text, options, kept, metric_name, judge), before)

    inputs = [prompt, how, keep, most, metric, reward, *fields.values, drawn]
    runs(buttons, prompt, run, inputs, [status, board, files, drawn], status)


def ranking_updates(
    steps: Generator[RankingState, None, RankingState], before: list[SavedImage]
) -> Iterator[list[Any]]:
    """Updates of the tab's status, board and files, and of `before`, while all images are drawn and ranked."""

    def now(state: RankingState) -> list[Any]:
        return [bar(len(state.images) / state.total, state.progress), leaderboard(state), gr.skip(), gr.skip()]

    state = yield from mapped(steps, now)
    kept = [saved for ranked, saved in zip(state.images, state.saved, strict=True) if ranked.kept]
    yield [note(state.progress + "."), leaderboard(state), _files(kept), remembered(before, state.saved)]


def search_updates(steps: Generator[SearchState, None, SearchState], before: list[SavedImage]) -> Iterator[list[Any]]:
    """Updates as of `ranking_updates`, while candidates are begun, dropped and accepted."""

    def now(state: SearchState) -> list[Any]:
        return [bar(state.done, state.progress), candidate_board(state), gr.skip(), gr.skip()]

    state = yield from mapped(steps, now)
    yield [note(state.progress), candidate_board(state), _files(state.saved), remembered(before, state.saved)]


def _files(kept: Sequence[SavedImage]) -> Any:
    paths = [str(path) for saved in kept for path in (saved.png, saved.latent_file, saved.manifest)]
    return gr.Files(value=paths, visible=True)


# --- Latent ----------------------------------------------------------------------------------------------------------


def _latent_tab(model: SharedModel, drawn: Any) -> None:
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
                panel = chat_panel("latent", "Ask about the latent; it is not decoded for that.")
            with gr.Tab("Continue", id="latent-continue"):
                prompt = gr.Textbox(
                    label="Message",
                    lines=2,
                    placeholder="Can you generate a photo of a red circle?",
                    elem_id="latent-prompt",
                    max_length=MOST_CHARACTERS,
                )
                buttons = run_buttons("latent", "Continue")
                fields = sampling_fields(model, 1, "latent")
                results = result_panel("latent", "Drawn after the latent")

    def load(path: str | None) -> list[Any]:
        if not path:
            return [None, None, note(_NO_LATENT), []]
        with removed_if_refused(path, model):
            tensor = model.latent(Path(path))
        image = model.decode(tensor)
        words = f"{Path(path).name}: {tensor.shape[0]} tokens of {tensor.shape[1]} channels."
        return [tensor, image, note(words), []]

    def forget() -> list[Any]:
        return [None, None, note(_NO_LATENT), []]

    places = [latent, picture, loaded, panel.chat]
    model_event(file.upload, load, [file], places, loaded, (lambda: [None, *forget()], [file, *places]))
    file.clear(forget, outputs=places, queue=False, show_progress="hidden", api_visibility="private")

    def ask(history: list[dict[str, Any]], text: str, tensor: Tensor | None) -> Iterator[Any]:
        if tensor is None:
            raise InputError("Load a latent first: a .pt file.")
        yield from conversation(model, history, text, tensor, None)

    asks(panel, ask, [latent])

    def go_on(text: str, path: str | None, *rest: Any) -> Iterator[list[Any]]:
        *values, before = rest
        if not path:
            raise InputError("Load a latent first: a .pt file.")
        if not text.strip():
            raise InputError("Write a message first: how is it to go on?")
        yield from draw_updates(model.draw(text, sampling(*values), Path(path)), before)

    runs(buttons, prompt, go_on, [prompt, file, *fields.values, drawn], [*results.outputs, drawn], results.status)
