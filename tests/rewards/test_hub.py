"""Rewards from a hub that answers, and what is said when it doesn't."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from scale_rae.errors import HubError
from scale_rae.pipeline import ScaleRAE
from scale_rae.rewards import imagereward, load_reward, pickscore
from tests.helpers.fake_hub import FakeHub, Repo
from tests.rewards.test_imagereward import VOCABULARY, write_weights
from tests.test_hub import hub  # noqa: F401 - a fixture


def test_imagereward_and_its_tokenizer_come_from_the_hub(
    hub: FakeHub,  # noqa: F811
    models: dict[str, ScaleRAE],
    tmp_path: Path,
) -> None:
    from tokenizers.implementations import BertWordPieceTokenizer

    write_weights(tmp_path / "weights", widen=True)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    (tmp_path / "bert").mkdir()
    BertWordPieceTokenizer(str(tmp_path / "vocab.txt")).save(str(tmp_path / "bert" / "tokenizer.json"))
    hub.add(imagereward.REPO, tmp_path / "weights")
    hub.add(imagereward.TOKENIZER_REPO, tmp_path / "bert")
    hub.repos[imagereward.REPO].revisions["main"]["ImageReward_med.pt"] = b"nobody asked"
    hub.repos[imagereward.TOKENIZER_REPO].revisions["main"]["model.safetensors"] = b"nobody asked"

    reward = load_reward("imagereward", models["siglip"])
    picture = [Image.new("RGB", (224, 224), "red")]
    (tmp_path / "weights" / "vocab.txt").write_text("\n".join(VOCABULARY))
    local = load_reward("imagereward", models["siglip"], str(tmp_path / "weights"))
    assert reward.score(picture, "a red cat") == local.score(picture, "a red cat")
    identity = reward.identity()
    assert identity["weights"] == {
        "name": imagereward.REPO,
        "revision": hub.repos[imagereward.REPO].commit("main"),
    }
    assert identity["tokenizer"]["name"] == imagereward.TOKENIZER_REPO
    assert not any(request.path.endswith(("_med.pt", "model.safetensors")) for request in hub.requests)

    hub.status = 500  # and again from the cache
    assert load_reward("imagereward", models["siglip"]).score(picture, "a red cat") == reward.score(
        picture, "a red cat"
    )


@pytest.mark.parametrize(("name", "repo"), [("imagereward", imagereward.REPO), ("pickscore", pickscore.REPO)])
def test_missing_weights_say_where_they_come_from_and_what_else_there_is(
    hub: FakeHub,  # noqa: F811
    models: dict[str, ScaleRAE],
    name: str,
    repo: str,
) -> None:
    hub.status = 503
    with pytest.raises(HubError) as caught:
        load_reward(name, models["siglip"])
    for said in (repo, "status 503", "--reward-path FOLDER", "--reward siglip", "--reward none"):
        assert said in str(caught.value)


def test_a_missing_tokenizer_says_where_to_put_it(
    hub: FakeHub,  # noqa: F811
    models: dict[str, ScaleRAE],
    tmp_path: Path,
) -> None:
    write_weights(tmp_path, widen=True)
    hub.repos[imagereward.TOKENIZER_REPO] = Repo({"main": {"README.md": b"x"}})
    with pytest.raises(
        HubError, match=r"holds no tokenizer \(tokenizer\.json\).*into a folder tokenizer beside the weights"
    ):
        load_reward("imagereward", models["siglip"], str(tmp_path))
