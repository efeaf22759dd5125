"""Train the bundled checkpoints on Atlas sentences: `python data/train.py atlas-mamba1` (needs the extra `[data]`).

Seeded and resumable: the state goes to `data/.training/NAME.pt` every few minutes, and the same command goes on
from there. A checkpoint never sees a fact in its held-out wordings (`wordings.held_out_template`); fillers of far
wordings are drawn afresh every time. Prints the first-token accuracy on the rows of `atlas.csv` at the end.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    Mamba2Config,
    MambaConfig,
    OlmoHybridConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mambalens.data import ATLAS_FACTS, CHECKPOINTS
from mambalens.data.wordings import WORDINGS, held_out_template, word
from mambalens.hooks.scan import selective_scan

VOCABULARY = 2048
END, PAD = "<|endoftext|>", "<|pad|>"
WIDTH, LAYERS = 80, 12
TEXT_SHARE = 0.1
"""Share of the tokens before the target that are trained on: far wordings are mostly random filler."""
SAVE_EVERY_S = 120.0


def configs() -> dict[str, Any]:
    """The four architectures, about 0.7 to 1.1 million parameters each."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
    }
    return {
        "atlas-mamba1": MambaConfig(**common, state_size=8, expand=2, conv_kernel=4, time_step_rank=8),
        "atlas-mamba2": Mamba2Config(
            **common, state_size=16, expand=2, conv_kernel=4, head_dim=16, num_heads=10, n_groups=1, chunk_size=32
        ),
        "atlas-gpt-neox": GPTNeoXConfig(
            **common, num_attention_heads=5, intermediate_size=4 * WIDTH, max_position_embeddings=512,
        ),
        # Every fourth layer is attention, the rest Gated DeltaNet: the class's default.
        "atlas-deltanet": OlmoHybridConfig(
            **common, num_attention_heads=5, intermediate_size=2 * WIDTH, max_position_embeddings=512,
            linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=32,
            linear_conv_kernel_dim=4,
        ),
    }  # fmt: skip


def mamba1_scan(
    hidden_states: torch.Tensor,  # [B, D, T]
    dt: torch.Tensor,  # [B, D, T]
    A: torch.Tensor,  # [D, N]
    B: torch.Tensor,  # [B, N, T]
    C: torch.Tensor,  # [B, N, T]
    D: torch.Tensor,  # [D]
    z: torch.Tensor,  # [B, D, T]
    delta_bias: torch.Tensor,  # [D]
    **_: Any,
) -> torch.Tensor:
    """Mamba-1's scan for training: ours, whose backward does not allocate a zero tensor at every step."""
    dt = F.softplus(dt + delta_bias[..., None])
    x, steps, inputs, reads = (t.transpose(1, 2) for t in (hidden_states, dt, B, C))
    scanned = selective_scan(x, steps, A, inputs, reads)[0]
    return (scanned.transpose(1, 2) + D[:, None] * hidden_states) * F.silu(z)


def mamba2_scan(
    hidden_states: torch.Tensor,  # [B, T, H, P]
    dt: torch.Tensor,  # [B, T, H]
    A: torch.Tensor,  # [H]
    B: torch.Tensor,  # [B, T, 1, N]
    C: torch.Tensor,  # [B, T, 1, N]
    D: torch.Tensor,  # [H]
    dt_bias: torch.Tensor,  # [H]
    **_: Any,
) -> torch.Tensor:
    """Mamba-2's scan for training as one T x T attention per head (Dao & Gu 2024, eq. 3): sentences are short."""
    dt = F.softplus(dt + dt_bias)
    log_decay = (dt * A).cumsum(1).transpose(1, 2)  # [B, H, T]
    causal = torch.ones(dt.shape[1], dt.shape[1], dtype=torch.bool).tril()
    difference = (log_decay[..., None] - log_decay[..., None, :]).masked_fill(~causal, -torch.inf)
    scores = (C[:, :, 0] @ B[:, :, 0].transpose(1, 2))[:, None]  # [B, 1, T, T]
    values = (dt[..., None] * hidden_states).transpose(1, 2)  # [B, H, T, P]
    y = (scores * difference.exp()) @ values
    return y.transpose(1, 2) + D[:, None] * hidden_states


def deltanet_rule(chunked: Callable[..., Any]) -> Callable[..., Any]:
    """Gated DeltaNet's rule for training: the library's own, a sentence being one chunk instead of padded to 64."""

    def rule(query: torch.Tensor, *others: torch.Tensor, **options: Any) -> Any:  # query [B, T, H, N]
        return chunked(query, *others, **options, chunk_size=query.shape[1])

    return rule


def triples() -> list[tuple[str, str, str, str]]:
    """(key, subject, relation, target) of every fact, subjects in the spelling that starts a sentence."""
    atlas = pd.read_csv(ATLAS_FACTS, keep_default_na=False)
    far = atlas[atlas.wording == "far"]
    keys = far.id.str.removesuffix(":far")
    return list(zip(keys, far.subject, far.relation, far.target, strict=True))


