"""Published settings, by name."""

from __future__ import annotations

from typing import Any


# BiPO, arXiv 2406.00045, section 4.1 and appendix; read beside the authors' code, which sets the weight decay of the
# paper (0.05) but never passes it on. Layers: 15 of Llama-2-7b, 13 of Mistral-7B.
_PAPER: dict[str, Any] = dict(
    beta=0.1,
    learning_rate=5e-4,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    weight_decay=0.05,
    lr_scheduler_type="cosine",
    warmup_steps=100,
    optim="adamw_torch",
)

RECIPES: dict[str, dict[str, Any]] = {
    "bipo-persona-llama2": dict(_PAPER, num_train_epochs=20),
    "bipo-hallucination-llama2": dict(_PAPER, num_train_epochs=20),
    "bipo-jailbreak-llama2": dict(_PAPER, num_train_epochs=10),
    "bipo-persona-mistral": dict(_PAPER, num_train_epochs=5),
    "bipo-truthfulqa": dict(_PAPER, num_train_epochs=1),
}
# The system prompt of the authors' training data.
PAPER_SYSTEM_PROMPT = "You are a helpful, honest and concise assistant."
