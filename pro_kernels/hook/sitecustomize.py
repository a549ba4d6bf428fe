"""Run by every Python that ``pro-kernels run`` starts, before its program.

It waits for ``transformers.modeling_utils`` and has the models attached that are loaded then
(``models.loaded``). Until a model is loaded it imports nothing, and a failure here is one line.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # of typing, whose import would cost every interpreter some milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

FOLDER = os.environ.get("PRO_KERNELS_RUN", "")  # of the reports


def guarded(action: Callable[..., object], *args: Any) -> None:
    """Call something of ours; what it raises is one line and a report, and the program goes on."""
    try:
        action(*args)
    except Exception as error:
        import contextlib
        import json

        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"pro-kernels run: models are left as they are: {reason}", file=sys.stderr)
        with contextlib.suppress(OSError):
            with open(os.path.join(FOLDER, f"{os.getpid()}-failed.json"), "w") as file:
                json.dump({"failed": {reason: 1}}, file)


class Finder:
    """Finds one module as others do, and changes it when it was run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As of ``importlib.abc.MetaPathFinder``."""
        if name != "transformers.modeling_utils":
            return None
        others = (getattr(x, "find_spec", None) for x in sys.meta_path if x is not self)
        spec = next(filter(None, (find(name, path, target) for find in others if find)), None)
        if spec is not None:
            guarded(change_after_run, spec.loader)
        return spec


def change_after_run(loader: Any) -> None:
    """Have ``attach_what_is_loaded`` called with the module that a loader runs."""
    run = loader.exec_module

    def exec_module(module: Any) -> None:
        run(module)
        guarded(attach_what_is_loaded, module)

    loader.exec_module = exec_module


def attach_what_is_loaded(module: Any) -> None:
    """Change ``PreTrainedModel``: what loads or makes a model hands it to ``attach_loaded``."""
    import functools
    import threading

    here = threading.local()  # a model may load its parts, which are not attached by themselves

    def attaching(load: Callable[..., Any]) -> Any:
        @functools.wraps(load)
        def load_and_attach(cls: type, *args: Any, **kwargs: Any) -> Any:
            inner, here.loading = getattr(here, "loading", False), True
            try:
                loaded = load(cls, *args, **kwargs)
            finally:
                here.loading = inner
            if not inner:
                guarded(attach, loaded[0] if isinstance(loaded, tuple) else loaded)
            return loaded

        return classmethod(load_and_attach)

    for name in ("from_pretrained", "_from_config"):
        own = getattr(module.PreTrainedModel, name).__func__
        setattr(module.PreTrainedModel, name, attaching(own))


def attach(model: Any) -> None:
    """Hand on a model; the import takes pro_kernels and torch, which is there by now."""
    from pro_kernels.models.loaded import attach_loaded

    attach_loaded(model)


if FOLDER:
    sys.meta_path.insert(0, Finder())

# What is further down the path runs as it would without this: ``site`` knows what to do if there is
# nothing, or if it fails.
_own = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [x for x in sys.path if os.path.abspath(x) != _own]
sys.modules.pop("sitecustomize", None)
import sitecustomize  # noqa: E402, F401
