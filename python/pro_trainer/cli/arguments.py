"""What each command can be told. Nothing heavy is imported here, so that help comes at once."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from pro_trainer.options import ModelOptions, check_positive, option
from pro_trainer.prepare.options import SampleOptions, ServerOptions
from pro_trainer.prepare.rewards.options import RewardOptions
from pro_trainer.rounds.options import RoundOptions

_DATA = "Ranked lists: JSON Lines (plain, .gz, .zst), Parquet, folders, hub names[:split]."


@dataclass
class FileOptions:
    """Which lists are trained on, and which are held out."""

    group: ClassVar[str] = "data"

    data: list[str] = option([], _DATA)
    eval_data: list[str] = option([], "Held-out lists. Default: eval_fraction of the lists.")
    eval_fraction: float = option(
        0.1,
        "Share of the prompts held out when no eval_data is given (lists with the same prompt stay "
        "together); 0 for none.",
    )
    demo: bool = option(
        False,
        "What is not given is supplied: without --model a tiny byte-level Llama made on the spot, "
        "without --data the bundled ranked lists.",
    )


@dataclass
class LoraOptions:
    """Adapters instead of all weights."""

    group: ClassVar[str] = "model"

    use_peft: bool = option(False, "Train LoRA adapters (needs peft) instead of all weights.")
    lora_r: int = option(16, "Rank of the adapters.")
    lora_alpha: int = option(32, "Their scale is lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout before them (needs --disable_dropout false).")
    lora_target_modules: list[str] = option(
        [], "Modules that get adapters. Default: every linear layer but the LM head."
    )
    lora_modules_to_save: list[str] = option([], "Modules trained whole beside the adapters.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(lora_r) (rank-stabilised LoRA).")
    use_dora: bool = option(False, "Weight-decomposed adapters (DoRA).")


@dataclass
class TrainArguments(FileOptions, LoraOptions, ModelOptions):
    """Which model is trained on which data; the rest is ``PROConfig``."""

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie in [0, 1), got {self.eval_fraction}")
        if not (self.demo or (self.model and self.data)):
            raise ValueError("train needs --model and --data, or --demo")
        if self.use_peft and not self.model:
            raise ValueError("use_peft needs --model: adapters of the demo's model fit no other")
        if self.tokenizer and not self.model:
            raise ValueError(f"tokenizer {self.tokenizer} was given without --model")
        if self.quantization() is not None and not self.use_peft:
            raise ValueError(
                "quantised weights cannot be trained themselves: give --use_peft true with "
                "load_in_4bit or load_in_8bit"
            )


@dataclass
class InspectArguments(TrainArguments):
    """What is shown; every option of ``train`` counts as it does there."""

    group: ClassVar[str] = "inspect"

    num: int = option(3, "How many lists are shown.")
    json: bool = option(
        False,
        "One object a line: prompt_ids, completion_ids (best first, scored tokens only), rewards, "
        "desirable, weight, cut. The report goes to standard error.",
    )

    def __post_init__(self) -> None:
        check_positive(self, "num")
        super().__post_init__()


@dataclass
class EvalArguments(ModelOptions):
    """Which model is evaluated on which data, and against which; the rest is ``PROConfig``."""

    group: ClassVar[str] = "eval"

    data: list[str] = option([], _DATA)
    base: str | None = option(
        None,
        "The model it is compared with, and the reference model of the losses that have one. "
        "Default: the model that the run started from. none: no comparison.",
    )
    generate: int = option(
        0, "Answer the first so many prompts (greedy) by both models, side by side; 0: none."
    )
    max_new_tokens: int = option(128, "Most tokens of an answer.")
    reward_model: str | None = option(
        None, "Folder (or hub name) of a sequence classifier with one label, to score the answers."
    )

    def __post_init__(self) -> None:
        if not self.model or not self.data:
            raise ValueError("eval needs --model and --data")
        if self.generate < 0:
            raise ValueError(f"generate must be at least 0, got {self.generate}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.reward_model and not self.generate:
            raise ValueError(
                "reward_model scores generated answers, but generate is 0: set it to how many "
                "prompts to answer"
            )
        if self.generate and find_spec("sacrebleu") is None:
            raise ValueError("generate reports BLEU, which needs sacrebleu: pip install sacrebleu")


@dataclass
class RoundsArguments(
    RoundOptions, SampleOptions, RewardOptions, ServerOptions, LoraOptions, ModelOptions
):
    """Flags of ``pro-kernels rounds``; how a round trains is ``PROConfig``."""

    def check(self) -> None:
        """Raise ValueError for arguments out of range or at odds; the rest is for its parts."""
        self.check_rounds()
        if not self.model:
            raise ValueError("model: the folder or hub name of the model to begin with is missing")
        if not self.reward:
            raise ValueError("reward: samples have no reward of their own, so give one")
        if self.sft != "best":
            raise ValueError("sft must be best: prompts alone prefer no candidate")
        if self.server and not self.reload_command:
            raise ValueError(
                "server: a round's samples come from the model that was trained last, so the "
                "server must load it: give a reload_command (true, where something else does that)"
            )
        if self.reload_command and not self.server:
            raise ValueError("reload_command is for a server: give one as server, or leave it out")
        if len(self.server_model) > 1:
            raise ValueError(f"server_model: one is trained, got {self.server_model}")
