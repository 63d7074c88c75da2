"""How the weights were made: two stages on the corpus of make_corpus.py, 4 CPU cores, bfloat16 autocast, AdamW (0.9, 0.95), weight decay 0.1, gradient clip 1.

Stage 1: 1,200 steps of 16 windows of 512 tokens, peak rate 2e-3, cosine to a tenth.   Held-out perplexity 14.5 (512).
Stage 2: 1,199 steps of  8 windows of 1,024 tokens, rate 1.2e-3 held, then linear to nothing over the last 350.   Held-out perplexity 7.45 (1,024).
"""

import math
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


def train(model, tokens, *, steps, windows, length, rate, schedule, seed):
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - length - 1, (windows,))
        batch = torch.stack([tokens[start : start + length] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)


torch.manual_seed(0)
model = LlamaForCausalLM(CONFIG)
tokens = torch.from_numpy(np.load("train.npy").astype(np.int64))
train(
    model,
    tokens,
    steps=1200,
    windows=16,
    length=512,
    rate=2e-3,
    seed=0,
    schedule=lambda step: min(1, step / 100) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 1200))),
)
train(
    model,
    tokens,
    steps=1199,
    windows=8,
    length=1024,
    rate=1.2e-3,
    seed=7,
    schedule=lambda step: min(1, (step + 1) / 50) if step < 849 else max(0.03, 1 - (step - 849) / 350),
)
model.to(torch.float16).save_pretrained(".")
