"""After the reader stage: conditions like those that the velocity network learnt with.

The reader stage trains the whole language model, so its conditions move a little. One linear layer, the projector, makes them of the
hidden states at the latent queries, and nothing but drawing uses it. Here it is solved by least squares: from the trained model's hidden
states at requests in usual and other words, to the conditions of another model at the same requests in usual words.

python -m recipes.shapes.refit exported/reader --conditions-of scale_rae/bundled/shapes --export exported/refitted
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from recipes.shapes import common, export, lessons, reader
from recipes.shapes.loop import prepare_device, say
from scale_rae.language import LanguageModel

PROJECTOR = "diff_head_projector"
HELD_BACK = 8
"""One of so many prompts is not learnt from: the errors that are printed are of these."""
RIDGE = 1e-4
"""Added to the squares' diagonal, relative to its mean: hidden states that hardly vary keep their old weights."""


class LeastSquares:
    """Sums of squares of inputs [.., H] and of what a linear layer's outputs [.., Z] lack, from which its change is solved."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.squares = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self.products = torch.zeros(inputs + 1, outputs, dtype=torch.float64)

    def add(self, states: Tensor, lacking: Tensor) -> None:
        """Adds examples: inputs [.., H] and, for each, wanted minus present outputs [.., Z]."""
        x = torch.nn.functional.pad(states.flatten(0, -2).double().cpu(), (0, 1), value=1.0)
        self.squares += x.T @ x
        self.products += x.T @ lacking.flatten(0, -2).double().cpu()

    def solve(self) -> tuple[Tensor, Tensor]:
        """The change of the weight [Z, H] and of the bias [Z]."""
        ridge = RIDGE * self.squares.diagonal().mean() * torch.eye(len(self.squares), dtype=torch.float64)
        change = torch.linalg.solve(self.squares + ridge, self.products)
        return change[:-1].T, change[-1]


def main(argv: list[str] | None = None) -> None:
    """Makes the model of `--export`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="exported model of the reader stage")
    parser.add_argument(
        "--conditions-of", type=Path, metavar="DIR", required=True, help="exported model whose conditions are wanted"
    )
    parser.add_argument("--export", type=Path, metavar="DIR", required=True, help="folder to make")
    parser.add_argument("--prompts", type=int, default=2_000, help="each in usual and four other wordings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    preset = common.preset_of(args)
    words = common.vocabulary_of(args.model)
    if common.vocabulary_of(args.conditions_of).size != words.size:
        raise SystemExit(f"{args.conditions_of}: its tokenizer is not that of {args.model}")
    write = lessons.Writer(words.tokenizer, words.pad, preset.tokens)
    usual, others, _ = reader.draw_chunk(0, args.prompts, args.seed, 1, write)
    device, _ = prepare_device(args.device)
    wanted = reader.conditions_of(
        _language(args.conditions_of, args, device), preset, words.size, usual, torch.float32
    )  # [N, L, Z]
    language = _language(args.model, args, device)
    variance = wanted.var(0).mean()  # between prompts

    layer = language.diff_head_projector
    fit, back = LeastSquares(layer.in_features, layer.out_features), []
    for rows, prompts in ((usual, torch.arange(len(usual))), (others, torch.from_numpy(others.wish).long())):
        start = 0
        for states in reader.states_of(language, preset, words.size, rows, torch.float32):
            of = prompts[start : start + len(states)].to(device)
            start += len(states)
            is_back = of % HELD_BACK == 0
            back.append((states[is_back], wanted[of[is_back]]))
            with torch.no_grad():
                fit.add(states[~is_back], wanted[of[~is_back]] - language.condition(states[~is_back]))

    @torch.no_grad()
    def error() -> float:
        parts = [(language.condition(states) - wish).square().mean((1, 2)) for states, wish in back]
        return float(torch.cat(parts).mean() / variance)

    say(f"held-back prompts: conditions differ by {error():.5f} of the variance between prompts")
    with torch.no_grad():
        for parameter, change in zip((layer.weight, layer.bias), fit.solve(), strict=True):
            parameter.copy_((parameter.double().cpu() + change).bfloat16())  # as it is stored
    say(f"after solving the projector: {error():.5f}")
    new = {f"{PROJECTOR}.{name}": value.detach().bfloat16() for name, value in layer.named_parameters()}
    export.replaced(args.model, args.export, export.stored(args.model) | new)


def _language(folder: Path, args: argparse.Namespace, device: torch.device) -> LanguageModel:
    preset, words = common.preset_of(args), common.vocabulary_of(folder)
    return reader.drawing_model(folder, words, preset, device, torch.float32).language


if __name__ == "__main__":
    main()
