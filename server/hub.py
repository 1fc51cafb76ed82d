"""Models of a hub: fetched once into the hub's own cache, and pinned to a commit.

Only the files of a model directory are fetched: configurations, safetensors, plans, the card. A commit in the cache is
served without asking the hub; a branch or tag is looked up at every start, or served as last seen if the hub is
unreachable. `snapshot_download` would do less: its listing has no timeout, and it checks no digests.
"""

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.tqdm import disable_progress_bars

from model.checkpoint.card import WEIGHTS, ModelCard, Source, read_card, shard_names
from model.checkpoint.foreign import require_served_kind
from model.checkpoint.pipeline import INDEX, PARTS, require_served
from model.checkpoint.plans import FILE as PLAN
from model.checkpoint.plans import MAX_PLANS
from model.checkpoint.weighing import PICKLES, served_names
from model.digests import file_digest
from model.errors import ModelRefused
from model.options import MAX_CONFIG_BYTES, read_json

logger = logging.getLogger(__name__)
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_S = 4.0  # of the hub; there is no retry, so that a server says at once what it lacks
MAX_WEIGHTS_BYTES = 64 << 30
FAILURES = (httpx2.HTTPError, OSError, ValueError, RuntimeError)  # of the hub's library


def fetch(id: str, revision: str, name: str) -> ModelCard:
    """The card of a model of a hub, under this name, after all its files are here. Raises ModelRefused."""
    if COMMIT.fullmatch(revision):
        with suppress(ModelRefused):  # not all of it is here
            return _cached(id, revision, name)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # at INFO it logs URLs, some of them signed
    disable_progress_bars()
    try:
        info = HfApi().model_info(id, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
    except FAILURES as error:
        if refusal := _answered(id, revision, error):
            raise refusal from error
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached: {type(error).__name__}"
    else:
        _fetch_all(id, revision, str(info.sha), {file.rfilename: file for file in info.siblings or ()})
        return _cached(id, str(info.sha), name)
    try:
        card = _cached(id, revision, name)
    except ModelRefused as error:
        raise ModelRefused(f"{id}@{revision} cannot be fetched, and is not in the cache: {why}") from error
    logger.warning("model served from the cache", extra={"id": id, "revision": revision, "why": why})
    return card


def _answered(id: str, revision: str, error: Exception) -> ModelRefused | None:
    """The refusal if the hub answered, which the cache does not overrule; None if it did not."""
    match error:
        case errors.GatedRepoError():
            return ModelRefused(f"{id} is gated: accept its terms on the hub, and set HF_TOKEN to a token of yours")
        case errors.RevisionNotFoundError():
            return ModelRefused(f"{id} has no revision {revision}")
        case errors.RepositoryNotFoundError():
            words = "or it is private and HF_TOKEN is not a token that may see it"
            return ModelRefused(f"there is no {id} on the hub, {words}")
        case errors.HfHubHTTPError() if error.response.status_code < 500:
            return ModelRefused(f"{id}@{revision} cannot be fetched: the hub answers {error.response.status_code}")
    return None


def _cached(id: str, revision: str, name: str) -> ModelCard:
    """The card of a model in the cache. Raises ModelRefused if it is incomplete."""
    try:
        directory = Path(snapshot_download(id, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{id}@{revision} is not in the cache") from error
    with _naming(id):
        return replace(read_card(directory, name), source=Source(id, directory.name))


def _fetch_all(id: str, revision: str, commit: str, files: dict[str, RepoSibling]) -> None:
    """Fetches the files of a model directory that are not in the cache. Raises ModelRefused."""
    net, schedule = (f"{part}/" * any(f.startswith(f"{part}/") for f in files) for part in ("unet", "scheduler"))
    index = _fetch_file(id, revision, commit, files[INDEX]) if INDEX in files else None
    with _naming(id):
        require_served({} if index is None else read_json(index), PARTS & {file.split("/")[0] for file in files})
    weights = next(iter(served_names(file for file in files if _of_a_net(file, files))), None)
    if weights is not None:
        net = weights.removesuffix(Path(weights).name)
    elif any(file.endswith(PICKLES) for file in files):
        convert = f"`hf download {id} --local-dir SRC`, then `ddpm convert SRC DIR`"
        raise ModelRefused(f"{id} has its weights as a pickle only, which is never read; {convert}")
    required = [f"{net}config.json", f"{schedule}scheduler_config.json", weights or net + WEIGHTS]
    for file in required:
        if file not in files:
            raise ModelRefused(f"{id} is not a model directory of diffusers: it has no {file}")
    logger.info("model fetch started", extra={"id": id, "revision": commit})
    plans = sorted(filter(PLAN.fullmatch, files))[: MAX_PLANS + 1]  # of too many one more, so that the card tells of it
    for file in (*(["README.md"] if "README.md" in files else []), *plans, *required):
        path = _fetch_file(id, revision, commit, files[file])
        if file == required[0]:  # before the weights, which may be large
            with _naming(id):
                require_served_kind(read_json(path))
    for shard in shard_names(read_json(path), path.name) if path.suffix == ".json" else ():
        if net + shard not in files:
            raise ModelRefused(f"{id} lacks {shard}, which {path.name} names")
        _fetch_file(id, revision, commit, files[net + shard])
    logger.info("model fetched", extra={"id": id, "revision": commit})


def _of_a_net(file: str, files: Collection[str]) -> bool:
    """Whether a file lies where a net's weights are looked for, beside its configuration."""
    folder = file.rpartition("/")[0]
    return f"{folder}/config.json".lstrip("/") in files and (
        not folder or re.fullmatch(r"unet[^/]*", folder) is not None
    )


@contextmanager
def _naming(id: str) -> Iterator[None]:
    """Puts the model's id before whatever it is refused for in here."""
    try:
        yield
    except ModelRefused as error:
        raise ModelRefused(f"{id}: {error}") from error


def _fetch_file(id: str, revision: str, commit: str, file: RepoSibling) -> Path:
    """One file of a commit, in the cache. Raises ModelRefused."""
    most = MAX_WEIGHTS_BYTES if file.rfilename.endswith(".safetensors") else MAX_CONFIG_BYTES
    if file.size is not None and file.size > most:
        raise ModelRefused(f"{id}: {file.rfilename} has {file.size} bytes, at most {most} are fetched")
    try:
        # by the revision's name: then the cache knows which commit it was when the hub cannot be reached
        path = Path(hf_hub_download(id, file.rfilename, revision=revision, etag_timeout=TIMEOUT_S))
    except errors.RemoteEntryNotFoundError as error:
        raise ModelRefused(f"{id}: {file.rfilename} is listed by the hub, and is not there") from error
    except FAILURES as error:
        failed = ModelRefused(f"{id}: fetching {file.rfilename} failed: {type(error).__name__}")
        raise _answered(id, revision, error) or failed from error
    if commit not in path.parts:
        raise ModelRefused(f"{id}: {revision} was changed while it was fetched; start again")
    if file.lfs is not None and file_digest(path) != file.lfs.sha256:
        path.resolve().unlink()
        path.unlink()
        raise ModelRefused(f"{id}: {file.rfilename} is not what the hub says it is, and was thrown away")
    return path
