"""Write a small Llama as the checkpoints that others publish: GPTQ with act-order, AWQ, and rounded to the nearest.

    python benchmarks/quality/write_quantized.py argosy/default_model OUT --text docs/*.md

Makes OUT/gptq, OUT/awq and OUT/packed (compressed-tensors), 4 bits with groups of `--group` inputs, OUT/gptq-8 likewise
in 8, and OUT/int8 (compressed-tensors) and OUT/bitsandbytes, 8 bits with a scale a row. The methods are
those of the papers in their plainest form, on the CPU and in float32: GPTQ (arXiv 2210.17323) rounds column after
column, those of the largest inputs first, and lets the columns to come make up for each error; AWQ (arXiv 2306.00978)
makes the inputs that matter larger before it rounds, by powers of their mean size, and what stands before them smaller.
The words are laid out here by the formats' descriptions, not by the code that reads them.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

BITS = 4  # of what is being written
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight neighbours a word holds, from its lowest bits on
TOKENS, WINDOW = 16384, 512  # of text that inputs are taken from
INPUTS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
          ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
Grid = tuple[Tensor, Tensor]  # scales and zeros of some columns, [O, 1] each


def top() -> int:
    """The largest number."""
    return (1 << BITS) - 1


def grid(weight_OC: Tensor, *, symmetric: bool) -> Grid:
    """Steps that reach from the least to the largest number of each row; the zero is a whole number."""
    if symmetric:
        scale = weight_OC.abs().amax(1, keepdim=True).clamp(min=1e-8) * 2 / top()
        return scale.half().float(), torch.full_like(scale, float(1 << (BITS - 1)))
    low, high = weight_OC.amin(1, keepdim=True).clamp(max=0), weight_OC.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top()).clamp(min=1e-8).half().float()
    return scale, (-low / scale).round().clamp(0, top())


def to_grid(weight_OC: Tensor, steps: Grid) -> Tensor:
    """The nearest numbers, 0 to `top`."""
    scale, zero = steps
    return (weight_OC / scale + zero).round().clamp(0, top())


class Rounded:
    """Numbers [O, I], scales and zeros [O, G], and the group of each input."""

    def __init__(self, weight_OI: Tensor, group: int):
        rows, columns = weight_OI.shape
        self.numbers_OI = torch.zeros(rows, columns)
        self.scale_OG, self.zero_OG = torch.ones(rows, columns // group), torch.zeros(rows, columns // group)
        self.group_I = torch.arange(columns) // group

    @property
    def plain(self) -> Tensor:
        """What it means."""
        return (self.numbers_OI - self.zero_OG[:, self.group_I]) * self.scale_OG[:, self.group_I]


def nearest(weight_OI: Tensor, group: int, *, symmetric: bool) -> Rounded:
    """Each number to the nearest."""
    made = Rounded(weight_OI, group)
    for place in range(weight_OI.shape[1] // group):
        columns = slice(place * group, (place + 1) * group)
        steps = grid(weight_OI[:, columns], symmetric=symmetric)
        made.numbers_OI[:, columns] = to_grid(weight_OI[:, columns], steps)
        made.scale_OG[:, place], made.zero_OG[:, place] = steps[0][:, 0], steps[1][:, 0]
    return made


def gptq(weight_OI: Tensor, products_II: Tensor, group: int) -> Rounded:
    """With the products of the inputs (X^T X), columns in the order of how large their inputs are."""
    made = Rounded(weight_OI, group)
    size = products_II.diagonal()
    order = torch.argsort(size, descending=True)
    damped = products_II + 0.01 * size.mean().clamp(min=1e-8) * torch.eye(len(order))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order].double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight_OI[:, order].clone()
    for place in range(len(order)):
        number, input_ = place // group, int(order[place])
        if place % group == 0:
            scale, zero = grid(left[:, place : place + group], symmetric=True)
            made.scale_OG[:, number], made.zero_OG[:, number] = scale[:, 0], zero[:, 0]
        steps = (made.scale_OG[:, number : number + 1], made.zero_OG[:, number : number + 1])
        column = left[:, place : place + 1]
        found = to_grid(column, steps)
        made.numbers_OI[:, input_], made.group_I[input_] = found[:, 0], number
        error = (column - (found - steps[1]) * steps[0]) / upper[place, place]
        left[:, place + 1 :] -= error * upper[place : place + 1, place + 1 :]
    return made


def words(numbers: Tensor, axis: int, order: list[int] | None = None) -> Tensor:
    """int32 words of neighbours along `axis`, the first (or the first of `order`) in the lowest bits."""
    per_word = 32 // BITS
    together = numbers.movedim(axis, -1).long().unflatten(-1, (-1, per_word))
    together = together if order is None else together[..., order]
    packed = sum(together[..., place] << (BITS * place) for place in range(per_word))
    assert isinstance(packed, Tensor)
    return (packed & 0xFFFFFFFF).to(torch.uint32).view(torch.int32).movedim(-1, axis).contiguous()


def as_gptq(made: Rounded) -> dict[str, Tensor]:
    """Zeros are stored less one."""
    return {
        "qweight": words(made.numbers_OI.t(), 0), "qzeros": words(made.zero_OG.t() - 1, 1),
        "scales": made.scale_OG.t().half().contiguous(), "g_idx": made.group_I.to(torch.int32),
    }  # fmt: skip


def as_awq(made: Rounded) -> dict[str, Tensor]:
    """Words along the outputs, in AWQ's order."""
    return {
        "qweight": words(made.numbers_OI.t(), 1, AWQ_ORDER), "qzeros": words(made.zero_OG.t(), 1, AWQ_ORDER),
        "scales": made.scale_OG.t().half().contiguous(),
    }  # fmt: skip


