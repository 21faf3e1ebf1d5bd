"""The nodes, in ComfyUI's V3 node API. A latent is a tensor [N, L, C] float32 on the CPU, a batch as ComfyUI's images are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import ComfyExtension, io
from torch import Tensor

import scale_rae
from scale_rae import networks
from scale_rae.checkpoint import load_latent
from scale_rae.errors import InputError, shorten
from scale_rae.files import write_new
from scale_rae.options import (
    AUTO_REWARD,
    DECODE_AT_ONCE,
    DEFAULT_NEW_TOKENS,
    PROMPT_PREFIX,
    REWARDS,
    ModelChoice,
    Sampling,
    SearchOptions,
)
from scale_rae.outputs import latent_bytes
from scale_rae.pipeline import READ_AT_ONCE
from scale_rae.prompt import DESCRIBE, clean_message
from scale_rae.ranking import METRICS, TABLE, Verdicts, rank
from scale_rae.rewards import default_reward, load_reward
from scale_rae.wording import after_no_drawing, as_request, subject

from . import folders, running
from .inputs import DEFAULT, inputs_of, naming_inputs, options_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scale_rae.language import Reply
    from scale_rae.results import Generation
    from scale_rae.rewards import Reward

Model = io.Custom("SCALE_RAE_MODEL")
Latent = io.Custom("SCALE_RAE_LATENT")
Lora = io.Custom("SCALE_RAE_LORA")
RewardModel = io.Custom("SCALE_RAE_REWARD")

CATEGORY = "Scale-RAE"
CODE_AT_ONCE = DECODE_AT_ONCE  # images or latents; between batches a run can be interrupted
PROMPT = "Can you generate a photo of a blue cross and a pink square?"
ABOUT = "a photo of a blue cross and a pink square"


def prompt_input(default: str, tooltip: str) -> Any:
    """A text field of several lines for a prompt."""
    return io.String.Input("prompt", multiline=True, default=default, tooltip=tooltip)


def found_outputs() -> list[Any]:
    """The outputs of nodes that search: kept images, their latents, and a report on all candidates."""
    return [
        io.Image.Output(display_name="images", tooltip="The best first."),
        Latent.Output(display_name="latents"),
        io.String.Output(display_name="report", tooltip="What was found of every candidate, as JSON."),
    ]


class LoadModel(io.ComfyNode):
    """Loads a Scale-RAE checkpoint; ComfyUI keeps it as long as the workflow uses it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAELoadModel",
            display_name="Load Scale-RAE",
            category=CATEGORY,
            description="Loads a Scale-RAE model: a bundled one, one in models/scale_rae, or a published one, which is "
            "downloaded when first used.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=folders.models(),
                    default=folders.FIRST_MODEL,
                    tooltip="shapes: the bundled model, which draws simple shapes. shapes-4: its student, which draws in 4 steps.",
                ),
                io.Combo.Input(
                    "decoder",
                    options=folders.decoders(),
                    default=folders.MATCHING,
                    tooltip="The decoder that makes pixels of latents. matching: the model's own.",
                ),
                io.Combo.Input(
                    "device",
                    options=[DEFAULT, "cpu", "cuda", "mps"],
                    default=DEFAULT,
                    tooltip="default: the device that ComfyUI uses.",
                ),
                *inputs_of(ModelChoice, without=("model_path", "decoder_repo", "revision", "device", "lora")),
                Lora.Input("lora", optional=True, tooltip="LoRA adapters to merge into the weights."),
            ],
            outputs=[Model.Output(display_name="model")],
        )

    @classmethod
    @naming_inputs
    def execute(
        cls, model: str, decoder: str, device: str, lora: tuple[str, ...] = (), **options: Any
    ) -> io.NodeOutput:
        """The loaded model."""
        choice = options_from(
            ModelChoice(
                model_path=folders.model(model),
                decoder_repo=folders.decoder(decoder),
                device=running.comfy_device() if device == DEFAULT else device,
                lora=lora,
            ),
            options,
        )
        choice.check()
        running.make_room(choice.device or "cpu")
        loaded = scale_rae.ScaleRAE(networks.load(choice, progress=running.loading_progress()))
        return io.NodeOutput(loaded)


