"""The frameworks: what is installed, and what is typed."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Installed once, beside torch (constraints.txt), and seen by every environment.
SHARED = (
    "torch numpy pyarrow pandas safetensors pyyaml packaging filelock psutil requests tqdm regex"  # noqa: E501
)


@dataclass(frozen=True)
class Framework:
    """One framework in one version; ``command`` finds ``file``, model/ and data/ where it runs."""

    name: str
    command: str
    file: str  # beside this one
    install: tuple[str, ...]  # arguments of `pip install`; the first names the framework
    broken: str = ""  # files of the environment that cannot be loaded without a GPU, a glob

    @property
    def pin(self) -> tuple[str, str]:
        """The framework's package, and its version."""
        return re.findall(r"([\w-]+)==(\S+)", self.install[0])[0]

    @property
    def key(self) -> str:
        """Names it in the results, and its environment."""
        return "-".join(self.pin)


def _trl(requirements: str) -> Framework:
    return Framework("TRL", "python trl_dpo.py", "trl_dpo.py", (f"{requirements} rich",))


FRAMEWORKS = (
    _trl("trl==0.24.0 transformers==4.57.1 accelerate==1.11.0 datasets==4.3.0 peft==0.18.1"),
    _trl("trl==0.29.1 transformers==5.3.0 accelerate==1.13.0 datasets==4.8.4 peft==0.18.1"),
    _trl("trl==1.9.2 transformers==5.17.0 accelerate==1.15.0 datasets==5.2.0 peft==0.21.2"),
    _trl("trl==1.16.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 peft==0.21.2"),
    Framework(
        "LLaMA-Factory", "llamafactory-cli train llamafactory.yaml", "llamafactory.yaml",
        (
            "--no-deps llamafactory==0.9.5",
            "transformers==5.6.0 trl==0.24.0 accelerate==1.11.0 datasets==4.0.0 peft==0.18.1 "
            "'numpy<3' einops fire omegaconf protobuf pydantic scipy sentencepiece tiktoken "
            "'tyro<0.9.0' fastapi uvicorn sse-starlette 'av<=16.0.0' hf-transfer matplotlib",
            "--no-deps torchaudio==2.11.1",  # is imported; nothing of it is used for text
        ),
        broken="torchaudio/lib/*.so",  # without them it imports as plain Python
    ),
    Framework(
        "ms-swift", "swift rlhf ms-swift.yaml", "ms-swift.yaml",
        (
            "--no-deps ms-swift==4.6.0",
            "trl==0.29.1 transformers==5.17.0 accelerate==1.15.0 datasets==4.8.4 peft==0.20.0 "
            "addict aiohttp binpacking dacite einops fastapi importlib-metadata json-repair "
            "matplotlib 'modelscope>=1.23' nltk openai pillow rouge scipy sentencepiece simplejson "
            "sortedcontainers tensorboard tiktoken uvicorn zstandard",
        ),
    ),
    Framework(
        "axolotl", "axolotl train axolotl.yaml --launcher python", "axolotl.yaml",
        (
            "--no-deps axolotl==0.19.0 axolotl-contribs-mit==0.0.6 axolotl-contribs-lgpl==0.0.7",
            "transformers==5.16.1 trl==1.9.0 accelerate==1.13.0 datasets==4.8.4 peft==0.20.0 "
            "huggingface_hub==1.17.0 tokenizers==0.23.1 'kernels<0.17.0,>=0.16.0' pydantic==2.12.5 "
            "addict fire einops colorama typer==0.25.1 python-dotenv==1.0.1 art scipy zstandard "
            "posthog==6.7.11 schedulefree==1.4.1 tensorboard 'numba>=0.63.1' 'numpy<3' "
            "evaluate==0.4.1 wandb sentencepiece fastcore langdetect immutabledict",
            "--no-deps bitsandbytes==0.50.2 triton==3.7.1",
        ),
    ),
)  # fmt: skip