def as_packed(made: Rounded) -> dict[str, Tensor]:
    """compressed-tensors, with the zero in the middle."""
    return {
        "weight_packed": words(made.numbers_OI, 1), "weight_scale": made.scale_OG.bfloat16(),
        "weight_shape": torch.tensor(made.numbers_OI.shape),
    }  # fmt: skip


def as_int8(made: Rounded) -> dict[str, Tensor]:
    """compressed-tensors, a scale for each row."""
    return {"weight": (made.numbers_OI - 128).to(torch.int8), "weight_scale": made.scale_OG.bfloat16()}


def as_bitsandbytes(made: Rounded) -> dict[str, Tensor]:
    """With 127 steps a row, as many as its largest number."""
    return {
        "weight": (made.numbers_OI - 128).to(torch.int8), "SCB": made.scale_OG[:, 0] * 127,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }  # fmt: skip


class Calibrated:
    """A model in float32, and the inputs of its products on some text."""

    def __init__(self, folder: Path, ids: Tensor):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()
        self.ids = ids

    @property
    def layers(self) -> Any:
        """Of the decoder."""
        return self.model.model.layers

    @torch.inference_mode()
    def inputs_of(self, module: nn.Module) -> Tensor:
        """[T, I] of a linear layer as the model is now."""
        seen: list[Tensor] = []
        hook = module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, 1)))
        for window in self.ids.split(8):
            self.model(window)
        hook.remove()
        return torch.cat(seen)


def quantize_gptq(source: Calibrated, group: int) -> dict[str, Rounded]:
    """Layer after layer, on the inputs that the rounded layers before give."""
    made = {}
    for place, layer in enumerate(source.layers):
        for names in INPUTS:
            x_TI = source.inputs_of(layer.get_submodule(names[0]))
            for name in names:
                module = layer.get_submodule(name)
                found = gptq(module.weight.data, x_TI.t() @ x_TI, group)
                module.weight.data = found.plain
                made[f"model.layers.{place}.{name}"] = found
    return made


def quantize_awq(source: Calibrated, group: int) -> dict[str, Rounded]:
    """Norms take up what their products' inputs are made larger by; for down, the rows of up do."""
    made = {}
    for place, layer in enumerate(source.layers):
        before = (layer.input_layernorm.weight, None, layer.post_attention_layernorm.weight, layer.mlp.up_proj.weight)
        for names, former in zip(INPUTS, before, strict=True):
            modules = [layer.get_submodule(name) for name in names]
            if former is not None:
                factor_I = _best_factor(source.inputs_of(modules[0]), [m.weight.data for m in modules], group)
                former.data /= factor_I if former.ndim == 1 else factor_I[:, None]
                for module in modules:
                    module.weight.data *= factor_I
        for names in INPUTS:
            for name in names:
                module = layer.get_submodule(name)
                found = nearest(module.weight.data, group, symmetric=False)
                module.weight.data = found.plain
                made[f"model.layers.{place}.{name}"] = found
    return made


