"""axolotl's plugin: it attaches the models that axolotl loads.

    plugins:
      - pro_kernels.integrations.axolotl.ProKernelsPlugin
    pro_kernels_rows: distinct

Source: axolotl 0.19, ``axolotl.integrations.base``.
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from pro_kernels.models.loaded import attach_loaded


class ProKernelsArgs(BaseModel):
    """What a configuration may say to the plugin."""

    pro_kernels_rows: Literal["padded", "distinct"] = "padded"


class ProKernelsPlugin(BasePlugin):
    """Attaches policy and reference, after adapters are there and before a trainer is made.

    A line says what became of each model. One that ``attach`` refuses stays as it was.
    """

    def get_input_args(self) -> str:
        """Where axolotl finds the fields of its configuration that are the plugin's."""
        return f"{__name__}.{ProKernelsArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Attach a model that axolotl has loaded, with ``cfg.pro_kernels_rows``."""
        attach_loaded(model, cfg.pro_kernels_rows, lambda text: print(f"pro_kernels: {text}"))
