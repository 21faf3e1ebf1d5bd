from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from scale_rae import outputs
from scale_rae.checkpoint import load_latent
from scale_rae.errors import InputError, OutputError
from scale_rae.outputs import Sample, check_folder, latent_bytes, picture_bytes, png_bytes, read_manifest, save_run

RED = Image.new("RGB", (4, 3), "red")


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_sample_leaves_picture_latent_and_manifest(tmp_path: Path) -> None:
    latent = torch.arange(6.0).view(2, 3)
    manifest = save_run(tmp_path / "a" / "b", {"x": "é", "seconds": {"load": 1}}, [Sample(RED, latent)], "T")
    folder = tmp_path / "a" / "b"
    assert left(folder) == ["sample_T.png", "sample_T_latent.pt", "sample_T_manifest.json"]
    assert manifest["output_images"] == [str(folder / "sample_T.png")]
    assert manifest["latent_path"] == str(folder / "sample_T_latent.pt")
    assert set(manifest["seconds"]) == {"load", "writing"}
    assert read_manifest(folder / "sample_T_manifest.json") == manifest
    assert torch.equal(load_latent(folder / "sample_T_latent.pt"), latent)


def test_many_samples_sort_as_they_are_numbered(tmp_path: Path) -> None:
    manifest = save_run(tmp_path, {}, [Sample(RED)] * 11, "T", "-00007")
    names = [Path(p).name for p in manifest["output_images"]]
    assert names[0] == "sample_T-00007_00.png"
    assert names == sorted(names)
    assert manifest["latent_path"] is None


def test_without_a_sample_only_the_manifest_is_left(tmp_path: Path) -> None:
    assert save_run(tmp_path, {}, [], "T")["output_images"] == []
    assert left(tmp_path) == ["sample_T_manifest.json"]


@pytest.mark.parametrize("taken", ["sample_T.png", "sample_T_manifest.json", ".sample_T.tmp"])
def test_taken_names_are_passed_over(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("mine")
    (tmp_path / "sample_T-2.png").symlink_to("nowhere")
    save_run(tmp_path, {}, [Sample(RED)], "T")
    assert left(tmp_path) == sorted([taken, "sample_T-2.png", "sample_T-3.png", "sample_T-3_manifest.json"])
    assert (tmp_path / taken).read_text() == "mine"


def test_what_a_killed_run_left_does_not_hold_its_name(tmp_path: Path) -> None:
    script = (
        "import os, sys; from scale_rae import outputs; from pathlib import Path\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "outputs.save_run(Path(sys.argv[1]), {}, [], 'T')\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == -9
    assert left(tmp_path) == [".sample_T.tmp"]
    save_run(tmp_path, {}, [Sample(RED)], "T")
    assert left(tmp_path) == ["sample_T.png", "sample_T_manifest.json"]


def test_a_folder_that_is_written_to_holds_its_name(tmp_path: Path) -> None:
    (tmp_path / ".sample_T-2.tmp").mkdir()
    (tmp_path / ".sample_T-2.tmp" / "not a run's").mkdir()
    (tmp_path / ".sample_T-3.tmp").symlink_to(tmp_path)
    with outputs.held(tmp_path / ".sample_T.tmp") as mine:
        assert mine
        save_run(tmp_path, {}, [], "T")
        assert left(tmp_path) == [".sample_T-2.tmp", ".sample_T-3.tmp", ".sample_T.tmp", "sample_T-4_manifest.json"]
    assert left(tmp_path) == [".sample_T-2.tmp", ".sample_T-3.tmp", "sample_T-4_manifest.json"]


@pytest.mark.parametrize("problem", [OSError(errno.ENOTSUP, "no locks here"), None])
def test_where_folders_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: OSError | None
) -> None:
    """As on some network file systems, and on Windows: a folder that is there is another process's."""
    if problem is None:
        monkeypatch.setattr(outputs, "fcntl", None)
    else:
        monkeypatch.setattr(outputs.fcntl, "flock", Mock(side_effect=problem))
    (tmp_path / ".sample_T.tmp").mkdir()
    save_run(tmp_path, {}, [], "T")
    assert left(tmp_path) == [".sample_T.tmp", "sample_T-2_manifest.json"]


def test_processes_in_one_folder_do_not_collide(tmp_path: Path) -> None:
    script = (
        "import sys; from PIL import Image; from scale_rae.outputs import Sample, save_run; from pathlib import Path\n"
        "for i in range(25):\n"
        "    save_run(Path(sys.argv[1]), {'by': sys.argv[2]}, [Sample(Image.new('RGB', (2, 2)), text={'by': sys.argv[2]})], 'T')\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(n)]) for n in range(4)]
    assert [p.wait(240) for p in processes] == [0] * 4
    manifests = [json.loads(p.read_text()) for p in tmp_path.glob("*_manifest.json")]
    assert len(manifests) == 100
    assert len(left(tmp_path)) == 200
    for manifest in manifests:
        assert Image.open(manifest["output_images"][0]).text == {"by": manifest["by"]}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("after", range(3))
def test_stopped_while_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException, after: int
) -> None:
    (tmp_path / "sample_T.png").write_text("mine")
    done = []
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if len(done) == after:
            raise interruption
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt if interruption is KeyboardInterrupt else OutputError):
        save_run(tmp_path, {}, [Sample(RED, torch.zeros(2, 2))], "T")
    assert left(tmp_path) == ["sample_T.png"]
    assert (tmp_path / "sample_T.png").read_text() == "mine"


