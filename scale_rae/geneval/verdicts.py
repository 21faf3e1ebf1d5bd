"""GenEval's verdict on a picture, from what a detector found (Ghosh et al. 2023, arXiv:2310.11513).

The rules are those of the original evaluator, to the last bit: a class's detections are selected by score, then the clauses
of the prompt's metadata are checked for number, colour and position. Boxes are float32, and so are the comparisons, since
1 in 14 verdicts or lists of boxes changes when they are computed in doubles. Needs numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from scale_rae.errors import InputError, shorten
from scale_rae.options import Knob, check_options

_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,"
    "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,"
    "toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,"
    "clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
CLASSES = tuple(_CLASSES.split(","))  # COCO's 80 classes in the detector's order, under GenEval's names for them
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTING = "counting"  # the tag of prompts about numbers, which has a threshold of its own
_NEAR = np.float32(1e-3)  # pixels: offsets below it have no direction
_PANEL = "Verdicts"

Boxes = NDArray[np.float32]  # [N, 5]: x0, y0, x1, y1 in pixels, score
Classify = Callable[[str, list[int]], Sequence[str]]  # (class, numbers of its detections) -> their colours


@dataclass(frozen=True)
class VerdictOptions:
    """What counts as an object. The defaults are those of published scores."""

    threshold: Annotated[float, Knob("Keep detections that score more.", _PANEL, least=0, most=1)] = 0.3
    counting_threshold: Annotated[
        float, Knob("The same, for prompts about numbers of objects.", _PANEL, least=0, most=1)
    ] = 0.9
    max_objects: Annotated[int, Knob("Keep at most this many objects of a class.", _PANEL, least=1)] = 16
    max_overlap: Annotated[
        float,
        Knob(
            "Drop an object that overlaps a better one of its class by this much or more; 1 keeps all.",
            _PANEL,
            least=0,
            most=1,
        ),
    ] = 1.0
    position_threshold: Annotated[
        float,
        Knob(
            "Objects nearer than this share of their sizes are not left, right, above or below each other.",
            _PANEL,
            least=0,
        ),
    ] = 0.1

    def __post_init__(self) -> None:
        check_options(self)


PUBLISHED_OPTIONS = VerdictOptions()


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what its prompt names, why not, and the objects that were found.

    `details` has each class's kept boxes [x0, y0, x1, y1, score], best first; classes without any are absent.
    """

    correct: bool
    reason: str
    details: dict[str, list[list[float]]]


def verdict(
    metadata: Mapping[str, Any],
    detections: Mapping[str, Boxes],
    classify: Classify,
    options: VerdictOptions = PUBLISHED_OPTIONS,
    classes: Sequence[str] = CLASSES,
    colors: Sequence[str] = COLORS,
) -> Verdict:
    """The verdict on one picture, as the original evaluator gives it.

    `detections` has the boxes of each class in the detector's order, [N, 5] float32: x0, y0, x1, y1 in pixels, score.
    `classify(class, numbers)` gives the colours of a class's detections, which it names by their row in `detections`; it
    is called once for each clause with a colour that has enough objects.

    Raises:
        InputError: `check_metadata` refuses the metadata, or detections are of an unknown class or another shape.
    """
    check_metadata(metadata, classes, colors)
    kept = keep(metadata, detections, options, classes)
    boxes = {name: detections[name][numbers] for name, numbers in kept.items()}
    reasons: list[str] = []
    targets: list[Boxes | None] = []
    for clause in metadata.get("include", ()):
        found, problem = _check_clause(clause, kept, boxes, targets, classify, options, colors)
        targets.append(None if problem else found)
        reasons += [problem] if problem else []
    for clause in metadata.get("exclude", ()):
        name, count = clause["class"], clause["count"]
        if (number := len(kept.get(name, ()))) >= count:
            reasons.append(f"expected {name}<{count}, found {number}")
    details = {name: [[float(x) for x in box] for box in boxes[name]] for name in boxes}
    return Verdict(not reasons, "\n".join(reasons), details)