class LoraAdapter(io.ComfyNode):
    """Chooses a LoRA adapter; several are chained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAELora",
            display_name="Scale-RAE LoRA",
            category=CATEGORY,
            description="A LoRA adapter in PEFT's format: a folder with adapter_config.json in models/loras or "
            "models/scale_rae. Connect it to Load Scale-RAE, which merges it into the weights; chain several.",
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=folders.adapters(),
                    tooltip="A folder in models/loras or models/scale_rae. Press R once a new one is there.",
                ),
                io.Float.Input("weight", default=1.0, step=0.05, min=-10.0, max=10.0, tooltip="1 is as trained."),
                Lora.Input("lora", optional=True, tooltip="Another adapter, merged before this one."),
            ],
            outputs=[Lora.Output(display_name="lora")],
        )

    @classmethod
    def execute(cls, adapter: str, weight: float, lora: tuple[str, ...] = ()) -> io.NodeOutput:
        """The adapters so far, as `scale_rae.load` takes them."""
        return io.NodeOutput((*lora, f"{folders.adapter(adapter)}:{float(weight)!r}"))


class LoadReward(io.ComfyNode):
    """Loads a reward model, which ranks pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAELoadReward",
            display_name="Load Scale-RAE Reward",
            category=CATEGORY,
            description="Loads a reward model, which scores how well pictures show a prompt. auto: the model's own "
            "where it brings one, else imagereward.",
            inputs=[
                Model.Input("model"),
                io.Combo.Input(
                    "reward",
                    options=[AUTO_REWARD, *REWARDS],
                    default=AUTO_REWARD,
                    tooltip="All but auto are downloaded when first used, and so is auto where the model brings none.",
                ),
            ],
            outputs=[RewardModel.Output(display_name="reward")],
        )

    @classmethod
    @naming_inputs
    def execute(cls, model: scale_rae.ScaleRAE, reward: str) -> io.NodeOutput:
        """The loaded reward."""
        return io.NodeOutput(load_reward(default_reward(model) if reward == AUTO_REWARD else reward, model))


class TextToImage(io.ComfyNode):
    """Draws images of a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAETextToImage",
            display_name="Scale-RAE Text to Image",
            category=CATEGORY,
            description="Draws images of a prompt. A seed draws the image that scale-rae t2i draws.",
            inputs=[
                Model.Input("model"),
                prompt_input(PROMPT, "What to draw, worded as a request."),
                *inputs_of(Sampling),
                Latent.Input("latent", optional=True, tooltip="One latent, shown to the model before the prompt."),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                Latent.Output(display_name="latents"),
                io.String.Output(display_name="reply"),
            ],
        )

    @classmethod
    @naming_inputs
    def execute(
        cls, model: scale_rae.ScaleRAE, prompt: str, latent: Tensor | None = None, **options: Any
    ) -> io.NodeOutput:
        """The images, their latents, and the model's reply."""
        sampling = options_from(Sampling(), options)
        if latent is not None and len(latent) != 1:
            raise InputError(f"latent: holds {len(latent)} latents; only one can be shown to the model before a prompt")
        drawn = draw(model, prompt, sampling, latent)
        return io.NodeOutput(
            running.to_comfy([one.image for one in drawn.images if one.image is not None]),
            torch.stack([one.latent for one in drawn.images]),
            drawn.text,
        )


class EncodeImage(io.ComfyNode):
    """Encodes images as latents, which every node takes that takes drawn ones."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAEEncode",
            display_name="Scale-RAE Encode",
            category=CATEGORY,
            description="Encodes images as Scale-RAE latents. Images may have any size; the model sees them as squares.",
            inputs=[Model.Input("model"), io.Image.Input("images")],
            outputs=[Latent.Output(display_name="latents")],
        )

    @classmethod
    def execute(cls, model: scale_rae.ScaleRAE, images: Tensor) -> io.NodeOutput:
        """One latent per image."""
        return io.NodeOutput(torch.stack(running.in_parts(running.from_comfy(images), CODE_AT_ONCE, model.encode)))


class DecodeLatent(io.ComfyNode):
    """Decodes latents to images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAEDecode",
            display_name="Scale-RAE Decode",
            category=CATEGORY,
            description="Decodes Scale-RAE latents to images.",
            inputs=[Model.Input("model"), Latent.Input("latents")],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(cls, model: scale_rae.ScaleRAE, latents: Tensor) -> io.NodeOutput:
        """One image per latent."""
        return io.NodeOutput(running.to_comfy(running.in_parts(list(latents), CODE_AT_ONCE, model.decode)))


