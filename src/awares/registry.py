"""Extension points: a reward, a judge, a crop rule or a compared system is a plain function under a decorator.

A name in params.yaml is looked up in this order: a function registered with the decorator (in a module or in a notebook
cell), a built-in name, or ``module:function``, which is imported. Code that takes a name also takes the function.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from awares.errors import AwaresValueError

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Registry:
    """The functions of one extension point, a ``kind``; ``builtin``: name -> module that defines it."""

    def __init__(self, kind: str, builtin: dict[str, str]) -> None:
        self.kind, self.builtin = kind, builtin
        self._functions: dict[str, Callable[..., Any]] = {}

    def __call__(self, name: str, **attributes: Any) -> Callable[[_Function], _Function]:
        """The decorator, such as ``@system("mine", model="awares")``: ``attributes`` become those of the function."""

        def register(function: _Function) -> _Function:
            self._functions[name] = function
            vars(function).update(attributes)
            return function

        return register

    def __iter__(self) -> Iterator[str]:
        return iter({**self.builtin, **self._functions})

    def find(self, wanted: str | Callable[..., Any]) -> Callable[..., Any]:
        """The function for a name, or ``wanted`` itself if it is a function; AwaresValueError for an unknown name."""
        if not isinstance(wanted, str):
            return wanted
        module, _, name = wanted.partition(":")
        try:
            if wanted not in self._functions:
                found = importlib.import_module(self.builtin.get(wanted, module))
            return self._functions[wanted] if wanted in self._functions else getattr(found, name)
        except (ImportError, AttributeError) as error:
            choices = f"choose from {', '.join(self)} or write module:function"
            raise AwaresValueError(f"unknown {self.kind} {wanted!r} ({error}): {choices}") from error

    def check(self, name: str) -> str:
        """``name`` if `find` finds it (a built-in function is not imported for that), else AwaresValueError."""
        if name not in self.builtin:
            self.find(name)
        return name

    def source(self, wanted: str | Callable[..., Any]) -> str:
        """Name and source code, of the module or of a notebook's function alone: part of a checkpoint's key."""
        function = self.find(wanted)
        name = wanted if isinstance(wanted, str) else function.__name__
        module = inspect.getmodule(function)
        try:
            return f"{name}\n{inspect.getsource(module if module and hasattr(module, '__file__') else function)}"
        except (OSError, TypeError) as error:
            raise AwaresValueError(f"{self.kind} {name!r} has no source code: define it in a file or a cell") from error


_TRAINED, SERVED = "awares.baselines.trained", "awares.clients.judges"
_LOCAL_JUDGES = dict.fromkeys(("semantic", "embedding", "anls"), "awares.method.judges")
_SYSTEMS = "full half no_image sft awares visionzip holov random_token fastv sparsevlm random_crop oracle_crop".split()

crop_rule = Registry("crop rule", dict.fromkeys(("coverage", "iou"), "awares.method.crops"))
judge = Registry("judge", _LOCAL_JUDGES | {"always": _TRAINED, "llama": SERVED, "deepseek": SERVED})
_REWARDS = {"awares": "awares.method.rewards", **dict.fromkeys(("visionthink", "ergo", "adaptvision"), _TRAINED)}
reward = Registry("reward", _REWARDS)
system = Registry("system", dict.fromkeys(_SYSTEMS, "awares.baselines.registry"))
