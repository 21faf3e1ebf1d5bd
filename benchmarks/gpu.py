"""Speed and memory at the published sizes, on made-up weights built on the device: a table, and JSON with --json FILE.

    python benchmarks/gpu.py --json gpu.json                       # everything that --seconds-budget leaves time for
    python benchmarks/gpu.py --stages ceilings,dit --sizes 1.5b
    python benchmarks/gpu.py --tiny --device cpu                   # does it run at all
    python benchmarks/gpu.py --markdown gpu.json                   # tables from figures measured before (--into FILE: into a page)

Every figure is the median of one to five repeats after a first run, which is given apart (it compiles and captures). Clocks are
read with the device synchronised. Weights and inputs are random, never zero. A stage that fails is reported and the others go on.
"Share" is of the bf16 matrix product rate that the same run measured first: in a burst and, apart, sustained for a second.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch._dynamo
from torch import Tensor, nn

from scale_rae import flow
from scale_rae.compiling import attention_kernels
from scale_rae.config import ScaleRAEConfig, parse_config
from scale_rae.cuda_graphs import Captured, graph_memory
from scale_rae.decoder import DecoderConfig, PixelDecoder
from scale_rae.dit import DiT, rope_table
from scale_rae.dit import flops as dit_flops
from scale_rae.fast_dit import Attend, FastDiT, attend_rotating
from scale_rae.float8 import Float8Linear, quantize
from scale_rae.hub import Source
from scale_rae.language import Conversation, LanguageModel, Reply
from scale_rae.options import DEFAULT_STEPS, SamplingOptions, Speed
from scale_rae.outputs import png_bytes
from scale_rae.pipeline import ScaleRAE
from scale_rae.prompt import ChatTokenizer
from scale_rae.promptfile import PromptRecord
from scale_rae.scaling.experiment import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.worker import Order, Worker, WorkerLog
from tests.made_checkpoints import write_tokenizer

OFFICIAL_DIT = 2.13  # seconds per image in the official implementation's DiT on one H200, float32
EVALUATIONS = DEFAULT_STEPS

# Published sizes: Qwen2.5's and the DiT's, as config.json has them. "tiny" is for trying the benchmark itself.
LANGUAGE = {
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "tiny": (64, 128, 2, 4, 2, 300, True),
}
DIT = {"1.5b": (2048, 32, 32, 2048), "7b": (3072, 48, 48, 3072), "tiny": (64, 4, 4, 48)}
DIT_NAME = {"1.5b": "2.4B", "7b": "9.8B", "tiny": "tiny"}


def config_of(size: str) -> dict[str, Any]:
    """A config.json of the published layout."""
    hidden, inner, layers, heads, groups, vocabulary, tied = LANGUAGE[size]
    width, depth, dit_heads, z = DIT[size]
    return {
        "architectures": ["ScaleRAEQwenForCausalLM"],
        "model_type": "cambrian_qwen",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "vision_loss": "diffusion-loss",
        "vision_loss_mode": "query",
        "vision_tower_aux_token_len_list": [16 if size == "tiny" else 256],
        "mm_vision_tower_aux_list": ["siglip2-made-up"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": True,
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "diffusion_model_hidden_size": width,
        "diffusion_model_depth": depth,
        "diffusion_model_heads": dit_heads,
        "diffusion_model_z_channels": z,
        "diffusion_model_channels": 48 if size == "tiny" else 1152,
        "diffusion_class_dropout_prob": 0.1,
        "tokenizer_model_max_length": 2048,
    }


def decoder_config(size: str) -> DecoderConfig:
    """The published pixel decoder (ViT-XL), or a tiny one."""
    if size == "tiny":
        return DecoderConfig(channels=48, width=48, depth=2, heads=4, inner=96, patch=14, image=56, eps=1e-12)
    return DecoderConfig(channels=1152, width=1152, depth=28, heads=16, inner=4096, patch=14, image=224, eps=1e-12)


def encoder_config(size: str) -> dict[str, Any]:
    """SigLIP-2 So400M's vision config, or a tiny one."""
    sizes = (48, 96, 2, 4, 56) if size == "tiny" else (1152, 4304, 27, 16, 224)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    return {"model_type": "siglip_vision_model", "patch_size": 14, **dict(zip(names, sizes, strict=True))}


# Made-up models -----------------------------------------------------------------------------------------------------------


def fill_randomly(
    module: nn.Module, device: torch.device, dtype: torch.dtype, seed: int, float32: tuple[str, ...] = ()
) -> None:
    """Gives a module built on the meta device random weights, matrices of a size that keeps activations at theirs.

    Modules with one of `float32` in their name get float32 weights.
    """
    generator = torch.Generator(device).manual_seed(seed)
    filled: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) not in filled:
                kept = torch.float32 if any(part in path for part in float32) else dtype
                tensor = torch.empty(parameter.shape, dtype=kept, device=device)
                if name == "weight" and tensor.dim() == 1:
                    tensor.normal_(1.0, 0.1, generator=generator)
                elif (
                    tensor.dim() > 1
                    and "embed_tokens" not in path
                    and "queries" not in name
                    and "pos_embed" not in name
                ):
                    tensor.normal_(0.0, 1 / math.sqrt(tensor[0].numel()), generator=generator)
                else:
                    tensor.normal_(0.0, 0.02, generator=generator)
                filled[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
            setattr(owner, name, filled[id(parameter)])
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = (
                buffer.to(device) if buffer.device.type != "meta" else _computed(module, name, device)
            )
    module.eval()


def _computed(module: nn.Module, name: str, device: torch.device) -> Tensor:
    raise RuntimeError(f"{type(module).__name__}: the buffer {name} is on the meta device")


def made_dit(size: str, device: torch.device, dtype: torch.dtype) -> DiT:
    """A velocity network with random weights."""
    config = parse_config(config_of(size), Path("config.json"))
    with torch.device("meta"):
        dit = DiT(config.dit)
    fill_randomly(dit, device, dtype, 1, ("t_embedder", "norm"))
    return dit


def made_model(size: str, device: torch.device, dtype: torch.dtype, speed: Speed, folder: Path) -> ScaleRAE:
    """A model with random weights that draws, decodes, answers and scores. Its encoder knows the pixels' scale only."""
    config = parse_config(config_of(size), Path("config.json"))
    with torch.device("meta"):
        language = LanguageModel(config)
    if config.tied_embeddings:
        language.lm_head.weight = language.model.embed_tokens.weight
    fill_randomly(language, device, dtype, 2)
    write_tokenizer(folder)
    tokenizer = ChatTokenizer(folder, config.image_markers)
    dit = made_dit(size, device, dtype)
    source = Source("made-up", folder)
    model = ScaleRAE(config, tokenizer, language, dit, None, source, None, dtype, device, speed)
    with torch.device("meta"):
        decoder = PixelDecoder(decoder_config(size))
    fill_randomly(decoder, device, dtype, 3)
    model._decoder = decoder.to(dtype)
    model._encoder = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)  # type: ignore[assignment]
    return model