def test_stopped_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(image: object, text: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs, "png_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        save_run(tmp_path, {}, [Sample(RED)], "T")
    assert left(tmp_path) == []


def test_a_file_in_the_folder_s_place(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for folder in (tmp_path / "f", tmp_path / "f" / "g"):
        with pytest.raises(OutputError, match="cannot be an output folder"):
            check_folder(folder)
        with pytest.raises(OutputError, match="cannot be written"):
            save_run(folder, {}, [], "T")
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(OutputError, match="not a folder"):
        check_folder(tmp_path / "broken")
    with pytest.raises(OutputError, match="too long"):
        check_folder(tmp_path / ("a" * 300))


def test_checking_makes_nothing(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    assert left(tmp_path) == []


def test_one_image_made_a_png_of_by_many_threads() -> None:
    """Each has the text that is its own, and the image none of it afterwards."""
    image = Image.new("RGB", (64, 64), "red")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: png_bytes(image, {"n": str(i)}), range(300)))
    texts = [Image.open(io.BytesIO(png)).text for png in [*made, png_bytes(image, {})]]
    assert texts == [*({"n": str(i)} for i in range(300)), {}]


def test_text_in_a_png(tmp_path: Path) -> None:
    text = {"prompt": "naïve 猫 <image>\nsecond line", "seed": "42"}
    # One of its own: Pillow keeps what it writes with an image, and threads of other tests may still be writing RED.
    (tmp_path / "i.png").write_bytes(png_bytes(RED.copy(), text))
    image = Image.open(tmp_path / "i.png")
    assert image.text == text
    assert np.array_equal(np.asarray(image), np.asarray(RED))


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_text_and_quality_in_other_forms(form: str) -> None:
    text = {"prompt": "naïve 猫", "seed": "42"}
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    best, worst = (picture_bytes(noise, text, form, quality) for quality in (100, 10))
    assert len(worst) < len(best) / 2
    image = Image.open(io.BytesIO(best))
    assert image.format == form.upper()
    assert json.loads(image.getexif()[ExifTags.Base.ImageDescription]) == text
    assert np.array_equal(np.asarray(image), np.asarray(noise)) == (form == "webp")


def test_a_latent_file_holds_only_the_latent(tmp_path: Path) -> None:
    batch = torch.randn(50, 4, 3, dtype=torch.float64)
    (tmp_path / "l.pt").write_bytes(latent_bytes(batch[7]))
    value = load_latent(tmp_path / "l.pt")
    assert value.dtype == torch.float32
    assert torch.equal(value, batch[7].float())
    assert (tmp_path / "l.pt").stat().st_size < 3000


def test_manifests_are_strict_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_run(tmp_path, {"x": float("nan")}, [], "T")
    assert left(tmp_path) == []


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("[" * 100_000)
    for name in ("deep", "none", "."):
        with pytest.raises(InputError, match=str(tmp_path)):
            read_manifest(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc, which takes no files")
def test_a_folder_that_takes_no_files_is_refused_before_any_work() -> None:
    with pytest.raises(OutputError, match=r"nothing can be written|not writable"):
        check_folder(Path("/proc/x"))
