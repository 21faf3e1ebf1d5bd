"""scale-rae t2i: draw images from text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from scale_rae.cli import options as o
from scale_rae.cli.app import fail, say
from scale_rae.cli.drawing import Message, prepare, send
from scale_rae.cli.progress import Bars
from scale_rae.errors import InputError, OptionError
from scale_rae.opening import OpenedModel
from scale_rae.options import check_count
from scale_rae.outputs import check_folder, read_manifest
from scale_rae.prompt import clean_message
from scale_rae.promptfile import read_prompts, read_template
from scale_rae.provenance import differences
from scale_rae.wording import after_no_drawing

# What a manifest decides, so that these options cannot go with --from-manifest.
_RECORDED = ["num_images", "seed", "guidance_level", "guidance_interval", "steps", "solver", "max_new_tokens"]
_RECORDED += ["batch_size"]


def command(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Option(help='What to draw: "Can you generate a photo of …?"')] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Draw every line of a .txt file, or every {"prompt": …, "index": …} of a .jsonl file. Image j of a '
            "prompt depends on the seed, the prompt's index (default: its place) and j."
        ),
    ] = None,
    from_manifest: Annotated[
        Path | None, typer.Option(help="Draw again what the manifest of an earlier t2i records.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --from-manifest: draw even if the model's files are others now.")
    ] = False,
    model_path: o.ModelPath = o.DEFAULT_MODEL,
    decoder_repo: o.DecoderRepo = None,
    revision: o.Revision = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    compile: o.Compile = "auto",
    quantize: o.Quantize = None,
    num_images: o.NumImages = 1,
    seed: o.Seed = 42,
    guidance_level: o.GuidanceLevel = 1.0,
    guidance_interval: o.GuidanceInterval = None,
    steps: o.Steps = o.DEFAULT_STEPS,
    solver: o.Solver = "euler",
    max_new_tokens: o.MaxNewTokens = 512,
    batch_size: o.BatchSize = None,
    post_qa_prompt: Annotated[
        str | None,
        typer.Option(
            help="Ask this about each drawing; {prompt} in it becomes the drawing's prompt. With a template: what the "
            "template's {prompt} becomes.",
            rich_help_panel=o.QUESTIONS,
        ),
    ] = None,
    post_qa_template_path: Annotated[
        Path | None,
        typer.Option(
            help="Ask the text of this file, {prompt} in it replaced by the drawing's prompt (or the prompt put at its "
            "end), as in ./assets/qa_prompt_template.txt.",
            rich_help_panel=o.QUESTIONS,
        ),
    ] = None,
    post_qa_mode: Annotated[
        str,
        typer.Option(
            callback=o.one_of(*o.POST_QA_MODES),
            help="latent: show the model its latent; image: show it the decoded image, encoded again.",
            rich_help_panel=o.QUESTIONS,
        ),
    ] = "latent",
    max_new_tokens_qa: Annotated[
        int, typer.Option(help="Longest answer, in tokens.", rich_help_panel=o.QUESTIONS)
    ] = 64,
    output_dir: o.OutputDir = Path("outputs"),
    save_latent: o.SaveLatent = False,
    skip_decoder: o.SkipDecoder = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Draw images from a prompt, or from every prompt of a file.

    Leaves sample_<time>.png and sample_<time>_manifest.json in the output folder; the manifest has what it takes to
    draw the same image again (--from-manifest).
    """
    given = {name for name in ctx.params if _is_given(ctx, name)}
    if (prompt is not None) + (prompts is not None) + (from_manifest is not None) != 1:
        raise typer.BadParameter("give one of them", param_hint=["--prompt", "--prompts", "--from-manifest"])
    if force and from_manifest is None:
        raise typer.BadParameter("goes with --from-manifest", param_hint="--force")
    if post_qa_mode == "image" and skip_decoder:
        raise typer.BadParameter("image needs the pixels that --skip-decoder leaves out", param_hint="--post-qa-mode")

    sampling = o.Sampling(
        num_images, seed, guidance_level, guidance_interval, steps, solver, max_new_tokens, batch_size
    )
    choice = o.ModelChoice(model_path, decoder_repo, revision, device, dtype, compile, quantize)
    output = o.Output(output_dir, save_latent, skip_decoder, json, debug)
    post_qa = _post_qa(post_qa_prompt, post_qa_template_path, post_qa_mode, max_new_tokens_qa)
    recorded: dict[str, Any] | None = None
    if from_manifest is not None:
        clash = [f"--{name.replace('_', '-')}" for name in _RECORDED if name in given]
        if clash:
            raise typer.BadParameter(f"the manifest says {', '.join(clash)} already", param_hint="--from-manifest")
        recorded = read_manifest(from_manifest)
        messages, sampling, choice = _from_manifest(recorded, from_manifest, choice, given)
    elif prompts is not None:
        messages = [
            Message(
                record.prompt,
                index=record.index,
                where=f"{prompts}: line {record.line}",
                label=f"-{record.index:05}",
                recorded={"prompt_index": record.index, "prompt_line": record.line, "prompt_record": record.extra},
            )
            for record in read_prompts(prompts)
        ]
    else:
        assert prompt is not None
        clean_message(prompt)
        messages = [Message(prompt)]
    check_folder(output_dir)
    bars = Bars()
    source = prepare(choice, sampling, bars)
    session = OpenedModel(choice, bars, source=source, decoder=not skip_decoder, debug=debug)
    if recorded is not None:
        _check_same_model(recorded, session, from_manifest, force)
    outcomes = send(session, {"mode": "t2i"}, messages, sampling, output, bars, post_qa)
    undrawn = [outcome for outcome in outcomes if not outcome.drew]
    if undrawn:
        how_many = "" if len(messages) == 1 else f" {len(undrawn)} of {len(messages)} prompts"
        remedy = after_no_drawing(session.model.source)
        if any(outcome.cut_off for outcome in undrawn):
            remedy = f"its reply was cut off by --max-new-tokens {sampling.max_new_tokens}"
        fail(f"the model answered{how_many} without drawing; {remedy}")


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _post_qa(prompt: str | None, template_path: Path | None, mode: str, max_new_tokens: int) -> o.PostQA | None:
    if prompt is None and template_path is None:
        return None
    if prompt is not None:
        clean_message(prompt)
    check_count("max new tokens of an answer", max_new_tokens)
    template = read_template(template_path) if template_path is not None else None
    return o.PostQA(prompt, template, mode, max_new_tokens)


