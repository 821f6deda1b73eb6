"""Lets Megatron-Bridge be imported on the CPU, where packages that it imports unconditionally are missing or hidden.

A stand-in has every name that is asked of it, as something that cannot be called. So modules of Bridge that mention the
package can be imported, and using them raises ImportError. An installed package is preferred to its stand-in.
Transformer Engine is always replaced, because CPU mode hides it.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

# Modules of Bridge and a package that each imports unconditionally. They alone see its stand-in: all others, and
# Megatron-Core, ask whether it can be imported, and must hear that it cannot.
_IMPORTERS = {
    "megatron.bridge.models.gpt_full_te_layer_autocast_spec": "transformer_engine",
    "megatron.bridge.peft.lora_layers": "transformer_engine",
    "megatron.bridge.training.pretrain": "nvidia_resiliency_ext",
}
# Packages that nobody asks for in this way.
_PACKAGES = ("megatron.energon", "webdataset")
_DECORATORS = ("stateless",)  # names that Bridge calls at import


def install(stack: contextlib.ExitStack) -> None:
    """Makes the stand-ins available until `stack` closes. Bridge's modules keep those that they have imported."""
    first, last = _ImporterFinder(), _StandInFinder()
    sys.meta_path.insert(0, first)
    stack.callback(sys.meta_path.remove, first)
    sys.meta_path.append(last)
    stack.callback(sys.meta_path.remove, last)
    stack.callback(_forget)


def keep_compiled_helpers(stack: contextlib.ExitStack) -> None:
    """Until `stack` closes, skips the Makefile that Megatron and Bridge call at each start, if it is not needed.

    The wheel of megatron-core has the compiled helpers of its data sets, and not the Makefile.
    """
    utils = importlib.import_module("megatron.core.datasets.utils")
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        stack.callback(setattr, utils, "compile_helpers", utils.compile_helpers)
        utils.compile_helpers = lambda: None


class _StandIn(types.ModuleType):
    """A module that has every name: classes, and further modules, which also stand for functions."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # so that it can have submodules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in _DECORATORS:
            found = _decorate
        elif name[0].isupper():
            found = _Missing(name, (), {"__module__": self.__name__})
        else:
            found = _StandIn(f"{self.__name__}.{name}")
        setattr(self, name, found)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _not_installed(self.__name__)


class _Missing(type):
    """The class of a stand-in's classes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _not_installed(f"{cls.__module__}.{cls.__name__}")

    def __getitem__(cls, parameters: Any) -> _Missing:
        return cls


def _not_installed(name: str) -> ImportError:
    return ImportError(f"{name}: expected an installed package, got a stand-in of vcrd's CPU mode")


def _decorate(function: Any = None, **options: Any) -> Any:
    return _decorate if function is None else function


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder, for what no other has found."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        ours = any(name == package or name.startswith(f"{package}.") for package in _PACKAGES)
        return importlib.machinery.ModuleSpec(name, self) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if isinstance(module, _StandIn):
            del sys.modules[name]


class _ImporterFinder(importlib.abc.MetaPathFinder):
    """The first finder: loads the modules of `_IMPORTERS` by `_ImporterLoader`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _IMPORTERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _ImporterLoader(spec.loader.name, spec.loader.path)
        return spec


class _ImporterLoader(importlib.machinery.SourceFileLoader):
    """Runs a module with an import statement of its own, which no other module uses."""

    def exec_module(self, module: types.ModuleType) -> None:
        import_ = _import_with_stand_in(_IMPORTERS[module.__name__])
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": import_}
        super().exec_module(module)


def _import_with_stand_in(package: str) -> Callable[..., Any]:
    plain, stand_in = builtins.__import__, _StandIn(package)

    def import_(
        name: str,
        globals: Any = None,
        locals: Any = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        try:
            return plain(name, globals, locals, fromlist, level)
        except ImportError:
            root, *others = name.split(".")
            if root != package:
                raise
            found = stand_in
            for other in others if fromlist else ():  # as the import statement wants it
                found = getattr(found, other)
            return found

    return import_
