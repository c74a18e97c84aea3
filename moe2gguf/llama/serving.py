"""How other programs serve a file: the line to type for each, Ollama's Modelfile, llama-server's presets."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.counts import override_count, read_counts, require_architecture
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.gguf.made_for import read_made_for
from moe2gguf.gguf.shards import list_view_paths, name_model
from moe2gguf.graphs import GRAPHS
from moe2gguf.llama.templates import ChatTemplate, Message, read_template, special_token


@dataclass(frozen=True)
class Way:
    """One way to serve a file: the program, what to type, and whether that was tried, with which version."""

    program: str
    commands: tuple[str, ...]
    tried: str


def list_ways(file: GGUFFile) -> list[Way]:
    """Return what to type for every program that serves such a file. Raises GGUFError for one that is no model."""
    require_architecture(file)
    path, name = shlex.quote(str(file.path)), shlex.quote(name_model(file.path))
    whole, merging = (path, []) if len(file.files) == 1 else (f"{name}.gguf", [_merge(file)])
    folder = f"~/.lmstudio/models/local/{name}"
    return [
        Way("llama-server", (f"llama-server -m {path} --port 8080",), "tried with llama.cpp 0c1e57098"),
        Way(
            "llama-cpp-python",
            ("pip install 'llama-cpp-python[server]'", f"python -m llama_cpp.server --model {path}"),
            "tried with 0.3.36",
        ),
        Way(
            "Ollama",
            (
                *merging,
                f"moe2gguf serve-help {whole} --modelfile Modelfile",
                f"ollama create {name} -f Modelfile",
                f"ollama run {name}",
            ),
            "not tried with this program; the Modelfile passes modelfile-lint 0.2.1",
        ),
        Way("LM Studio", (f"mkdir -p {folder}", f"ln {shlex.join(map(str, file.files))} {folder}/"), "not tried"),
        *_list_ways_with_counts(file, path),
        *_list_ways_as_folder(file, name),
    ]


def _list_ways_with_counts(file: GGUFFile, path: str) -> list[Way]:
    """Return how a file that serves several counts is served with fewer experts, with each count, and as a draft."""
    counts = list_counts(file)
    if len(counts) < 2:
        return []
    fewer, override = f"{counts[-1]} of {read_counts(file).n_expert} experts", override_count(file.metadata, counts[-1])
    tried = "tried with llama.cpp 0c1e57098"
    presets = f"moe2gguf serve-help {path} --presets preset.ini"
    return [
        Way(f"llama-server, {fewer}", (f"llama-server -m {path} --override-kv {override} --port 8080",), tried),
        Way(
            f"llama-cpp-python, {fewer}",
            (f"python -m llama_cpp.server --model {path} --kv_overrides {override}",),
            "tried with 0.3.36",
        ),
        Way("llama-server, every count", (presets, "llama-server --models-preset preset.ini --port 8080"), tried),
        _draft_with_half(file, counts),
    ]


def _list_ways_as_folder(file: GGUFFile, name: str) -> list[Way]:
    """Return how such experts are served from a folder, where the graph has a class of transformers."""
    architecture, n_expert = require_architecture(file), read_counts(file).n_expert
    targets = [target for target, graph in GRAPHS.items() if graph.hf_class and graph.architecture == architecture]
    if not (n_expert and targets):
        return []
    make = f"moe2gguf convert MODEL {name} --target {targets[0]} --experts {n_expert} --format hf"
    return [Way("vLLM, from a folder", (make, f"vllm serve ./{name}"), "not tried; transformers loads the folder")]


def _merge(file: GGUFFile) -> str:
    """Return the line that makes one file of a set of shards: https://github.com/ollama/ollama/issues/5245."""
    return shlex.join(["llama-gguf-split", "--merge", str(file.path), f"{name_model(file.path)}.gguf"])


def _draft_with_half(file: GGUFFile, counts: Sequence[int]) -> Way:
    """Return how the file with its fewest experts drafts for itself, from views of one set of weights."""
    first, last = counts[0], counts[-1]
    folder = f"{name_model(file.path)}-views"
    whole, half = (shlex.quote(str(list_view_paths(Path(folder), file.path, k)[0])) for k in (first, last))
    return Way(
        f"llama-server, {last} experts draft for {first}",
        (
            f"moe2gguf views {shlex.quote(str(file.path))} {shlex.quote(folder)} --used {first},{last}",
            f"llama-server -m {whole} -md {half} --spec-type draft-simple --port 8080",
        ),
        "tried with llama.cpp 0c1e57098",
    )


