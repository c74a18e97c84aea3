"""Chat templates: what transformers makes of them, and what hostile ones can do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny_gguf
from transformers.utils.chat_template_utils import render_jinja_template

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.llama import templates
from moe2gguf.llama.templates import ChatTemplate, read_template

TALK = [
    {"role": "user", "content": "Hello, é 🙂"},
    {"role": "assistant", "content": " Hi. "},
    {"role": "user", "content": "1 < 2 & 3"},
]
CHATML = (
    "{%- for message in messages %}\n{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[I] ' + message.content | trim + ' [/I]' }}{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)
JSON = "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}\n{% endfor %}"


def template(text: str) -> ChatTemplate:
    return ChatTemplate(Path("a.gguf"), text, "<s>", "</s>")


@pytest.mark.parametrize("text", [CHATML, STRICT, JSON])
def test_prompts_are_those_of_transformers(text: str) -> None:
    """Trimmed blocks, loop controls, JSON and special tokens."""
    made = template(text)
    known = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template(
        conversations=[TALK], chat_template=text, add_generation_prompt=True, **known
    )
    assert made.render(TALK) == expected
    assert made.render(TALK[:1]) != expected
    made.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{% for", "TemplateSyntaxError: "),
        ("{{ raise_exception('no system role') }}", "ValueError: no system role"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError: "),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{{ nothing.at.all }}", "UndefinedError: "),
        ("{{ 'a' * 20000000 }}", "it makes a text of 20,000,000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
    ],
)
def test_a_template_that_fails_is_one_message_with_the_way_out(text: str, words: str) -> None:
    """Broken, refusing, breaking out, too long."""
    with pytest.raises(HarnessError) as caught:
        template(text).render(TALK)
    message = str(caught.value)
    assert message.startswith(f"a.gguf: its chat template fails: {words}")
    assert message.endswith("; --raw does without it")
    assert "\n" not in message


def test_without_llama_cpp_the_template_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine is llama-cpp-python's."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(HarnessError, match=r"^llama-cpp-python is not installed: pip install -U llama-cpp-python$"):
        template(CHATML).render(TALK)


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox has no limit for nested loops."""
    monkeypatch.setattr(templates, "TIMEOUT", 5.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(HarnessError, match=r"its chat template fails: evaluation: no answer within 5 s"):
        template(endless).render(TALK)


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits are Linux's")
def test_a_template_that_wants_all_memory_is_stopped() -> None:
    """And the next text is made by another process."""
    made = template("{{ 'a' * 34359738368 if messages | length > 1 else 'b' }}")
    with pytest.raises(HarnessError, match=r"ran out of memory \(limit 2048 MiB\)"):
        made.render(TALK)
    assert made.render(TALK[:1]) == "b"
    made.close()


def test_the_template_of_a_file(tmp_path: Path) -> None:
    """With the special tokens of its vocabulary; a file without a template has none."""
    weights = tiny_gguf.dense_weights()
    assert read_template(read_gguf(tiny_gguf.write_gguf(tmp_path / "a.gguf", weights))) is None
    strings = {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}
    made = read_template(read_gguf(tiny_gguf.write_gguf(tmp_path / "b.gguf", weights, strings=strings)))
    assert made is not None
    assert made.render(TALK) == "<s>Hello, é 🙂</s>"
    made.close()
