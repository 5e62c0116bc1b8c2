"""What the config files share: their arguments."""

import difflib
from types import SimpleNamespace
from typing import Any


def parse(argument: str, **defaults: Any) -> SimpleNamespace:
    """Arguments after the colon of --config: "key=value,key=value", each in the type of its default.

    Raises:
      ValueError: For an unknown key, or a value of another type.

    Example:
      >>> parse("seed=3", method="kd", seed=0)
      namespace(method='kd', seed=3)
    """
    values = dict(defaults)
    for item in filter(None, argument.split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise ValueError(f"config argument {key!r}: {_hint(key, defaults)}")
        try:
            values[key] = type(defaults[key])(text)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"config argument {item!r}: needs {key}=<{type(defaults[key]).__name__}>")
    return SimpleNamespace(**values)


def choose(key: str, name: str, table: dict[str, Any]) -> Any:
    """The entry of a config's table that an argument names.

    Raises:
      ValueError: If there is none; names the nearest and all of them.
    """
    if name not in table:
        raise ValueError(f"config argument {key}={name}: {_hint(name, table)}")
    return table[name]


def _hint(name: str, valid: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, valid, n=1)
    return (f"did you mean {near[0]!r}? " if near else "unknown. ") + f"Valid: {', '.join(valid)}"