def _from_manifest(
    manifest: dict[str, Any], path: Path, choice: o.ModelChoice, given: set[str]
) -> tuple[list[Message], o.Sampling, o.ModelChoice]:
    """The message, sampling and model that a manifest records; model, decoder, device and dtype as given, if given."""

    def get(name: str, kind: type | tuple[type, ...], optional: bool = False) -> Any:
        value = manifest.get(name)
        if value is None and optional:
            return None
        if not isinstance(value, kind) or isinstance(value, bool):
            problem = "is missing" if value is None else f"is {value!r:.40}"
            raise InputError(f"{path}: not a manifest that can be drawn from: {name} {problem}")
        return value

    mode = get("mode", str)
    if mode != "t2i":
        raise InputError(f"{path}: is the manifest of scale-rae {mode}; only those of t2i can be drawn again")
    seeds = get("image_seeds", list)
    if not all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**63 for s in seeds):
        raise InputError(f"{path}: not a manifest that can be drawn from: image_seeds must be whole numbers")
    if not seeds:
        raise InputError(f"{path}: records no image (the model answered without drawing)")
    interval = get("guidance_interval", list, optional=True)
    if interval is not None and (
        len(interval) != 2 or any(not isinstance(x, int | float) or isinstance(x, bool) for x in interval)
    ):
        raise InputError(f"{path}: not a manifest that can be drawn from: guidance_interval is {interval!r:.40}")
    sampling = o.Sampling(
        num_images=len(seeds),
        seed=get("seed", int),
        guidance_level=get("guidance_level", (int, float)),
        guidance_interval=(interval[0], interval[1]) if interval is not None else None,
        steps=get("steps", int),
        solver=get("solver", str),
        max_new_tokens=get("max_new_tokens", int),
        batch_size=get("batch_size", int, optional=True),
        image_seeds=tuple(seeds),
    )
    model, decoder = get("model", dict), get("decoder", dict, optional=True)
    changes: dict[str, Any] = {}
    if "model_path" not in given:
        changes["model_path"] = get("model_path", str)
        if "revision" not in given:
            changes["revision"] = model.get("revision")
    if not {"decoder_repo", "model_path"} & given and decoder is not None and not decoder.get("with_model"):
        changes["decoder_repo"] = decoder.get("name")  # one that lies with the model is found with it
    for name in ("device", "dtype"):
        if name not in given:
            changes[name] = get(name, str)
    if "quantize" not in given:
        changes["quantize"] = get("quantize", str, optional=True)
    kept = {str(k): manifest[k] for k in ("prompt_index", "prompt_line", "prompt_record") if k in manifest}
    message = Message(get("prompt", str), recorded=kept | {"from_manifest": str(path)})
    clean_message(message.prompt)
    choice = dataclasses.replace(choice, **changes)
    try:  # here, where it is known that they are the file's values, and no options'
        sampling.check()
        choice.check()
    except OptionError as e:
        raise InputError(f"{path}: not a manifest that can be drawn from: {e}") from e
    return [message], dataclasses.replace(sampling, guidance_level=float(sampling.guidance_level)), choice


def _check_same_model(recorded: dict[str, Any], session: OpenedModel, path: Path | None, force: bool) -> None:
    """Refuses, or with `force` warns, when the files loaded are not those that drew the manifest's images."""
    now = session.record()
    found = differences(recorded, now)
    if found and not force:
        raise InputError(
            f"{path}: drawn with other files than those here ({'; '.join(found)}); "
            "give the right --model-path and --decoder-repo, or draw with these: --force"
        )
    if found:
        say(f"warning: other files than those of {path} ({'; '.join(found)})")
    then = recorded.get("versions", {})
    for name in ("torch", "transformers"):
        if isinstance(then, dict) and then.get(name) not in (None, now["versions"][name]):
            say(f"note: {name} {now['versions'][name]} here, {then[name]} then: rounding may differ")
