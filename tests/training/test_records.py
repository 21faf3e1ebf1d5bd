"""Training data in all its forms, and every bad record by file and line."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scale_rae.errors import DataError, InputError, MissingExtraError, OptionError
from scale_rae.training.records import Data, Record, read_data, read_records
from scale_rae.training.sequences import Message
from scale_rae.training.settings import SelfRewardOptions, TrainingOptions

DRAWN = [{"from": "human", "value": "Generate a sunset"}, {"from": "gpt", "value": "Here you go:\n<image>"}]
ASKED = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A sunset."}]


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), color).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, **files: bytes | str) -> Path:
    """Files by name, with `_` for the dot before the suffix."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(*values: Any) -> str:
    return "\n".join(value if isinstance(value, str) else json.dumps(value) for value in values)


def read(path: Path) -> Data:
    return read_data([path], lambda text: f"Draw {text}")


def tar(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def captioned(record: Record, text: str) -> None:
    assert record.messages == (Message("user", f"Draw {text}"), Message("assistant", "<image>"))
    assert record.own_reply
    assert record.draws
    assert record.pictures[0].read() == png()
    assert record.with_reply("Here:\n").messages[-1].text == "Here:\n<image>"


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    write(tmp_path, a_png=png(), metadata_jsonl=lines({"file_name": "a.png", "text": " a cat "}))
    (record,) = read(tmp_path).records
    captioned(record, "a cat")
    assert record.where == f"{tmp_path / 'metadata.jsonl'}, line 1"


def test_a_folder_with_texts_beside_the_pictures(tmp_path: Path) -> None:
    write(tmp_path, a_png=png(), a_txt="a cat\n", b_png=png(), c_txt="alone")
    data = read(tmp_path)
    captioned(data.records[0], "a cat")
    assert data.problems == [
        f"{tmp_path / 'c.txt'}: no picture beside it (.png, .jpg, .jpeg, .webp, .bmp, .gif, .tif, .tiff, .avif, .jp2)",
        f"{tmp_path / 'b.png'}: no text beside it (b.txt)",
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_folder_with_a_table(tmp_path: Path, separator: str) -> None:
    rows = [
        ("file_name", "index", "text"),
        ("a.png", "1", ' a "good", old; cat '),
        ("a.png", "2", "a cat\r\non a mat"),
        ("b.png", "3", "a dog"),
        ("a.png", "4"),
        ("a.png", "5", "a dog", "a cat"),
    ]
    with (tmp_path / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    data = read(write(tmp_path, a_png=png()))
    captioned(data.records[0], 'a "good", old; cat')
    captioned(data.records[1], "a cat\r\non a mat")
    table = tmp_path / "metadata.csv"
    assert data.problems == [
        f"{table}, line 5: {tmp_path / 'b.png'}: no such picture",
        f'{table}, line 6: has no "text"',
        f"{table}, line 7: has more columns than the first line; put a text with commas into quotes",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name,text\na.png,a cat\n", "its first line names no column file_name"),
        (b"", "its first line names no column file_name and no column text"),
        (b"file_name,text\na.png,sch\xf6n\n", r"not valid UTF-8 \(byte 25\); save it as UTF-8"),
        (
            b'file_name,text\na.png,"a cat\n',
            r"after line 1: not a table of comma-separated values \(unexpected end of data\)",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(InputError, match=rf"metadata\.csv.*{said}"):
        read(write(tmp_path, a_png=png(), metadata_csv=content))


def test_pictures_of_a_phone(tmp_path: Path) -> None:
    """Suffixes in capitals, texts of several lines, and a format that is not read."""
    (tmp_path / "schöner Tag.PNG").write_bytes(png())
    (tmp_path / "schöner Tag.TXT").write_text("a cat\r\n\r\n  on a  mat\r\n", newline="")
    data = read(write(tmp_path, b_HEIC=b"x", b_txt="a dog"))
    captioned(data.records[0], "a cat on a  mat")
    assert data.problems == [f"{tmp_path / 'b.HEIC'}: pictures in this format are not read; save it as JPEG or PNG"]


def test_pictures_without_texts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds 2 pictures and no texts; put a \.txt beside each, or"):
        read(write(tmp_path, a_png=png(), b_png=png()))


def test_hidden_files_and_the_result_are_no_data(tmp_path: Path) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "pictures" / "below" / "lora"
    write(pictures, a_png=png(), a_txt="a cat", _b_png=b"a file manager's copy")
    write(out.parent, c_png=png(), c_txt="a dog")
    write(out, d_png=png())  # as a validation sheet
    where = [str(pictures / "a.png"), str(out.parent / "c.png")]
    records, problems = read_records(TrainingOptions(data=(pictures,), out=out))
    assert ([record.where for record in records], problems) == (where, [])
    _, problems = read_records(TrainingOptions(data=(pictures,), out=tmp_path, skip_bad=True))  # data within the result
    assert problems == [f"{out / 'd.png'}: no text beside it (d.txt)"]
    with pytest.raises(
        InputError, match=f"^{pictures}: is the folder of --out, too"
    ):  # a resumed run would read its sheets
        read_records(TrainingOptions(data=(pictures,), out=pictures))


def test_the_official_form(tmp_path: Path) -> None:
    write(
        tmp_path,
        a_png=png(),
        data_jsonl=lines({"image": "a.png", "conversations": DRAWN}, "", {"image": "a.png", "conversations": ASKED}),
    )
    drawn, asked = read(tmp_path / "data.jsonl").records
    assert drawn.messages == (Message("user", "Generate a sunset"), Message("assistant", "Here you go:\n<image>"))
    assert drawn.draws
    assert not drawn.own_reply
    assert not asked.draws
    assert asked.where.endswith("line 3")


def test_tars_and_their_manifest(tmp_path: Path) -> None:
    tar(tmp_path / "one.tar", a_json=json.dumps({"conversations": DRAWN}).encode(), a_png=png(), b_png=png())
    tar(tmp_path / "two.tar", c_txt=b"a cat", c_png=png())
    (tmp_path / "all.json").write_text(json.dumps({"dataset_name": "x", "tars": ["one.tar", "two.tar", "three.tar"]}))
    data = read(tmp_path / "all.json")
    assert [record.where for record in data.records] == [f"{tmp_path / 'one.tar'}, a", f"{tmp_path / 'two.tar'}, c"]
    assert data.records[0].pictures[0].read() == png()
    captioned(data.records[1], "a cat")
    assert [problem.partition(": ")[2] for problem in data.problems] == [
        "has no .json and no .txt",
        f"{tmp_path / 'three.tar'}: no such tar",
    ]
    assert len(read(tmp_path).records) == 2


def test_a_tar_of_img2dataset(tmp_path: Path) -> None:
    about = json.dumps({"caption": "a cat", "url": "x", "status": "success"}).encode()
    one = tar(tmp_path / "one.tar", a_jpg=png(), a_json=about, a_txt=b"a cat", b_jpg=png(), b_json=about)
    data = read(one)
    captioned(data.records[0], "a cat")
    assert data.problems == [f'{one}, b: "conversations" must be a list of turns']


def test_hidden_members_of_a_tar_are_no_data(tmp_path: Path) -> None:
    members = {"./._a.png": b"x", "./a.png": png(), "./._a.txt": b"x", "./a.txt": b"a cat", ".DS_Store": b"x"}
    data = read(tar(tmp_path / "one.tar", **members))
    assert not data.problems
    captioned(data.records[0], "a cat")


def test_checking_many_pictures_is_reported(tmp_path: Path) -> None:
    write(tmp_path, a_png=png(), metadata_jsonl=lines(*[{"file_name": "a.png", "text": "a cat"}] * 600))
    said: list[tuple[str, int, int]] = []
    read_records(TrainingOptions(data=(tmp_path,)), lambda *report: said.append(report))
    assert said == [("checking pictures", 256, 600), ("checking pictures", 512, 600)]


BAD: dict[str, Any] = {
    "{": "not valid JSON",
    "[1]": "must be a JSON object",
    '{"text": "a cat"}': 'neither "conversations" nor a "file_name"',
    '{"file_name": "a.png"}': 'has no "text"',
    '{"file_name": "a.png", "text": " "}': "its text is empty",
    '{"file_name": "a.png", "text": "an <image>"}': "stands for a picture",
    '{"file_name": "none.png", "text": "a cat"}': "no such picture",
    '{"file_name": "bad.png", "text": "a cat"}': "cannot be read",
    json.dumps({"image": "a.png", "conversations": []}): "must be a list of turns",
    json.dumps({"image": ["a.png", "a.png"], "conversations": DRAWN}): "has 2 pictures, but 1 place for pictures",
    json.dumps({"image": "a.png", "conversations": DRAWN[:1]}): "ends without a reply",
    json.dumps({"image": "a.png", "conversations": DRAWN[::-1]}): "take turns, human first",
    json.dumps({"image": "a.png", "conversations": [{"from": "me", "value": "x"}]}): "turn 1 must be",
    json.dumps({"image": 1, "conversations": DRAWN}): '"image" must be the name',
    json.dumps({"file_name": "a.png", "text": "a \ud800"}): "not valid Unicode (character 3)",
    json.dumps({"image": "a.png", "conversations": [DRAWN[0] | {"value": "\ud800"}, DRAWN[1]]}): "not valid Unicode",
}


def test_every_bad_record_is_listed_with_its_line_in_order(tmp_path: Path) -> None:
    good = {"file_name": "a.png", "text": "a cat"}
    write(tmp_path, a_png=png(), bad_png=png()[:40], metadata_jsonl=lines(*BAD, good))
    options = TrainingOptions(data=(tmp_path,))
    with pytest.raises(DataError, match=f"^{len(BAD)} of {len(BAD) + 1} records cannot be used") as error:
        read_records(options)
    for number, (problem, expected) in enumerate(zip(error.value.problems, BAD.values(), strict=True), start=1):
        assert problem.startswith(f"{tmp_path / 'metadata.jsonl'}, line {number}: ")
        assert expected in problem
        assert "\n" not in problem
    records, left_out = read_records(TrainingOptions(data=(tmp_path,), skip_bad=True))
    assert len(records) == 1
    assert len(left_out) == len(BAD)


def test_what_holds_no_training_data_is_refused(tmp_path: Path) -> None:
    write(tmp_path, a_xyz="", b_json='{"tars": []}', c_jsonl="")
    for path, problem in (
        (tmp_path, "holds no training data"),
        (tmp_path / "a.xyz", "not training data"),
        (tmp_path / "none.xyz", "no such data file"),
        (tmp_path / "none.tar", "no such tar"),
        (tmp_path / "b.json", '"tars" must be a list'),
    ):
        with pytest.raises(InputError, match=problem):
            read(path)
    with pytest.raises(DataError, match="no record of the data can be used"):
        read_records(TrainingOptions(data=(tmp_path / "c.jsonl",)))
    write(tmp_path / "set", a_png=png())
    write(tmp_path / "set" / "train", b_png=png(), metadata_jsonl="")
    with pytest.raises(InputError, match=f"set: has no metadata.jsonl, but {tmp_path / 'set' / 'train'} has one"):
        read(tmp_path / "set")
    broken = tar(tmp_path / "d.tar", a_txt=b"a cat", a_png=png())
    broken.write_bytes(broken.read_bytes()[:700])
    assert "not a readable tar" in read(broken).problems[0]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"self_reward": SelfRewardOptions(condition_noise=0.2)}, "^--condition-noise: has no meaning without"),
        ({"self_reward": SelfRewardOptions(prompts=Path("p.txt")), "data": ()}, "^--prompts: has no meaning without"),
        ({"data": ()}, "^--data: give at least one"),
        ({"num_train_epochs": 1, "max_train_steps": 1}, "^--num-train-epochs: gives the number of steps, as --max"),
        ({"reply": "Here you go:\n<image>"}, "^--reply: give the words before the picture, without <image>"),
        ({"adam_beta2": 1.0}, "^--adam-beta2 1.0: must be 0 to 0.999999"),  # would divide by zero
        ({"language_learning_rate": 1e-4}, "^--language-learning-rate: the language model does not learn"),
    ],
)
def test_options_that_no_training_can_use_are_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        TrainingOptions(**{"data": (Path("d"),), **given}).check()


def test_epochs_are_passes_through_the_data() -> None:
    options = TrainingOptions(train_batch_size=4, num_train_epochs=3)
    assert options.steps(records=8, processes=1) == 6
    assert replace(options, class_prompts=Path("known.txt")).steps(records=8, processes=1) == 12  # half of each batch


def test_a_board_that_is_asked_for_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    TrainingOptions(data=(Path("d"),)).check()
    with pytest.raises(MissingExtraError, match="--report-to tensorboard: needs tensorboard"):
        TrainingOptions(data=(Path("d"),), report_to="tensorboard").check()
