"""Records for policies of search: what the model, the reward and the judge find in each candidate, early and at the end.

    python benchmarks/study_records.py --out runs/records --guidance 1 --prompts 600 --device cuda --workers 4

Each prompt has `--candidates` candidates, drawn to the end. At some evaluations on the way, and at the end, the model is
asked about the estimated latent, and the reward scores the decoded estimate; the judge reads the final picture. With these
records, any policy can be replayed without drawing again: see study_search.py. Noise seeds are those of `scale t2i`.

`records.jsonl` has a description, then one line per prompt. If it is stopped, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench import prompts_in_turn
from benchmarks.study_analysis import letters, read_lines
from scale_rae.jsonio import dump_json
from scale_rae.noise import image_seed

FIELDS = ("yes_logit", "yes_conf_score", "no_logit", "no_conf_score", "prompt_conf_score", "prompt_loss")


def main() -> None:
    """Records what the options say, in several processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/records"))
    parser.add_argument("--model-path", default="shapes")
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--held-out", choices=("only", "exclude"), default="only", help="exclude: prompts of training")
    parser.add_argument("--prompts-seed", type=int, default=0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", default="ab2")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[4, 6, 8, 10, 12], help="when to look early")
    parser.add_argument("--reward", default="siglip")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no prompt after so many seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=record, args=(args, i)) for i in range(args.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = [line for path in sorted(args.out.glob("part-*.jsonl")) for line in read_lines(path)]
    lines.sort(key=lambda line: line["index"])
    study = {name: value if not isinstance(value, Path) else str(value) for name, value in vars(args).items()}
    everything = [{"study": study}, *lines]
    (args.out / "records.jsonl").write_text("".join(dump_json(line) + "\n" for line in everything))
    print(f"{len(lines)} prompts recorded", flush=True)
    if any(process.exitcode for process in processes):
        raise SystemExit("error: a process failed")


def record(args: argparse.Namespace, worker: int) -> None:
    """Records every `args.workers`-th prompt from number `worker` on."""
    import torch

    import scale_rae
    from scale_rae.flow import evaluation_times, time_shift
    from scale_rae.options import PROMPT_PREFIX, SamplingOptions
    from scale_rae.rewards import load_reward
    from scale_rae.wording import as_request

    start = time.perf_counter()
    lines = prompts_in_turn(args.prompts, args.held_out, args.prompts_seed)
    prompts = [line | {"index": i} for i, line in enumerate(lines)]
    path = args.out / f"part-{worker}.jsonl"
    known = {line["index"] for line in read_lines(path)}
    todo = [p for p in prompts if p["index"] % args.workers == worker and p["index"] not in known]
    model = scale_rae.load(args.model_path, device=args.device, dtype=args.dtype)
    torch.set_num_threads(1)
    reward = load_reward(args.reward, model)
    options = SamplingOptions(guidance=args.guidance, steps=args.steps, solver=args.solver)
    config = model.config
    times = evaluation_times(args.solver, args.steps, time_shift(config.channels, config.tokens, config.base_dim))
    with ThreadPoolExecutor(1) as writer, path.open("a") as file:
        waiting: Future[None] | None = None
        for done, prompt in enumerate(todo, start=1):
            if time.perf_counter() - start > args.seconds:
                break
            text = prompt["prompt"]
            request = as_request(text, PROMPT_PREFIX)
            reply = model.reply([request])[0]
            assert reply.condition is not None
            seeds = [image_seed(args.seed, prompt["index"], i) for i in range(args.candidates)]
            seen: list[tuple[int, list[Any]]] = []

            def look(evaluation: int, evaluations: int, t: float, x: Any, v: Any, seen: Any = seen) -> None:
                if evaluation in args.evaluations:
                    seen.append((evaluation, model.estimate(t, x, v)))

            latents = model.sample([reply.condition] * len(seeds), seeds, options, len(seeds), look)
            stages: dict[str, Any] = {}
            for evaluation, estimates in [*seen, (len(times), latents)]:
                pictures = model.decode(estimates, batch_size=len(seeds))
                scores = model.score(estimates, text, request=request, request_reply=reply)
                stages[str(evaluation)] = {
                    "answer": letters(s.answer for s in scores),
                    "reward": _short(reward.score(pictures, text)),
                } | {name: _short([getattr(s, name) for s in scores]) for name in FIELDS}
            line = {"index": prompt["index"], "tag": prompt["tag"], "prompt": text, "times": times, "stages": stages}
            if waiting is not None:
                waiting.result()
            waiting = writer.submit(_finish, file, line, prompt, pictures)
            if worker == 0 and done % 10 == 0:
                print(f"{done}/{len(todo)} prompts, {time.perf_counter() - start:.0f} s", flush=True)
        if waiting is not None:
            waiting.result()


def _finish(file: Any, line: dict[str, Any], prompt: dict[str, Any], pictures: Sequence[Any]) -> None:
    """Judges the final pictures and writes a prompt's line."""
    from scale_rae.shapes.judge import judge

    line["correct"] = "".join("1" if judge(picture, prompt).correct else "0" for picture in pictures)
    file.write(json.dumps(line) + "\n")
    file.flush()


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


if __name__ == "__main__":
    main()
