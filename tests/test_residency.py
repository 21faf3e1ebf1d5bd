"""Weights that wait on the host: the same bits as with all of them on the device. The CPU is the device here."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scale_rae
from scale_rae import options
from scale_rae.adaptive import Batching, Search, Searcher
from scale_rae.errors import InputError, OptionError
from scale_rae.images import Picture
from scale_rae.memory import MemoryErrors, savings
from scale_rae.options import ModelChoice, SamplingOptions, SearchOptions, Speed
from scale_rae.pipeline import ScaleRAE
from scale_rae.quantization import QuantizedLinear, joined, room
from scale_rae.residency import BufferLayout, HostMemory, Residency, Ring, Streamed, tensors_of, to_host
from scale_rae.rewards import load_reward
from scale_rae.scores import Asked
from tests.test_goldens import DRAW

Load = Callable[..., ScaleRAE]
MODES = ("model", "stream")


@pytest.fixture
def load(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a golden checkpoint, with offloading from the CPU, which users cannot ask for."""
    monkeypatch.setattr("scale_rae.networks.check_offload", lambda *_: None)

    def load(name: str = "siglip", offload: str = "none", **more: Any) -> ScaleRAE:
        return ScaleRAE.from_pretrained(str(checkpoints.get(name, name)), device="cpu", offload=offload, **more)

    return load


def all_it_does(load: Load, name: str, quantize: str | None, offload: str) -> dict[str, Any]:
    """Replies, latents, pictures, encoded pictures and scores of a model."""
    model = load(name, offload, quantize=quantize)
    guidance = 3.0 if model.config.dit.null_condition else 1.0
    drawn = model.generate([DRAW, "What is this?"], num_images=2, steps=2, guidance=guidance, max_new_tokens=8)
    shape = (model.config.tokens, model.config.dit.condition_width)
    condition = torch.randn(shape, generator=torch.Generator().manual_seed(0))  # a quantised model may ask for no image
    latents = model.sample([condition] * 3, [1, 2, 3], SamplingOptions(steps=2, guidance=guidance))
    latents += [image.latent for result in drawn for image in result.images]
    pictures = model.decode(latents[:2])
    return {
        "mode": model.residency.mode,
        "replies": [result.reply.ids for result in drawn],
        "latents": [latent.tolist() for latent in latents],
        "pictures": [picture.tobytes() for picture in pictures],
        "encoded": [latent.tolist() for latent in model.encode(pictures)],
        "scores": model.score(latents[:2], "a red circle"),
    }


@pytest.mark.parametrize(
    ("name", "quantize"), [("siglip", None), ("wide", None), ("ddt", "int8-products"), ("ddt", "nf4")]
)
def test_changes_no_bit(load: Load, name: str, quantize: str | None) -> None:
    expected = all_it_does(load, name, quantize, "none")
    for mode in MODES:
        assert all_it_does(load, name, quantize, mode) == expected | {"mode": mode}


def test_parts_have_their_turn_one_after_the_other(load: Load) -> None:
    model = load(offload="model")
    model.generate(DRAW, num_images=3, batch_size=2, steps=2)
    assert model.residency.copies == {"language": 1, "dit": 1, "decoder": 1}
    model.generate([DRAW] * 2, num_images=2, steps=2)
    assert model.residency.copies == {"language": 2, "dit": 2, "decoder": 2}
    latents = model.generate(DRAW, steps=2, decode=False).images[0].latent
    model.sample([torch.zeros(model.config.tokens, model.config.dit.condition_width)], [1], SamplingOptions(steps=2))
    assert model.decode([]) == model.sample([], []) == model.encode([]) == []
    assert model.residency.copies["dit"] == 3, "the DiT stays until another part needs its place"
    model.score([latents], DRAW)
    model.answer("What is this?", latents=latents)
    assert model.residency.copies == {"language": 4, "dit": 3, "decoder": 2}


def weights(*things: object) -> list[Tensor]:
    return [tensor for tensor in tensors_of(list(things)) if tensor.numel() > 1]


