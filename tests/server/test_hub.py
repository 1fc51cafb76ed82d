"""Hub ids as models: fetched once, pinned, served from the cache without a hub, or refused in one line."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants

from model.checkpoint.card import INDEX, WEIGHTS, Source
from model.checkpoint.load import load_model
from model.errors import ModelRefused
from server.catalog import find_models
from tests.model.convert.directories import write_model, write_plan
from tests.model.tiny import CPU
from tests.server.conftest import Server
from tests.server.hub import Hub, commit, running

ID = "somebody/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one model, and a cache with none."""
    write_model(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("Eight by eight.")
    with running(Hub()) as listening:
        listening.add(ID, tmp_path / "model")
        plug(listening.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield listening
    close_session()


def refusal(weights: str) -> str:
    """The line with which this is refused, and at once."""
    began = time.monotonic()
    with pytest.raises(ModelRefused) as refused:
        find_models(weights)
    assert time.monotonic() - began < 5
    assert "\n" not in str(refused.value)
    return str(refused.value)


def plug(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, this is where the hub is, as HF_ENDPOINT would have said at the start."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def unplug(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, nobody listens where the hub was said to be."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        plug(f"http://127.0.0.1:{free.getsockname()[1]}", monkeypatch)


# Good ones


def test_a_model_is_fetched_and_pinned_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    card = find_models(ID)["tiny"]

    assert card.source == Source(ID, hub.commits[ID]["main"])
    assert card.readme == "Eight by eight."
    assert (card.directory / WEIGHTS).read_bytes() == (tmp_path / "model" / WEIGHTS).read_bytes()


def test_only_the_files_of_a_model_directory_are_fetched(hub: Hub, tmp_path: Path) -> None:
    for name in (
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16.safetensors",
        "run.py",
        "events.tfevents",
    ):
        (tmp_path / "model" / name).write_bytes(b"no")
    hub.add(ID, tmp_path / "model")
    find_models(ID)

    assert sorted(hub.fetched) == sorted(["config.json", "scheduler_config.json", "README.md", WEIGHTS])


def test_plans_are_fetched_before_the_weights_and_read_from_the_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache with weights and without the plans would be served by its commit."""
    model = tmp_path / "model"
    write_plan(model)
    write_plan(model, b"{}", "wrong")
    (model / "plans" / "notes.txt").write_text("no plan")
    hub.add(ID, model)
    card = find_models(ID)["tiny"]
    unplug(hub, monkeypatch)

    assert [*card.process.plans] == ["fast"] and [*card.process.refused_plans] == ["wrong"]
    assert (hub.fetched[-1], sorted(hub.fetched[1:3])) == (WEIGHTS, ["fast.json", "wrong.json"])
    assert find_models(ID)["tiny"].process.plans == card.process.plans


def test_a_plan_that_is_too_large_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    write_plan(tmp_path / "model", b" " * (1 << 20) + b"{}")
    hub.add(ID, tmp_path / "model")

    assert refusal(ID) == f"{ID}: plans/fast.json has 1048578 bytes, at most 1048576 are fetched"


def test_folders_and_shards_are_fetched(hub: Hub, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "folders", folders=True)
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    (directory / "unet" / WEIGHTS).rename(directory / "unet" / shard)
    (directory / "unet" / INDEX).write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    hub.add(ID, directory)

    assert find_models(ID)["tiny"].shards[0].name == shard


def test_an_average_is_fetched_in_place_of_the_net(hub: Hub, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "folders", folders=True)
    (write_model(directory / "unet_ema") / "scheduler_config.json").unlink()
    write_model(directory / "checkpoint-500" / "unet_ema")
    hub.add(ID, directory)

    assert find_models(ID)["tiny"].taken == f"unet_ema/{WEIGHTS}"
    assert hub.fetched.count(WEIGHTS) == 1


def test_files_in_the_cache_are_not_fetched_again(hub: Hub) -> None:
    first, sent = find_models(ID)["tiny"], list(hub.fetched)

    assert find_models(ID)["tiny"].digest == first.digest
    assert hub.fetched == sent


def test_a_branch_is_looked_up_at_every_start_and_a_commit_only_once(hub: Hub, tmp_path: Path) -> None:
    old = hub.commits[ID]["main"]
    find_models(ID)
    asked = len(hub.asked)
    assert find_models(f"{ID}@{old}")["tiny"].source == Source(ID, old)
    assert len(hub.asked) == asked

    (tmp_path / "model" / "README.md").write_text("Better.")
    new = hub.add(ID, tmp_path / "model")
    assert find_models(ID)["tiny"].source == Source(ID, new)


def test_a_list_may_name_folders_directories_and_hub_ids(hub: Hub, tmp_path: Path) -> None:
    write_model(tmp_path / "folder" / "a")
    write_model(tmp_path / "b")

    assert list(find_models(f"{tmp_path / 'folder'}, {tmp_path / 'b'},{ID}@main")) == ["a", "b", "tiny"]


def test_a_model_of_a_hub_is_not_fetched_under_a_name_that_is_taken(hub: Hub, tmp_path: Path) -> None:
    write_model(tmp_path / "tiny")
    found = find_models(f"{tmp_path / 'tiny'},{ID},{ID}@main")

    assert (found["tiny"].source, hub.asked) == (None, [])
    assert found.refused.keys() == {"tiny (2)", "tiny (3)"}
    assert found.refused["tiny (2)"].startswith(f"{ID}@main has the name of {tmp_path / 'tiny'}, which is listed first")


def test_lost_and_found_is_not_a_model(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny")
    (tmp_path / "lost+found").mkdir()

    assert find_models(tmp_path).keys() == {"tiny"}


def test_a_directory_whose_name_no_model_can_have_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "a model")

    assert "'a model'" in refusal(str(tmp_path))


# Without a hub


@pytest.mark.parametrize("how", ["unplugged", "told to be offline", "broken"])
def test_without_a_hub_models_are_served_from_the_cache_or_refused_at_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    pinned = find_models(ID)["tiny"]
    if how == "unplugged":
        unplug(hub, monkeypatch)
    elif how == "broken":
        hub.status = 502
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()

    assert find_models(ID)["tiny"].source == pinned.source
    assert pinned.source is not None
    assert find_models(f"{ID}@{pinned.source.revision}")["tiny"].digest == pinned.digest
    line = refusal("somebody/else")
    assert line.startswith("somebody/else@main cannot be fetched, and is not in the cache: ")
    assert line.split(": ", 1)[1].startswith("HF_HUB_OFFLINE is set" if how == "told to be offline" else "the hub")


# What a hub refuses, or gets wrong


def test_a_missing_model_or_revision_is_refused(hub: Hub) -> None:
    assert refusal("somebody/else").startswith("there is no somebody/else on the hub, or it is private")
    assert refusal(f"{ID}@v9") == f"{ID} has no revision v9"
    assert refusal(f"{ID}@{commit('nothing')}") == f"{ID} has no revision {commit('nothing')}"
    assert refusal("./nothing/here") == "./nothing/here is not a directory"


def test_a_gated_model_needs_a_token(hub: Hub) -> None:
    hub.gated.add(ID)

    assert refusal(ID) == f"{ID} is gated: accept its terms on the hub, and set HF_TOKEN to a token of yours"


def test_the_cache_does_not_overrule_a_refusal_of_the_hub(hub: Hub) -> None:
    find_models(ID)
    hub.status = 403

    assert refusal(ID) == f"{ID}@main cannot be fetched: the hub answers 403"


def test_an_unsupported_model_is_refused_by_its_id(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, write_model(tmp_path / "fourier", {"time_embedding_type": "fourier"}))

    assert refusal(ID).startswith(f"{ID}: config.json: time_embedding_type must be ")


@pytest.mark.parametrize(
    ("index", "folder"), [({"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}, ""), (None, "vqvae")]
)
def test_the_pipeline_of_a_net_on_a_hub_is_read_before_its_weights(
    hub: Hub, tmp_path: Path, index: dict[str, object] | None, folder: str
) -> None:
    directory = write_model(tmp_path / "ldm", folders=True)
    if index is not None:
        (directory / "model_index.json").write_text(json.dumps(index))
    if folder:
        (directory / folder).mkdir()
        (directory / folder / "config.json").write_text("{}")
    hub.add(ID, directory)

    assert "has vqvae" in refusal(ID)
    assert hub.fetched == (["model_index.json"] if index is not None else [])


def test_the_kind_of_a_net_on_a_hub_is_known_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, write_model(tmp_path / "text", {"_class_name": "UNet2DConditionModel"}))

    assert refusal(ID).startswith(f"{ID}: config.json: UNet2DConditionModel is a net that needs a text")
    assert WEIGHTS not in hub.fetched


def test_a_file_in_the_cache_that_was_written_to_is_not_loaded(hub: Hub) -> None:
    """The hub says what a file is only when it is asked; the cache names it by its sha256."""
    card = find_models(ID)["tiny"]
    path = (card.directory / WEIGHTS).resolve()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(ModelRefused, match="the hub's cache is damaged"):
        load_model(card, CPU, torch.float32)


def test_a_file_that_is_listed_and_missing_is_named(hub: Hub) -> None:
    hub.lost.add("scheduler_config.json")

    assert refusal(ID) == f"{ID}: scheduler_config.json is listed by the hub, and is not there"


def test_pickles_are_not_fetched_and_the_refusal_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model" / WEIGHTS).rename(tmp_path / "model" / "diffusion_pytorch_model.bin")
    hub.add(ID, tmp_path / "model")

    assert refusal(ID).endswith(f"`hf download {ID} --local-dir SRC`, then `ddpm convert SRC DIR`")
    assert hub.fetched == []


def test_weights_with_another_digest_are_deleted(hub: Hub, tmp_path: Path) -> None:
    sound = hub.files[ID][WEIGHTS]
    hub.lies[WEIGHTS] = sound[:-4] + b"\0\0\0\1"

    assert refusal(ID) == f"{ID}: {WEIGHTS} is not what the hub says it is, and was thrown away"
    hub.lies.clear()
    assert (find_models(ID)["tiny"].directory / WEIGHTS).read_bytes() == sound


def test_a_truncated_file_is_never_served(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cut.add(WEIGHTS)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)

    assert f"{ID}: fetching {WEIGHTS} failed: " in refusal(ID)
    unplug(hub, monkeypatch)
    assert "is not in the cache" in refusal(ID)


# The whole server


def test_a_server_serves_a_hub_id_and_says_which_commit(hub: Hub, tmp_path: Path) -> None:
    places = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "another")}
    server = Server(Path(ID), **places).wait_until_ready()
    try:
        (model,) = server.client.get("/models").json()["models"]
        picture = server.client.post("/generate", json={"seed": 1, "steps": 3})
    finally:
        code, log = server.stop()

    assert (model["name"], model["source"]) == ("tiny", {"id": ID, "revision": hub.commits[ID]["main"]})
    assert picture.content.startswith(b"\x89PNG")
    assert code == 0
    assert hub.commits[ID]["main"] in log
