"""Train the language model that Argosy serves when no model is named, and write its folder.

    python examples/train_default_model.py --docs /path/to/python/Doc --out argosy/default_model

It reads the documentation of Python (PSF licence) and learns to continue it and to answer questions in its manner. The
folder is written every few minutes, so that a run cut short leaves a model that loads.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from default_model_chats import conversations
from default_model_text import Document, read_documents, sections
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN: Final = "<|begin|>"
END: Final = "<|end|>"
PAD: Final = "<|pad|>"
END_OF_TURN: Final = "<|end_of_turn|>"
SPECIAL_TOKENS: Final = (BEGIN, END, PAD, "<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN)
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end_of_turn|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Heads, KV heads, vocabulary and MLP width divide by 4: the model must split over 2 and 4 ranks.
SHAPE: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": SPECIAL_TOKENS.index(BEGIN),
    "eos_token_id": [SPECIAL_TOKENS.index(END), SPECIAL_TOKENS.index(END_OF_TURN)],
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
# Peaks. Held-out loss after a run of 80 steps, by rate of (matrices, embedding): 5.44 at (0.003, 0.003), 5.34 at
# (0.01, 0.003), 5.22 at (0.003, 0.01). The matrices stay below 0.01 because the real run is many times as long.
MATRIX_RATE: Final = 6e-3
EMBEDDING_RATE: Final = 1e-2
# Attention is two fifths of a step at 512 tokens, so most windows are short; each eighth step trains the positions
# behind them, throughout and not only at the end, where the rate is too low to learn anything new.
LONG_EVERY: Final = 8
LONG_FACTOR: Final = 4

PROMPTS: Final = (
    "The module provides a function",
    "If the file does not exist,",
    "To read a text file line by line, you can",
    "Return True if",
    "A class is",
)
QUESTIONS: Final = ("What does textwrap.dedent do?", "What is a decorator?", "What is the json module?", "Who are you?")


@dataclass(frozen=True, slots=True)
class Split:
    """One side of the split: its text, as characters counted and as a stream of tokens."""

    num_documents: int
    num_chats: int
    num_characters: int
    tokens_T: Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """What training came to so far, over all runs that began where another had ended."""

    num_runs: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    minutes: float = 0.0

    @classmethod
    def of(cls, weights: Path) -> Self:
        with safe_open(weights, framework="pt") as opened:
            told = json.loads(opened.metadata()["training"])
        return cls(**told)


# ----------------------------------------------------------------------------------------------- tokenizer and tokens


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so nothing is ever unknown and every text comes back."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for document in documents for text in sections(document)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, SPECIAL_TOKENS.index(BEGIN))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, bos_token=BEGIN)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document], *, seed: int) -> Split:
    """Sections and chats, each begun and ended by its marks, shuffled together into one stream."""
    texts = [f"{text}{END}" for document in documents for text in sections(document)]
    chats = conversations(documents, seed=seed)
    texts += [tokenizer.apply_chat_template(chat, tokenize=False).removeprefix(BEGIN) for chat in chats]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    pieces = tokenizer([texts[index] for index in order])["input_ids"]
    return Split(
        num_documents=len(documents),
        num_chats=len(chats),
        num_characters=sum(map(len, texts)),
        tokens_T=torch.tensor([token_id for piece in pieces for token_id in piece]),
    )


def batches(tokens_T: Tensor, *, num_rows: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of the packed stream without end: each pass cuts it at another offset and in another order."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(context, (1,), generator=rng))
        starts = torch.arange(offset, len(tokens_T) - context - 1, context)
        for rows in starts[torch.randperm(len(starts), generator=rng)].split(num_rows):
            if len(rows) == num_rows:
                window = torch.stack([tokens_T[start : start + context + 1] for start in rows.tolist()])
                yield window[:, :-1], window[:, 1:]


# ------------------------------------------------------------------------------------------------------------ training


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens_T: Tensor, *, context: int = 512, num_rows: int = 8) -> float:
    """Mean nats per token over the whole split, each token seen once behind at most `context` others."""
    device = next(model.parameters()).device
    num_windows = (len(tokens_T) - 1) // context
    inputs = tokens_T[: num_windows * context].view(num_windows, context)
    targets = tokens_T[1 : num_windows * context + 1].view(num_windows, context)
    total = 0.0
    for rows, wanted in zip(inputs.split(num_rows), targets.split(num_rows), strict=True):
        total += float(loss_of(model, rows.to(device), wanted.to(device))) * rows.numel()
    return total / inputs.numel()


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns more from each token here, AdamW for embedding and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=EMBEDDING_RATE, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


def rate_at(share: float) -> float:
    """Linear warm-up over the first 2 % of the run, then a cosine down to 2 % of the peak."""
    if share < 0.02:
        return max(share, 0.001) / 0.02
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (share - 0.02) / 0.98))


def train(model: nn.Module, tokens_T: Tensor, before: Run, arguments: argparse.Namespace) -> Iterator[Run]:
    """Train for `--steps`, or for `--minutes` if they end first; either way the rate has come down by then.

    Yields what was done when it is time to save, and once at the end.
    """
    device = next(model.parameters()).device
    rows, context, seed = arguments.rows, arguments.context, arguments.seed + 2 * before.num_runs
    short = batches(tokens_T, num_rows=rows, context=context, seed=seed)
    long = batches(tokens_T, num_rows=max(1, rows // LONG_FACTOR), context=context * LONG_FACTOR, seed=seed + 1)
    stepping = optimizers(model)
    num_steps, num_tokens, smoothed, share, num_saved = 0, 0, float("nan"), 0.0, 0
    since = time.monotonic()
    with tqdm(total=arguments.steps, desc="training", unit="step", mininterval=5.0) as progress:
        while share < 1.0:
            inputs, targets = next(long if num_steps % LONG_EVERY == LONG_EVERY - 1 else short)
            loss = loss_of(model, inputs.to(device), targets.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in stepping:
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * rate_at(share)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            num_steps, num_tokens, nats = num_steps + 1, num_tokens + inputs.numel(), float(loss.detach())
            smoothed = nats if math.isnan(smoothed) else 0.95 * smoothed + 0.05 * nats
            progress.set_postfix(loss=f"{smoothed:.3f}", done=f"{share:.0%}", refresh=False)
            progress.update()
            minutes = (time.monotonic() - since) / 60
            share = max(num_steps / arguments.steps, minutes / arguments.minutes)
            if share >= 1.0 or minutes // arguments.save_minutes > num_saved:
                num_saved = int(minutes // arguments.save_minutes)
                yield Run(
                    num_runs=before.num_runs + 1,
                    num_steps=before.num_steps + num_steps,
                    num_tokens=before.num_tokens + num_tokens,
                    minutes=before.minutes + minutes,
                )


# ---------------------------------------------------------------------------------------------------------- the folder


def write_tokenizer(out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Written by hand: what the library saves differs between its versions, and each version reads this."""
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    markers = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": SHAPE["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            **markers,
            "additional_special_tokens": [token for token in SPECIAL_TOKENS if token not in markers.values()],
            "added_tokens_decoder": {
                str(token_id): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token_id, token in enumerate(SPECIAL_TOKENS)
            },
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(out / "special_tokens_map.json", markers)