def test_parts_share_one_piece_of_the_devices_memory(load: Load) -> None:
    model = load(offload="model")
    decoder = model.decoder  # known before anything is on the device
    language = model.language
    model.generate(DRAW, steps=2)
    parts = [
        weights(language.model.layers, language.model.embed_tokens, language.lm_head),
        weights(model.dit.dit_blocks),
        weights(decoder),
    ]
    used = [{tensor.untyped_storage().data_ptr() for tensor in part} for part in parts]
    assert used[0] == used[1] == used[2]
    assert len(used[0]) == 1
    (size,) = {part[0].untyped_storage().nbytes() for part in parts}
    assert size <= max(sum(tensor.nbytes for tensor in part) for part in parts) * 1.2, "as large as the largest part"


def test_a_later_part_that_does_not_fit_has_memory_of_its_own() -> None:
    kept = Residency("model", torch.device("cpu"))
    small, large = nn.Linear(4, 4), nn.Linear(400, 400)
    x, values = torch.ones(1, 4), small.weight.detach().clone()
    kept.keep("small", small, [small])
    with kept.use("small"):
        y = small(x)
    kept.keep("large", large, [large])
    expected = large.weight.detach().clone()
    with kept.use("large"):
        assert torch.equal(large.weight, expected)
    with kept.use("small"):
        assert torch.equal(small(x), y)
        assert torch.equal(small.weight, values)


def test_memory_that_quantised_weights_leave_is_freed() -> None:
    """Also where several linears share it, as projections with one input do."""
    weights = room("int8", [4, 8], 8, torch.device("cpu"))
    left = weights[0].values.untyped_storage().data_ptr()
    linears = [QuantizedLinear(weight, None) for weight in weights]
    fused = joined([linear.weight for linear in linears])
    del weights
    Residency("model", torch.device("cpu")).keep("part", [linears, fused])
    tensors = [x for x in gc.get_objects() if isinstance(x, Tensor) and x.dtype == torch.int8]
    assert [x for x in tensors if x.untyped_storage().data_ptr() == left] == []


@pytest.mark.parametrize("mode", MODES)
def test_a_part_used_outside_of_its_turn_raises(load: Load, mode: str) -> None:
    """Else it would compute with another part's weights."""
    model = load(offload=mode)
    with pytest.raises(RuntimeError, match="language is used outside of its turn"):
        model.language.tokens([1, 2])
    with pytest.raises(RuntimeError, match="decoder is used outside of its turn"):
        model.decoder(torch.zeros(1, model.config.tokens, model.config.channels))
    with model.residency.use("decoder"), pytest.raises(RuntimeError, match="dit is used outside of its turn"):
        model.sampler.draw([torch.zeros(model.config.tokens, model.config.dit.condition_width)], [1], SamplingOptions())


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_an_image_that_forms(load: Load, mode: str) -> None:
    """The decoder has its turn in between, and the DiT goes on with its own weights."""

    def draw(model: ScaleRAE) -> tuple[Tensor, list[bytes]]:
        seen: list[bytes] = []

        def watch(evaluation: int, evaluations: int, t: float, x: Tensor, v: Tensor) -> None:
            seen.extend(picture.tobytes() for picture in model.decode(model.estimate(t, x, v)))

        return model.generate(DRAW, steps=3, callback=watch).images[0].latent, seen

    latent, pictures = draw(load(offload=mode))
    expected, expected_pictures = draw(load())
    assert torch.equal(latent, expected)
    assert pictures == expected_pictures


@pytest.mark.parametrize("mode", MODES)
def test_threads_use_an_offloaded_model_in_turn(load: Load, mode: str) -> None:
    model, expected = load(offload=mode), load().generate(DRAW, num_images=2, steps=3)

    def draw(seed: int) -> list[Any]:
        torch.set_num_threads(1)
        (image,) = model.generate(DRAW, image_seeds=[[seed]], steps=3).images
        return [image.latent.tolist(), image.image]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(draw, [image.seed for image in expected.images] * 3))
    assert found == [[image.latent.tolist(), image.image] for image in expected.images] * 3


