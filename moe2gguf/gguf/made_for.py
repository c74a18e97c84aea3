"""The number of experts per token that a sliced file was made for, where its weights serve only that one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe2gguf.graphs import MIXTRAL
from moe2gguf.spec import MetadataValue

EXPERTS = f"{MIXTRAL.architecture}.expert_count"
USED = f"{MIXTRAL.architecture}.expert_used_count"
USED_HERE = "moe2gguf.slicing.expert_used_count"


@dataclass(frozen=True)
class MadeFor:
    """The count a file was made for, the reason in words, and every other count that it serves as well.

    `only_all` says that the count is all experts, as an exact file's with a zero router: fewer are an arbitrary choice.
    """

    count: int
    reason: str
    others: range = range(0)
    only_all: bool = False

    @property
    def summary(self) -> str:
        """A sentence on the count."""
        return f"{self.reason}; {'fewer' if self.only_all else 'more or fewer'} make it worse"

    def note(self, name: str, used: Iterable[int]) -> str:
        """A sentence on the file `name` that runs with these numbers of experts; empty where they are right."""
        wrong = [k for k in dict.fromkeys(used) if k != self.count and k not in self.others]
        if self.only_all:
            wrong = [k for k in wrong if 0 < k < self.count]  # the others cannot run
        if not wrong:
            return ""
        counts = " or ".join(map(str, wrong))
        more = "" if self.only_all else ", even where that is more"
        return f"in {name} {self.reason}; with {counts} it answers worse{more}"


def read_made_for(metadata: Mapping[str, MetadataValue]) -> MadeFor | None:
    """What the metadata of a file says; None where its weights mean the same at every count, and for a dense file.

    Experts are tied to a count where they were amplified or refitted for it, and to all of them by a router of zeros,
    which cannot choose. The mode `any`, `exact` with a router that can, experts that were not sliced here, and graphs
    that do not normalise the weights of the chosen experts are not tied.
    """
    count = metadata.get(USED_HERE, metadata.get(USED))
    if not isinstance(count, int) or USED not in metadata:
        return None
    low, high = (metadata.get(f"moe2gguf.heal.used_{end}") for end in ("min", "max"))
    others = range(low, high + 1) if isinstance(low, int) and isinstance(high, int) else range(0)
    mode = metadata.get("moe2gguf.slicing.amplify", "exact")
    if mode in ("used", "fitted"):
        return MadeFor(count, f"the experts are amplified for {count} of them", others)
    if metadata.get("moe2gguf.slicing.refit") is True:
        return MadeFor(count, f"the experts are refitted for {count} of them", others)
    n_expert = metadata.get(EXPERTS)
    if metadata.get("moe2gguf.slicing.router") == "zero" and not others and isinstance(n_expert, int):
        return MadeFor(n_expert, f"the router is zero, it cannot choose among the {n_expert} experts", only_all=True)
    return None
