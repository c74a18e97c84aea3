"""YAML from outside: plain values only, and no text that grows when it is read."""

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # no stubs
    """Safe YAML without aliases, which no file here has a use for and which can make a small text enormous."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError with the reason, in one line, if it has none."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - it is a safe loader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"not valid YAML ({' '.join(str(error).split()):.200})") from error