def color_calls(
    metadata: Mapping[str, Any],
    detections: Mapping[str, Boxes],
    options: VerdictOptions = PUBLISHED_OPTIONS,
) -> list[tuple[str, list[int]]]:
    """The calls of `classify` that `verdict` will make, so that many pictures can share a batch.

    Raises:
        InputError: as `verdict`.
    """
    check_metadata(metadata)
    kept = keep(metadata, detections, options)
    wanted = [clause for clause in metadata.get("include", ()) if clause.get("color") is not None]
    return [
        (clause["class"], kept[clause["class"]][: clause["count"]])
        for clause in wanted
        if len(kept.get(clause["class"], ())) >= clause["count"]
    ]


def check_metadata(record: Any, classes: Sequence[str] = CLASSES, colors: Sequence[str] = COLORS) -> None:
    """Raises InputError, naming the field, unless `record` is metadata as GenEval writes it.

    Needed are `tag` and at least one of the lists `include` and `exclude`, whose clauses have `class` and `count`. A clause of
    `include` may have `color`, and `position`: a relation and the number of an earlier clause.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"metadata must be an object, not {_short(record)}")
    if not isinstance(record.get("tag"), str):
        raise InputError(f"metadata: tag is {_short(record.get('tag'))}; must be the name of a kind of prompt")
    if "include" not in record and "exclude" not in record:
        raise InputError("metadata: neither include nor exclude; one of them must say what the picture should show")
    for field in ("include", "exclude"):
        clauses = record.get(field, [])
        if not isinstance(clauses, Sequence) or isinstance(clauses, str):
            raise InputError(f"metadata: {field} is {_short(clauses)}; must be a list of clauses")
        for number, clause in enumerate(clauses):
            _check_clause_fields(
                clause, f"metadata: {field}[{number}]", number, classes, colors if field == "include" else None
            )


def _check_clause_fields(
    clause: Any, where: str, number: int, classes: Sequence[str], colors: Sequence[str] | None
) -> None:
    """Raises InputError, beginning with `where`; without `colors`, colour and position go unchecked."""
    if not isinstance(clause, Mapping):
        raise InputError(f"{where} is {_short(clause)}; must be an object with class and count")
    if clause.get("class") not in classes:
        raise InputError(f"{where}.class is {_short(clause.get('class'))}, which is none of the detector's classes")
    count = clause.get("count")
    if type(count) is not int or count < 1:
        raise InputError(f"{where}.count is {_short(count)}; must be a whole number of at least 1")
    if colors is None:
        return
    color = clause.get("color")
    if color is not None and color not in colors:
        raise InputError(f"{where}.color is {_short(color)}; must be one of {', '.join(colors)}")
    position = clause.get("position")
    if position is None:
        return
    if not isinstance(position, Sequence) or isinstance(position, str) or len(position) != 2:
        raise InputError(f"{where}.position is {_short(position)}; must be a relation and the number of a clause")
    relation, target = position
    if relation not in RELATIONS:
        raise InputError(f"{where}.position has relation {_short(relation)}; must be one of {', '.join(RELATIONS)}")
    if type(target) is not int or not 0 <= target < number:
        raise InputError(
            f"{where}.position has target {_short(target)}; must be the number of an earlier clause, from 0"
        )


def _short(value: Any) -> str:
    return shorten(repr(value))


def keep(
    metadata: Mapping[str, Any],
    detections: Mapping[str, Boxes],
    options: VerdictOptions = PUBLISHED_OPTIONS,
    classes: Sequence[str] = CLASSES,
) -> dict[str, list[int]]:
    """The numbers of each class's kept detections, best first: the objects of a verdict's `details`.

    Classes are in the detector's order, without those of which none is kept.

    Raises:
        InputError: detections are of an unknown class or another shape.
    """
    if unknown := [name for name in detections if name not in classes]:
        raise InputError(f"detections of {_short(unknown[0])}, which is none of the detector's classes")
    threshold = options.counting_threshold if metadata["tag"] == COUNTING else options.threshold
    kept: dict[str, list[int]] = {}
    for name in classes:
        boxes = detections.get(name)
        if boxes is None or not len(boxes):
            continue
        if boxes.dtype != np.float32 or boxes.ndim != 2 or boxes.shape[1] != 5:
            raise InputError(f"detections of {name} are {list(boxes.shape)} {boxes.dtype}; must be [N, 5] float32")
        numbers = _select(boxes, threshold, options)
        if numbers:
            kept[name] = numbers
    return kept


def _select(boxes: Boxes, threshold: float, options: VerdictOptions) -> list[int]:
    """The numbers of the kept boxes [N, 5], best first; of equal scores the later one first."""
    scores = boxes[:, 4]
    order = np.argsort(scores, kind="stable")[::-1]
    left = [int(i) for i in order if scores[i] > np.float32(threshold)][: options.max_objects]
    if options.max_overlap >= 1:
        return left
    kept: list[int] = []
    while left:
        best, *rest = left
        kept.append(best)
        left = [i for i in rest if _overlap(boxes[best], boxes[i]) < options.max_overlap]
    return kept


def _overlap(a: Boxes, b: Boxes) -> float:
    """Intersection over union of two boxes that contain their last pixels, so sides are 1 longer."""
    shared = _area(np.maximum(a[:2], b[:2]), np.minimum(a[2:4], b[2:4]))
    union = _area(a[:2], a[2:4]) + _area(b[:2], b[2:4]) - shared
    return shared / union if union else 0.0


def _area(low: Boxes, high: Boxes) -> float:
    width, height = (max(float(side) + 1, 0.0) for side in high - low)  # differences in float32, the rest in doubles
    return width * height


def _check_clause(
    clause: Mapping[str, Any],
    kept: Mapping[str, list[int]],
    boxes: Mapping[str, Boxes],
    targets: Sequence[Boxes | None],
    classify: Classify,
    options: VerdictOptions,
    colors: Sequence[str],
) -> tuple[Boxes, str]:
    """The boxes that a clause of `include` is about, and why it does not hold ("" if it does)."""
    name, count, color = clause["class"], clause["count"], clause.get("color")
    numbers = kept.get(name, [])[:count]
    found = boxes[name][:count] if numbers else np.empty((0, 5), np.float32)
    if len(numbers) < count:
        return found, f"expected {name}>={count}, found {len(numbers)}"
    if color is not None:
        seen = list(classify(name, numbers))
        if len(seen) != len(numbers):
            raise InputError(f"{len(seen)} colours for {len(numbers)} detections of {name}")
        if (right := seen.count(color)) < count:
            others = ", ".join(f"{seen.count(other)} {other}" for other in colors if other in seen)
            return found, f"expected {color} {name}>={count}, found {right} {color}; and {others}"
    if clause.get("position") is not None:
        relation, index = clause["position"]
        target = targets[index]
        if target is None:
            return found, f"no target for {name} to be {relation}"
        for a in found:
            for b in target:
                relations = relative_position(a, b, options.position_threshold)
                if relation not in relations:
                    return found, f"expected {name} {relation} target, found {' and '.join(relations)} target"
    return found, ""


def relative_position(a: Boxes, b: Boxes, threshold: float) -> list[str]:
    """The RELATIONS of box `a` [x0, y0, x1, y1, ...] to box `b`: none, one or two.

    The original writes two of them in an order that changes from run to run; here it is that of RELATIONS.
    """
    corners_a, corners_b = a[:4].astype(np.float32).reshape(2, 2), b[:4].astype(np.float32).reshape(2, 2)
    offset = corners_a.mean(axis=0) - corners_b.mean(axis=0)  # [x, y], of the centres
    sizes = np.abs(np.diff(corners_a, axis=0))[0] + np.abs(np.diff(corners_b, axis=0))[0]
    beyond = np.maximum(np.abs(offset) - np.float32(threshold) * sizes, np.float32(0)) * np.sign(offset)
    if np.all(np.abs(beyond) < _NEAR):
        return []
    x, y = beyond / np.linalg.norm(offset)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return [relation for relation, is_so in zip(RELATIONS, holds, strict=True) if is_so]
