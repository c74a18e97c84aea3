"""Tokens with a role: which ids they have, and which of them are put around a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unk",
    "sep": "sep",
    "pad": "pad",
    "mask": "mask",
    "eot": "eot",
    "eom": "eom",
    "fim_pre": "prefix",
    "fim_suf": "suffix",
    "fim_mid": "middle",
}
"""Our names of the roles that llama.cpp reads -> how Hugging Face files call them (`bos_token`, `bos_token_id`)."""


@dataclass(frozen=True)
class Surroundings:
    """The tokens that an encoder puts before and behind a text."""

    before: Sequence[int] = ()
    behind: Sequence[int] = ()


def find_surroundings(runtime: Tokenizer) -> Surroundings:
    """Find out what `encode(text)` adds, by encoding one.

    Raises:
        ValueError: what it adds is not before and behind the text.
    """
    bare = runtime.encode("a", add_special_tokens=False).ids
    full = runtime.encode("a").ids
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return Surroundings(full[:start], full[start + len(bare) :])
    raise ValueError("its post_processor drops or changes the tokens of the text itself")


Files = Mapping[str, Mapping[str, Any]]
"""What files say, by their names, the first to be asked first."""


def find_special_ids(ids: Mapping[str, int], n_vocab: int, by_text: Files, by_id: Files) -> dict[str, int]:
    """Return role -> id for every role a file states.

    `ids` maps the tokens' texts to their ids. Files that name tokens (`by_text`: tokenizer_config.json,
    special_tokens_map.json) go before files that give numbers (`by_id`: config.json, generation_config.json), each in
    order, as in llama.cpp's converter
    (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/gguf-py/gguf/vocab.py#L50). An id that is no row of the
    embedding (-1, or a pad token that was never added) states nothing; of a list of ids the first counts.
    """
    found = {}
    for role, name in ROLES.items():
        texts = (_read_content(file.get(f"{name}_token")) for file in by_text.values())
        numbers = (_take_first(file.get(f"{name}_token_id")) for file in by_id.values())
        candidates = [*(ids.get(text) for text in texts if text), *numbers]
        stated = [id_ for id_ in candidates if id_ is not None and 0 <= id_ < n_vocab]
        if stated:
            found[role] = stated[0]
    return found


def list_unknown(ids: Mapping[str, int], n_vocab: int, by_text: Files, by_id: Files) -> list[str]:
    """Return "FILE: KEY VALUE" of every token that a file states and the model does not have; -1 stands for none.

    Arguments as in `find_special_ids`. llama.cpp's converter passes over such ids with a warning as well.
    """
    found = []
    for key in (f"{name}_token" for name in ROLES.values()):
        texts = ((file, _read_content(values.get(key)), values.get(key)) for file, values in by_text.items())
        found += [
            f"{file}: {key} {text or given!r}"
            for file, text, given in texts
            if given and not ids.get(text or "", n_vocab) < n_vocab
        ]
        found += _list_unknown_ids(f"{key}_id", n_vocab, by_id)
    return found


def _list_unknown_ids(key: str, n_vocab: int, by_id: Files) -> list[str]:
    """Return "FILE: KEY ID" of every id under this key, or in its list of ids, that the model does not have."""
    return [
        f"{file}: {key} {id_!r}"
        for file, given in ((file, values.get(key)) for file, values in by_id.items())
        for id_ in (given if isinstance(given, list) else [given])
        if id_ not in (None, -1) and not (type(id_) is int and 0 <= id_ < n_vocab)
    ]


def place_added(
    special: dict[str, int], around: Surroundings, config: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, bool], list[str]]:
    """Return the special ids, the flags add_bos_token and add_eos_token, and problems.

    `around` is what the encoder adds by itself; an explicit `add_bos_token` or `add_eos_token` of tokenizer_config.json
    (`config`) overrides it, as in transformers. llama.cpp adds exactly one token, the one whose role is bos (eos), so
    a token that the encoder adds takes that role. An eos that loses its role to it becomes eot, which ends a
    generation as well.
    """
    special = dict(special)
    flags: dict[str, bool] = {}
    problems = []
    for role, tokens in (("bos", around.before), ("eos", around.behind)):
        key = f"add_{role}_token"
        wish = config.get(key)
        if isinstance(wish, bool):
            flags[key] = wish and role in special
            continue
        flags[key] = bool(tokens)
        if len(tokens) > 1:
            problems.append(
                f"the encoder adds tokens {list(tokens)} around a text, where llama.cpp adds only one {role}"
            )
        elif tokens and special.get(role) != tokens[0]:
            if role == "eos" and "eos" in special:
                special.setdefault("eot", special["eos"])
            special[role] = tokens[0]
    if "eos" not in special:
        problems.append(
            "no end-of-text token: set eos_token in tokenizer_config.json (or eos_token_id in config.json); "
            "without it llama.cpp takes an arbitrary one"
        )
    return special, flags, problems


ENDS_BY_TEXT = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "[EOT]")
)
"""Tokens that llama.cpp takes for ends of a text by their spelling, whatever the roles say."""


def add_ends(special: dict[str, int], texts: Sequence[str], by_id: Sequence[Mapping[str, Any]]) -> list[int]:
    """Give further ends of a text, which `eos_token_id` lists, the roles eot and eom; return those that are left.

    llama.cpp ends a generation at eos, eot and eom, and at the tokens of `ENDS_BY_TEXT`
    (https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-vocab.cpp). `texts` are those of all tokens.
    """
    left: list[int] = []
    for file in by_id:
        ids = file.get("eos_token_id")
        for id_ in ids if isinstance(ids, list) else [ids]:
            if type(id_) is not int or not 0 <= id_ < len(texts) or texts[id_] in ENDS_BY_TEXT:
                continue
            if id_ in left or id_ in (special.get(role) for role in ("eos", "eot", "eom")):
                continue
            role = next((role for role in ("eot", "eom") if role not in special), None)
            if role:
                special[role] = id_
            else:
                left.append(id_)
    return left


def _read_content(token: Any) -> str | None:
    """Return the text of a token that a file names, as a string or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _take_first(number: Any) -> int | None:
    if isinstance(number, list) and number:
        number = number[0]
    return number if type(number) is int else None