class Ask(io.ComfyNode):
    """Asks the model about images or latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAEAsk",
            display_name="Scale-RAE Ask",
            category=CATEGORY,
            description="Asks the model about images or latents. Connect one of them; the answers are a list.",
            inputs=[
                Model.Input("model"),
                io.String.Input("question", multiline=True, default=DESCRIBE, tooltip="Asked of each image or latent."),
                io.Int.Input(
                    "max_new_tokens",
                    display_name="max new tokens",
                    default=DEFAULT_NEW_TOKENS,
                    min=1,
                    tooltip="Longest answer, in tokens.",
                ),
                io.Image.Input("images", optional=True),
                Latent.Input("latents", optional=True),
            ],
            outputs=[io.String.Output(display_name="answers", is_output_list=True)],
        )

    @classmethod
    def execute(
        cls,
        model: scale_rae.ScaleRAE,
        question: str,
        max_new_tokens: int,
        images: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> io.NodeOutput:
        """One answer per image or latent."""

        def listen(i: int, text: str) -> bool:
            running.stop_if_interrupted()
            return True

        answers = model.answer(
            question,
            images=None if images is None else running.from_comfy(images),
            latents=None if latents is None else list(latents),
            max_new_tokens=max_new_tokens,
            listen=listen,
        )
        return io.NodeOutput([answer.text for answer in answers])


class ScoreLatents(io.ComfyNode):
    """Lets the model judge how well latents show a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAEScore",
            display_name="Scale-RAE Score",
            category=CATEGORY,
            description="The model's own judgement of how well each latent shows a prompt. The outputs are lists.",
            inputs=[
                Model.Input("model"),
                Latent.Input("latents"),
                prompt_input(ABOUT, "What the images are to show; of a request, what it asks for."),
            ],
            outputs=[
                io.String.Output(display_name="answer", is_output_list=True, tooltip="yes, no or uncertain."),
                io.Float.Output(
                    display_name="confidence",
                    is_output_list=True,
                    tooltip="Of the answer, in nats: positive for a yes, negative for a no, 0 if uncertain.",
                ),
                io.Float.Output(
                    display_name="prompt loss",
                    is_output_list=True,
                    tooltip="Of the prompt as a description of the image; lower is better.",
                ),
                io.String.Output(display_name="scores", is_output_list=True, tooltip="All scores, as JSON."),
            ],
        )

    @classmethod
    def execute(cls, model: scale_rae.ScaleRAE, latents: Tensor, prompt: str) -> io.NodeOutput:
        """Answer, confidence, loss and all scores of each latent."""
        request, about = judged_prompt(prompt)
        scores = judgements(model, list(latents), request, about, model.reply([request])[0])
        return io.NodeOutput(
            [score["answer"] for score in scores],
            [score["score"] for score in scores],
            [score["prompt_loss"] for score in scores],
            [json.dumps(score) for score in scores],
        )


