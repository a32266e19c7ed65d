"""YAML without surprises: a key stands once, and anchors do not multiply."""

from typing import Any

import yaml

MOST_NODES = 10_000
"""Of a document with its aliases written out: hundreds of times a recipe's, far below what fills a memory."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuse a key that stands twice, of which YAML's own loader takes the last one silently."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The plain values of one YAML document.

    Raises:
        ValueError: not YAML, a key that stands twice, a value that is not what its tag says, or aliases that stand for
            themselves or for more than :data:`MOST_NODES` values; the message is one line.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        _count_nodes(node)
        return None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        loader.dispose()


def parse_scalar(text: str) -> Any:
    """A value as YAML reads it, and ``1e-3`` as the number that YAML 1.1 takes for a string."""
    value = load_yaml(text)
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _count_nodes(root: yaml.Node | None) -> None:
    waiting, count = [root] * (root is not None), 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if count > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES} values, or an alias of what it is part of")
        if isinstance(node, yaml.MappingNode):
            waiting.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