def list_counts(file: GGUFFile) -> list[int]:
    """Return the numbers of experts that are worth serving, shared ones included: the file's own and, where it serves
    others, fewer.
    """
    counts = read_counts(file)
    n, used, least = counts.n_expert, counts.n_used, counts.n_shared
    if not n or read_made_for(file.metadata):
        return [used] if n else []
    return sorted({used, *(k for k in (3 * n // 4, n // 2) if least < k < used)}, reverse=True)


def make_presets(file: GGUFFile) -> str:
    """Return a preset.ini with a preset for every count of `list_counts`, for `llama-server --models-preset`.

    Raises HarnessError for a path that such a file cannot hold, and for a dense file.
    """
    path = file.path.absolute()
    if any(character in f"{path}" for character in ";#\n\r]"):
        raise HarnessError(f"{path}: a preset cannot hold a path with ; # ] or a line break; rename the file")
    counts = list_counts(file)
    if not counts:
        raise HarnessError(f"{path}: is dense, it has no counts to choose from: give it to llama-server -m")
    sections = [
        f"[{name_model(path)}-{k}]\nmodel = {path}\noverride-kv = {override_count(file.metadata, k)}\n" for k in counts
    ]
    return "\n".join(["version = 1\n", *sections])


def make_modelfile(file: GGUFFile) -> tuple[str, bool]:
    """Return Ollama's Modelfile, and whether it carries the chat template.

    Ollama's templates are no Jinja. A template that only puts words around messages is carried: it is read off
    conversations that the file's own makes, and held against others. Where it does more, Ollama looks for the template
    among those that it knows.

    Raises HarnessError for a set of shards, which Ollama does not read.
    """
    if len(file.files) > 1:
        raise HarnessError(f"{file.path}: Ollama reads one file, not {len(file.files)}; join them: {_merge(file)}")
    lines = [f"FROM {file.path.absolute()}"]
    template = read_template(file)
    if template is None:
        return lines[0] + "\n", True
    with closing(template):
        around = _read_around(template, special_token(file, "bos") if _adds_bos(file) else "")
    if around:
        lines.append(f'TEMPLATE """{around.to_go()}"""')
        lines += [f'SYSTEM """{around.default}"""'] if around.default else []
    stops = dict.fromkeys(special_token(file, role) for role in ("eos", "eot"))
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop and '"' not in stop]
    return "\n".join(lines) + "\n", around is not None


@dataclass(frozen=True)
class _Around:
    """What stands around the messages of a conversation; `default` is what the system says where nobody told it."""

    system: tuple[str, str]
    user: tuple[str, str]
    answer: str
    default: str

    def to_go(self) -> str:
        """As a template of Ollama, which repeats it for every turn."""
        system = f"{{{{ if .System }}}}{self.system[0]}{{{{ .System }}}}{self.system[1]}{{{{ end }}}}"
        user = f"{{{{ if .Prompt }}}}{self.user[0]}{{{{ .Prompt }}}}{self.user[1]}{{{{ end }}}}"
        return f"{system}{user}{{{{ .Response }}}}{self.answer}"

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama makes of a conversation."""
        text = "" if messages[0]["role"] == "system" or not self.default else self.default.join(self.system)
        around = {"system": self.system, "user": self.user, "assistant": ("", self.answer)}
        return text + "".join(m["content"].join(around[m["role"]]) for m in messages)


_SYSTEM, _USER, _ANSWER, _AGAIN = "SyS7x", "uSr8y", "aNs9z", "aGn6w"  # words that no template has


def _read_around(template: ChatTemplate, bos: str) -> _Around | None:
    """Return what a template puts around messages; None where it does more than that."""
    turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    turns.append({"role": "user", "content": _AGAIN})
    whole = [{"role": "system", "content": _SYSTEM}, *turns]
    try:
        texts = {n: template.render(messages).removeprefix(bos) for n, messages in ((3, turns), (4, whole))}
        before, after_user, between, end = _split(texts[3], (_USER, _ANSWER, _AGAIN))
        start, after_system, *same = _split(texts[4], (_SYSTEM, _USER, _ANSWER, _AGAIN))
        around = _guess(before, after_user, between, start, after_system)
        shorter = [whole[:2], turns[:1]]
        agree = [around.render(messages) == template.render(messages).removeprefix(bos) for messages in shorter]
    except (HarnessError, ValueError):
        return None
    sound = [around.render(turns), around.render(whole)] == list(texts.values()) and all(agree)
    parts = (*around.system, *around.user, around.answer, around.default)
    plain = not any(mark in part for part in parts for mark in ("{{", "}}", '"""'))
    return around if sound and plain and same == [after_user, between, end] else None


def _guess(before: str, after_user: str, between: str, start: str, after_system: str) -> _Around:
    """Tell apart where one message's words end and the next one's begin: a user's begin alike wherever they stand."""
    user = _common_start([before[::-1], between[::-1], after_system[::-1]])[::-1]
    ending = _common_start([between, after_user]).rpartition("<")[0]  # of a message, without half a special token
    user = user.removeprefix(ending)
    system = (start, after_system.removesuffix(user))
    default = before.removesuffix(user).removeprefix(system[0]).removesuffix(system[1])
    return _Around(system, (user, after_user), between.removesuffix(user), default)


def _common_start(texts: list[str]) -> str:
    return commonprefix(texts)  # noqa: RUF071 - texts, no paths


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """The parts of a text between marks that it holds once each, in this order. Raises ValueError otherwise."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(f"{mark} is not there once")
        part, _, text = text.partition(mark)
        parts.append(part)
    return [*parts, text]


def _adds_bos(file: GGUFFile) -> bool:
    """Whether programs put BOS before a prompt themselves, so that a template must not."""
    spm = file.metadata.get("tokenizer.ggml.model") == "llama"
    return file.metadata.get("tokenizer.ggml.add_bos_token", spm) is True
