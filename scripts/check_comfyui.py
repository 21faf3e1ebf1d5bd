"""Tries the nodes in a ComfyUI that runs: workflows, pixels, what is drawn again, interruption.

    python scripts/check_comfyui.py http://127.0.0.1:8188

Start ComfyUI on the CPU with the nodes in its folder custom_nodes (docs/comfyui.md), on the machine that has this repository.
The pixels are compared with those that this Python draws, so OMP_NUM_THREADS must be the same for both. The workflow with a
LoRA adapter runs if ComfyUI has an adapter.
"""

from __future__ import annotations

import io
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import scale_rae

WORKFLOWS = Path(__file__).resolve().parents[1] / "integrations" / "comfyui" / "example_workflows" / "api"
LONGEST = 600  # seconds of one workflow
Workflow = dict[str, dict[str, Any]]


def main(address: str) -> int:
    """The exit status: 0 if all is as it should be."""
    problems = []
    names = [path.stem for path in sorted(WORKFLOWS.glob("*.json"))]
    for name in sorted(names, key=lambda name: name == "load_latent"):  # after the one that saves it
        workflow = json.loads((WORKFLOWS / f"{name}.json").read_text())
        if name == "lora" and not chosen(
            workflow, "ScaleRAELora", "adapter", entries(address, "ScaleRAELora", "adapter")
        ):
            print(f"{name}: skipped, ComfyUI has no adapter")
            continue
        if name == "load_latent":
            chosen(workflow, "ScaleRAELoadLatent", "latent", entries(address, "ScaleRAELoadLatent", "latent")[-1:])
        start = time.monotonic()
        status, outputs, _ = run(address, workflow)
        print(f"{name}: {status} after {time.monotonic() - start:.1f} s")
        if status != "success":
            problems.append(name)
        elif name == "text_to_image" and not same_pixels(address, workflow, outputs):
            problems.append("pixels of text_to_image")
        if name == "text_to_image" and not drawn_again_with_another_seed_only(address, workflow):
            problems.append("what of text_to_image is drawn again")
    if (status := interrupted(address)) != "interrupted":
        problems.append(f"interruption ({status})")
    print("all as it should be" if not problems else f"wrong: {', '.join(problems)}")
    return len(problems) > 0


def run(address: str, workflow: Workflow) -> tuple[str, dict[str, Any], set[str]]:
    """("success", "error" or "interrupted"; outputs of nodes by their number; nodes that did not run again), once it is over."""
    number = queue(address, workflow)
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        if entry := ask(address, f"/history/{number}").get(number):
            messages = dict(entry["status"]["messages"])
            status = "interrupted" if "execution_interrupted" in messages else entry["status"]["status_str"]
            return status, entry["outputs"], set(messages.get("execution_cached", {}).get("nodes", []))
        time.sleep(0.2)
    return "not over", {}, set()


def drawn_again_with_another_seed_only(address: str, workflow: Workflow) -> bool:
    """Whether no node of a workflow that has just run runs again, and with another seed all but the loader do."""
    unchanged = run(address, workflow)[2]
    (drawing,) = (entry for entry in workflow.values() if entry["class_type"] == "ScaleRAETextToImage")
    other = drawing | {"inputs": drawing["inputs"] | {"seed": drawing["inputs"]["seed"] + 1, "num_images": 1}}
    changed = run(address, {key: other if entry is drawing else entry for key, entry in workflow.items()})[2]
    return unchanged == set(workflow) and changed == {drawing["inputs"]["model"][0]}


def interrupted(address: str) -> str:
    """The status of a long drawing that is interrupted once it runs."""
    workflow = json.loads((WORKFLOWS / "text_to_image.json").read_text())
    for entry in workflow.values():
        if entry["class_type"] == "ScaleRAETextToImage":
            entry["inputs"] |= {"num_images": 200, "seed": time.time_ns() % 2**31}
    number = queue(address, workflow)
    while not any(job[1] == number for job in ask(address, "/queue")["queue_running"]):
        time.sleep(0.1)
    time.sleep(3)  # the model is loaded, and the node draws
    start = time.monotonic()
    ask(address, "/interrupt", {})
    while number not in (history := ask(address, f"/history/{number}")) and time.monotonic() - start < LONGEST:
        time.sleep(0.1)
    kinds = [kind for kind, _ in history[number]["status"]["messages"]]
    print(f"interruption: over after {time.monotonic() - start:.1f} s")
    return "interrupted" if "execution_interrupted" in kinds else str(kinds[-1])


def same_pixels(address: str, workflow: Workflow, outputs: dict[str, Any]) -> bool:
    """Whether the saved pictures of text_to_image have the pixels that `ScaleRAE.generate` draws here."""
    (inputs,) = (entry["inputs"] for entry in workflow.values() if entry["class_type"] == "ScaleRAETextToImage")
    saved = next(output["images"] for output in outputs.values() if "images" in output)
    expected = scale_rae.load("shapes", device="cpu").generate(
        inputs["prompt"], num_images=inputs["num_images"], seed=inputs["seed"], guidance=inputs["guidance_level"]
    )
    pictures = []
    for file in saved:
        with urllib.request.urlopen(f"{address}/view?{urllib.parse.urlencode(file)}", timeout=60) as response:
            pictures.append(np.asarray(Image.open(io.BytesIO(response.read()))))
    return [picture.tobytes() for picture in pictures] == [np.asarray(one.image).tobytes() for one in expected.images]


def chosen(workflow: Workflow, kind: str, name: str, entries: list[str]) -> bool:
    """Sets the input `name` of nodes of a kind to the first of a menu's entries; False if there is none."""
    for entry in workflow.values():
        if entry["class_type"] == kind and entries:
            entry["inputs"][name] = entries[0]
    return bool(entries)


def entries(address: str, kind: str, name: str) -> list[str]:
    """The entries of a node's menu."""
    found: list[str] = ask(address, f"/object_info/{kind}")[kind]["input"]["required"][name][1]["options"]
    return found


def queue(address: str, workflow: Workflow) -> str:
    """The number of a workflow in ComfyUI's queue."""
    return str(ask(address, "/prompt", {"prompt": workflow})["prompt_id"])


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """What ComfyUI answers, as JSON; None if it answers nothing."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            text = response.read()
    except urllib.error.HTTPError as e:
        raise SystemExit(f"{address}{path}: {e.code}: {e.read().decode()[:1000]}") from e
    return json.loads(text) if text else None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(sys.argv[1].rstrip("/")))
