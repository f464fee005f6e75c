"""Write what `gpu/check_families.py` found on a card into docs/models.md: the newest line of each model and row count.

python benchmarks/families/slices_table.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
FOUND = ROOT / "benchmarks" / "results" / "families_h200.jsonl"
START, END = "<!-- slices: written by benchmarks/families/slices_table.py -->", "<!-- end of slices -->"
ROWS = (1, 8, 64)
NAMES = {
    "llama-405b": "Llama 3.1 405B", "mixtral": "Mixtral 8x7B", "mixtral-awq": "Mixtral 8x7B, AWQ",
    "qwen3-30b": "Qwen3-30B-A3B", "qwen3-30b-awq": "Qwen3-30B-A3B, AWQ",
    "qwen3-30b-gptq": "Qwen3-30B-A3B, GPTQ with `desc_act`", "deepseek-r1": "DeepSeek-R1 in 16 bits",
    "deepseek-r1-fp8": "DeepSeek-R1, FP8 as published", "gpt-oss": "gpt-oss-120b in 16 bits",
    "gpt-oss-mxfp4": "gpt-oss-120b, MXFP4 as published", "gemma3-27b": "Gemma 3 27B", "command-r": "Command-R",
    "falcon-40b": "Falcon 40B", "bloom-7b": "BLOOM 7B", "gemma2-27b": "Gemma 2 27B", "phi-4": "Phi-4",
    "gpt-neox-20b": "GPT-NeoX-20B", "gpt-j-6b": "GPT-J 6B", "opt-30b": "OPT 30B", "gpt2-xl": "GPT-2 XL",
    "starcoder2-15b": "StarCoder2 15B", "olmo2-32b": "OLMo 2 32B", "granite-8b": "Granite 3.1 8B",
    "qwen2-57b-a14b": "Qwen2-57B-A14B",
}  # fmt: skip


def main() -> None:
    """Read, print, write."""
    table = "\n".join(lines(map(json.loads, FOUND.read_text(encoding="utf-8").splitlines())))
    print(table)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")


def lines(found: Any) -> list[str]:
    """The table's."""
    checks: dict[str, dict[str, Any]] = {}
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    for row in found:
        if "worst_relative_error" in row:
            checks[row["model"]] = row
        elif "step_ms" in row:
            steps[row["model"], row["rows"]] = row
    times = " | ".join(f"{count} row{'s' * (count > 1)}" for count in ROWS)
    made = [f"| slice | error | plain torch | {times} |", f"|---|---|---|{'---|' * len(ROWS)}"]
    for model, name in NAMES.items():
        if model not in checks:
            continue
        check = checks[model]
        plain = f"{check['plain_torch']:.1%}" if "plain_torch" in check else ""
        cells = []
        for count in ROWS:
            step = steps.get((model, count))
            share = None if step is None else step.get("limit", step["weights"])
            cells.append("" if step is None else f"{step['ms_a_layer']:.3f} ms ({share:.0%})")
        title = f"{name}, {check['layers']} layers"
        made.append(f"| {title} | {check['worst_relative_error']:.1%} | {plain} | {' | '.join(cells)} |")
    return made


if __name__ == "__main__":
    main()
