"""What other programs are given: templates for Ollama, presets for llama-server, lines to type."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny_gguf
from command import moe2gguf

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.counts import read_counts
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.gguf.reader import read_gguf
from moe2gguf.gguf.shards import read_model
from moe2gguf.llama.serving import list_counts, list_ways, make_modelfile, make_presets
from moe2gguf.llama.templates import read_template
from moe2gguf.recipes.views import write_views

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou "
    "are Tiny.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}{% elif m.role == 'user' %}"
    "{{ 'USER: ' + m.content + '\\nASSISTANT: ' }}{% else %}{{ m.content + '</s>\\n' }}{% endif %}{% endfor %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}"
SHORT = "{% if messages | length > 1 %}{{ 'We talk. ' }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
HALF = "{% for m in messages %}{{ '{{' + m.content }}{% endfor %}"

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "And?"},
]


def file_with(path: Path, template: str | None, **strings: str) -> GGUFFile:
    weights = tiny_gguf.sliced_weights(tiny_gguf.dense_weights(), 8)
    keys = {"tokenizer.chat_template": template} if template else {}
    return read_gguf(tiny_gguf.write_gguf(path, weights, strings={**keys, **strings}))


def in_ollama(modelfile: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of a conversation: its template once for every turn, cut before the answer that is wanted."""
    template = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    default = re.search(r'SYSTEM """(.*?)"""', modelfile, re.DOTALL)
    assert template is not None
    turns: list[dict[str, str]] = [{"System": default[1] if default else ""}]
    for message in messages:
        name = {"system": "System", "user": "Prompt", "assistant": "Response"}[message["role"]]
        if name == "Prompt" and "Prompt" in turns[-1]:
            turns.append({})
        turns[-1][name] = message["content"]
    return "".join(_fill(template[1], turn) for turn in turns)


def _fill(template: str, values: Mapping[str, str]) -> str:
    for name in ("System", "Prompt"):
        block = re.compile(rf"\{{\{{ if \.{name} \}}\}}(.*?)\{{\{{ end \}}\}}", re.DOTALL)
        template = block.sub(lambda found, name=name: found[1] if values.get(name) else "", template)  # type: ignore[misc]
        template = template.replace(f"{{{{ .{name} }}}}", values.get(name, ""))
    before, _, after = template.partition("{{ .Response }}")
    return before + (values["Response"] + after if "Response" in values else "")


@pytest.mark.parametrize("text", [CHATML, LLAMA3, VICUNA])
def test_a_template_that_puts_words_around_messages_is_carried(text: str, tmp_path: Path) -> None:
    """Ollama gets the very text that the Jinja template makes, with and without a system message, over turns."""
    file = file_with(tmp_path / "a.gguf", text)
    modelfile, carried = make_modelfile(file)
    template = read_template(file)
    assert carried
    assert template is not None
    for messages in (TALK, TALK[1:], TALK[:2], TALK[1:2]):
        assert in_ollama(modelfile, messages) == template.render(messages).removeprefix("<s>")
    assert modelfile.startswith(f"FROM {file.path}\n")
    assert modelfile.endswith('PARAMETER stop "</s>"\n')
    template.close()


@pytest.mark.parametrize("text", [NUMBERED, NO_SYSTEM, SHORT, HALF, "{% for"])
def test_another_template_is_left_to_ollama(text: str, tmp_path: Path) -> None:
    """One that does more, refuses, fails, or would be read as Ollama's own language."""
    modelfile, carried = make_modelfile(file_with(tmp_path / "a.gguf", text))
    assert not carried
    assert "TEMPLATE" not in modelfile
    done = moe2gguf("serve-help", tmp_path / "a.gguf", "--modelfile", tmp_path / "Modelfile")
    assert 0 == done.returncode
    assert "too special for a Modelfile" in done.stderr


def test_a_base_model_has_nothing_to_carry(tmp_path: Path) -> None:
    """The file alone."""
    file = file_with(tmp_path / "a.gguf", None)
    assert (f"FROM {file.path}\n", True) == make_modelfile(file)