def write_model(out: Path, model: LlamaForCausalLM, run: Run) -> None:
    """Weights in bf16; the output head is the embedding and is not stored twice."""
    _write_json(out / "config.json", SHAPE)
    _write_json(
        out / "generation_config.json",
        {key: SHAPE[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        | {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    )
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    half_written = out / "model.safetensors.part"
    save_file(weights, half_written, metadata={"format": "pt", "training": json.dumps(asdict(run))})
    half_written.chmod(0o644)  # it is made readable to its owner alone, and would be installed so
    half_written.replace(out / "model.safetensors")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def continuations(out: Path) -> str:
    """What the folder says when loaded as anyone would load it: five greedy prompts and four chats."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    prompts = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"])
    told = [model.generate(ids, max_new_tokens=60, do_sample=False, temperature=None, top_p=None) for ids in prompts]
    return "\n\n".join(str(tokenizer.decode(ids[0])) for ids in told)


def write_card(out: Path, arguments: argparse.Namespace, train: Split, held: Split, run: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(arguments.device)
    loss = held_out_loss(model, held.tokens_T)
    device = "a CPU" if arguments.device == "cpu" else torch.cuda.get_device_name()
    template = (Path(__file__).parent / "default_model_card.md").read_text(encoding="utf-8")
    card = template.format(
        millions=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        layers=SHAPE["num_hidden_layers"],
        width=SHAPE["hidden_size"],
        mlp=SHAPE["intermediate_size"],
        heads=SHAPE["num_attention_heads"],
        kv_heads=SHAPE["num_key_value_heads"],
        head=SHAPE["head_dim"],
        vocabulary=SHAPE["vocab_size"],
        positions=SHAPE["max_position_embeddings"],
        python=".".join(map(str, sys.version_info[:2])),
        train=train,
        held=held,
        train_tokens=len(train.tokens_T),
        held_tokens=len(held.tokens_T),
        run=run,
        step_tokens=arguments.rows * arguments.context,
        passes=run.num_tokens / len(train.tokens_T),
        context=arguments.context,
        long_every=LONG_EVERY,
        long_context=arguments.context * LONG_FACTOR,
        matrix_rate=MATRIX_RATE,
        embedding_rate=EMBEDDING_RATE,
        seed=arguments.seed,
        device=device,
        loss=loss,
        perplexity=math.exp(loss),
        bits=loss / math.log(2) * len(held.tokens_T) / held.num_characters,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    print(f"held out: {loss:.3f} nats per token, perplexity {math.exp(loss):.2f}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Without --docs only the standard library's own docstrings are read, a fifth of the text: enough to try"
        "\nthe script, too little for a model that answers. On Debian the sources come with `apt install python3-doc`,"
        "\nin html/_sources; in a checkout of CPython they are Doc.",
    )
    parser.add_argument("--docs", action="append", default=[], type=Path, metavar="DIR", help="folder of .rst files")
    parser.add_argument("--out", type=Path, default=Path("argosy/default_model"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="at most this many steps (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="or as many as fit (no limit)")
    parser.add_argument("--resume", action="store_true", help="begin with the weights in --out, on new batches")
    parser.add_argument("--rows", type=int, default=16, help="windows in a step (%(default)s)")
    parser.add_argument("--context", type=int, default=256, help="tokens in most windows (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of weights, order and chats (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--save-minutes", type=float, default=2.0, help="how often the folder is written (%(default)s)")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    documents = read_documents(arguments.docs)
    kept = [document for document in documents if not document.held_out]
    tokenizer = train_tokenizer(kept)
    write_tokenizer(arguments.out, tokenizer)
    seen = encode(tokenizer, kept, seed=arguments.seed)
    held = encode(tokenizer, [document for document in documents if document.held_out], seed=arguments.seed)
    print(f"{len(seen.tokens_T):,} tokens to train on, {len(held.tokens_T):,} held out", flush=True)

    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")).float()
    before = Run()
    if arguments.resume:
        model.load_state_dict(load_file(arguments.out / "model.safetensors"), strict=False)
        before = Run.of(arguments.out / "model.safetensors")
    model.to(arguments.device)
    for run in train(model, seen.tokens_T, before, arguments):
        write_model(arguments.out, model, run)
        tqdm.write(f"step {run.num_steps}: held out {held_out_loss(model, held.tokens_T[:16385]):.3f}", file=sys.stderr)
    write_card(arguments.out, arguments, seen, held, run)
    print(continuations(arguments.out))


if __name__ == "__main__":
    main()
