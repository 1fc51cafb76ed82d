"""A model on a hub as a model directory of this machine: fetched once, into the hub's own cache, pinned to a commit.

Only what a model directory is made of is fetched: configurations, safetensors, the card. A commit that is in the cache
is served without asking anybody; a branch or a tag is looked up at every start, and served as it was last seen where
the hub cannot be reached. A hub that does not answer is not asked twice: a server that starts should say at once what
it lacks.
"""

import hashlib
import logging
import re
from dataclasses import replace
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.tqdm import disable_progress_bars

from model.checkpoint.card import ModelCard, Source, read_card, shard_names, weights_names
from model.errors import ModelRefused
from model.options import MAX_CONFIG_BYTES, read_json

logger = logging.getLogger(__name__)
COMMIT = re.compile(r"[0-9a-f]{40}")
ANSWER_S = 4.0  # within which a hub must answer
MAX_WEIGHTS_BYTES = 64 << 30
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def fetch(id: str, revision: str, name: str) -> ModelCard:
    """The card of a model of a hub, under this name, once all of it is here. Raises ModelRefused in one line."""
    if COMMIT.fullmatch(revision):
        try:
            return _cached(id, revision, name)
        except ModelRefused:  # not all of it is here
            pass
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # below, it logs addresses, some of them signed
    try:
        info = HfApi().model_info(id, revision=revision, timeout=ANSWER_S, files_metadata=True)
        return _fetched(id, revision, name, str(info.sha), {file.rfilename: file for file in info.siblings or ()})
    except errors.OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE is set"
    except (httpx2.HTTPError, OSError, ValueError) as error:
        refusal = _refusal(id, revision, error)
        if refusal is not None:
            raise refusal from error
        why = f"the hub cannot be reached: {type(error).__name__}"
    try:
        card = _cached(id, revision, name)
    except ModelRefused as error:
        raise ModelRefused(f"{id}@{revision} cannot be fetched, and is not in the cache: {why}") from error
    logger.warning("served from the cache", extra={"id": id, "revision": revision, "why": why})
    return card


def _refusal(id: str, revision: str, error: Exception) -> ModelRefused | None:
    """What the hub said, if it said something: then what is in the cache is not asked."""
    if isinstance(error, errors.GatedRepoError):
        return ModelRefused(f"{id} is gated: accept its terms on the hub, and set HF_TOKEN to a token of yours")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelRefused(f"{id} has no revision {revision}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelRefused(
            f"there is no {id} on the hub, or it is private and HF_TOKEN is not a token that may see it"
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
        return ModelRefused(f"{id}@{revision} cannot be fetched: the hub answers {error.response.status_code}")
    return None


def _cached(id: str, revision: str, name: str) -> ModelCard:
    """The card of what is in the cache. Raises ModelRefused if that is not all of it."""
    try:
        directory = Path(snapshot_download(id, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelRefused(f"{id}@{revision} is not in the cache") from error
    try:
        return replace(read_card(directory, name), source=Source(id, directory.name))
    except ModelRefused as error:
        raise ModelRefused(f"{id}: {error}") from error


def _fetched(id: str, revision: str, name: str, commit: str, files: dict[str, RepoSibling]) -> ModelCard:
    """Fetches what is not in the cache yet."""
    net, schedule = (
        f"{part}/" if any(f.startswith(f"{part}/") for f in files) else "" for part in ("unet", "scheduler")
    )
    weights = next((net + file for file in weights_names() if net + file in files), None)
    if weights is None:
        raise ModelRefused(_without_weights(id, [file for file in files if file.endswith(PICKLES)]))
    wanted = [f"{net}config.json", f"{schedule}scheduler_config.json"]
    for file in wanted:
        if file not in files:
            raise ModelRefused(f"{id} is not a model directory of diffusers: it has no {file}")
    optional = [file for file in ("model_index.json", "README.md") if file in files]
    logger.info("fetching", extra={"id": id, "revision": commit})
    for file in (*wanted, *optional, weights):
        path = _fetch_file(id, revision, commit, files[file])
    if weights.endswith(".json"):
        for shard in shard_names(read_json(path), weights):
            if net + shard not in files:
                raise ModelRefused(f"{id} lacks {shard}, which {weights} names")
            _fetch_file(id, revision, commit, files[net + shard])
    logger.info("fetched", extra={"id": id, "revision": commit})
    return _cached(id, commit, name)


def _without_weights(id: str, pickles: list[str]) -> str:
    if not pickles:
        return f"{id} is not a model directory of diffusers: it has no {weights_names()[0]}"
    fetched = f"`hf download {id} --local-dir SRC`"
    return f"{id} has its weights as a pickle only, which is never read; {fetched}, then `ddpm convert SRC DIR`"


def _fetch_file(id: str, revision: str, commit: str, file: RepoSibling) -> Path:
    """One file, in the cache, as it was in this commit. Raises ModelRefused."""
    most = MAX_WEIGHTS_BYTES if file.rfilename.endswith(".safetensors") else MAX_CONFIG_BYTES
    if file.size is not None and file.size > most:
        raise ModelRefused(f"{id}: {file.rfilename} has {file.size} bytes, at most {most} are fetched")
    disable_progress_bars()
    try:
        # by the name of the revision, so that the cache knows next time which commit that was
        path = Path(hf_hub_download(id, file.rfilename, revision=revision, etag_timeout=ANSWER_S))
    except errors.RemoteEntryNotFoundError as error:
        raise ModelRefused(f"{id}: {file.rfilename} is listed by the hub, and is not there") from error
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        failed = ModelRefused(f"{id}: fetching {file.rfilename} failed: {type(error).__name__}")
        raise _refusal(id, revision, error) or failed from error
    if commit not in path.parts:
        raise ModelRefused(f"{id}: {revision} was changed while it was fetched; start again")
    if file.lfs is not None and _digest(path) != file.lfs.sha256:
        path.resolve().unlink()
        path.unlink()
        raise ModelRefused(f"{id}: {file.rfilename} is not what the hub says it is, and was thrown away")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
