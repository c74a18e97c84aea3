"""The Hugging Face Hub: a model by its id, in the cache that all programs share, and what a plan needs of it.

What talks to the Hub is huggingface_hub: its cache, its token, its `HF_ENDPOINT` and `HF_HUB_OFFLINE`.
https://huggingface.co/docs/huggingface_hub/guides/download
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe2gguf.errors import CheckpointError, OutputError
from moe2gguf.hf.companions import OTHER_FILES, TEMPLATES, TOKENIZER_FILES
from moe2gguf.hf.paths import Origin, find_origin
from moe2gguf.hf.safetensors import INDEX, SINGLE, StoredTensor, list_shards

SMALL_FILES = ("config.json", "README.md", INDEX, *TOKENIZER_FILES, *OTHER_FILES, f"{TEMPLATES}/*.jinja")
WEIGHTS = (SINGLE, "model-*-of-*.safetensors")

_MODEL_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")


def find_model_id(path: Path) -> Origin | None:
    """The repository and the branch, tag or commit ("" for the newest) that OWNER/NAME or OWNER/NAME@REVISION means.

    None for what is on this machine, or is no such id.
    """
    match = _MODEL_ID.fullmatch(path.as_posix())
    return Origin(match["repository"], match["revision"] or "") if match and not path.exists() else None


def fetch_model(model: Origin, *, weights: bool) -> Path:
    """The folder of the model in the Hub's cache, with the files that a conversion reads; without the `weights` or not.

    Where the Hub cannot be reached, it is what an earlier download left.

    Raises:
        CheckpointError: there is no such model, it may not be read, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # no stubs
        """A progress bar that a pipe does not get."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{"disable": None, **kwargs})

    patterns, revision = [*SMALL_FILES, *(WEIGHTS if weights else ())], model.revision or None
    with explained(model.repository):
        folder = Path(snapshot_download(model.repository, revision=revision, allow_patterns=patterns, tqdm_class=Bar))
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{model.repository}: has no config.json; is it a model for transformers?")
    return folder


def read_remote_headers(folder: Path) -> dict[str, StoredTensor] | None:
    """The tensors of a model that `fetch_model` got without its weights: only their headers are read, from the Hub.

    None where the folder has all of its weights, or is none of the Hub's.

    Raises:
        CheckpointError: as `fetch_model`, or the model has no safetensors files.
    """
    from huggingface_hub import HfApi

    origin, files = find_origin(folder), list_shards(folder) or [folder / SINGLE]
    if origin is None or all(file.exists() for file in files):
        return None
    read = functools.partial(HfApi().parse_safetensors_file_metadata, origin.repository, revision=origin.revision)
    with explained(origin.repository), ThreadPoolExecutor() as pool:
        headers = [*pool.map(read, (file.name for file in files))]
    return {
        name: StoredTensor(name, one.dtype, tuple(one.shape), file, start, end - start)
        for file, header in zip(files, headers, strict=True)
        for name, one in header.tensors.items()
        for start, end in [one.data_offsets]
    }


@contextlib.contextmanager
def explained(repository: str) -> Iterator[None]:
    """Turn errors of the Hub, and of the way to it, into CheckpointError with what a user can do."""
    from huggingface_hub import constants, errors

    page, name = f"{constants.ENDPOINT}/{repository}", repository.partition("/")[2]
    missing = (
        "no folder here and no model on the Hub has this name; look at its spelling, or log in if it is private: "
        "hf auth login"
    )
    known = {
        errors.GatedRepoError: f"accept its terms on {page}, then log in: hf auth login",
        errors.RepositoryNotFoundError: missing,
        errors.RevisionNotFoundError: f"has no such revision; {page} lists them",
        errors.SafetensorsParsingError: f"its safetensors files are not sound; {page} lists them",
        errors.LocalEntryNotFoundError: "",
        errors.EntryNotFoundError: f"has no {SINGLE} and no {INDEX}; {page} lists its files",
    }
    client = errors.HfHubHTTPError.__mro__[1]  # the base of the errors of the HTTP client, whichever it is
    try:
        yield
    except (*known, client, OSError) as error:
        words = next((words for kind, words in known.items() if isinstance(error, kind)), "")
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{error.__cause__ or error}".splitlines()[0]
        words = words or (
            f"no folder here has this name, and the Hub cannot be reached ({reason:.200}); where it can: "
            f"hf download {repository} --local-dir {name}"
        )
        raise CheckpointError(f"{repository}: {words}") from error


def require_login(repository: str) -> None:
    """Raise OutputError where nobody is logged in, who could write to the repository."""
    from huggingface_hub import get_token

    if not get_token():
        raise OutputError(f"{repository}: only who is logged in can write there: hf auth login")


def upload_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Send the files of `folder` to `repository` on the Hub, which is made if it is new, and return its page.

    An interrupted call that is repeated sends only the files that did not arrive.

    Raises:
        OutputError: the Hub cannot be reached, or does not let this user write there.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        url = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["*.partial/*"])
    except (errors.HfHubHTTPError.__mro__[1], OSError, RuntimeError) as error:  # RuntimeError: of a large file
        reason = f"{error.__cause__ or error}".splitlines()[0]
        raise OutputError(
            f"{repository}: cannot be written on the Hub ({reason:.200}); log in as one who may: hf auth login. "
            f"{folder} is complete: repeat the command, or type: hf upload {repository} {folder}"
        ) from error
    return url
