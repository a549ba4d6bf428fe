"""``python -m bench.logprobs [MODEL ...]``: the figures of docs/logprobs.md, as Markdown tables.

Agreement of bf16 models' log-probs with a plain fp32 forward (of each model folder, on the text of
the documentation), errors of a temperature of each row against fp64, and what ``batch_invariant``
and ``return_topk`` cost in CPU time of one thread, interleaved, as medians of ratios.
"""

from __future__ import annotations

import itertools
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pro_kernels as pk
from bench.engine.timing import Step, paired, timed
from bench.report.tables import table

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP32_HEAD = {"head_dtype": "float32"}
HEADS = {"bf16": (BF16, {}), "bf16, fp32 head": (BF16, FP32_HEAD)}
TOKENS, WINDOW, ROUNDS = 4096, 512, 3


def difference(found: Tensor, exact: Tensor) -> str:
    """The largest and the mean difference of log-probs."""
    apart = (found.double() - exact.double()).abs()
    return f"{apart.max():.1e} ({apart.mean():.1e})"


@torch.no_grad()
def agreement(folder: str) -> str:
    """Log-probs of a bf16 model from fp32 logits of its hidden states, and from fp64 ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16).eval()
    text = "".join(x.read_text() for x in sorted(Path(__file__).parents[1].glob("docs/*.md")))
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids[:TOKENS])
    ids = ids.view(-1, WINDOW)
    hidden = model.base_model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    weight, targets = model.get_output_embeddings().weight, ids[:, 1:].flatten()

    def plain(x: Tensor, w: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, FP32)
        parts = [(part @ w.t()).to(wide).log_softmax(-1) for part in x.split(256)]
        return torch.cat(parts).gather(1, targets[:, None])[:, 0]

    exact = plain(hidden.float(), weight.float()), plain(hidden.double(), weight.double())
    rows = {
        "logits in bf16, as the model gives them": plain(hidden, weight),
        "`linear_token_logps`": pk.linear_token_logps(hidden, weight, targets),
        'with `head_dtype="float32"`': pk.linear_token_logps(hidden, weight, targets, **FP32_HEAD),
        "the plain forward in fp32": exact[0],
    }
    lines = [[what, *(difference(x, e) for e in exact)] for what, x in rows.items()]
    return table([f"{Path(folder).name}, {len(targets)} tokens", "from fp32", "from fp64"], lines)


def temperatures() -> str:
    """Errors of log-probs, dHidden and dW at temperatures from 0.5 to 1.5, from fp64."""
    gen = torch.Generator().manual_seed(0)
    n, width, vocab = 512, 1024, 16000
    x = torch.randn(n, width, generator=gen)
    w = 4 * torch.randn(vocab, width, generator=gen) / width**0.5
    up, lines = torch.rand(n, generator=gen), []
    heads = {**HEADS, "fp16": (FP16, {}), "fp32": (FP32, {})}
    for per_row in (True, False):
        t = 0.5 + torch.rand(n, generator=gen) if per_row else torch.ones(n)
        lines.append(["of each row" if per_row else "1"])
        for dtype, options in heads.values():
            hidden, weight = (v.to(dtype).requires_grad_() for v in (x, w))
            wide = [v.detach().double().requires_grad_() for v in (hidden, weight)]
            logits = wide[0] @ wide[1].t() / t[:, None]
            targets = logits.softmax(-1).multinomial(1, generator=gen)[:, 0]
            exact = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            scale = {"logit_scale": 1 / t} if per_row else {}
            found = pk.linear_token_logps(hidden, weight, targets, **scale, **options)
            grads = [
                torch.autograd.grad(y, of, up.to(y.dtype))
                for y, of in ((found, [hidden, weight]), (exact, wide))
            ]
            off = [((a - b).norm() / b.norm()).item() for a, b in zip(*grads, strict=True)]
            lines[-1].append(f"{difference(found, exact)}, {off[0]:.1e}, {off[1]:.1e}")
    return table(["temperature", *heads], lines)


def costs(option: dict[str, Any], sizes: tuple[int, ...]) -> str:
    """CPU time with an option over that of a call without."""
    width, vocab, lines = 1024, 32000, []
    heads = {"bf16, fp32 head": HEADS["bf16, fp32 head"], "fp32": (FP32, {}), "bf16": (BF16, {})}
    name = ", ".join(f"{key}={value}" for key, value in option.items())
    columns = [f"{what}, {head}" for what in ("forward", "both") for head in heads]
    for n in sizes:
        lines.append([str(n)])
        for learns, (dtype, more) in itertools.product((False, True), heads.values()):
            x, w = (torch.randn(k, width).to(dtype).requires_grad_(learns) for k in (n, vocab))
            call = partial(step, x, w, torch.randint(0, vocab, (n,)))
            taken = timed({"with": call(more | option), "without": call(more)}, ROUNDS, cpu_time)
            lines[-1].append(f"{paired(taken['with'], taken['without']):.2f}")
    return table([f"rows, {name}", *columns], lines)


def step(x: Tensor, w: Tensor, targets: Tensor, options: dict[str, Any]) -> Step:
    """A call, with its backward where the weight learns."""

    def run() -> object:
        found: Any = pk.linear_token_logps(x, w, targets, **options)
        logps = found[0] if isinstance(found, tuple) else found
        return torch.autograd.grad(logps.sum(), [x, w]) if w.requires_grad else logps

    return Step(run)


def cpu_time(step: Step) -> float:
    """Seconds of all threads of a call."""
    start = time.process_time()
    step.run()
    return time.process_time() - start


if __name__ == "__main__":
    for model in sys.argv[1:]:
        print(agreement(model), flush=True)
    print(temperatures(), flush=True)
    torch.set_num_threads(1)
    print(costs({"batch_invariant": True}, (1, 64, 300, 1024)), flush=True)
    print(costs({"return_topk": 8}, (1024,)))