def _best_factor(x_TI: Tensor, weights: list[Tensor], group: int) -> Tensor:
    """Powers of the inputs' mean sizes: the one with which the products change least."""
    size_I, sample_TI = x_TI.abs().mean(0).clamp(min=1e-6), x_TI[:: max(1, len(x_TI) // 1024)]
    found: list[tuple[float, Tensor]] = []
    for step in range(20):
        factor_I = size_I ** (step / 20)
        factor_I = factor_I / (factor_I.max() * factor_I.min()).sqrt()
        error = 0.0
        for weight_OI in weights:
            rounded = nearest(weight_OI * factor_I, group, symmetric=False).plain / factor_I
            error += float((sample_TI @ (rounded - weight_OI).t()).square().mean())
        found.append((error, factor_I))
    return min(found, key=lambda pair: pair[0])[1]


def quantize_nearest(source: Calibrated, group: int) -> dict[str, Rounded]:
    """What the others are compared with."""
    return {
        f"model.layers.{place}.{name}": nearest(layer.get_submodule(name).weight.data, group, symmetric=True)
        for place, layer in enumerate(source.layers) for names in INPUTS for name in names
    }  # fmt: skip


def quantize_rows(source: Calibrated, group: int) -> dict[str, Rounded]:
    """A scale for each row; zero in the middle, and the largest number 127 steps from it."""
    found = {}
    for place, layer in enumerate(source.layers):
        for name in (name for names in INPUTS for name in names):
            weight_OI = layer.get_submodule(name).weight.data
            made = Rounded(weight_OI, weight_OI.shape[1])
            made.scale_OG = (weight_OI.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127).bfloat16().float()
            made.zero_OG += 128
            made.numbers_OI = (weight_OI / made.scale_OG + 128).round().clamp(0, 255)
            found[f"model.layers.{place}.{name}"] = made
    return found


def configs(group: int) -> dict[str, dict[str, object]]:
    """What `config.json` says of each."""
    weights = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    by_row = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    gptq_config = {"quant_method": "gptq", "bits": BITS, "group_size": group, "desc_act": True, "sym": True}
    return {
        "gptq": gptq_config,
        "gptq-8": gptq_config,
        "int8": {
            "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": by_row, "input_activations": None}},
        },
        "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        "awq": {"quant_method": "awq", "bits": BITS, "group_size": group, "version": "gemm", "zero_point": True},
        "packed": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        },
    }  # fmt: skip


Make = Callable[[Calibrated, int], dict[str, Rounded]]
METHODS: dict[str, tuple[int, Make, Callable[[Rounded], dict[str, Tensor]]]] = {
    "gptq": (4, quantize_gptq, as_gptq), "awq": (4, quantize_awq, as_awq), "packed": (4, quantize_nearest, as_packed),
    "gptq-8": (8, quantize_gptq, as_gptq), "int8": (8, quantize_rows, as_int8),
    "bitsandbytes": (8, quantize_rows, as_bitsandbytes),
}  # fmt: skip


def write(folder: Path, out: Path, method: str, ids: Tensor, group: int) -> None:
    """One checkpoint: the model's own files, its weights in the format, and a config that says so."""
    global BITS  # of all that rounds and packs
    source = Calibrated(folder, ids)
    BITS, quantize, lay_out = METHODS[method]
    made = quantize(source, group)
    tied = source.model.config.tie_word_embeddings
    stored = {
        name: value.bfloat16().contiguous()
        for name, value in source.model.state_dict().items()
        if name.removesuffix(".weight") not in made and not (name == "lm_head.weight" and tied)
    }
    for name, rounded in made.items():
        stored |= {f"{name}.{word}": tensor for word, tensor in lay_out(rounded).items()}
    out.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, out / file.name)
    save_file(stored, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = configs(group)[method]
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Write all that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="what inputs are taken from")
    parser.add_argument("--group", type=int, default=16, help="must divide every product's inputs")
    parser.add_argument("--method", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    found = tokenizer("\n".join(path.read_text(encoding="utf-8") for path in args.text))["input_ids"][:TOKENS]
    ids = torch.tensor(found[: len(found) // WINDOW * WINDOW]).view(-1, WINDOW)
    for method in args.method:
        write(args.model, args.out / method, method, ids, args.group)
        print(f"{args.out / method}: {METHODS[method][0]} bits, {ids.numel()} tokens looked at", flush=True)


if __name__ == "__main__":
    main()
