"""ms-swift's external plugin: it attaches the models that ms-swift loads.

``--external_plugins`` takes the path of a file and imports it. ``python -m
pro_kernels.integrations.swift`` prints the path of ``pro_kernels_plugin.py``, which stands in a
folder of its own, because ms-swift puts the folder on ``sys.path``.

Source: ms-swift 4.6, ``swift.model.register``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from pro_kernels.integrations.switch import Switch
from pro_kernels.models.loaded import attach_loaded

PLUGIN = Path(__file__).with_name("pro_kernels_plugin.py")
_switch = Switch(__name__, "ms-swift", "ms-swift's models are attached")


def apply(rows: str | None = None) -> None:
    """Attach every causal LM that ms-swift loads from now on; ``restore()`` undoes it.

    A line says what became of each model. One that ``attach`` refuses stays as it was.

    Args:
        rows: "padded" or "distinct", as of ``attach``; None: what ``PRO_KERNELS_RUN_ROWS`` says.

    Raises:
        ImportError: ms-swift is missing.
        ValueError: it was called before.
    """
    (register,) = _switch.modules("swift.model.register")
    load = register.ModelLoader.load

    @functools.wraps(load)
    def load_and_attach(self: Any) -> Any:
        model, processor = load(self)
        if model is not None and not self.return_dummy_model:
            attach_loaded(model, rows, lambda text: print(f"pro_kernels: {text}"))
        return model, processor

    _switch.put(register.ModelLoader, "load", load_and_attach)


def restore() -> None:
    """Undo ``apply``; models stay attached. Nothing happens where it was not called."""
    _switch.restore()
