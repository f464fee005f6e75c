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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from default_model_chats import conversations
from default_model_text import Document, read_documents, sections
from safetensors.torch import save_file
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
SHAPE: Final[dict[str, object]] = {
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


def optimizers(model: nn.Module, *, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learns more from each token here, AdamW for embedding and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


def rate_at(step: int, num_steps: int) -> float:
    """Linear warm-up over the first 2 %, then a cosine down to 2 % of the peak."""
    num_warmup = max(10, num_steps // 50)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: LlamaForCausalLM,
    tokens_T: Tensor,
    arguments: argparse.Namespace,
    save: Callable[[int], None],
) -> int:
    """Train for `--steps`, the last tenth on windows of four times the length; return how many tokens were read."""
    device = next(model.parameters()).device
    num_long = arguments.steps // 10
    short = batches(tokens_T, num_rows=arguments.rows, context=arguments.context, seed=arguments.seed)
    long_rows, long_context = max(1, arguments.rows // 4), min(arguments.context * 4, 2048)
    long = batches(tokens_T, num_rows=long_rows, context=long_context, seed=arguments.seed + 1)
    stepping = optimizers(model, learning_rate=arguments.learning_rate)
    num_read, smoothed, saved_at = 0, float("nan"), time.monotonic()
    progress = tqdm(range(arguments.steps), desc="training", unit="step", mininterval=5.0)
    for step in progress:
        inputs, targets = next(short if step < arguments.steps - num_long else long)
        loss = loss_of(model, inputs.to(device), targets.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in stepping:
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * rate_at(step, arguments.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        num_read += inputs.numel()
        nats = float(loss.detach())
        smoothed = nats if math.isnan(smoothed) else 0.95 * smoothed + 0.05 * nats
        progress.set_postfix(loss=f"{smoothed:.3f}", refresh=False)
        if time.monotonic() - saved_at > 60 * arguments.save_minutes:
            save(step + 1)
            saved_at = time.monotonic()
    return num_read


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


def write_model(out: Path, model: LlamaForCausalLM) -> None:
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
    save_file(weights, half_written, metadata={"format": "pt"})
    half_written.replace(out / "model.safetensors")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def continuations(out: Path) -> str:
    """What the folder says when loaded as anyone would load it: five greedy prompts and four chats."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    prompts = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"])
    told = [model.generate(ids, max_new_tokens=60, do_sample=False, temperature=None, top_p=None) for ids in prompts]
    return "\n\n".join(tokenizer.decode(ids[0]) for ids in told)


def write_card(
    out: Path, arguments: argparse.Namespace, train: Split, held: Split, num_read: int, since: float
) -> None:
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
        steps=arguments.steps,
        step_tokens=arguments.rows * arguments.context,
        num_read=num_read,
        passes=num_read / len(train.tokens_T),
        context=arguments.context,
        long_context=min(arguments.context * 4, 2048),
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        minutes=(time.monotonic() - since) / 60,
        threads=arguments.threads,
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
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps; 2000 take 45 minutes on two cores")
    parser.add_argument("--rows", type=int, default=8, help="windows in a step (%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="its peak (%(default)s)")
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

    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")).float().to(arguments.device)
    since = time.monotonic()

    def save(step: int) -> None:
        write_model(arguments.out, model)
        tqdm.write(f"step {step}: held out {held_out_loss(model, held.tokens_T[:16385]):.3f}", file=sys.stderr)

    num_read = train(model, seen.tokens_T, arguments, save)
    write_model(arguments.out, model)
    write_card(arguments.out, arguments, seen, held, num_read, since)
    print(continuations(arguments.out))


if __name__ == "__main__":
    main()
