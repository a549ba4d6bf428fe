"""What each command can be told. Nothing heavy is imported here, so that help comes at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal

from pro_trainer.options import ModelOptions, check_choices, check_positive, option
from pro_trainer.prepare.options import ServerOptions
from pro_trainer.prepare.rewards.options import RewardOptions
from pro_trainer.rounds.options import RoundOptions
from pro_trainer.text.options import TemplateOptions

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
    """Which model is evaluated on which data, and against which; the rest is ``PROConfig``.

    Raises:
        ValueError: something needed is missing, or a number out of range.
    """

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
class SampleOptions:
    """How candidates are sampled, but for their temperature: losses have one, too."""

    group: ClassVar[str] = "prepare"

    num_samples: int = option(2, "Samples for each prompt from each generator and server_model.")
    top_p: float = option(
        0.95, "Only the likeliest tokens that reach this share together are drawn from."
    )
    max_new_tokens: int = option(128, "Most tokens of a sample.")
    stop: list[str] = option(["\n\nHuman:"], "A sample ends before the first of these strings.")
    batch_size: int = option(16, "Sequences run together, and lists between two saves.")


@dataclass
class PrepareArguments(SampleOptions, RewardOptions, ServerOptions, TemplateOptions):
    """Flags of ``pro-kernels prepare``."""

    group: ClassVar[str] = "prepare"

    data: list[str] = option(
        [],
        "Ranked lists, in any form that train reads: files, dataset folders or hub names. With a "
        'generator or a server also prompts alone: {"prompt": text or messages}.',
    )
    output: str = option("", "File to write, .jsonl or .jsonl.gz; OUTPUT.report.json beside it.")
    generator: list[str] = option(
        [],
        "Causal LMs (folders or hub names) that candidates are sampled from, loaded all at once.",
    )
    generator_tokenizer: list[str] = option(
        [], "Their tokenizers, as many as generators. Default: each generator's own."
    )
    temperature: list[float] = option(
        [1.0], "Sampling temperature. Several: a prompt's samples have them in turn."
    )
    max_prompt_length: int | None = option(
        None,
        "Tokens of the prompt a generator sees; a longer one loses its start there (never in the "
        "output). Default: what its context leaves.",
    )
    seed: int = option(42, "Of the samples.")
    limit: int | None = option(None, "Only the first so many lists.")
    on_bad_line: Literal["error", "skip"] = option(
        "error", "A malformed record stops the run (error), or is counted and reported (skip)."
    )
    overwrite: bool = option(
        False, "Replace an existing output, and drop what was begun with other settings."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the checkpoints.")
    device: str | None = option(None, "Device of the models. Default: cuda where there is one.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "Of the models' weights; auto: as saved."
    )

    def sources(self) -> list[str]:
        """The paths (or hub names) of all that is read."""
        return [*self.data, *self.generator, *self.generator_tokenizer, *self.reward_files()]

    def check(self) -> None:
        """Raise ValueError for arguments out of range or at odds."""
        check_choices(self, PrepareArguments)
        if not self.data:
            raise ValueError("data: no file, folder or hub name given")
        if not self.output.endswith((".jsonl", ".jsonl.gz")):
            raise ValueError(f"output must end in .jsonl or .jsonl.gz, got {self.output!r}")
        self.check_rewards()
        self.check_servers(self.asks_servers())
        if (self.generator or self.server) and not self.reward:
            name = "generator" if self.generator else "server"
            raise ValueError(
                f"samples have no reward of their own: a {name} needs a reward that scores all "
                "candidates"
            )
        if self.max_prompt_length is not None and not self.generator:
            raise ValueError(
                "max_prompt_length cuts the prompts of a generator, and none was given; a server "
                "has a length of its own"
            )
        if self.generator_tokenizer and len(self.generator_tokenizer) != len(self.generator):
            raise ValueError(
                f"generator_tokenizer: one for each of the {len(self.generator)} generators, got "
                f"{len(self.generator_tokenizer)}"
            )
        check_positive(self, "num_samples", "top_p", "max_new_tokens")
        check_positive(self, "max_prompt_length", "batch_size", "limit")
        if not self.temperature:
            raise ValueError("temperature: none was given")
        for temperature in self.temperature:
            if not 0 < temperature < math.inf:
                raise ValueError(f"temperature must be finite and > 0, got {temperature}")
        if len(self.temperature) > self.num_samples:
            raise ValueError(
                f"temperature: {len(self.temperature)} of them for {self.num_samples} samples of a "
                "prompt: raise num_samples"
            )
        if self.top_p > 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not all(self.stop):
            raise ValueError("stop: an empty string would end every sample at once")


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
