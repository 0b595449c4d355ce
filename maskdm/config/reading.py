"""From the file params.yaml to validated `Params`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from maskdm.base.errors import ParamsError
from maskdm.base.printable import printable
from maskdm.config.schema import PARAMS_FILE, Params, parse_params

MAX_BYTES = 2**18  # of params.yaml: a thousand arms; YAML is read at 100 kB a second
# What PyYAML raises for values that can't be what their tags say, such as a date with a thirteenth month.
NOT_PLAIN_YAML = (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate params.yaml, which may come from anybody: no tag is obeyed, and its size is bounded.

    Raises:
        ParamsError: it is missing, no YAML, too large, or does not satisfy the schema; one line per mistake.
    """
    if not path.is_file():
        what = f"{path} is no file" if path.exists() else f"no {path}"
        raise ParamsError(
            f"{what} in {Path.cwd()}: run this where a params.yaml is (the project's root or experiments/<name>)"
        )
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ParamsError(f"{path} is larger than {MAX_BYTES} bytes: is it another file?")
        content = yaml.load(text.decode("utf-8"), _Loader)
    except OSError as error:
        raise ParamsError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise ParamsError(f"{path} is nested too deeply") from None
    except NOT_PLAIN_YAML as error:
        raise ParamsError(f"{path} is not plain YAML: {printable(' '.join(str(error).split()))}") from None
    return parse_params(content, source=str(path))


class _Loader(yaml.SafeLoader):
    """Plain values alone; no key twice, and aliases that written out would not fill the memory."""

    _values = 0  # composed so far, aliases written out

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases of too many values, or within what they stand for: merging and messages write them out."""
        before, is_alias = self._values, self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        if not is_alias:
            node.values = self._values - before + 1
        self._values = before + getattr(node, "values", MAX_BYTES)
        if self._values > MAX_BYTES:  # a file without aliases has fewer values than bytes
            raise ValueError(f"its aliases stand for more than {MAX_BYTES} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is given twice: otherwise the last one wins in silence."""
        seen = set()
        for key_node, _ in node.value:
            is_merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = key_node.value if is_merge else self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
