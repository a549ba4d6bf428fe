"""PRO with LoRA on the attention and on the LM head; everything else is frozen."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model

import pro_kernels as pk
import tiny


def main(steps: int = 30) -> list[float]:
    """Train the adapters and return the losses."""
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "lm_head"])
    model = pk.attach(get_peft_model(tiny.model(), config), loss="ranking")
    model.print_trainable_parameters()
    batch = tiny.collate(tiny.ranked_lists())
    return tiny.fit(lambda: model(**batch).loss, model, steps, rate=1e-2)


if __name__ == "__main__":
    main()
