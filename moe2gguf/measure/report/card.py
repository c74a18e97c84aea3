"""The model card of published files: what they are, what they lose, how they were made, how they are run.

The front matter is written and read again by huggingface_hub:
https://huggingface.co/docs/hub/model-cards
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe2gguf.errors import OutputError
from moe2gguf.gguf.counts import override_count
from moe2gguf.gguf.made_for import USED_HERE
from moe2gguf.gguf.outputs import write_whole
from moe2gguf.hf.folder import SOURCE_REPOSITORY, SOURCE_REVISION
from moe2gguf.measure.grid import ANOTHER_TEXT
from moe2gguf.measure.results import Comparison, ResultRow
from moe2gguf.spec import Metadata

HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class CardFile:
    """A published file; `options` are those of `convert` that make it again."""

    name: str
    n_byte: int
    sha256: str
    options: str


def write_card(
    path: Path, metadata: Metadata, files: Sequence[CardFile], found: Comparison, picture: str | None
) -> None:
    """Write the card of `files`, of which one has this `metadata`, as they were `found` to be.

    Raises OutputError if it cannot be written, or huggingface_hub cannot read it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    front = ModelCardData(**describe_front(metadata)).to_yaml()
    text = "\n".join(["---", front, "---", "", *describe_files(metadata, files, found, picture)]) + "\n"
    try:
        ModelCard(text)
    except ValueError as error:
        raise OutputError(f"{path}: huggingface_hub cannot read the card ({error})") from error
    with write_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def describe_front(metadata: Metadata) -> dict[str, Any]:
    """The front matter: licence and languages are the source's, which is the base model."""
    general = {key.removeprefix("general."): value for key, value in metadata.items() if key.startswith("general.")}
    front = {
        "base_model": find_base_model(metadata),
        "base_model_relation": "quantized",
        "language": general.get("languages"),
        "library_name": "gguf",
        "license": general.get("license"),
        "license_name": general.get("license.name"),
        "license_link": general.get("license.link"),
        "pipeline_tag": "text-generation",
        "tags": ["moe2gguf", "gguf", "moe", metadata.get("general.architecture", "llama")],
    }
    if not front["base_model"]:
        del front["base_model_relation"]
    return {key: value for key, value in front.items() if value}


def find_base_model(metadata: Metadata) -> str | None:
    """OWNER/NAME of the source, or else of what its card calls its own base model."""
    if repository := metadata.get(SOURCE_REPOSITORY):
        return str(repository)
    url = str(metadata.get("general.base_model.0.repo_url", ""))
    return url.removeprefix(HUB) if url.startswith(HUB) else None


def describe_files(
    metadata: Metadata, files: Sequence[CardFile], found: Comparison, picture: str | None
) -> Iterator[str]:
    """The lines below the front matter."""
    name, repository = str(metadata.get("general.name", "A model")), metadata.get(SOURCE_REPOSITORY)
    model = f"{repository}@{metadata.get(SOURCE_REVISION)}" if repository else name.replace(" ", "-")
    source = f"[{repository}]({HUB}{repository})" if repository else name
    yield f"# {name}, sliced into experts"
    yield ""
    yield (
        f"Every MLP of the dense model ({source}) is cut into experts, of which llama.cpp runs a few per token. With "
        "all of them a file is the dense model in its type; with fewer it reads fewer weights and answers worse: see "
        "the table."
    )
    yield from ["", *tabulate_rows(files, found), ""]
    if base_summary := found.base:
        yield (
            f"Measured on {base_summary.n_token:,} tokens of a text with SHA-256 "
            f"`{found.settings.get('text_sha256')}`, on which the dense model has a perplexity of "
            f"{base_summary.perplexity_base:.3f}; lower perplexity and KL divergence are better. The dense files were "
            "measured beside them and are not here."
        )
    yield from (f"\n{note[0].upper()}{note[1:].removesuffix(ANOTHER_TEXT)}." for note in found.notes)
    if picture:
        yield f"\n![Quality of the files beside the dense model]({picture})"
    first = files[0].name
    yield from [
        "",
        "## Run",
        "",
        "```sh",
        f"llama-server -m {first}",
        f'moe2gguf run {first} "What is the capital of France?"',
        *_list_runs_with_fewer(first, metadata, found),
        "```",
    ]
    yield from ["", "## Make them again", "", "```sh"]
    yield from (f"moe2gguf convert {model} {file.name} \\\n  {file.options}" for file in files)
    yield from ["```", "", "| file | bytes | SHA-256 |", "|---|--:|---|"]
    yield from (f"| {file.name} | {file.n_byte:,} | `{file.sha256}` |" for file in files)
    yield from ["", f"Made with moe2gguf {metadata.get('moe2gguf.version')}."]


def _list_runs_with_fewer(file: str, metadata: Metadata, found: Comparison) -> Iterator[str]:
    """The lines that run a file with the smallest count that was measured, where that is not its own."""
    used, rows = metadata.get(USED_HERE), [row.config for row in found.rows if row.config.path.name == file]
    fewest = min(rows, key=lambda one: one.n_expert_used, default=None)
    if not (fewest and isinstance(used, int) and fewest.n_expert_used < used):
        return
    k = fewest.n_expert_used
    yield f"# with {k} of {fewest.n_expert} experts:"
    yield f"llama-server -m {file} --override-kv {override_count(metadata, k)}"
    yield f'moe2gguf run {file} "What is the capital of France?" --used {k}'


def tabulate_rows(files: Sequence[CardFile], found: Comparison) -> Iterator[str]:
    """A Markdown table: the files, then the dense ones."""
    timed = any(row.speed for row in found.rows)
    names = ["file", "size", "experts used", "perplexity", "x dense", "KL divergence", "same top token"]
    names += ["tokens/s"] if timed else []
    yield "| " + " | ".join(names) + " |"
    yield "|---|" + "--:|" * (len(names) - 1)
    own = {file.name for file in files}
    for row in sorted(found.rows, key=lambda row: row.config.path.name not in own):
        yield "| " + " | ".join(_list_cells(row, timed=timed)) + " |"


def _list_cells(row: ResultRow, *, timed: bool) -> Iterator[str]:
    one, quality = row.config, row.quality
    yield one.path.name.removesuffix(".gguf")
    yield f"{one.file_size / 1e6:,.1f} MB"
    yield f"{one.n_expert_used} of {one.n_expert}" if one.n_expert else "dense"
    if quality:
        summary = quality.summary
        yield f"{summary.perplexity:.3f}"
        yield f"{summary.ratio:.3f}"
        yield f"{summary.kl_mean:.4f}"
        yield f"{summary.top1:.1%}"
    if timed:
        yield f"{row.speed.generation.median:.1f}" if row.speed else ""
