"""How many experts a file has and uses, in the words of this project: a shared expert counts with the others.

A graph with a shared expert of its own keeps that apart: `expert_count` and `expert_used_count` are then those that the
router chooses from, and the shared expert is as wide as `expert_shared_count` of them. Here, as in every option, all
count: of 16 experts, 4 of which are shared, 8 run per token if the router chooses 4 of 12.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from moe2gguf.errors import GGUFError
from moe2gguf.gguf.file import GGUFFile
from moe2gguf.graphs import DENSE_GRAPHS, GRAPHS, Graph
from moe2gguf.limits import Size, estimate_graph
from moe2gguf.spec import Metadata


@dataclass(frozen=True)
class ExpertCounts:
    """The counts of a file; 0 for what it does not say.

    n_expert  experts per layer
    n_used    experts that run per token
    n_shared  those of both that are the graph's own shared expert
    size      what the room for experts depends on
    """

    n_expert: int
    n_used: int
    n_shared: int
    size: Size

    @property
    def n_routed(self) -> int:
        """Experts that the router chooses from."""
        return self.n_expert - self.n_shared


def read_counts(file: GGUFFile) -> ExpertCounts:
    """The counts of a file of any architecture; a value that is no whole number counts as 0."""
    architecture = str(file.metadata.get("general.architecture"))
    graph = find_graph(architecture) or estimate_graph(architecture)
    n_expert, n_used, n_shared = count_experts(partial(_read_count, file.metadata))
    n_layer = _read_count(file.metadata, "block_count") - (
        _read_count(file.metadata, "nextn_predict_layers") if graph.empty_layer else 0
    )
    return ExpertCounts(n_expert, n_used, n_shared, Size.of(file.tensors, n_layer, graph))


def require_architecture(file: GGUFFile) -> str:
    """The architecture of a model. Raises GGUFError for a file that is none, such as an importance matrix."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise GGUFError(f"{file.path}: has no general.architecture, so it is no model; name the file of a model")
    return architecture


def read_context_length(file: GGUFFile) -> int:
    """The tokens that the model was trained for; 0 if the file does not say it."""
    return _read_count(file.metadata, "context_length")


def override_count(metadata: Metadata, n_expert_used: int) -> str:
    """The key of the used count and its value, which does not contain the graph's own shared expert.

    llama.cpp's programs take both as `--override-kv`.
    """
    *_, n_shared = count_experts(partial(_read_count, metadata))
    return f"{metadata.get('general.architecture')}.expert_used_count=int:{n_expert_used - n_shared}"


def _read_count(metadata: Metadata, key: str) -> int:
    value = metadata.get(f"{metadata.get('general.architecture')}.{key}", 0)
    return value if type(value) is int else 0


def count_experts(read: Callable[[str], int]) -> tuple[int, int, int]:
    """Experts, used experts, and those of both that are shared, from the keys behind the architecture's name."""
    n_routed, n_used = read("expert_count"), read("expert_used_count")
    if not n_routed:
        return 0, 0, 0
    d_expert, d_shared = read("expert_feed_forward_length"), read("expert_shared_feed_forward_length")
    n_shared = read("expert_shared_count") or (d_shared // d_expert if d_expert > 0 else 0)
    return n_routed + n_shared, n_used + n_shared if n_used else 0, n_shared


def find_graph(architecture: str) -> Graph | None:
    """The graph of an architecture, if it is one of those that are written or read here."""
    targets = (graph for graph in GRAPHS.values() if graph.architecture == architecture)
    return DENSE_GRAPHS.get(architecture) or next(targets, None)
