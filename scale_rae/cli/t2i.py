"""The command `scale-rae t2i`: draw images from text."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from scale_rae.cli.app import fail, say
from scale_rae.cli.options import OutputOptions, PostQA, UntilAccepted
from scale_rae.cli.progress import Bars
from scale_rae.cli.runs import ModelInput, note_seed, prepare, send
from scale_rae.cli.searches import check_search, search_and_save
from scale_rae.cli.signature import expanded, flag_name, given_options
from scale_rae.errors import InputError, OptionError
from scale_rae.jsonio import Fields
from scale_rae.manifest import noise_gpu, recorded_sampling
from scale_rae.opening import OpenedModel
from scale_rae.options import ModelChoice, Sampling, SamplingOptions, options_of
from scale_rae.outputs import read_manifest
from scale_rae.prompt import clean_message
from scale_rae.promptfile import MOST_BYTES, parse_prompts, read_prompts, read_template
from scale_rae.provenance import differences
from scale_rae.wording import after_no_drawing


@expanded
def command(
    ctx: typer.Context,
    *,
    positional: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="The prompt, if no option gives one.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help='What to draw: "Can you generate a photo of …?"')] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Draw every line of a .txt file, or every {"prompt": …, "index": …} of a .jsonl file; - is the standard '
            "input. Image j of a prompt depends on the seed, the prompt's index (default: its place) and j."
        ),
    ] = None,
    from_manifest: Annotated[
        Path | None, typer.Option(help="Draw again what the manifest of an earlier t2i records.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --from-manifest: draw even if the model's files are others now.")
    ] = False,
    choice: ModelChoice,
    sampling: Sampling,
    until: UntilAccepted,
    post_qa: PostQA,
    output: OutputOptions,
) -> None:
    """Draw images from a prompt, or from every prompt of a file.

    Leaves sample_<time>.png and sample_<time>_manifest.json in the output folder; the manifest has what it takes to
    draw the same image again (--from-manifest).
    """
    given = given_options(ctx)
    if positional is not None and len(positional) > 1:
        raise typer.BadParameter("several arguments; put the prompt in quotes", param_hint="PROMPT")
    if sum(source is not None for source in (positional or None, prompt, prompts, from_manifest)) != 1:
        raise typer.BadParameter("give one of them", param_hint=["PROMPT", "--prompt", "--prompts", "--from-manifest"])
    prompt = positional[0] if positional else prompt
    if force and from_manifest is None:
        raise typer.BadParameter("goes with --from-manifest", param_hint="--force")
    if post_qa.mode == "image" and output.skip_decoder:
        raise typer.BadParameter("image needs the pixels that --skip-decoder leaves out", param_hint="--post-qa-mode")
    output.check(given)
    _check_search(until, sampling, output, from_manifest, given)
    if post_qa.asked:
        post_qa = _with_template(post_qa)
    recorded: dict[str, Any] | None = None
    if from_manifest is not None:
        recorded_names = [option.name for option in options_of(Sampling)]
        clash = [flag_name(name) for name in recorded_names if name in given]
        if clash:
            raise typer.BadParameter(f"the manifest says {', '.join(clash)} already", param_hint="--from-manifest")
        if "memory" in given:  # it would choose another quantisation, which draws another image
            raise typer.BadParameter(
                "the manifest says --quantize and --offload already; --offload may be given", param_hint="--memory"
            )
        recorded = read_manifest(from_manifest)
        inputs, sampling, choice = _from_manifest(recorded, from_manifest, choice, given)
        if "upscale" not in given:
            recorded_size = Fields(recorded, from_manifest, InputError).count("upscale", 1)
            output = dataclasses.replace(output, upscale=recorded_size)
            output.check(given)
    elif prompts is not None:
        inputs = _of_file(prompts)
    else:
        assert prompt is not None
        clean_message(prompt)
        inputs = [ModelInput(prompt)]
    output.check_place()
    bars = Bars(output.quiet)
    note_seed(ctx, sampling, bars)
    chosen = given if recorded is None else {option.name for option in options_of(SamplingOptions)}
    source, sampling = prepare(choice, sampling, bars, chosen)
    if until.keep is not None:
        check_search(source, sampling, until)
    opened = OpenedModel(choice, bars, source=source, decoder=not output.skip_decoder, debug=output.debug)
    if recorded is not None:
        _check_same_model(recorded, opened, from_manifest, force)
    mode = {"mode": "t2i"}
    if until.keep is not None:
        outcomes = search_and_save(opened, mode, inputs, sampling, until, output, bars, post_qa)
    else:
        outcomes = send(opened, mode, inputs, sampling, output, bars, post_qa if post_qa.asked else None)
    undrawn = [outcome for outcome in outcomes if not outcome.drew]
    if undrawn:
        how_many = "" if len(inputs) == 1 else f" {len(undrawn)} of {len(inputs)} prompts"
        remedy = after_no_drawing(opened.model.source)
        if any(outcome.cut_off for outcome in undrawn):
            remedy = f"its reply was cut off by --max-new-tokens {sampling.max_new_tokens}"
        fail(f"the model answered{how_many} without drawing; {remedy}")


def _of_file(path: Path) -> list[ModelInput]:
    """The prompts of a file, or of the standard input."""
    if str(path) == "-":
        if sys.stdin.isatty():
            say("one prompt per line; Ctrl-D ends them")
        name, records = "standard input", parse_prompts(sys.stdin.buffer.read(MOST_BYTES + 1), "standard input")
    else:
        name, records = str(path), read_prompts(path)
    return [
        ModelInput(
            record.prompt,
            index=record.index,
            where=f"{name}: line {record.line}",
            label=f"-{record.index:05}",
            recorded={"prompt_index": record.index, "prompt_line": record.line, "prompt_record": record.extra},
        )
        for record in records
    ]


def _check_search(
    until: UntilAccepted, sampling: Sampling, output: OutputOptions, from_manifest: Path | None, given: set[str]
) -> None:
    """Raises BadParameter for flags of a search without one, or flags that no search can go with; else checks the values."""
    keep = flag_name("until_accepted")
    if until.keep is None:
        if alone := [flag_name(o.name) for o in options_of(UntilAccepted) if o.name in given]:
            raise typer.BadParameter(f"only with {keep}", param_hint=alone)
        return
    for clashes, flag, why in (
        (from_manifest is not None, "--from-manifest", "draws the images that a search found by their seeds"),
        (len(sampling.seeds) > 1, "--seed", "begins the seeds of all candidates, so there can be only one"),
        (sampling.num_images > 1, "--num-images", f"is the number of images without a search; give {keep} N"),
        (output.skip_decoder, "--skip-decoder", "leaves out the pixels that candidates are looked at by"),
    ):
        if clashes:
            raise typer.BadParameter(f"not with {keep}: {why}", param_hint=flag)
    until.check()


def _with_template(post_qa: PostQA) -> PostQA:
    """The question with its template read."""
    if post_qa.prompt is not None:
        clean_message(post_qa.prompt)
    post_qa.check()
    path = post_qa.template_path
    return dataclasses.replace(post_qa, template=None if path is None else read_template(path))


def _from_manifest(
    raw: dict[str, Any], path: Path, choice: ModelChoice, given: set[str]
) -> tuple[list[ModelInput], Sampling, ModelChoice]:
    """The input, sampling and model that a manifest records; model, decoder, device and dtype may be given instead."""
    manifest = Fields(raw, f"{path}: not a manifest that can be drawn from", InputError)
    mode = manifest.get("mode", str)
    if mode != "t2i":
        raise InputError(f"{path}: is the manifest of scale-rae {mode}; only those of t2i can be drawn again")
    sampling = recorded_sampling(manifest)
    if not sampling.image_seeds:
        raise InputError(f"{path}: records no image (the model answered without drawing)")
    model, decoder = manifest.get("model", dict), manifest.get("decoder", dict, None)
    changes: dict[str, Any] = {}
    if "model_path" not in given:
        changes["model_path"] = manifest.get("model_path", str)
        if "revision" not in given:
            changes["revision"] = model.get("revision")
    if not {"decoder_repo", "model_path"} & given and decoder is not None and not decoder.get("with_model"):
        changes["decoder_repo"] = decoder.get("name")  # a decoder inside or beside the model is found there
    for name in ("device", "dtype"):
        if name not in given:
            changes[name] = manifest.get(name, str)
    changes["memory"] = None
    if "quantize" not in given:
        changes["quantize"] = manifest.get("quantize", str, None)
    if "lora" not in given:
        changes["lora"] = _recorded_lora(manifest)
    if "offload" not in given and "device" not in given:  # a device of another kind may have nowhere to offload to
        changes["offload"] = manifest.get("offload", str, "none")
    kept = {str(k): raw[k] for k in ("prompt_index", "prompt_line", "prompt_record") if k in raw}
    message = ModelInput(manifest.get("prompt", str), recorded=kept | {"from_manifest": str(path)})
    clean_message(message.prompt)
    choice = dataclasses.replace(choice, **changes)
    try:  # here, so that the error names the file, not the options
        sampling.check()
        choice.check()
    except OptionError as e:
        raise InputError(f"{path}: not a manifest that can be drawn from: {e}") from e
    return [message], sampling, choice


def _recorded_lora(manifest: Fields) -> tuple[str, ...]:
    """The adapters that a manifest records, as --lora has them."""
    recorded = manifest.get("lora", list, [])
    parts = [Fields(entry, f"{manifest.where}: lora", InputError) for entry in recorded if isinstance(entry, dict)]
    return tuple(f"{part.get('name', str)}:{part.number('weight'):g}" for part in parts)


def _check_same_model(recorded: dict[str, Any], opened: OpenedModel, path: Path | None, force: bool) -> None:
    """Raises InputError, or with `force` warns, when the loaded files are not those that drew the manifest's images."""
    now = opened.record()
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
    if "noise_gpu" in recorded and recorded["noise_gpu"] != (here := noise_gpu(now["device"])):
        say(f"note: the noise is drawn by {here} here, by {recorded['noise_gpu']} then: the images may be others")
