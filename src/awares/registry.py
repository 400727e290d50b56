"""Extension points: a reward, a judge, a crop rule or a compared system is a plain function under a decorator.

A name in params.yaml is found in this order: a function registered with the decorator (in a module or in a notebook
cell), a built-in name, or ``module:function``, which is imported. Where code takes a name it also takes the function.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from awares.errors import AwaresValueError

F = TypeVar("F", bound=Callable[..., Any])


class Registry:
    """The functions of one extension point. ``key``: its key in params.yaml; ``builtin``: name -> module that defines it."""

    def __init__(self, key: str, builtin: Mapping[str, str]) -> None:
        self.key = key
        self.builtin = dict(builtin)
        self._functions: dict[str, Callable[..., Any]] = {}

    def __call__(self, name: str) -> Callable[[F], F]:
        """The decorator: ``@reward("mine")``. A later definition of the same name replaces the earlier one."""

        def register(function: F) -> F:
            self._functions[name] = function
            return function

        return register

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.builtin, *self._functions)))

    def find(self, wanted: str | Callable[..., Any]) -> Callable[..., Any]:
        """The function for a name or for a function itself; AwaresValueError for an unknown name."""
        if not isinstance(wanted, str):
            return wanted
        self.check(wanted)
        if wanted not in self._functions and wanted in self.builtin:
            importlib.import_module(self.builtin[wanted])
        if wanted in self._functions:
            return self._functions[wanted]
        module, _, name = wanted.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise AwaresValueError(f"{self.key}: cannot import {wanted!r} ({error}): write module:function") from error

    def check(self, name: str) -> None:
        """AwaresValueError unless ``name`` is registered, built in, or of the form module:function."""
        if name not in self._functions and name not in self.builtin and ":" not in name:
            raise AwaresValueError(f"{self.key}: unknown {name!r}, choose from {', '.join(self)} or module:function")

    def source(self, wanted: str | Callable[..., Any]) -> str:
        """The name, and for a function of the user its source code: part of a checkpoint's key."""
        function = self.find(wanted)
        if isinstance(wanted, str) and function.__module__ == self.builtin.get(wanted):
            return wanted
        return f"{wanted if isinstance(wanted, str) else function.__name__}\n{inspect.getsource(function)}"


_METHOD, _TRAINED, _SERVED = "awares.method", "awares.baselines.trained", "awares.clients.judges"

crop_rule = Registry("crops.rule", {"coverage": f"{_METHOD}.crops", "iou": f"{_METHOD}.crops"})
judge = Registry(
    "curation.judge",
    dict.fromkeys(("semantic", "embedding", "anls"), f"{_METHOD}.judges")
    | {"always": _TRAINED}
    | dict.fromkeys(("llama", "deepseek"), _SERVED),
)
reward = Registry("grpo.reward", {"awares": f"{_METHOD}.rewards", "visionthink": _TRAINED, "ergo": _TRAINED})
