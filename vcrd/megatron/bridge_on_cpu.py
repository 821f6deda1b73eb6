"""Lets Megatron-Bridge be imported on the CPU, where packages that it imports unconditionally are missing or hidden.

A stand-in has every name that is asked of it, as a class that cannot be constructed. So modules of Bridge that mention
the package can be imported, and using them raises ImportError. An installed package is preferred to its stand-in. Only
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

# Found by the import system if no real package is, with all their submodules or with these alone.
_PACKAGES = ("megatron.energon", "webdataset")
_MODULES = ("nvidia_resiliency_ext", "nvidia_resiliency_ext.inprocess")
# Modules of Bridge that import Transformer Engine unconditionally. Only they see its stand-in: all others, and
# Megatron-Core, ask whether it can be imported, and must hear that it cannot.
_ENGINE = "transformer_engine"
_NEED_ENGINE = (
    "megatron.bridge.models.gpt_full_te_layer_autocast_spec",
    "megatron.bridge.peft.lora_layers",
)
_DECORATORS = ("stateless",)  # names that Bridge uses at import


def install(stack: contextlib.ExitStack) -> None:
    """Makes the stand-ins available until `stack` closes. Bridge's modules keep those that they have imported."""
    first, last = _EngineFinder(), _StandInFinder()
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


class _Missing(type):
    """The class of a stand-in's classes."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(
            f"{cls.__module__}.{cls.__name__}: expected an installed package, got a stand-in of vcrd"
        )

    def __getitem__(cls, parameters: Any) -> _Missing:
        return cls


class _StandIn(types.ModuleType):
    """A module that has every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # so that it can have submodules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = _decorate if name in _DECORATORS else _Missing(name, (), {"__module__": self.__name__})
        setattr(self, name, found)
        return found


def _decorate(function: Any = None, **options: Any) -> Any:
    return _decorate if function is None else function


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder, for what no other has found."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        whole = any(name == package or name.startswith(f"{package}.") for package in _PACKAGES)
        return importlib.machinery.ModuleSpec(name, self) if whole or name in _MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if isinstance(module, _StandIn):
            del sys.modules[name]


class _EngineFinder(importlib.abc.MetaPathFinder):
    """The first finder: loads the modules that need Transformer Engine by `_EngineLoader`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _NEED_ENGINE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _EngineLoader(spec.loader.name, spec.loader.path)
        return spec


class _EngineLoader(importlib.machinery.SourceFileLoader):
    """Runs a module with an import statement of its own, which no other module uses."""

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module)["__builtins__"] = {
            **vars(builtins),
            "__import__": _import_with_engine(builtins.__import__),
        }
        super().exec_module(module)


def _import_with_engine(plain: Callable[..., Any]) -> Callable[..., Any]:
    engine = _StandIn(_ENGINE)
    engine.pytorch = _StandIn(f"{_ENGINE}.pytorch")
    engine.pytorch.ops = _StandIn(f"{_ENGINE}.pytorch.ops")

    def import_(
        name: str,
        globals: Any = None,
        locals: Any = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if name.split(".")[0] != _ENGINE or level:
            return plain(name, globals, locals, fromlist, level)
        return engine.pytorch if fromlist else engine  # as the import statement wants it

    return import_
