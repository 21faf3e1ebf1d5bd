"""The trained parameters of networks, and how blocks run: compiled, or with recomputed activations."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scale_rae.compiling import compiled
from scale_rae.dit import DiT
from scale_rae.fast_weights import is_quantized, pad_swiglu
from scale_rae.language import LanguageModel
from scale_rae.layout import DIT_PREFIX, keeps_float32
from scale_rae.toolchain import can_compile
from scale_rae.training.lora import LoraLinear, add_to_networks, pass_gradients, switched_off
from scale_rae.training.optim import FlatModel, OptimizerOptions, warmed_up
from scale_rae.training.parallel import Group
from scale_rae.training.settings import TrainingOptions

PAD_TO = 8  # SwiGLU widths in training, so that matrix products run on aligned memory
MUON_RATE = 0.02  # relative to AdamW's 1e-3


def make_repeatable(device: torch.device) -> None:
    """Makes PyTorch use deterministic kernels, so that a resumed run has the same bits."""
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compile_blocks(dit: DiT, options: TrainingOptions, device: torch.device) -> None:
    """Compiles the blocks of a velocity network, in place, if the options say so; "auto" compiles on CUDA."""
    auto = device.type == "cuda" and not is_quantized(dit) and can_compile(device)
    if options.compile == "on" or (options.compile == "auto" and auto):
        for block in dit.dit_blocks:
            block.forward = compiled(block.forward)


class Learner:
    """Prepares networks for training, in place: `flat` has the trained parameters by checkpoint names.

    `layers` are the LoRA's layers, scaled by `alpha` / rank; with --full there are none.
    """

    def __init__(
        self,
        options: TrainingOptions,
        language: LanguageModel | None,
        dit: DiT,
        device: torch.device,
        dtype: torch.dtype,
        steps: int,
        group: Group | None = None,
    ) -> None:
        """`language` is None where it does not take part.

        With --full, the processes of `group` share the state of AdamW.
        """
        self.options, self.language, self.dit, self.device = options, language, dit, device
        self.alpha = float(options.rank if options.alpha is None else options.alpha)
        if not is_quantized(dit):
            pad_swiglu(dit, PAD_TO)
        self.layers: list[LoraLinear] = []
        networks: dict[str, nn.Module] = {} if language is None else {"": language}
        networks[DIT_PREFIX] = dit
        learning = self._choose_parameters(networks)
        self._wrap_blocks()
        self.flat = FlatModel(
            networks,
            device,
            dtype,
            _optimizer(options, steps),
            steps,
            keep_float32=lambda name: keeps_float32(name) and "lora_" not in name,
            trains=learning.__contains__,
            rate=self._rate,
            schedule=warmed_up(options.lr_scheduler, options.warmup(steps)),  # type: ignore[arg-type]
            group=group if options.full and options.optimizer == "adamw" else None,
        )

    def without_lora(self) -> AbstractContextManager[None]:
        """A context in which the networks compute as before training."""
        return switched_off(self.layers)

    def _choose_parameters(self, networks: Mapping[str, nn.Module]) -> set[str]:
        """The names of the parameters that learn, which are made where there is a LoRA."""
        options = self.options
        if options.full:
            learns = {"": options.trains_language, DIT_PREFIX: options.trains_dit}
            names = {
                prefix + name
                for prefix, network in networks.items()
                if learns[prefix]
                for name, _ in network.named_parameters()
            }
        else:
            language = self.language if options.trains_language else None
            dit = self.dit if options.trains_dit else None
            layers = add_to_networks(language, dit, options.rank, self.alpha, options.seed)
            self.layers = list(layers.values())
            names = {f"{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")}
        for prefix, network in networks.items():
            pass_gradients(network)
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(prefix + name in names)
        return names

    def _wrap_blocks(self) -> None:
        """Compiles the velocity network's blocks, and has activations computed twice, if that is chosen.

        The language model's sequences have a length of their own in each batch, for which compiling would not pay.
        """
        options = self.options
        compile_blocks(self.dit, options, self.device)
        blocks: list[nn.Module] = list(self.dit.dit_blocks)
        if self.language is not None:
            blocks += list(self.language.model.layers)
        for block in blocks if options.gradient_checkpointing else ():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)

    def _rate(self, name: str) -> float:
        """The learning rate of a parameter, relative to --learning-rate."""
        options = self.options
        if options.language_learning_rate is None or name.startswith(DIT_PREFIX):
            return 1.0
        return options.language_learning_rate / options.learning_rate if options.learning_rate else 1.0


def _optimizer(options: TrainingOptions, steps: int) -> OptimizerOptions:
    """The optimizer's options for a training of so many steps."""
    return OptimizerOptions(
        kind=options.optimizer,  # type: ignore[arg-type]
        lr=options.learning_rate,
        muon_lr=MUON_RATE * options.learning_rate / 1e-3,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=0.0,
        warmup=options.warmup(steps),
        clip=options.max_grad_norm,
        ema=options.ema_decay,
    )
