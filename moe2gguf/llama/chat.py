"""A conversation with a file: its template, its memory of what was said, and a count of experts that can change."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.counts import read_context_length, read_counts
from moe2gguf.gguf.made_for import read_made_for
from moe2gguf.gguf.shards import read_model
from moe2gguf.llama.generate import Generation, Session, Speed, Turn, make_setup
from moe2gguf.llama.templates import Message, read_template


class Chat:
    """A conversation with the GGUF file `path`.

    system        what the model is told before anything else, where its template has a place for it
    raw           no template: what is said continues the text so far
    n_context     tokens of the whole conversation; at most what the model was trained for
    n_token, temperature, seed   of every answer, see `moe2gguf.llama.generate.generate`

    Use it in a `with` statement, or call `close`.

    Raises:
        GGUFError: the header of the file is not sound.
        HarnessError: it has no chat template, and `raw` is not set; a number is out of range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        system: str = "",
        raw: bool = False,
        n_expert_used: int | None = None,
        device: str = "cpu",
        threads: int | None = None,
        n_context: int = 4096,
        n_token: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        path = self._path = Path(path)
        file = read_model(path)
        self._template = None if raw else read_template(file)
        if self._template is None and not raw:
            raise HarnessError(f"{path}: has no chat template, it is no chat model: use `moe2gguf run`, or --raw")
        self._made_for = read_made_for(file.metadata)
        counts = read_counts(file)
        self.n_expert, self.n_expert_used, self._n_shared = counts.n_expert, counts.n_used, counts.n_shared
        self._n_context = min(n_context, read_context_length(file) or n_context)
        self._options = (device, threads)
        self._turn = (n_token, temperature, seed)
        Turn("", *self._turn)
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._system)
        self._session = self._open(None)
        if n_expert_used is not None:
            self.use(n_expert_used)

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def note(self) -> str:
        """A sentence where the file was made for another count of experts than it uses; empty otherwise."""
        return self._made_for.note(self._path.name, [self.n_expert_used]) if self._made_for else ""

    def say(self, text: str) -> Generation:
        """Return the answer to `text`, to be iterated over; what has arrived when it ends is remembered.

        Raises HarnessError from the iteration where llama.cpp or the template fails, or the conversation fills the
        context. Then nothing is remembered of this turn.
        """
        return Generation(self._say([*self._messages, {"role": "user", "content": text}]), self._session)

    def use(self, n_expert_used: int) -> None:
        """Go on with another number of experts per token, shared ones included.

        Raises HarnessError where the file cannot.
        """
        if not self._n_shared < n_expert_used <= self.n_expert:
            raise HarnessError(
                f"{self._path.name} has {self.n_expert} experts: choose {self._n_shared + 1} to {self.n_expert}"
                if self.n_expert
                else f"{self._path.name} is dense: it has no experts to choose from"
            )
        self._session.close()
        self.n_expert_used, self._session = n_expert_used, self._open(n_expert_used)

    def clear(self) -> None:
        """Forget what was said."""
        self._messages = list(self._system)

    def close(self) -> None:
        """End the processes."""
        self._session.close()
        if self._template:
            self._template.close()

    def _open(self, n_expert_used: int | None) -> Session:
        return Session(self._path, make_setup(n_expert_used, *self._options), self._n_context)

    def _say(self, messages: list[Message]) -> Generator[str, None, Speed]:
        template = self._template
        prompt = template.render(messages) if template else "".join(one["content"] for one in messages)
        generation, said = self._session.answer(Turn(prompt, *self._turn)), ""
        for piece in generation:
            said += piece
            yield piece
        self._messages = [*messages, {"role": "assistant", "content": said}]
        if generation.speed is None:
            raise RuntimeError("an answer that has ended has its speed")
        return generation.speed
