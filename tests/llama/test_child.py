"""A child process: its results, its ways to die, and what is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from moe2gguf.errors import CrashError, HarnessError, PlanError
from moe2gguf.llama.child import converse_with_child, run_in_child, stream_from_child

TESTS = Path(__file__).parent
PACKAGE_PARENT = TESTS.parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


def double(x: int) -> int:
    os.write(1, b"this must not get between the messages")
    return 2 * x


def die(number: int) -> None:
    os.write(2, b"ggml.c:1814: GGML_ASSERT(obj_new) failed\n")
    os.kill(os.getpid(), number)
    time.sleep(60)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def complain_and_exit(code: int) -> None:
    os.write(2, b"first\nlast words\n")
    os._exit(code)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def refuse() -> None:
    raise PlanError(["one", "two"])


def blunder() -> None:
    raise KeyError("our own mistake")


def allocate(n_byte: int) -> int:
    return len(bytearray(n_byte))


def count(n: int, pause: float = 0.0) -> Iterator[int]:
    for i in range(n):
        time.sleep(pause)
        yield i
    return (yield from ())


def count_and_die(n: int) -> Iterator[int]:
    yield from range(n)
    os.abort()


def pid_then_sleep() -> Iterator[int]:
    yield os.getpid()
    time.sleep(120)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_alive(pid)


def test_result_comes_back() -> None:
    """A function's result comes back, and what it prints does not disturb the messages."""
    assert run_in_child(double, 21) == 42


@posix
@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
def test_a_signal_is_an_error_with_its_name(number: signal.Signals) -> None:
    """A child that is killed by a signal is a HarnessError naming the work, the signal and the last log line."""
    with pytest.raises(HarnessError) as caught:
        run_in_child(die, int(number), what="running model.gguf")
    message = str(caught.value)
    assert isinstance(caught.value, CrashError)
    assert caught.value.signal == number
    assert message.startswith(f"running model.gguf: the process was ended by {number.name}")
    assert "| ggml.c:1814: GGML_ASSERT(obj_new) failed" in message
    assert "lower n_expert_used" in message


@posix
def test_advice_follows_the_signal_when_the_log_says_nothing() -> None:
    """Without a telling log line the advice is the signal's: a kill is most often a lack of memory."""
    with pytest.raises(HarnessError, match=r"(?s)^kill_self: .* SIGKILL.*\(nothing\).*ran out of memory"):
        run_in_child(kill_self)


def test_an_exit_without_an_answer_is_an_error() -> None:
    """A child that leaves without an answer is a HarnessError with its exit code and last words."""
    with pytest.raises(HarnessError, match=r"ended with 3; it said last:\n  \| first\n  \| last words"):
        run_in_child(complain_and_exit, 3)


def test_time_out() -> None:
    """A child that takes too long is stopped, and the error says how long it had."""
    began = time.monotonic()
    with pytest.raises(HarnessError, match=r"sleep: no answer within 0\.5 s"):
        run_in_child(sleep, 60.0, timeout=0.5)
    assert time.monotonic() - began < 20


def test_errors_of_ours_come_back_as_they_are() -> None:
    """A Moe2GgufError keeps its type, message and fields on the way, also where its __init__ takes no message."""
    with pytest.raises(PlanError) as caught:
        run_in_child(refuse)
    assert (caught.value.refusals, str(caught.value)) == (("one", "two"), str(PlanError(["one", "two"])))


def test_defects_keep_their_traceback() -> None:
    """Any other exception is a defect: RuntimeError with the child's traceback."""
    with pytest.raises(RuntimeError, match=r"in blunder\n.*\n?KeyError: 'our own mistake'"):
        run_in_child(blunder)


def test_functions_of_the_main_module_are_refused() -> None:
    """A function that the child could not import is refused before anything starts."""
    code = "from moe2gguf.llama.child import run_in_child\ndef f(): pass\nrun_in_child(f)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE_PARENT, capture_output=True, text=True)
    assert "ValueError: f must live in an importable module" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits are Linux's")
def test_memory_limit() -> None:
    """A child that needs more than its memory limit fails with that limit in the message; below it works."""
    assert run_in_child(allocate, 2**20, memory_limit=2**28) == 2**20
    with pytest.raises(HarnessError, match=r"allocate ran out of memory \(limit 256 MiB\)"):
        run_in_child(allocate, 2**29, memory_limit=2**28)