class BestOfN(io.ComfyNode):
    """Draws N images, judges them, and keeps the best."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAEBestOfN",
            display_name="Scale-RAE Best of N",
            category=CATEGORY,
            description="Draws N images, lets the model (and a reward, if one is connected) judge them, keeps the best.",
            inputs=[
                Model.Input("model"),
                prompt_input(ABOUT, "What to draw. The request for it is worded by the node, unless it is one."),
                io.Int.Input("candidates", default=8, min=1, tooltip="Images to draw."),
                io.Int.Input("keep", default=1, min=1, tooltip="Images to keep, the best first."),
                io.Combo.Input(
                    "metric", options=list(METRICS), default=METRICS[0], tooltip="What the images are ranked by."
                ),
                *inputs_of(Sampling, without=("num_images",)),
                RewardModel.Input("reward", optional=True),
            ],
            outputs=found_outputs(),
        )

    @classmethod
    @naming_inputs
    def execute(
        cls,
        model: scale_rae.ScaleRAE,
        prompt: str,
        candidates: int,
        keep: int,
        metric: str,
        reward: Reward | None = None,
        **options: Any,
    ) -> io.NodeOutput:
        """The best images, their latents, and what was found of all candidates."""
        if keep > candidates:
            raise InputError(f"keep {keep}: there are only {candidates} candidates; draw more, or keep fewer")
        if reward is None and TABLE[metric].needs_reward:
            raise InputError(
                f"metric {metric}: needs a reward; connect Load Scale-RAE Reward, or choose another metric"
            )
        sampling = options_from(Sampling(num_images=candidates), options)
        request, about = judged_prompt(prompt)
        drawn = draw(model, request, sampling)
        pictures = [one.image for one in drawn.images if one.image is not None]
        judged = judgements(model, [one.latent for one in drawn.images], request, about, drawn.reply)
        rewards = None if reward is None else reward.score(pictures, about)
        ranking = rank(Verdicts.made(judged, rewards), metric)
        best = ranking.order[:keep]
        report = [
            {
                "seed": drawn.images[i].seed,
                metric: ranking.scores[i],
                "reward": None if rewards is None else rewards[i],
                **judged[i],
            }
            for i in ranking.order
        ]
        return io.NodeOutput(
            running.to_comfy([pictures[i] for i in best]),
            torch.stack([drawn.images[i].latent for i in best]),
            json.dumps(report, indent=1),
        )


class DrawUntilAccepted(io.ComfyNode):
    """Draws candidates until enough are accepted, and drops those early that will not do: adaptive best of N."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAEDrawUntilAccepted",
            display_name="Scale-RAE Draw Until Accepted",
            category=CATEGORY,
            description="Adaptive best of N: draws candidates until enough are accepted. The model (and a reward, if one "
            "is connected) looks at half-formed images and drops those that will not do.",
            inputs=[
                Model.Input("model"),
                prompt_input(ABOUT, "What to draw. The request for it is worded by the node, unless it is one."),
                io.Int.Input("keep", default=1, min=1, tooltip="Images to keep, the best first."),
                *inputs_of(SearchOptions, without=("save_dropped",)),
                *inputs_of(Sampling, without=("num_images",)),
                RewardModel.Input("reward", optional=True),
            ],
            outputs=found_outputs(),
        )

    @classmethod
    @naming_inputs
    def execute(
        cls, model: scale_rae.ScaleRAE, prompt: str, keep: int, reward: Reward | None = None, **options: Any
    ) -> io.NodeOutput:
        """The kept images, their latents, and what became of all candidates."""
        search, sampling = options_from(SearchOptions(), options), options_from(Sampling(), options)
        search.check()
        sampling.check()
        if reward is None:
            search.check_without_reward()

        def stop(evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
            running.stop_if_interrupted()

        found = scale_rae.search(
            model,
            prompt,
            keep=keep,
            reward=reward,
            search=search,
            options=sampling.options,
            seed=sampling.seeds[0],
            max_new_tokens=sampling.max_new_tokens,
            batch_size=sampling.batch_size,
            watch=running.searching_progress(search.max_candidates),
            callback=stop,
        )
        check_drawn(model, found.images, found.text)
        report = {
            "kept": [
                {"seed": one.seed, "accepted": one.accepted, "reward": one.reward, **one.judgement}
                for one in found.images
            ],
            "candidates": [
                {"seed": one.seed, "fate": one.fate, "reason": one.reason, "evaluations": one.evaluations}
                for one in found.candidates
            ],
        }
        return io.NodeOutput(
            running.to_comfy([one.image for one in found.images]),
            torch.stack([one.latent for one in found.images]),
            json.dumps(report, indent=1),
        )


class SaveLatent(io.ComfyNode):
    """Writes latents into ComfyUI's output folder, one file each, as scale-rae t2i does with --save-latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAESaveLatent",
            display_name="Save Scale-RAE Latent",
            category=CATEGORY,
            description="Writes each latent into a file NAME_00001_latent.pt in ComfyUI's output folder. The scale-rae "
            "command reads these files too.",
            is_output_node=True,
            inputs=[
                Latent.Input("latents"),
                io.String.Input(
                    "filename_prefix", default="latents/Scale-RAE", tooltip="May begin with a folder: folder/name."
                ),
            ],
            outputs=[Latent.Output(display_name="latents")],
        )

    @classmethod
    def execute(cls, latents: Tensor, filename_prefix: str) -> io.NodeOutput:
        """The latents, once they are written."""
        files = folders.new_latent_files(filename_prefix, len(latents))
        for path, latent in zip(files, latents, strict=True):
            write_new(path, latent_bytes(latent))
        return io.NodeOutput(latents)


class LoadLatent(io.ComfyNode):
    """Reads a latent file from ComfyUI's input or output folder; no code in the file is run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="ScaleRAELoadLatent",
            display_name="Load Scale-RAE Latent",
            category=CATEGORY,
            description="Reads a latent file (.pt) in ComfyUI's input or output folder.",
            inputs=[
                io.Combo.Input(
                    "latent",
                    options=folders.latents(),
                    tooltip="Files of Save Scale-RAE Latent have [output] behind the name. Press R once a new one is there.",
                )
            ],
            outputs=[Latent.Output(display_name="latents")],
        )

    @classmethod
    def fingerprint_inputs(cls, latent: str) -> Any:
        """Changes when the file does, so that ComfyUI reads it again."""
        stat = folders.latent_file(latent).stat()
        return stat.st_mtime_ns, stat.st_size

    @classmethod
    def execute(cls, latent: str) -> io.NodeOutput:
        """The latent, as a batch of one."""
        tensor = load_latent(folders.latent_file(latent)).float()
        return io.NodeOutput(tensor if tensor.dim() == 3 else tensor[None])


