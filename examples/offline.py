"""Text from a script, without a server:  .venv/bin/python examples/offline.py [MODEL]

The engine runs as plain processes here (`distributed_executor_backend="mp"`); without that word it runs on Ray.
"""

import sys

from argosy import LLM, SamplingParams

PROMPTS = ["Return a list of", "The function", "A class that holds"]


def main() -> None:
    """All prompts at once, several answers to each, and how likely their words were."""
    model = sys.argv[1:2]  # a folder or a hub name; none: the model that ships with Argosy
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, n=2, max_tokens=24, logprobs=0)
    with LLM(*model, distributed_executor_backend="mp") as llm:
        for output in llm.generate(PROMPTS, params):
            for answer in output.outputs:
                likely = (answer.cumulative_logprob or 0.0) / max(len(answer.token_ids), 1)
                print(f"{likely:6.2f}  {output.prompt!r} -> {answer.text!r}")


if __name__ == "__main__":
    main()
