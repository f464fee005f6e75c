"""A job that outlives this script and the server:  .venv/bin/python examples/a_job.py [URL]

Kill it, or the server, and run it again: the key finds the same job, and each item gets one result (docs/jobs.md).
"""

import sys

from argosy import Client

PROMPTS = [f"Example {number}: return a list of" for number in range(20)]


def main() -> None:
    """Submit, or find what an earlier run submitted; results as they come."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    with Client(url) as client:
        job = client.submit(PROMPTS, key="examples/a_job.py", max_tokens=24, temperature=0)
        print(f"job {job.id}")
        num_done = 0
        for result in job.results():
            num_done += result.is_done
            print(f"{result.custom_id}: {result.text!r}" if result.is_done else f"{result.custom_id}: {result.error}")
        print(f"{num_done} of {len(PROMPTS)} done")


if __name__ == "__main__":
    main()