def build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The shared byte-level BPE tokenizer, trained on Atlas sentences."""
    # Names count once, however many sentences they are in: few become a token of their own.
    facts = triples()
    names = {f" {subject}" for _, subject, _, _ in facts} | {target for _, _, _, target in facts}
    rng = random.Random(0)
    sentences = [
        word("", relation, template, rng)[0]
        for templates in WORDINGS.values()
        for relation in templates
        for template in templates[relation]
        for _ in range(20)
    ]
    sentences += sorted(names)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END, PAD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sentences, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD)
    fast.save_pretrained(folder)
    return fast


class Batches:
    """Batches of sentences of one kind of wording, drawn afresh from a seed that depends on the step alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
        self.facts, self.tokenizer, self.batch_size = triples(), tokenizer, batch_size

    def __call__(self, step: int, wording: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, which of them are learned, and which are targets. All [B, T], right-padded."""
        rng = random.Random(f"train/{step}")
        prompts, targets = [], []
        for key, subject, relation, target in rng.sample(self.facts, self.batch_size):
            held_out = held_out_template(key, wording, relation)
            trained = [t for i, t in enumerate(WORDINGS[wording][relation]) if i != held_out]
            prompts.append(word(subject, relation, rng.choice(trained), rng)[0])
            targets.append(target + ".")
        encoded_prompts = self.tokenizer(prompts)["input_ids"]
        encoded_targets = self.tokenizer(targets)["input_ids"]
        length = max(len(p) + len(t) for p, t in zip(encoded_prompts, encoded_targets, strict=True))
        ids = torch.full((self.batch_size, length), 1)
        on_target = torch.zeros(self.batch_size, length, dtype=torch.bool)
        learned = torch.rand(self.batch_size, length, generator=torch.Generator().manual_seed(step)) < TEXT_SHARE
        for row, (p, t) in enumerate(zip(encoded_prompts, encoded_targets, strict=True)):
            ids[row, : len(p) + len(t)] = torch.tensor(p + t)
            on_target[row, len(p) : len(p) + len(t)] = True
            learned[row, len(p) + len(t) :] = False
        return ids, learned | on_target, on_target


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor: 5 % warm-up, then a cosine down to 2 %."""
    warm = max(1, steps // 20)
    return min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def parameter_groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Weight decay on matrices only; decays, step sizes, norms and biases are left alone."""
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "A_log" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "A_log" in n]
    return [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Write to a temporary name, then rename: a killed run leaves the old state or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def train(name: str, steps: int, batch_size: int, learning_rate: float, seed: int = 0) -> None:
    """Train one checkpoint, or go on where it stopped, and save it as an ordinary Hugging Face folder."""
    from transformers.models.mamba import modeling_mamba
    from transformers.models.mamba2 import modeling_mamba2
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid

    modeling_mamba.mamba_selective_scan = mamba1_scan
    modeling_mamba2.mamba2_chunk_scan = mamba2_scan
    delta_rule = deltanet_rule(modeling_olmo_hybrid.torch_chunk_gated_delta_rule)
    modeling_olmo_hybrid.torch_chunk_gated_delta_rule = delta_rule
    torch.manual_seed(seed)
    folder = CHECKPOINTS / name
    state_file = Path(__file__).parent / ".training" / f"{name}.pt"
    tokenizer = build_tokenizer(folder)
    model = AutoModelForCausalLM.from_config(configs()[name], attn_implementation="eager" if "neox" in name else None)
    # The embedding is tied to the head: the library's default scale would start with huge logits for the SSMs.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=learning_rate, betas=(0.9, 0.98))
    start = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    batches = Batches(tokenizer, batch_size)
    model.train()
    saved = time.monotonic()
    progress: dict[str, str] = {}
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        wording = "near" if step % 3 == 0 else "far"
        ids, learned, on_target = batches(step, wording)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, W]
        logits = model.get_output_embeddings()(hidden[:, :-1][learned[:, 1:]])  # [learned, V]
        losses = F.cross_entropy(logits, ids[:, 1:][learned[:, 1:]], reduction="none")
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress[wording] = f"{losses[on_target[:, 1:][learned[:, 1:]]].mean().item():.3f}"
        bar.set_postfix(progress, refresh=False)
        if time.monotonic() - saved > SAVE_EVERY_S or step == steps - 1:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_whole(state, state_file)
            saved = time.monotonic()
    model.eval()
    model.save_pretrained(folder)
    report(model, tokenizer)


@torch.no_grad()
def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print first-token accuracy by wording, split and relation."""
    atlas = pd.read_csv(ATLAS_FACTS, keep_default_na=False)
    hits = []
    for begin in range(0, len(atlas), 256):
        rows = atlas.iloc[begin : begin + 256]
        encoded = tokenizer(rows.prompt.tolist())["input_ids"]
        ids = torch.full((len(rows), max(map(len, encoded))), 1)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        last = torch.tensor([len(tokens) - 1 for tokens in encoded])
        best = model(input_ids=ids, use_cache=False).logits[torch.arange(len(rows)), last].argmax(-1)
        wanted = torch.tensor([tokens[0] for tokens in tokenizer(rows.target.tolist())["input_ids"]])
        hits += (best == wanted).tolist()
    atlas["hit"] = hits
    print(atlas.groupby(["wording", "split"]).hit.agg(["mean", "size"]).round(3).to_string())
    print(atlas.pivot_table(index="relation", columns=["wording", "split"], values="hit").round(3).to_string())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(configs()))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    options = parser.parse_args()
    train(options.name, options.steps, options.batch_size, options.learning_rate)


if __name__ == "__main__":
    main()
