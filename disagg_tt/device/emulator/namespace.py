"""ttnn's namespaces (ttnn.experimental, ttnn.distributed, ...) and what is said of a name that is in none of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any, NoReturn


class Namespace(ModuleType):
    """A part of ttnn as a module, so that it can be imported; a name that it lacks is an error that lists what it has."""

    def __init__(self, name: str, **members: Any):
        super().__init__(name, f"What the emulator has of {name}.")
        self.__path__: list[
            str
        ] = []  # a package: `from ttnn.x import y` then asks Finder for a y that is not here
        vars(self).update(members)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(missing(self, name))


def missing(module: ModuleType, name: str) -> str:
    """Return the message for a name that `module`, ttnn or one of its namespaces, does not have."""
    known = sorted(
        n
        for n, value in vars(module).items()
        if not n.startswith("_") and (not isinstance(value, ModuleType) or isinstance(value, Namespace))
    )
    within = module.__name__ if isinstance(module, Namespace) else "ttnn"
    return f"the emulator does not have {within}.{name}; it has {', '.join(known)}"


def chosen(module: Mapping[str, Any], names: Mapping[str, str] | tuple[str, ...]) -> dict[str, Any]:
    """Return `names` with what they are in `module`; a mapping gives, for each name, what it is called there."""
    pairs = names.items() if isinstance(names, Mapping) else zip(names, names, strict=True)
    return {name: module[there] for name, there in pairs}


class Finder(MetaPathFinder):
    """Says what there is when a part of ttnn is imported that the emulator does not have."""

    def __init__(self, module: ModuleType):
        self._own = module.__name__  # which `from ttnn import x` asks for x

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        parent, _, name = fullname.rpartition(".")
        lacking = parent == self._own and PathFinder.find_spec(fullname, path) is None
        if lacking or parent.split(".")[0] == "ttnn":
            # in the name of ttnn: where a `from` import asked for it, Python hides an error in the module's own name
            raise ModuleNotFoundError(missing(sys.modules[parent], name), name="ttnn")


def stand_in_for_ttnn(module: ModuleType) -> None:
    """Have `import ttnn` find `module`, in this process and whether or not the real ttnn is installed."""

    def register(name: str, value: ModuleType) -> None:
        sys.modules[name] = value
        for child, inner in list(vars(value).items()):
            if isinstance(inner, Namespace) and inner.__name__ == f"{name}.{child}":
                register(inner.__name__, inner)

    register("ttnn", module)
    sys.meta_path.insert(0, Finder(module))