def test_items_stream_in_order() -> None:
    """Items arrive in order, more of them than the inbox holds."""
    assert list(stream_from_child(count, 50)) == list(range(50))


def add_up(start: int) -> Generator[int, int, str]:
    total = start
    while total < 100:
        total += yield total
    return f"{total} in the end"


def test_a_conversation_goes_in_step() -> None:
    """What is sent is what the child's yield returns; the return value comes at the end."""
    talk = converse_with_child(add_up, 1)
    assert [1, 3, 6] == [next(talk), talk.send(2), talk.send(3)]
    with pytest.raises(StopIteration) as end:
        talk.send(1000)
    assert end.value.value == "1006 in the end"


def test_items_before_a_crash_arrive() -> None:
    """Every item sent before a crash arrives, then the error."""
    stream = stream_from_child(count_and_die, 3)
    assert [next(stream), next(stream), next(stream)] == [0, 1, 2]
    with pytest.raises(HarnessError, match="the process was ended by SIGABRT" if os.name == "posix" else "ended"):
        next(stream)


def test_stream_time_out_is_per_item() -> None:
    """The time-out of a stream counts from item to item, not from its start."""
    assert list(stream_from_child(count, 4, 0.5, timeout=30.0)) == [0, 1, 2, 3]
    stream = stream_from_child(pid_then_sleep, timeout=5.0)
    next(stream)
    with pytest.raises(HarnessError, match="no answer within 5 s"):
        next(stream)


@posix
def test_closing_a_stream_ends_the_child() -> None:
    """A consumer that stops early leaves no process behind."""
    stream = stream_from_child(pid_then_sleep)
    pid = next(stream)
    stream.close()
    assert wait_until_gone(pid)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_orphan_when_the_parent_goes(number: signal.Signals) -> None:
    """Ctrl-C in the parent, or even its sudden death, ends the child; the parent was started with python -c."""
    code = f"""
        import sys; sys.path[:0] = [{str(PACKAGE_PARENT)!r}, {str(TESTS)!r}]
        from moe2gguf.llama.child import stream_from_child
        from test_child import pid_then_sleep
        for pid in stream_from_child(pid_then_sleep):
            print(pid, flush=True)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(number)
    _, errors = parent.communicate(timeout=20)
    assert wait_until_gone(pid)
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


def test_works_from_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """A script that calls at import time, as a notebook or a quick script does, is not run again by the child."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(PACKAGE_PARENT)!r}, {str(TESTS)!r}]\n"
        "from moe2gguf.llama.child import run_in_child\n"
        "from test_child import double\n"
        "print(run_in_child(double, 4))\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "8\n")


def imported() -> tuple[bool, int]:
    """Whether llama.cpp's bindings were there before anything was asked for, and the process number."""
    return "llama_cpp" in sys.modules, os.getppid()


@pytest.mark.skipif(sys.platform != "linux", reason="forks of a warm process are Linux's")
def test_children_are_forks_of_one_warm_process() -> None:
    """The bindings are imported already; both children have one parent, which is not this process."""
    first, second = run_in_child(imported), run_in_child(imported)
    assert first == second
    assert first[0]
    assert first[1] != os.getpid()


def environment_of(name: str) -> tuple[str | None, list[str]]:
    return os.environ.get(name), sys.path


def test_a_warm_child_has_this_processes_environment_and_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are now, not as they were when the warm process began."""
    run_in_child(double, 1)
    monkeypatch.setenv("MOE2GGUF_TEST", "now")
    monkeypatch.syspath_prepend("/nowhere")
    assert ("now", sys.path) == run_in_child(environment_of, "MOE2GGUF_TEST")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # read when a library is loaded: another warm process
    assert "3" == run_in_child(environment_of, "OMP_NUM_THREADS")[0]


def test_a_warm_child_starts_in_this_processes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of now, so that relative paths mean the same in both, not in that of the warm process."""
    run_in_child(double, 1)
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) == run_in_child(os.getcwd)


@pytest.mark.skipif(sys.platform != "linux", reason="forks of a warm process are Linux's")
def test_a_lost_warm_process_is_replaced() -> None:
    """Killed from outside, as a machine short of memory does."""
    parent = run_in_child(imported)[1]
    os.kill(parent, signal.SIGKILL)
    time.sleep(0.2)
    assert 4 == run_in_child(double, 2)
    assert parent != run_in_child(imported)[1]
