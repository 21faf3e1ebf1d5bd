"""An experiment as `scale-rae scale t2i` leaves it, made without a model: small drawings and plausible scores.

`python -m tests.helpers.made_experiment FOLDER` writes one to look at.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"red": "#d33", "blue": "#36c", "green": "#2a5", "yellow": "#ec3", "purple": "#84b", "orange": "#e82"}
SHAPES = ("circle", "square", "triangle")


def draw(colour: str, shape: str, rng: random.Random, size: int = 64) -> Image.Image:
    """One shape, somewhere on a pale ground."""
    image = Image.new("RGB", (size, size), rng.choice(["#f4f1ea", "#e9eef4", "#20242c"]))
    r = size * rng.uniform(0.18, 0.3)
    x, y = rng.uniform(r, size - r), rng.uniform(r, size - r)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    else:
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=COLOURS[colour])
    return image


def response(answer: str, prompt: str, quality: float, rng: random.Random) -> dict[str, Any]:
    """What the model says of an image; `quality` in [0, 1]."""
    sure = {
        "yes": 5.5 + 3 * quality + rng.gauss(0, 0.4),
        "no": 8.0 - 3 * quality + rng.gauss(0, 0.4),
        "uncertain": 0.0,
    }
    return {
        "answer": answer,
        "yes_logit": 14 + 4 * quality if answer == "yes" else 0.0,
        "yes_conf_score": sure["yes"] if answer == "yes" else 0.0,
        "no_logit": 17 - 4 * quality if answer == "no" else 0.0,
        "no_conf_score": sure["no"] if answer == "no" else 0.0,
        "score": sure[answer],
        "response_conf_score": 6 + rng.gauss(0, 0.5),
        "prompt_loss": 2.4 - 1.2 * quality + rng.gauss(0, 0.15),
        "prompt_conf_score": 5 + quality + rng.gauss(0, 0.2),
        "image_conf_score": 3 + rng.gauss(0, 0.3),
        "question": f"Does this image align with the prompt: {prompt}?",
        "reply": {"yes": "Yes, it does.", "no": "No.", "uncertain": "It is a drawing."}[answer],
    }


def write_prompt(
    folder: Path,
    index: int,
    prompt: str,
    answers: list[str],
    rewards: list[float] | None,
    rng: random.Random,
    **more: Any,
) -> dict[str, Any]:
    """One prompt folder; returns its metadata."""
    samples = folder / "samples"
    samples.mkdir(parents=True)
    count, n_samples = len(answers), more.pop("n_samples", 4)
    words = [word for word in prompt.split() if word in COLOURS or word in SHAPES]
    colour = next((w for w in words if w in COLOURS), "red")
    shape = next((w for w in words if w in SHAPES), "circle")
    responses = {}
    for i, answer in enumerate(answers):
        right = answer == "yes"
        image = draw(colour if right else rng.choice(list(COLOURS)), shape if right else rng.choice(SHAPES), rng)
        image.save(samples / f"{i:05}.png")
        responses[str(i)] = response(answer, prompt, min(1, max(0, rng.gauss(0.6 if right else 0.3, 0.2))), rng)
    order = sorted(range(count), key=lambda i: -rewards[i]) if rewards else None
    metadata = {
        "tag": "colors",
        "include": [{"class": shape, "count": 1, "color": colour}],
        "index": index,
        "prompt": prompt,
        "request": f"Can you generate {prompt}",
        "input_prompt": f"<|im_start|>user\nCan you generate {prompt}<|im_end|>\n<|im_start|>assistant\n",
        "output_text": "Sure.",
        "model_path": "shapes",
        "guidance_level": 1.0,
        "max_new_tokens": 512,
        "n_samples": n_samples,
        "scaling_rounds": max(1, count // n_samples),
        "n_samples_generated": count,
        "qa_mode": "latent",
        "reward": "siglip" if rewards else None,
        "image_seeds": [1000 * index + i for i in range(count)],
        "all_ir_scores": rewards,
        "top_ir_scores": [rewards[i] for i in order[:n_samples]] if rewards and order else None,
        "top_ir_indices": order[:n_samples] if order else None,
        "text_responses": responses,
        **more,
    }
    (folder / "metadata.jsonl").write_text(json.dumps(metadata, ensure_ascii=False) + "\n", encoding="utf-8")
    return metadata


def write_experiment(
    folder: Path,
    prompts: int = 3,
    n_samples: int = 4,
    rounds: int = 2,
    seed: int = 0,
    reward: bool = True,
    texts: tuple[str, ...] = (),
) -> Path:
    """A whole experiment; `texts` replace the first prompts."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    settings = {"n_samples": n_samples, "scaling_rounds": rounds, "seed": 42, "reward": "siglip" if reward else None}
    (folder / "experiment.json").write_text(json.dumps({"settings": settings, "version": "0.1.0"}))
    for index in range(prompts):
        colour = rng.choice(list(COLOURS))
        made = f"a photo of {'an' if colour == 'orange' else 'a'} {colour} {rng.choice(SHAPES)}"
        text = texts[index] if index < len(texts) else made
        hardness = rng.uniform(0.2, 0.9)
        count = n_samples * rounds
        answers = [rng.choices(["yes", "no", "uncertain"], [hardness, 0.95 - hardness, 0.05])[0] for _ in range(count)]
        rewards = [rng.gauss(0.4 if a == "yes" else -0.3, 0.6) for a in answers] if reward else None
        write_prompt(folder / f"{index:05}", index, text, answers, rewards, rng, n_samples=n_samples)
    return folder