def test_memory_that_runs_out_halves_batches(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = load(offload="stream"), load().generate(DRAW, num_images=4, steps=2)
    evaluate = model.sampler.fast_dit.evaluate

    def limited(parts: Any, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        if len(x) > 2:
            for _ in model.sampler.fast_dit.shared:  # some blocks are on their way
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return evaluate(parts, x, *rest, **more)

    monkeypatch.setattr(model.sampler.fast_dit, "evaluate", limited)
    halved = model.generate(DRAW, num_images=4, steps=2)
    for mine, its in zip(halved.images, whole.images, strict=True):
        torch.testing.assert_close(mine.latent, its.latent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_other_speeds_of_an_offloaded_model(load: Load, mode: str) -> None:
    model = load(offload=mode)
    latent = model.generate(DRAW, steps=2).images[0].latent
    other = model.with_speed(Speed("off"))
    assert torch.equal(other.generate(DRAW, steps=2).images[0].latent, latent)
    model.release_memory()
    assert torch.equal(model.generate(DRAW, steps=2).images[0].latent, latent)
    with pytest.raises(InputError, match=f"only compile can change with --offload {mode}"):
        model.with_speed(Speed("off", shared=False))
    assert model.exact_batch(2, [SamplingOptions()], one_prompt=True) in (1, 2)


@pytest.mark.parametrize("mode", MODES)
def test_a_reward_has_its_turn_too(load: Load, mode: str) -> None:
    pictures = [image.image for image in load("shapes").generate(DRAW, num_images=2, steps=4).images]

    def scores(offload: str) -> tuple[tuple[float, float], list[float]]:
        reward = load_reward("siglip", model := load("shapes", offload))
        found = reward.score(pictures, "a red circle")
        model.encode(pictures)
        again = load_reward("siglip", model)  # a second one does not take the place of the first
        assert reward.score(pictures, "a red circle") == again.score(pictures, "a red circle") == found
        return reward.range, found

    assert scores(mode) == scores("none")


class Rewarding:
    """A reward that is a part of the model, for counting its turns."""

    name, range, operations = "rewarding", (0.0, 1.0), 0.0

    def __init__(self, model: ScaleRAE) -> None:
        self._residency, self._network = model.residency, nn.Linear(3, 1)
        self._residency.keep(self.name, self._network, [self._network])

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def score(self, images: Sequence[Picture], prompt: str) -> list[float]:
        with self._residency.use(self.name):
            return [float(self._network(torch.zeros(1, 3)).detach()) * 0 for _ in images]


def test_in_a_search_each_part_has_one_turn_per_stage(load: Load) -> None:
    """Candidates of all prompts are drawn, then decoded, then rewarded, then scored, in however many batches."""

    def searched(offload: str) -> tuple[list[Any], ScaleRAE]:
        model = load("shapes", offload)
        requests = ["a photo of a red circle", "a photo of a blue square"]
        replies = model.reply(requests)
        searches = [Search(Asked(r, r, reply), lambda j: j) for r, reply in zip(requests, replies, strict=True)]
        options, sampling = SearchOptions(check_at=(0.9,), max_candidates=4), SamplingOptions(steps=3)
        searcher = Searcher(model, Rewarding(model), 2, options, sampling, Batching(draw=1, read=1))
        model.residency.copies.clear()
        waves = searcher.next_round(searches)
        assert sum(map(len, waves)) >= 2, "several batches"
        return [(drawn.candidate, drawn.latent.tolist()) for wave in waves for drawn in wave], model

    found, model = searched("model")
    assert set(model.residency.copies.values()) == {2}, "one turn until the look, and one to the end"
    assert set(model.residency.copies) == {"dit", "decoder", "rewarding", "language"}
    assert found == searched("none")[0]


# --- layouts and blocks ----------------------------------------------------------------------------------------------


def test_tensors_that_share_memory_share_it_on_the_host() -> None:
    whole = torch.arange(64, dtype=torch.float32).view(8, 8)
    tied = nn.Parameter(whole[2:4])
    tensors = [
        whole[:3],
        tied,
        whole.t(),
        whole[:, 1],
        torch.arange(5),
        torch.tensor(7, dtype=torch.int8),
        torch.empty(0),
    ]
    before = [tensor.detach().clone() for tensor in tensors]
    layout, memory = to_host(tensors, lock=False)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)
    assert layout.size == memory.numel() < 64 * 4 + 5 * 8 + 1 + 3 * 256
    assert all(offset % 256 == 0 for *_, offset in layout.pieces)
    tied.data.fill_(-1.0)
    assert torch.equal(tensors[2][:, 2:4], torch.full((8, 2), -1.0)), "still the same memory"
    assert whole[2, 0] == 16, "no longer that of before"


def test_a_slice_of_a_large_tensor_takes_its_own_bytes_only() -> None:
    rows = torch.arange(1000.0).view(100, 10)
    layout = BufferLayout([rows[10:20]])
    assert 400 <= layout.size < 400 + 256
    (buffer,) = [torch.zeros(layout.size, dtype=torch.uint8)]
    ((source, place),) = layout.sources([rows[10:20]])
    buffer[place : place + len(source)] = source
    assert torch.equal(layout.views(buffer)[0], rows[10:20])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries return what is freed")
def test_weights_are_not_on_the_host_twice() -> None:
    """Blocks below 32 MiB lie in glibc's heap, which keeps what is freed below a block that is in use."""

    def taken() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) << 10

    torch.empty(24 << 20, dtype=torch.uint8).fill_(1)  # when it is freed, glibc begins to use the heap for such sizes
    tensors = [torch.ones(20 << 20, dtype=torch.uint8) for _ in range(27)]
    above = torch.ones(20 << 20, dtype=torch.uint8)
    before = taken()
    to_host(tensors, lock=False)
    assert taken() - before < 400 << 20, "540 MB were freed and taken"
    assert above[0] == 1


def test_numbers_of_all_sizes_stay_aligned() -> None:
    """Memory that was packed holds int8 weights, then float32 scales: a layout of some of it begins anywhere."""
    tensors = [torch.arange(50, dtype=torch.int8), torch.arange(50.0), torch.arange(9, dtype=torch.int16)]
    to_host(tensors, lock=False)
    some = [tensors[0][3:], tensors[1][7:], tensors[2]]
    expected = [tensor.clone() for tensor in some]
    layout, _ = to_host(some, lock=False)
    for tensor, old in zip(some, expected, strict=True):
        assert torch.equal(tensor, old)
    assert len(layout.pieces) <= 3


def test_a_host_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*size: object) -> None:
        raise MemoryError

    monkeypatch.setattr("numpy.empty", no_room)
    with pytest.raises(scale_rae.ScaleRAEError, match=r"the host's memory has no room for 1\.0 GiB of weights"):
        HostMemory(1 << 30)


