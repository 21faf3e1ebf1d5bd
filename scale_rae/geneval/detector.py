"""The objects in pictures as boxes, scores and masks, found by Mask2Former as MMDetection runs it.

Every step follows the original's order and number formats: pictures are resized in OpenCV's integer arithmetic and padded before
they are normalised, and the network does not mask the padding. Masks stay on the device until they are packed to one bit per pixel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from scale_rae.errors import InputError, ScaleRAEError
from scale_rae.geneval.mask2former import PUBLISHED, Architecture, load
from scale_rae.geneval.verdicts import CLASSES, Boxes
from scale_rae.memory import MemoryErrors, exact_convolutions, in_batches, pick_device

Mask = NDArray[np.bool_]  # [H, W]

SCALE = (1333, 800)  # pixels: the most that a picture's longer and shorter side get
DIVISOR = 32  # padded sides are multiples of it
PAD = 128
MOST = 100  # detections per picture
BATCH = {"cuda": 8}  # pictures; 1 on other devices
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_BITS = 11  # of the weights of OpenCV's resizing
_AT_ONCE = {"cuda": 1 << 27}  # pixels of masks that are resized at once, and elsewhere:
_AT_ONCE_ELSEWHERE = 1 << 23
_SAFE = 1 - 1e-4  # mask scores are at most 1, up to rounding


class PackedMasks(Sequence[Mask]):
    """The masks [H, W] bool of some detections, stored as one bit per pixel and unpacked on access."""

    def __init__(self, bits: NDArray[np.uint8], rows: Sequence[int], size: tuple[int, int]) -> None:
        """`bits` [K, ceil(H · W / 8)] of numpy.packbits, the row of each mask in them, and `size` (W, H)."""
        self._bits, self._rows, self._size = bits, list(rows), size

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Mask: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mask]: ...
    def __getitem__(self, index: int | slice) -> Mask | list[Mask]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        width, height = self._size
        bits = np.unpackbits(self._bits[self._rows[index]], count=width * height)
        return bits.reshape(height, width).astype(bool)


@dataclass(frozen=True)
class Detections:
    """The objects found in a picture, by class; classes without any are absent.

    `boxes` has rows x0, y0, x1, y1 in pixels of the picture, and score: [N, 5] float32, in descending class probability.
    `masks` has the mask [H, W] of each row.
    """

    boxes: dict[str, Boxes]
    masks: Mapping[str, Sequence[Mask]]


def resized_size(width: int, height: int, scale: tuple[int, int] = SCALE) -> tuple[int, int]:
    """The (width, height) that a picture gets: as large as `scale` allows, in the same proportions."""
    factor = min(max(scale) / max(width, height), min(scale) / min(width, height))
    return int(width * factor + 0.5), int(height * factor + 0.5)


def size_problem(width: int, height: int, scale: tuple[int, int] = SCALE) -> str:
    """Why a picture of that size cannot be brought to the network; empty if it can."""
    if not width or not height:
        return f"{width} x {height} pixels: empty"
    return "" if all(resized_size(width, height, scale)) else f"{width} x {height} pixels: too narrow for its length"


def padded_size(width: int, height: int) -> tuple[int, int]:
    """The (width, height) of the network's input for a resized picture."""
    return -(-width // DIVISOR) * DIVISOR, -(-height // DIVISOR) * DIVISOR


def resize(picture: Tensor, width: int, height: int) -> Tensor:
    """A picture [H, W, 3] uint8 resized to [height, width, 3] uint8 as OpenCV does bilinearly, to the bit.

    OpenCV computes in whole numbers: weights have 11 bits, and what is below a result's last bits is cut off in between.
    """
    above, below, of_above, of_below = _taps(picture.shape[0], height, picture.device, clamp_weights=False)
    left, right, of_left, of_right = _taps(picture.shape[1], width, picture.device, clamp_weights=True)
    values = picture.int()
    rows = values[:, left] * of_left[None, :, None] + values[:, right] * of_right[None, :, None]  # [H, width, 3]
    rows >>= 4
    upper, lower = rows[above] * of_above[:, None, None], rows[below] * of_below[:, None, None]
    return (((upper >> 16) + (lower >> 16) + 2) >> 2).to(torch.uint8)


def _taps(old: int, new: int, device: torch.device, clamp_weights: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each of `new` places along an axis: its two neighbours among `old`, and their weights of 2048."""
    places = ((np.arange(new) + 0.5) / (new / old) - 0.5).astype(np.float32)
    first = np.floor(places)
    part = places - first
    index = first.astype(np.int64)
    if clamp_weights:  # along rows only
        outside = (index < 0) | (index >= old - 1)
        part[outside] = 0
        index = index.clip(0, old - 1)
    weights = [np.rint(np.float32(1 << _BITS) * p).astype(np.int32) for p in (np.float32(1) - part, part)]
    ends = [index.clip(0, old - 1), (index + 1).clip(0, old - 1)]
    first_, second, of_first, of_second = (torch.from_numpy(a).to(device) for a in (*ends, *weights))
    return first_, second, of_first, of_second


def network_input(pictures: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The network's input [B, 3, H, W] float32, of a padded `size` (W, H), of pictures [h, w, 3] uint8."""
    device = pictures[0].device
    batch = torch.full((len(pictures), 3, size[1], size[0]), PAD, dtype=torch.uint8, device=device)
    for padded, picture in zip(batch, pictures, strict=True):
        padded[:, : picture.shape[0], : picture.shape[1]] = picture.permute(2, 0, 1)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (_MEAN, _STD))
    return (batch.float() - mean) / std


def detections(
    class_logits: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    resized: tuple[int, int],
    least_score: float = 0.0,
) -> Detections:
    """The objects in a picture of `size` (W, H), by MMDetection's instance post-processing.

    `class_logits` [Q, 81], `mask_logits` [Q, h, w] of the padded input, `resized` is the (W, H) before padding. The best MOST pairs
    of query and class are kept. Scores are class probability times the mean mask probability inside the mask, so pairs whose
    class probability is below `least_score` cannot score more, and are left out before their masks are made.

    Raises:
        ScaleRAEError: an output is not finite.
    """
    pairs = class_logits.float().softmax(-1)[:, :-1].flatten()  # [Q · 80]
    chances, order = pairs.sort(descending=True, stable=True)
    kept = (chances[:MOST] >= least_score * _SAFE).nonzero()[:, 0] if least_score > 0 else slice(MOST)
    chances, order = chances[:MOST][kept], order[:MOST][kept]
    labels = (order % len(CLASSES)).tolist()
    queries, places = torch.unique(order // len(CLASSES), return_inverse=True)
    boxes, scores, bits = _masks(mask_logits[queries].float(), size, resized)
    rows = torch.cat([boxes[places], (chances * scores[places])[:, None]], 1).cpu().numpy()  # [N, 5]
    if not np.isfinite(rows).all():
        raise ScaleRAEError("the detector's output is not finite; use --detector-dtype float32")
    of_class: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        of_class.setdefault(CLASSES[label], []).append(number)
    row_of = places.tolist()
    packed = {name: PackedMasks(bits, [row_of[n] for n in numbers], size) for name, numbers in of_class.items()}
    return Detections({name: rows[numbers] for name, numbers in of_class.items()}, packed)


def _masks(logits: Tensor, size: tuple[int, int], resized: tuple[int, int]) -> tuple[Tensor, Tensor, NDArray[np.uint8]]:
    """Boxes [K, 4] float32, scores [K] and packed masks [K, bytes] of mask logits, some at a time."""
    if not len(logits):
        return logits.new_zeros(0, 4), logits.new_zeros(0), np.zeros((0, 0), np.uint8)
    width, height = size
    padded = padded_size(*resized)
    most = _AT_ONCE.get(logits.device.type, _AT_ONCE_ELSEWHERE)
    step = max(1, most // (padded[0] * padded[1] + width * height))
    boxes, scores, bits = [], [], []
    for part in torch.split(logits, step):
        whole = F.interpolate(part[None], size=padded[::-1], mode="bilinear", align_corners=False)
        cut = whole[..., : resized[1], : resized[0]]
        values = F.interpolate(cut, size=(height, width), mode="bilinear", align_corners=False)[0]  # [k, H, W]
        mask = values > 0
        inside = (values.sigmoid_() * mask).flatten(1).sum(1)
        scores.append(inside / (mask.flatten(1).sum(1) + 1e-6))
        boxes.append(_boxes(mask))
        bits.append(_pack(mask.flatten(1)))
    return torch.cat(boxes), torch.cat(scores), torch.cat(bits).cpu().numpy()


def _boxes(masks: Tensor) -> Tensor:
    """Boxes [K, 4] float32 of masks [K, H, W]: first column and row, last ones plus 1; 0 where empty."""
    ends = []
    for lines in (masks.any(1), masks.any(2)):  # [K, W], [K, H]
        some = lines.any(1)
        numbers = lines.int()
        ends.append(numbers.argmax(1) * some)
        ends.append((lines.shape[1] - numbers.flip(1).argmax(1)) * some)
    x0, x1, y0, y1 = ends
    return torch.stack([x0, y0, x1, y1], 1).float()


def _pack(masks: Tensor) -> Tensor:
    """Masks [K, pixels] as [K, ceil(pixels / 8)] uint8, the first pixel in the highest bit."""
    padded = F.pad(masks.to(torch.uint8), (0, -masks.shape[1] % 8)).view(len(masks), -1, 8)
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=masks.device)
    return (padded * places).sum(-1, dtype=torch.uint8)


class Detector:
    """Mask2Former with its preprocessing and postprocessing.

    `comparable` is whether the weights are those of published scores; `note` says in a sentence why not. `sha256` is that of the
    published file the weights came from, None for other weights.
    """

    def __init__(
        self,
        path: str,
        device: str | None = None,
        dtype: str = "float32",
        architecture: Architecture = PUBLISHED,
        scale: tuple[int, int] = SCALE,
    ) -> None:
        """Loads MMDetection's .pth file, a folder of `convert`, or a Mask2Former in transformers' layout.

        With another `dtype` than float32, the network runs under autocast of it.
        `architecture` and `scale` are for tests and for networks of other sizes.

        Raises:
            ConfigError, CheckpointError, HubError: as `mask2former.load`.
        """
        self.device = pick_device(device)
        loaded = load(path, architecture)
        self.network = loaded.network.to(self.device)
        self.name, self.sha256, self.comparable = loaded.name, loaded.sha256, loaded.comparable
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.scale = scale

    @property
    def note(self) -> str:
        """Why scores are not comparable with published ones; empty if they are."""
        if self.comparable:
            return ""
        return f"not comparable with published scores: the weights {self.name} are not those of the published detector"

    def detect(
        self, images: Sequence[Image.Image], least_score: float = 0.0, batch_size: int | None = None
    ) -> list[Detections]:
        """The objects in each picture; alpha is dropped. Pictures of the same padded size share batches.

        Objects that certainly score less than `least_score` are left out before their masks are computed. `batch_size` is
        halved whenever memory runs out.

        Raises:
            InputError: `size_problem` refuses a picture.
            DeviceError: memory runs out with a single picture.
        """
        found: list[Detections | None] = [None] * len(images)
        groups: dict[tuple[int, int], list[int]] = {}
        for number, image in enumerate(images):
            if problem := size_problem(*image.size, self.scale):
                raise InputError(f"a picture of {problem}")
            groups.setdefault(padded_size(*resized_size(*image.size, self.scale)), []).append(number)
        size = batch_size or BATCH.get(self.device.type, 1)
        release = torch.cuda.empty_cache if self.device.type == "cuda" else None
        for padded, numbers in groups.items():

            def run(
                start: int, stop: int, padded: tuple[int, int] = padded, numbers: list[int] = numbers
            ) -> list[Detections]:
                return self._detect([images[i] for i in numbers[start:stop]], padded, least_score)

            results = in_batches(
                len(numbers), size, run, self._errors, "detecting objects in", "image", release=release
            )
            for number, result in zip(numbers, results, strict=True):
                found[number] = result
        return [result for result in found if result is not None]

    @torch.inference_mode()
    def outputs(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Class logits [B, Q, 81] and mask logits [B, Q, h, w], float32, of pictures of one padded size."""
        resized = []
        for image in images:
            picture = torch.from_numpy(np.array(image.convert("RGB"))).to(self.device)
            resized.append(resize(picture, *resized_size(*image.size, self.scale)))
        height, width, _ = resized[0].shape
        pixels = network_input(resized, padded_size(width, height))
        autocast: Any = contextlib.nullcontext()
        if self.dtype != torch.float32:
            autocast = torch.autocast(self.device.type, self.dtype)
        with autocast, exact_convolutions():
            class_logits, mask_logits = self.network(pixels)
        return class_logits.float(), mask_logits.float()

    @torch.inference_mode()
    def _detect(self, images: Sequence[Image.Image], padded: tuple[int, int], least_score: float) -> list[Detections]:
        outputs = self.outputs(images)
        return [
            detections(classes, masks, image.size, resized_size(*image.size, self.scale), least_score)
            for image, classes, masks in zip(images, *outputs, strict=True)
        ]

    def _errors(self, what: str, remedy: str) -> MemoryErrors:
        return MemoryErrors(self.device, None, what, remedy)
