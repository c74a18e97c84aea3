"""What a SentencePiece-style tokenizer.json does with spaces, found by watching it."""

from collections.abc import Iterable

from tokenizers import Tokenizer

from moe2gguf.hf.tokenizer.pretokenizers import PROBES, make_cutter

SPACE = "▁"


def find_space_prefix(tokenizer: Tokenizer, tokens: Iterable[str]) -> bool:
    """Say whether a space is put before a text (`tokenizer.ggml.add_space_prefix`).

    llama.cpp replaces spaces by `▁`, may put one in front, and merges over the whole text. The normalizer and
    pre-tokenizer must come to the same. They may cut before a `▁` (Metaspace with split=true) if no token has a `▁`
    elsewhere than at its start, for then no merge crosses a cut.

    Raises:
        ValueError: they do something else.
    """
    cut = make_cutter(tokenizer)
    prefixes = set()
    cuts = False
    for text in PROBES:
        pieces = [piece for piece in cut(text) if piece]
        joined, escaped = "".join(pieces), text.replace(" ", SPACE)
        if joined not in (escaped, SPACE + escaped):
            raise ValueError(f"its normalizer changes text, which llama.cpp does not: {text!r} becomes {joined!r}")
        if not all(piece.startswith(SPACE) for piece in pieces[1:]):
            raise ValueError(f"its pre-tokenizer cuts text, which llama.cpp does not: {text!r} becomes {pieces!r}")
        cuts = cuts or len(pieces) > 1
        if not escaped.startswith(SPACE):  # before a space Metaspace puts none, whatever it does elsewhere
            prefixes.add(joined != escaped)
    if len(prefixes) != 1:
        raise ValueError("it puts a space before some texts and not before others, which llama.cpp does not")
    crossing = next((token for token in tokens if SPACE in token[1:]), None)
    if cuts and crossing:
        raise ValueError(f"it cuts text before spaces, which llama.cpp does not, and has tokens like {crossing!r}")
    return prefixes.pop()