def make_adaptive(folder: Path) -> None:
    """Makes an experiment of `write_experiment` an adaptive one: after each image, a candidate that was dropped.

    Images with a yes were accepted. Every second dropped candidate has a picture.
    """
    settings = json.loads((folder / "experiment.json").read_text())
    settings["settings"]["search"] = "adaptive"
    (folder / "experiment.json").write_text(json.dumps(settings))
    for place in sorted(folder.glob("[0-9]*")):
        metadata = json.loads((place / "metadata.jsonl").read_text())
        (place / "dropped").mkdir()
        candidates: list[dict[str, Any]] = []
        for i, response in metadata["text_responses"].items():
            accepted = response["answer"] == "yes"
            fate = {"fate": "accepted", "reason": None} if accepted else {"fate": "rejected", "reason": "<i>no</i>"}
            candidates.append(fate | {"image": int(i), "dropped_at": None, "evaluations": 20.91})
            reason = {"reason": "the model says no at t = 0.84", "evaluations": 8.91}
            candidates.append({"fate": "dropped", "image": None, "dropped_at": 0.84} | reason)
            if int(i) % 2:
                draw("red", "circle", random.Random(0)).save(place / "dropped" / f"{2 * int(i) + 1:05}.png")
        for number, candidate in enumerate(candidates):
            candidate |= {"candidate": number, "seed": 1000 + number, "looks": []}
        yes = [i for i, response in metadata["text_responses"].items() if response["answer"] == "yes"]
        lacking = max(0, metadata["n_samples"] - len(yes))
        no = [i for i in metadata["text_responses"] if i not in yes][:lacking]
        metadata |= {"search": "adaptive", "scaling_rounds": None, "candidates": candidates}
        metadata |= {"evaluations": sum(c["evaluations"] for c in candidates), "n_accepted": len(yes)}
        metadata["filled_up"] = [int(i) for i in no]
        (place / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")


if __name__ == "__main__":
    made = write_experiment(
        Path(sys.argv[1]),
        12,
        texts=('a photo of a red circle <script>alert(1)</script> & "more"', "ein grüner Kreis – 緑の丸, " * 6),
    )
    (made / "00009" / "samples" / "00003.png").unlink()
    (made / "00010" / "metadata.jsonl").unlink()
    (made / "00010" / "error.json").write_text(
        json.dumps({"error": "the latent of image 3 is not finite", "prompt": "x"})
    )
    (made / "00011" / "metadata.jsonl").unlink()