# Measuring ----------------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What is measured on, and what came out: `figures` are rows of the table."""

    device: torch.device
    dtype: torch.dtype
    repeat: int
    budget: float
    json_file: Path | None
    tiny: bool
    figures: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    ceiling: float = math.nan  # FLOP/s of a large bf16 product
    sustained: float = math.nan  # of one after the other for a second
    began: float = field(default_factory=time.perf_counter)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], repeat: int | None = None) -> tuple[float, float]:
        """(first, median of `repeat` further) wall seconds, the device synchronised before and after each."""
        times = []
        for _ in range(1 + (repeat or self.repeat)):
            self.sync()
            start = time.perf_counter()
            run()
            self.sync()
            times.append(time.perf_counter() - start)
        return times[0], statistics.median(times[1:])

    def add(self, stage: str, name: str, value: float, unit: str, target: str = "", **more: Any) -> None:
        """Records and prints a figure."""
        row = {"stage": stage, "name": name, "value": value, "unit": unit, "target": target, **more}
        self.figures.append(row)
        print(_line(row), flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Runs a stage: its failure is kept and reported, memory is released, what is known so far is written."""
        start = time.perf_counter()
        print(f"-- {name} (at {start - self.began:.0f} s)", flush=True)
        with self.reported(name):
            yield
        print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)
        self.release()
        self.write()

    @contextlib.contextmanager
    def reported(self, name: str) -> Iterator[None]:
        """Keeps and prints the failure of what is inside, for the exit status and the end; what comes after goes on."""
        try:
            yield
        except Exception:
            self.errors[name] = traceback.format_exc(limit=-8)
            print(f"FAILED {name}\n{self.errors[name]}", flush=True)

    def release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()

    def over(self, name: str) -> bool:
        """Whether the budget is used up; then the stage is noted as skipped."""
        if time.perf_counter() - self.began < self.budget:
            return False
        self.skipped.append(name)
        print(f"-- {name}: skipped, {self.budget:.0f} s are over", flush=True)
        return True

    def peak_gib(self, reset: bool = False) -> float:
        if self.device.type != "cuda":
            return math.nan
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.max_memory_reserved(self.device) / 2**30

    def write(self) -> None:
        if self.json_file is None:
            return
        environment = {"python": platform.python_version(), "torch": torch.__version__, "device": str(self.device)}
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "describe", "--always", "--dirty"]
            git = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
            environment["commit"] = git.stdout.strip()
        if self.device.type == "cuda":
            environment["gpu"] = torch.cuda.get_device_name(self.device)
            environment["cuda"] = str(torch.version.cuda)
        value = {
            "environment": environment,
            "figures": self.figures,
            "errors": self.errors,
            "skipped": self.skipped,
            "seconds": time.perf_counter() - self.began,
        }
        self.json_file.write_text(json.dumps(_finite(value), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


COLUMNS = {  # what a figure may have besides its value, as it is printed
    "share": ("share", "{:.1%}"),
    "share_sustained": ("sustained", "{:.1%}"),
    "times_official": ("x official", "{:.1f}"),
    "first": ("first run", "{:.2g} s"),
    "peak_gib": ("GiB", "{:.3g}"),
}


def _line(row: dict[str, Any]) -> str:
    value = row["value"]
    shown = "-" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value:.4g}"
    parts = [f"{row['stage']:9} {row['name']:52} {shown:>9} {row['unit']:9}"]
    for key, (label, form) in COLUMNS.items():
        number = row.get(key)
        if isinstance(number, float) and math.isfinite(number):
            parts.append(f"{label} {form.format(number)}")
    if row["target"]:
        parts.append(f"[target {row['target']}]")
    return "  ".join(parts)


def relative_error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.double().cpu(), reference.double().cpu()
    return float((value - reference).norm() / reference.norm())


# Stages -------------------------------------------------------------------------------------------------------------------


def ceilings(b: Bench) -> None:
    """The rates that everything else is measured against: on random data, since zeros run faster."""
    side = 256 if b.tiny else 8192
    x, y = (torch.randn(side, side, device=b.device, dtype=b.dtype) for _ in range(2))
    out = torch.empty_like(x)
    times = 2 if b.tiny else 20

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(x, y, out=out)

    _, seconds = b.seconds(lambda: products(times), 5)
    b.ceiling = 2.0 * side**3 * times / seconds
    b.add("ceilings", f"bf16 matrix product {side}³", b.ceiling / 1e12, "TFLOP/s")
    many = 4 if b.tiny else round(b.ceiling / (2.0 * side**3))  # a chip at its power limit slows down on the way
    _, seconds = b.seconds(lambda: products(many), 1)
    b.sustained = 2.0 * side**3 * many / seconds
    b.add("ceilings", f"bf16 matrix product {side}³, sustained for {seconds:.2f} s", b.sustained / 1e12, "TFLOP/s")
    count = 1 << (20 if b.tiny else 30)
    source = torch.randint(0, 100, (count,), dtype=torch.int32, device=b.device)
    copy = torch.empty_like(source)
    _, seconds = b.seconds(lambda: copy.copy_(source), 5)
    b.add("ceilings", "device copy, read + written", 8.0 * count / seconds / 1e12, "TB/s")
    if b.device.type == "cuda" and torch.cuda.get_device_capability(b.device) >= (8, 9):
        with contextlib.suppress(Exception):
            one = torch.ones(side, 1, device=b.device)
            x8, y8 = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)

            def float8() -> None:
                for _ in range(times):
                    torch._scaled_mm(x8, y8.t(), one, one.t(), out_dtype=torch.bfloat16, use_fast_accum=True)

            _, seconds = b.seconds(float8, 5)
            b.add(
                "ceilings", f"float8 matrix product by rows {side}³", 2.0 * side**3 * times / seconds / 1e12, "TFLOP/s"
            )


def checks(b: Bench) -> None:
    """A small network's latents, the fast ways against the plain float32 one on the CPU: 8 Euler steps, guided and not."""
    cpu = torch.device("cpu")
    config = parse_config(config_of("tiny"), Path("config.json")).dit
    reference = made_dit("tiny", cpu, torch.float32)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(3, config.channels, config.side, config.side, generator=generator)
    condition = torch.randn(3, config.tokens, config.condition_width, generator=generator)

    def sample(dit: DiT, device: torch.device, guidance: float, speed: Speed | None) -> Tensor:
        times = flow.evaluation_times("euler", 8, 3.0)
        y = condition.to(device)
        null = dit.null_condition
        assert null is not None
        if speed is None:
            everywhere = null.expand_as(y).clone()
            conditional: flow.Velocity = lambda x, t: dit(x, torch.full((len(x),), t, device=device), y)  # noqa: E731
            nothing: flow.Velocity = lambda x, t: dit(x, torch.full((len(x),), t, device=device), everywhere)  # noqa: E731
            f = flow.guided(conditional, nothing, guidance)
        else:
            c, u, both = FastDiT(dit, speed).velocities(y, times, guidance != 1.0, speed.compile == "on")
            f = flow.guided(c, u, guidance, both=both)
        return flow.euler(f, noise.to(device), flow.official_times(8, 3.0))

    ways: dict[str, tuple[torch.dtype, Speed | None, float]] = {
        "plain": (torch.float32, None, 1e-4),
        "fast eager": (torch.float32, Speed("off"), 1e-4),
        "fast eager bf16": (torch.bfloat16, Speed("off"), 2e-2),
        "fast compiled bf16": (torch.bfloat16, Speed("on"), 2e-2),
        "fast compiled bf16, nothing deferred": (torch.bfloat16, Speed("on", defer=False), 2e-2),
    }
    if b.device.type == "cuda":
        ways["PyTorch's attention"] = (torch.bfloat16, Speed("on", attention="flash"), 2e-2)
        ways["float8"] = (torch.bfloat16, Speed("on", "fp8"), 1e-1)
        ways["float8, PyTorch's attention"] = (torch.bfloat16, Speed("on", "fp8", attention="flash"), 1e-1)
        ways["float8 without our kernels"] = (torch.bfloat16, Speed("on", "fp8", kernels=False), 1e-1)
    with torch.inference_mode():
        for guidance in (1.0, 1.5):
            exact = sample(reference, cpu, guidance, None)
            for name, (dtype, speed, tolerance) in ways.items():
                if speed is not None and speed.compile == "on" and (b.device.type == "cpu" or guidance == 1.0):
                    continue  # on the CPU, minutes of C++ compilation
                check = f"{name}, guidance {guidance}"
                with b.reported(f"checks: {check}"):
                    dit = made_dit("tiny", cpu, torch.float32).to(b.device)
                    for path, parameter in dit.named_parameters():
                        if "t_embedder" not in path and ".norm" not in path:
                            parameter.data = parameter.data.to(dtype)
                    error = relative_error(sample(dit, b.device, guidance, speed), exact)
                    b.add("checks", f"{check}: relative error", error, "", f"≤ {tolerance}")
                    if not error <= tolerance:
                        b.errors[f"checks: {check}"] = f"relative error {error} > {tolerance}"


def sampling(
    b: Bench,
    model: ScaleRAE,
    stage: str,
    name: str,
    batch: int,
    options: SamplingOptions,
    target: str = "",
    repeat: int = 0,
    one_prompt: bool = False,
) -> float:
    """Seconds per image of `model.sample`: noise, all evaluations, latents back on the CPU. Each image has a condition of its
    own, or all are of `one_prompt`."""
    shape = (model.config.tokens, model.config.dit.condition_width)
    generator = torch.Generator().manual_seed(batch)
    conditions = [torch.randn(shape, generator=generator).to(b.device, b.dtype) for _ in range(batch)]
    conditions = conditions[:1] * batch if one_prompt else conditions
    seeds = list(range(batch))
    first, seconds = b.seconds(lambda: model.sample(conditions, seeds, options, batch), repeat or b.repeat)
    each = seconds / batch
    evaluations = len(flow.evaluation_times(options.solver, options.steps, 3.0))
    flops = dit_flops(model.config.dit) * evaluations
    more = {"first": first, "images_per_second": 1 / each, "batch": batch, "guidance": options.guidance}
    if options.guidance == 1.0 and not one_prompt:
        more["share"], more["share_sustained"] = flops / each / b.ceiling, flops / each / b.sustained
    if options.guidance == 1.0 and DIT_NAME["1.5b"] in name:
        more["times_official"] = OFFICIAL_DIT / each
    b.add(stage, name, each, "s/image", target, **more)
    return each


def dit_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Sampling at batch 1, 8, 32, guidance 1.0 and 1.5; the most wanted first."""
    network = DIT_NAME[size]
    plain, guided_ = SamplingOptions(), SamplingOptions(guidance=1.5)
    if size == "7b":
        sampling(b, model, "dit", f"{network}, batch 8", 8, plain, "share ≥ 75 %", 2)
        sampling(b, model, "dit", f"{network}, batch 1", 1, plain, "", 2)
        sampling(b, model, "dit", f"{network}, batch 8, guidance 1.5", 8, guided_, "", 1)
        return
    b.add(
        "dit",
        f"{network}: one image of {EVALUATIONS} evaluations",
        dit_flops(model.config.dit) * EVALUATIONS / 1e12,
        "TFLOP",
    )
    eight = sampling(b, model, "dit", f"{network}, batch 8", 8, plain, "share ≥ 80 %, ≥ 18 x official")
    sampling(b, model, "dit", f"{network}, batch 1", 1, plain, "share ≥ 55 % (70 %), ≥ 13 x official")
    guided_eight = sampling(b, model, "dit", f"{network}, batch 8, guidance 1.5", 8, guided_)
    b.add("dit", f"{network}, batch 8: guidance 1.5 over 1.0", guided_eight / eight, "×", "≤ 1.75")
    sampling(
        b, model, "dit", f"{network}, batch 32", 32, plain, "share ≥ 80 %, ≥ 18 x official", 1 if not b.tiny else 0
    )
    sampling(b, model, "dit", f"{network}, batch 8, of one prompt", 8, plain, one_prompt=True)
    sampling(b, model, "dit", f"{network}, batch 1, guidance 1.5", 1, guided_)
    sampling(b, model, "dit", f"{network}, batch 32, guidance 1.5", 32, guided_, "", 1)


def fp8_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """The same network in float8, in place: nothing in bf16 can be measured on this model afterwards."""
    if b.device.type != "cuda":
        return
    network = DIT_NAME[size]
    model.release_memory()
    model = model.with_speed(Speed("on", "fp8"))
    b.release()
    for batch in (8, 32, 1) if size != "7b" else (8,):
        target = "≥ 1.55 x bf16 (1.8)" if batch > 1 else ""
        each = sampling(
            b, model, "fp8", f"{network} fp8, batch {batch}", batch, SamplingOptions(), target, 1 if batch == 32 else 0
        )
        before = [r["value"] for r in b.figures if r["name"] == f"{network}, batch {batch}"]
        if before:
            b.add("fp8", f"{network} fp8 over bf16, batch {batch}", before[0] / each, "×", target)
    if size != "7b":
        profile_stage(b, model, size)
        sampling(b, model, "fp8", f"{network} fp8, batch 8, of one prompt", 8, SamplingOptions(), one_prompt=True)
    for steps in (12, 16, 20):
        options = SamplingOptions(steps=steps, solver="ab2")
        sampling(b, model, "fp8", f"{network} fp8, {steps} evaluations of ab2, batch 8", 8, options, "≥ 60 x official")


def solver_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """bf16 with fewer evaluations."""
    for steps in (12, 20):
        options = SamplingOptions(steps=steps, solver="ab2")
        sampling(b, model, "solver20", f"{DIT_NAME[size]}, {steps} evaluations of ab2, batch 8", 8, options)


def prompt_of(model: ScaleRAE, tokens: int, number: int = 0) -> str:
    """A text of so many tokens; other numbers give others."""
    text = f"Can you generate {number} photos of a cat on the windowsill and a dog in the garden by the house?" * 4
    while len(model.tokenizer.plain(text)) > tokens:
        text = text[:-1]
    return text


def prompt_that_draws(b: Bench, model: ScaleRAE, tokens: int) -> str:
    """A 40-token prompt, and the made-up model's token for "image" set so that its reply to it is so many tokens long."""
    prompts = [prompt_of(model, 40, number) for number in range(64)]
    conversations = [Conversation(model.tokenizer.chat(prompt)) for prompt in prompts]
    replies = model.language.reply(conversations, [tokens] * len(prompts), stop=-1, image_start=-1)
    for prompt, reply in zip(prompts, replies, strict=True):
        if reply.ids[-1] not in reply.ids[:-1]:
            model.tokenizer.image_start = reply.ids[-1]
            alone = model.reply([prompt])[0]  # in another batch, bf16 may round to another reply
            if alone.condition is not None:
                if len(alone.ids) != tokens:
                    print(f"note: the reply has {len(alone.ids)} tokens, not {tokens}", flush=True)
                return prompt
    raise RuntimeError(f"the made-up replies repeat themselves: {replies[0].ids}")


def t2i_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """From a 40-token prompt to a PIL image: the whole of `generate`."""
    prompt = prompt_that_draws(b, model, 10)
    results: list[Any] = []
    ways = [("", "≤ 0.30", model)]
    if model.speed.compile == "on":
        ways.append((", captured, not compiled", "", model.with_speed(Speed("off"))))
    for mode, goal, model in ways:
        first, seconds = b.seconds(partial(lambda model: results.append(model.generate(prompt)), model))
        assert len(results[-1].images) == 1
        stages = {k: round(v, 4) for k, v in results[-1].seconds.items()}
        name = f"{size}: end to end, warm, {len(results[-1].reply.ids)}-token reply{mode}"
        b.add("t2i", name, seconds, "s", goal, first=first, stages=stages)
        print(f"          {stages}", flush=True)


def memory_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Peak memory of one prompt drawn and decoded, as the allocator reserves it, batch 1 and then 8."""
    if b.device.type != "cuda":
        return
    prompt = prompt_that_draws(b, model, 10)
    model.release_memory()
    for batch, target in ((1, "≤ 12"), (8, "≤ 16")):
        b.peak_gib(reset=True)
        model.generate(prompt, num_images=batch, steps=4, batch_size=batch)
        b.add("memory", f"{size}: peak memory, batch {batch}", b.peak_gib(), "GiB", target if size != "7b" else "")


def tokens_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Greedy tokens per second of replies (to 40-token prompts) and answers (about latents), prefill included."""
    prompt = prompt_of(model, 40)
    latent = torch.randn(model.config.tokens, model.config.channels, generator=torch.Generator().manual_seed(1))
    count = 8 if b.tiny else 128
    compiling = model.speed.compile == "on"
    cases = [("reply", 1, compiling), ("reply", 32, compiling), ("answer", 1, compiling), ("answer", 32, compiling)]
    if compiling:
        cases += [("reply", 1, False), ("reply", 32, False)]
    for kind, batch, compile_steps in cases:
        ids = model.tokenizer.chat(prompt, image=kind == "answer")
        conversations = [Conversation(ids, latent if kind == "answer" else None)] * batch
        language = model.language if compile_steps == compiling else model.with_speed(Speed("off")).language

        runs: list[list[float]] = []  # of each, when it began and when each token was there

        def run(
            language: LanguageModel = language,
            conversations: Sequence[Conversation] = conversations,
            runs: list[list[float]] = runs,
        ) -> None:
            def hear(row: int, token: int) -> bool:
                if row == 0:
                    at.append(time.perf_counter())
                return True

            at = [time.perf_counter()]
            runs.append(at)
            limits = [count] * len(conversations)
            replies = language.reply(conversations, limits, stop=-1, image_start=-1, listen=hear)
            assert all(len(r.ids) == count for r in replies)

        first, seconds = b.seconds(run)
        to_first = statistics.median(at[1] - at[0] for at in runs[1:])
        each = statistics.median((at[-1] - at[1]) / (count - 1) for at in runs[1:])
        goal = "" if size == "7b" else "≥ 300" if batch == 1 else "≥ 5000"
        name = f"{size}: {kind}, batch {batch}" + (
            ", captured, not compiled" if compiling and not compile_steps else ""
        )
        b.add("tokens", f"{name}, {count} tokens", batch * count / seconds, "tokens/s", goal, first=first)
        b.add("tokens", f"{name}: prefill and first token", to_first, "s")
        b.add("tokens", f"{name}: each token after", each, "s")
    weights = sum(p.numel() * p.element_size() for p in model.language.parameters())
    b.add("tokens", f"{size}: weights read for each token", weights / 1e9, "GB")


def scaling_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Prompts of 4 × 2 by an experiment's own worker: reply, 8 latents, pictures, answers and all scores, files checked and synced."""
    prompt = prompt_that_draws(b, model, 10)
    settings = Settings(
        "prompts.jsonl", size, prompt_prefix="", post_qa_max_new_tokens=16, reward=None, batch_size=8, max_new_tokens=16
    )
    store = Store(Path(tempfile.mkdtemp(dir=model.source.folder)), settings)
    store.make_folders()
    order = Order(0, str(b.device), [], [], {})
    worker = Worker(store, settings, model, None, order, lambda event: None, WorkerLog(store, 0))
    worker.batch_size = worker.fits = 8
    index = itertools.count()
    before: dict[str, float] = {}

    def one_prompt() -> None:
        nonlocal before
        before = dict(worker.seconds)
        number = next(index)
        record = PromptRecord(number + 1, prompt, number)
        worker.attempt(record)
        if not store.has_record(record.index):
            raise RuntimeError(f"the prompt was not drawn: {store.failure(record.index)}")

    with ThreadPoolExecutor(4) as worker.encoders:
        first, seconds = b.seconds(one_prompt)
        stages = {name: round(value - before.get(name, 0.0), 4) for name, value in worker.seconds.items()}
        name = f"{size}: 4×2 with latent QA (16 tokens) and scores"
        b.add("scaling", name, seconds, "s/prompt", "≤ 1.5" if size != "7b" else "", first=first, stages=stages)
        print(f"          {stages}", flush=True)
        if b.device.type == "cuda":
            share = _busy_seconds(one_prompt) / seconds
            b.add("scaling", f"{size}: share of it in GPU kernels", share, "", "≥ 0.90")


def _profiled(run: Callable[[], object]) -> tuple[Any, float]:
    """What the profiler saw of the GPU, and wall seconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    return profiler, wall


def _busy_seconds(run: Callable[[], object]) -> float:
    """Seconds in which the GPU was in a kernel. (Profiling slows the host down, so put them to the seconds of another run.)"""
    profiler, _ = _profiled(run)
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() if "CUDA" in str(e.device_type))
    busy = reached = 0.0
    for start_us, end_us in spans:  # kernels on two streams at once count once
        busy += max(0.0, end_us - max(start_us, reached))
        reached = max(reached, end_us)
    return busy / 1e6


def kernel_table(b: Bench, name: str, run: Callable[[], object], times: int, most: int = 16) -> None:
    """Prints which kernels the GPU spends its time in, per run."""
    if b.device.type != "cuda":
        return
    run()
    profiler, wall = _profiled(lambda: [run() for _ in range(times)])
    spent: dict[str, list[float]] = {}
    for event in profiler.events():
        if "CUDA" in str(event.device_type):
            row = spent.setdefault(event.name, [0, 0.0])
            row[0] += 1
            row[1] += event.time_range.end - event.time_range.start
    total = sum(us for _, us in spent.values())
    print(f"kernels of {name}: {total / times:.0f} us of {wall / times * 1e6:.0f} us wall", flush=True)
    for kernel, (count, us) in sorted(spent.items(), key=lambda item: -item[1][1])[:most]:
        print(f"  {us / times:9.1f} us {count / times:7.1f} x {us / count:7.2f} us  {kernel[:110]}", flush=True)


def profile_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Kernels of one DiT evaluation, one decoding step, one judging."""
    config, compiling = model.config, model.speed.compile == "on"
    times = flow.evaluation_times("euler", EVALUATIONS, 8.0)
    for batch in (1, 8):
        y = torch.randn(batch, config.tokens, config.dit.condition_width, device=b.device, dtype=b.dtype)
        x = torch.randn(batch, config.channels, config.dit.side, config.dit.side, device=b.device)
        with torch.inference_mode():
            velocity, _, _ = model._fast_dit.velocities(y, times, False, compiling)
            kernel_table(b, f"{size}: an evaluation, batch {batch}", lambda f=velocity, x=x: f(x, times[0]), 3)  # type: ignore[misc]
    if b.figures and any("fp8" in r["name"] for r in b.figures):
        return
    conversation = Conversation(model.tokenizer.chat(prompt_of(model, 40)))
    for compile_steps in (False, True) if compiling else (False,):
        language = model.language if compile_steps == compiling else model.with_speed(Speed("off")).language
        run = partial(language.reply, [conversation], [33], -1, -1)
        run()
        kernel_table(b, f"{size}: a reply of 33 tokens, compiled {compile_steps}", run, 1)
    latents = list(torch.randn(8, config.tokens, config.channels))
    judge = partial(
        model.score, latents, "a photo of a cat", request="a cat", request_reply=Reply([65]), max_new_tokens=4
    )
    judge()
    kernel_table(b, f"{size}: judging 8 latents, 4 tokens", judge, 1)
    sample = partial(
        model.sample, [torch.randn(config.tokens, config.dit.condition_width)] * 8, list(range(8)), None, 8
    )
    kernel_table(b, f"{size}: sampling 8 images", sample, 1, 6)


def gemm_stage(b: Bench, size: str) -> None:
    """The DiT's matrix products by themselves, as CUDA graphs: bf16, and float8 by rows with and without the bias."""
    if b.device.type != "cuda":
        return
    c = parse_config(config_of(size), Path("config.json")).dit
    inner = -(-int(2 / 3 * 4 * c.width) // 64) * 64
    shapes = {"qkv": (3 * c.width, c.width), "proj": (c.width, c.width), "w12": (2 * inner, c.width)}
    shapes |= {
        "w3": (c.width, inner),
        "adaLN": (6 * c.width, c.condition_width),
        "8 adaLN": (48 * c.width, c.condition_width),
    }
    for rows in (256, 2048, 8192):
        for name, (n, k) in shapes.items():
            if name == "8 adaLN" and rows > 256:
                continue
            with torch.inference_mode():
                x, w = (torch.randn(m, k, device=b.device, dtype=b.dtype) for m in (rows, n))
                bias = torch.randn(n, device=b.device, dtype=b.dtype)
                xq, linear = quantize(x), Float8Linear(w, bias)
                bare = Float8Linear(w, None)
                ways: dict[str, Callable[[], Tensor]] = {
                    "bf16": partial(torch.nn.functional.linear, x, w, bias),
                    "float8": partial(linear.product, xq),
                    "float8 without bias": partial(bare.product, xq),
                }
                line = [f"gemm      {rows:5} x {k:5} -> {n:6} ({name:7})"]
                for way, run in ways.items():
                    try:
                        graph, _ = graph_memory(b.device).capture(lambda run=run: [run() for _ in range(10)][-1])  # type: ignore[misc]
                        _, seconds = b.seconds(graph.replay, 5)
                        us = seconds / 10 * 1e6
                        line.append(f"{way} {us:7.1f} us {2e-6 * rows * n * k / us:5.0f} TFLOP/s")
                    except Exception as e:
                        line.append(f"{way}: {type(e).__name__}: {str(e)[:80]}")
                print("   ".join(line), flush=True)


def decode_stage(b: Bench, model: ScaleRAE, size: str) -> None:
    """Latents to PIL images."""
    generator = torch.Generator().manual_seed(2)
    latents = [torch.randn(model.config.tokens, model.config.channels, generator=generator) for _ in range(32)]
    for batch in (1, 8, 32):
        first, seconds = b.seconds(partial(model.decode, latents[:batch], batch))
        b.add("decode", f"{size}: latents to images, batch {batch}", seconds / batch, "s/image", first=first)
    pictures = model.decode(latents[:8])
    _, seconds = b.seconds(lambda: [png_bytes(p, {}) for p in pictures])
    b.add("decode", f"{size}: PNG encoding, one thread", seconds / 8, "s/image")


def evaluations(
    b: Bench, fast: FastDiT, config: ScaleRAEConfig, batch: int, guided: bool = False, prompts: int | None = None
) -> tuple[float, float]:
    """Seconds per image, from 6 of its evaluations, and of the first run of those 6."""
    y = torch.randn(prompts or batch, config.tokens, config.dit.condition_width, device=b.device, dtype=b.dtype)
    x = torch.randn(batch, config.channels, config.dit.side, config.dit.side, device=b.device)
    times = flow.evaluation_times("euler", EVALUATIONS, 8.0)[:6]
    velocity, _, both = fast.velocities(y, times, guided, fast.speed.compile == "on")

    def run() -> None:
        for t in times:
            (both if guided else velocity)(x, t)

    first, seconds = b.seconds(run)
    return seconds / len(times) * EVALUATIONS / batch, first


def ladder(b: Bench, size: str) -> None:
    """What each trick gains: seconds per image from 6 evaluations, one trick after the other."""
    dit = made_dit(size, b.device, b.dtype)
    config = parse_config(config_of(size), Path("config.json"))
    flops = dit_flops(config.dit) * EVALUATIONS
    off: dict[str, Any] = {"graph": False, "pad": False, "group": False, "defer": False, "kernels": False}
    padded = off | {"pad": True}
    captured = padded | {"graph": True}
    grouped = captured | {"group": True}
    deferred = grouped | {"defer": True}
    # Name, tricks, batches (negative: of one prompt), whether guided.
    steps: tuple[tuple[str, Speed, tuple[int, ...], bool], ...] = (
        ("plain bf16, eager", Speed("off", **off), (1, 8, 32), False),
        ("eager in a CUDA graph", Speed("off", **off | {"graph": True}), (1, 8), False),
        ("blocks compiled", Speed("on", **off), (1, 8), False),
        ("and SwiGLU padded", Speed("on", **padded), (1, 8), False),
        ("and a CUDA graph", Speed("on", **captured), (1, 8), False),
        ("and grouped modulations", Speed("on", **grouped), (1, 2), False),
        ("and sums deferred", Speed("on", **deferred), (1, 4, 8, 32), False),
        ("and our attention (default)", Speed("on"), (1, 4, 8, 32), False),
        ("default but PyTorch's attention, nothing compiled", Speed("off", attention="flash"), (1,), False),
        ("default, nothing compiled", Speed("off"), (1,), False),
        ("default, but time embeddings at each step", Speed("on", before=False), (1,), False),
        ("images of one prompt", Speed("on"), (-8,), False),
        ("guided", Speed("on"), (8,), True),
        ("guided, but both branches modulated alike", Speed("on", null=False), (8,), True),
        ("guided, but one branch after the other", Speed("on", together=False), (8,), True),
        ("float8 without kernels of our own", Speed("on", "fp8", kernels=False), (8,), False),
        ("float8 with PyTorch's attention", Speed("on", "fp8", attention="flash"), (8,), False),
        ("float8", Speed("on", "fp8"), (8,), False),
    )
    with torch.inference_mode():
        for name, speed, batches, guided in steps:
            if b.device.type == "cpu" and speed.compile == "on":
                continue
            torch._dynamo.reset()  # what was compiled is measured with its first run, and lets go of the network before
            if speed.quantize is not None:  # which cannot be taken back
                dit = made_dit(size, b.device, b.dtype)
            fast = FastDiT(dit, speed)
            for batch in batches:
                with b.reported(f"ladder: {name}, batch {abs(batch)}"):
                    each, first = evaluations(b, fast, config, abs(batch), guided, 1 if batch < 0 else None)
                    # How many operations a guided evaluation, or one of one prompt, has depends on the tricks.
                    share: dict[str, Any] = {} if guided or batch < 0 else {"share": flops / each / b.ceiling}
                    title = f"{DIT_NAME[size]}, batch {abs(batch)}: {name}"
                    b.add("ladder", title, each, "s/image", first=first, **share)
            fast.forget()
            b.release()


def attention_stage(b: Bench, size: str) -> None:
    """The ways to attend at the DiT's shape, rotation included, µs a call: each of many on inputs that no cache holds."""
    if b.device.type != "cuda":
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from scale_rae import kernels

    config = parse_config(config_of(size), Path("config.json")).dit
    cos, sin = (kernels.of_axis(table.to(b.device)) for table in rope_table(config.side, config.width // config.heads))

    def cudnn(x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend_rotating(x, heads, cos, sin)

    ways: dict[str, Attend] = {
        "PyTorch's": attend_rotating,
        "cuDNN's": cudnn,
        "ours": kernels.attend_pairs,
    }
    for batch in (1, 2, 4, 8, 16, 32):
        count = max(4, 320 // batch)
        inputs = torch.randn(count, batch, config.tokens, 3 * config.width, device=b.device, dtype=b.dtype)
        for name, way in ways.items():
            if way is kernels.attend_pairs and not kernels.attention_fits(config, b.dtype):
                continue

            def attend_all(x: Tensor, way: Attend = way) -> Tensor:
                for qkv in x:
                    seen = way(qkv, config.heads, cos, sin)
                return seen

            with b.reported(f"attention: {name}, batch {batch}"), attention_kernels(b.device), torch.inference_mode():
                captured = Captured(attend_all, [inputs])
                _, seconds = b.seconds(captured.graph.replay)
                b.add("attention", f"{DIT_NAME[size]}, batch {batch}: {name}", seconds / count * 1e6, "µs")
                del captured
        del inputs
        b.release()


def official(b: Bench, size: str) -> None:
    """The same network as the official code runs it: plain, float32 with TF32 off, one image at a time."""
    dit = made_dit(size, b.device, torch.float32)
    config = parse_config(config_of(size), Path("config.json"))
    x = torch.randn(1, config.channels, config.dit.side, config.dit.side, device=b.device)
    y = torch.randn(1, config.tokens, config.dit.condition_width, device=b.device)
    t = torch.full((1,), 0.5, device=b.device)

    def run() -> None:
        for _ in range(EVALUATIONS):
            dit(x, t, y)

    with torch.inference_mode():
        _, seconds = b.seconds(run, 1)
    b.add(
        "official",
        f"{DIT_NAME[size]}: float32, plain, batch 1 (the official code's DiT: {OFFICIAL_DIT} s)",
        seconds,
        "s/image",
    )


def load_stage(b: Bench, size: str) -> None:
    """Writes a made-up checkpoint in the published layout, and loads it: model, decoder and encoder, from the page cache."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_checkpoint(size, Path(temporary), b)
        print("          written", flush=True)
        models: list[ScaleRAE] = []

        def load() -> None:
            models.clear()
            b.release()
            dtype = str(b.dtype).removeprefix("torch.")
            models.append(ScaleRAE.from_pretrained(str(folder), device=str(b.device), dtype=dtype))
            _ = models[0].encoder.model, models[0].decoder

        b.peak_gib(reset=True)
        first, seconds = b.seconds(load, 1)
        name = f"{size}: bf16 model, decoder and encoder from page cache"
        b.add("load", name, seconds, "s", "≤ 15", first=first, peak_gib=b.peak_gib())
    (model,) = models
    pictures = model.decode([torch.randn(model.config.tokens, model.config.channels) for _ in range(8)])
    pixels = model.encoder.preprocess(pictures)
    _, seconds = b.seconds(lambda: model.encoder.encode(pixels))
    b.add("load", f"{size}: images to latents, batch 8, without preprocessing", seconds / 8, "s/image")
    _, seconds = b.seconds(lambda: model.encode(pictures))
    b.add("load", f"{size}: images to latents, batch 8", seconds / 8, "s/image")


def write_checkpoint(size: str, folder: Path, b: Bench) -> Path:
    """A made-up checkpoint in the published layout, bf16."""
    from safetensors.torch import save_file
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = config_of(size)
    parsed = parse_config(config, Path("config.json"))
    model = folder / "model"
    write_tokenizer(model)
    (model / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        language = LanguageModel(parsed)
    if parsed.tied_embeddings:
        language.lm_head.weight = language.model.embed_tokens.weight
    fill_randomly(language, b.device, b.dtype, 2)
    tensors = {n: p.to(torch.bfloat16).cpu() for n, p in language.named_parameters()}
    del language
    dit = made_dit(size, b.device, b.dtype)
    tensors |= {f"diff_head.model.{n}": p.to(torch.bfloat16).cpu() for n, p in dit.named_parameters()}
    del dit
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    del tensors

    decoder_folder = folder / "decoder"
    decoder_folder.mkdir()
    sizes = decoder_config(size)
    with torch.device("meta"):
        decoder = PixelDecoder(sizes)
    fill_randomly(decoder, b.device, b.dtype, 3)
    torch.save({n: p.to(torch.bfloat16).cpu() for n, p in decoder.named_parameters()}, decoder_folder / "model.pt")
    names = {"hidden_size": sizes.width, "num_hidden_layers": sizes.depth, "num_attention_heads": sizes.heads}
    settings: dict[str, Any] = {f"decoder_{k}": v for k, v in names.items()} | {
        "decoder_intermediate_size": sizes.inner
    }
    settings |= {
        "patch_size": sizes.patch,
        "image_size": sizes.image,
        "layer_norm_eps": sizes.eps,
        "hidden_act": "gelu",
    }
    (decoder_folder / "config.json").write_text(json.dumps(settings))

    encoder_folder = folder / "siglip2-made-up"
    encoder_folder.mkdir()
    vision = encoder_config(size)
    (encoder_folder / "config.json").write_text(json.dumps(vision))
    network: Any = SiglipVisionModel(SiglipVisionConfig(**vision))
    save_file(
        {n: p.detach().to(torch.bfloat16) for n, p in network.named_parameters()}, encoder_folder / "model.safetensors"
    )
    square = {"height": vision["image_size"], "width": vision["image_size"]}
    settings = {"image_processor_type": "SiglipImageProcessor", "do_resize": True, "do_rescale": True}
    settings |= {"do_normalize": True, "rescale_factor": 1 / 255, "resample": 2, "size": square}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (encoder_folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


# Running ------------------------------------------------------------------------------------------------------------------


# fp8 changes the model, so it is the last.
WITH_MODEL: dict[str, Callable[[Bench, ScaleRAE, str], None]] = {
    "memory": memory_stage,  # before others have left their graphs
    "dit": dit_stage,
    "t2i": t2i_stage,
    "tokens": tokens_stage,
    "scaling": scaling_stage,
    "profile": profile_stage,
    "decode": decode_stage,
    "solver20": solver_stage,
    "fp8": fp8_stage,
}
ALONE: dict[str, Callable[[Bench, str], None]] = {
    "official": official,
    "ladder": ladder,
    "attention": attention_stage,
    "gemm": gemm_stage,
    "load": load_stage,
}
OF_7B = ("dit", "tokens", "fp8")
STAGES = ("ceilings", "checks", *WITH_MODEL, *ALONE)


def run_all(b: Bench, stages: Sequence[str], sizes: Sequence[str], compile_mode: str) -> None:
    """Every stage asked for: those on a model of each size, then the others."""
    for name, simple in (("ceilings", ceilings), ("checks", checks)):
        if name in stages and not b.over(name):
            with b.stage(name):
                simple(b)
    for size in sizes:
        names = [s for s in WITH_MODEL if s in stages and (size != "7b" or s in OF_7B)]
        if not names or b.over(f"{size}: {', '.join(names)}"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            model: ScaleRAE | None = None
            with b.stage(f"{size}: building"):
                model = made_model(size, b.device, b.dtype, Speed(compile_mode), Path(folder))
            for name in names if model is not None else ():
                if not b.over(f"{size}: {name}"):
                    with b.stage(f"{size}: {name}"):
                        assert model is not None
                        WITH_MODEL[name](b, model, size)
            del model
            b.release()
    for size in sizes:
        for name, alone in ALONE.items():
            if name in stages and size != "7b" and not b.over(f"{size}: {name}"):
                with b.stage(f"{size}: {name}"):
                    alone(b, size)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(file: Path) -> str:
    """The figures of a JSON file as tables, one for each stage."""
    data = json.loads(file.read_text())
    environment = data["environment"]
    commit = f", commit {environment['commit']}" if "commit" in environment else ""
    lines = [
        f"{environment.get('gpu', environment['device'])}, torch {environment['torch']}{commit}, {data['seconds']:.0f} s in all.",
        "",
    ]
    stage = None
    for row in data["figures"]:
        if row["stage"] != stage:
            stage = row["stage"]
            lines += [
                "",
                f"| {stage} | | share of the ceiling | of the sustained one | × official | first run | target |",
                "|---|---|---|---|---|---|---|",
            ]
        cells = [row["name"], "–" if row["value"] is None else f"{_number(row['value'])} {row['unit']}"]
        for key, (_, form) in COLUMNS.items():
            if key != "peak_gib":  # it has no column there
                cells.append(form.format(row[key]) if row.get(key) is not None else "")
        lines.append("| " + " | ".join([*cells, row["target"]]) + " |")
    for name, error in data["errors"].items():
        lines += ["", f"Failed: {name}: {error.strip().splitlines()[-1]}"]
    if data["skipped"]:
        lines += ["", f"Skipped: {', '.join(data['skipped'])}"]
    return "\n".join(lines)


def main() -> int:
    """Measures and prints; the exit code is 1 when a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--sizes", default="1.5b,7b", help="of 1.5b, 7b")
    parser.add_argument("--seconds-budget", type=float, default=math.inf, help="begin no stage after so many seconds")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", choices=("on", "off"), default="on", help="in the stages on a whole model")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the benchmark itself")
    parser.add_argument("--json", type=Path, help="also write the figures here, after every stage")
    parser.add_argument(
        "--markdown", type=Path, nargs="+", metavar="JSON", help="only print tables from files written before"
    )
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="with --markdown: put them between FILE's marks instead"
    )
    args = parser.parse_args()
    if args.markdown:
        tables = "\n\n".join(markdown(file) for file in args.markdown)
        if args.into:
            before, mark, rest = re.split(r"(<!-- figures: begin.*?-->\n)", args.into.read_text(), maxsplit=1)
            after = rest[rest.index("<!-- figures: end") :]
            args.into.write_text(f"{before}{mark}{tables}\n{after}")
        else:
            print(tables)
        return 0
    stages = args.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"no such stages: {', '.join(sorted(unknown))}")
    sizes = ["tiny"] if args.tiny else args.sizes.split(",")
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        device = torch.device("cuda", device.index or 0)
    b = Bench(device, torch.bfloat16, args.repeat, args.seconds_budget, args.json, args.tiny)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}, stages {', '.join(stages)}, sizes {', '.join(sizes)}", flush=True)
    run_all(b, stages, sizes, args.compile if device.type == "cuda" else "off")
    b.write()
    print("\n" + "\n".join(_line(row) for row in b.figures))
    for name, error in b.errors.items():
        print(f"FAILED {name}: {error.strip().splitlines()[-1]}")
    if b.skipped:
        print(f"skipped for lack of time: {'; '.join(b.skipped)}")
    print(f"{time.perf_counter() - b.began:.0f} s in all")
    return 1 if b.errors else 0


if __name__ == "__main__":
    sys.exit(main())