def test_presets_are_one_for_each_count(tmp_path: Path) -> None:
    """As any reader of such files reads them: all, three quarters, half; a file made for one count has that one."""
    file = file_with(tmp_path / "a.gguf", None)
    found = configparser.ConfigParser()
    found.read_string(make_presets(file).removeprefix("version = 1\n"))
    assert ["a-8", "a-6", "a-4"] == found.sections()
    assert {"model": str(file.path), "override-kv": "llama.expert_used_count=int:6"} == dict(found["a-6"])
    assert [8] == list_counts(file_with(tmp_path / "b.gguf", None, **{"moe2gguf.slicing.amplify": "used"}))
    assert [8] == list_counts(file_with(tmp_path / "c.gguf", None, **{"moe2gguf.slicing.router": "zero"}))


def test_what_a_preset_cannot_say_is_refused(tmp_path: Path) -> None:
    """A dense file has no counts, and a comment sign in a path would cut it off."""
    dense = read_gguf(tiny_gguf.write_gguf(tmp_path / "dense.gguf", tiny_gguf.dense_weights()))
    with pytest.raises(HarnessError, match="is dense, it has no counts to choose from"):
        make_presets(dense)
    with pytest.raises(HarnessError, match="cannot hold a path with ; #"):
        make_presets(file_with(tmp_path / "a#1.gguf", None))


def test_the_command_prints_lines_and_writes_files(tmp_path: Path) -> None:
    """Each line says whether it was tried; files are replaced only with --force; a path with a space is quoted."""
    path = file_with(tmp_path / "a b.gguf", CHATML).path
    done = moe2gguf("serve-help", path)
    assert f"llama-server (tried with llama.cpp 0c1e57098):\n  llama-server -m '{path}' --port 8080\n" in done.stdout
    assert f"llama-server -m '{path}' --override-kv llama.expert_used_count=int:4 --port 8080" in done.stdout
    assert "convert MODEL 'a b' --target mixtral --experts 8 --format hf" in done.stdout
    assert 9 == len(re.findall(r"^\S.* \(.*tried.*\):$", done.stdout, re.MULTILINE))
    assert 9 == len(json.loads(moe2gguf("serve-help", path, "--json").stdout)["ways"])
    files = ["--modelfile", tmp_path / "Modelfile", "--presets", tmp_path / "p.ini"]
    assert 0 == moe2gguf("serve-help", path, *files).returncode
    assert (tmp_path / "p.ini").read_text().startswith("version = 1\n")
    assert 1 == moe2gguf("serve-help", path, *files).returncode
    assert 0 == moe2gguf("serve-help", path, *files, "--force").returncode


def test_a_model_in_several_files_is_joined_for_ollama(tmp_path: Path) -> None:
    """Ollama reads one file; everything else gets all of them, and the model's own name."""
    whole = file_with(tmp_path / "a.gguf", None).path
    first = write_views(whole, tmp_path, [8]).paths[8]

    ways = {way.program: way.commands for way in list_ways(read_model(first))}
    done = moe2gguf("serve-help", first, "--modelfile", tmp_path / "Modelfile")

    assert ways["Ollama"][0] == f"llama-gguf-split --merge {first} a-k8.gguf"
    assert ways["Ollama"][1] == "moe2gguf serve-help a-k8.gguf --modelfile Modelfile"
    assert str(first.with_name("a-k8-00002-of-00002.gguf")) in ways["LM Studio"][1]
    assert "[a-k8-4]" in make_presets(read_model(first))
    assert (1, True) == (
        done.returncode,
        f"Ollama reads one file, not 2; join them: {ways['Ollama'][0]}" in done.stderr,
    )


def test_a_file_that_serves_several_counts_drafts_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The views that the second line names are those that the first one makes; other files have no such line."""
    monkeypatch.chdir(tmp_path)
    file = file_with(tmp_path / "a b.gguf", None)
    make, serve = next(way.commands for way in list_ways(file) if "draft" in way.program)

    assert 0 == moe2gguf(*shlex.split(make)[1:]).returncode

    words = shlex.split(serve)
    counts = [read_counts(read_model(Path(words[words.index(option) + 1]))).n_used for option in ("-m", "-md")]
    assert [8, 4] == counts
    one = file_with(tmp_path / "b.gguf", None, **{"moe2gguf.slicing.amplify": "used"})
    assert not any("llama-server, " in way.program or "of 8" in way.program for way in list_ways(one))
    dense = read_gguf(tiny_gguf.write_gguf(tmp_path / "dense.gguf", tiny_gguf.dense_weights()))
    assert ["llama-server", "llama-cpp-python", "Ollama", "LM Studio"] == [way.program for way in list_ways(dense)]