def draw(model: scale_rae.ScaleRAE, prompt: str, sampling: Sampling, latent: Tensor | None = None) -> Generation:
    """What `ScaleRAE.generate` draws, with progress.

    Raises:
        InputError: when the model answers without drawing.
    """
    progress, callback = running.drawing_progress(model)
    drawn = model.generate(
        prompt,
        num_images=sampling.num_images,
        seed=sampling.seeds[0],
        options=sampling.options,
        max_new_tokens=sampling.max_new_tokens,
        batch_size=sampling.batch_size,
        latents=None if latent is None else list(latent),
        progress=progress,
        callback=callback,
    )
    check_drawn(model, drawn.images, drawn.text)
    return drawn


def check_drawn(model: scale_rae.ScaleRAE, images: Sequence[object], text: str) -> None:
    """Raises InputError when there are no images, with what the model said instead."""
    if not images:
        raise InputError(
            f"the model answered without drawing: {shorten(text, 200)!r}; {after_no_drawing(model.source)}"
        )


def judgements(
    model: scale_rae.ScaleRAE, latents: Sequence[Tensor], request: str, about: str, reply: Reply
) -> list[dict[str, Any]]:
    """What the model finds of each latent, drawn or not for the `request` that it gave the `reply` to."""

    def judge(some: Sequence[Tensor]) -> list[dict[str, Any]]:
        return [score.judgement() for score in model.score(some, about, request=request, request_reply=reply)]

    return running.in_parts(latents, READ_AT_ONCE, judge)


def judged_prompt(prompt: str) -> tuple[str, str]:
    """(the message that asks for images, what they are judged against) of a prompt, as `scale_rae.search` has them."""
    return as_request(prompt, PROMPT_PREFIX), subject(clean_message(prompt))


class ScaleRAEExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes."""
        return [
            LoadModel,
            LoraAdapter,
            LoadReward,
            TextToImage,
            EncodeImage,
            DecodeLatent,
            Ask,
            ScoreLatents,
            BestOfN,
            DrawUntilAccepted,
            SaveLatent,
            LoadLatent,
        ]


async def comfy_entrypoint() -> ScaleRAEExtension:
    """The extension, which ComfyUI asks for when it starts."""
    return ScaleRAEExtension()