class Copies(Ring):
    """A ring that notes which bytes are copied when."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.log: list[int] = []

    def _copy(self, place: int, sources: Any) -> None:
        super()._copy(place, sources)
        self.log.append(place)


def test_a_block_is_copied_while_the_one_before_it_computes() -> None:
    ring = Copies()
    blocks = [(torch.full((3 + i % 2,), float(i)), nn.Linear(2, 2)) for i in range(5)]
    expected = [(values.clone(), linear.weight.detach().clone()) for values, linear in blocks]
    streamed = Streamed(ring, blocks, 1)
    for _ in range(2):
        for number, (values, linear) in enumerate(streamed):
            assert torch.equal(values, expected[number][0])
            assert torch.equal(linear.weight, expected[number][1])
            assert len(ring.log) % 5 == (number + 2) % 5, "the next block is there already"
            place = ring.log[-2]
            assert values.untyped_storage().data_ptr() == ring.buffers[place].untyped_storage().data_ptr()
    assert ring.log == [i % 2 for i in range(11)], "each block once per pass, and the first one for the next pass"
    assert [values.tolist() for values, _ in streamed[1:3]] == [[1.0] * 4, [2.0] * 3]
    assert torch.equal(streamed[4][0], expected[4][0]), "as it lies on the host"


def test_two_networks_share_the_buffers() -> None:
    ring = Copies()
    first, second = (Streamed(ring, [torch.full((4,), float(i + n)) for i in range(3)], n) for n in (10, 20))
    for _ in range(2):
        assert [block.tolist()[0] for block in first] == [10, 11, 12]
        assert [block.tolist()[0] for block in second] == [20, 21, 22]
    assert sum(buffer.numel() for buffer in ring.buffers) == 32


class Event:
    """Stands for a CUDA event: notes who waits for it and when it is recorded."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def record(self, stream: object = None) -> None:
        self._log.append(f"{self._name} on {stream}")


class Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def wait_event(self, event: Any) -> None:
        self._log.append(f"{self} waits for {event._name}")

    def __str__(self) -> str:
        return self._name


def test_the_order_of_streams_and_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy waits until the block in its buffer has computed; a block waits until its copy is there."""
    import contextlib

    log: list[str] = []
    ring = Copies()
    monkeypatch.setattr(ring, "_stream", Stream(log, "copying"))
    monkeypatch.setattr(ring, "_filled", [Event(log, f"filled {i}") for i in range(2)])
    monkeypatch.setattr(ring, "_used", [Event(log, f"used {i}") for i in range(2)])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(log, "computing"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(ring, "_copy", lambda place, sources: log.append(f"copy to {place}"))
    for _ in Streamed(ring, [torch.zeros(4) for _ in range(3)], 1):
        log.append("compute")
    fill = ["copying waits for used {0}", "copy to {0}", "filled {0} on copying"]
    take = ["computing waits for filled {0}"]
    done = ["used {0} on computing"]

    def at(steps: list[str], place: int) -> list[str]:
        return [step.format(place) for step in steps]

    block = [*at(take, 0), *at(fill, 1), "compute", *at(done, 0)]
    other = [*at(take, 1), *at(fill, 0), "compute", *at(done, 1)]
    assert log == [*at(fill, 0), *block, *other, *block]


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "offload", "why"),
    [
        ("cpu", "model", "device cpu computes in the host's memory"),
        ("mps", "stream", "device mps shares its memory with the host"),
        ("cuda", "some", "use one of none, model, stream"),
    ],
)
def test_offloading_that_makes_no_sense(device: str, offload: str, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        ModelChoice("shapes", device=device, offload=offload).check()
    if device == "cpu":
        with pytest.raises(OptionError, match=why):
            scale_rae.load("shapes", device=device, offload=offload)
    ModelChoice("shapes", device=device).check()
    ModelChoice("shapes", device="cuda:1", offload="stream").check()
    assert "offload" in {option.name for option in options.options_of(ModelChoice)}


def test_out_of_memory_names_what_takes_less() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    chooses = "--memory auto, which chooses"
    assert savings(cuda, None, "none") == ["--quantize int8", "--offload model", chooses]
    assert savings(cuda, "int8", "model") == ["--quantize nf4", "--offload stream", chooses]
    assert savings(cuda, "nf4", "stream") == savings(cpu, None, "none") == []
    listed = MemoryErrors(cuda, torch.bfloat16, "drawing", "fewer", savings(cuda, None, "model")).remedies
    assert listed[:4] == ["fewer", "--quantize int8", "--offload stream", chooses]


def test_memory_that_cannot_be_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    with pytest.raises(scale_rae.ScaleRAEError, match=r"page-locked \(CUDA error 2\); smaller weights need less"):
        to_host([torch.zeros(8)], lock=True)


def test_page_locked_memory_is_unlocked_when_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: set[int] = set()

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            assert address % 4096 == 0
            locked.add(address)
            return 0

        def cudaHostUnregister(self, address: int) -> None:
            locked.remove(address)

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    tensors = [torch.arange(8.0)]
    _, memory = to_host(tensors, lock=True)
    assert locked == {memory.data_ptr()}
    del memory
    assert locked, "the tensor is still a view of it"
    tensors.clear()
    assert not locked
