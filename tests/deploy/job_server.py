"""A server with jobs in a process of its own, to be killed: the real doors and driver, simulated ranks.

python job_server.py JOB_DIR [PORT [STEP_SECONDS]]        prints its address, and ends with its standard input
"""

import asyncio
import os
import sys
import threading
from pathlib import Path

import uvicorn

from argosy.cluster.protocol.config import ServingConfig
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_app import build_http_app
from argosy.deploy.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from test_openai_client import MODEL, engine


async def main(job_dir: str, port: int = 0, step_seconds: float = 0.002) -> None:
    given = {"model": str(MODEL), "served_model_name": "tiny", "max_model_len": 256, "max_num_seqs": 8}
    given |= {"max_num_batched_tokens": 512, "job_dir": job_dir}
    config = ServingConfig.from_mapping(given)
    async with engine(config, step_seconds=step_seconds) as client:
        app = build_http_app(Gateway(client, Tokenizer.load(MODEL), config), config.server)
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=2))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        print(f"http://{host}:{port}", flush=True)
        await serving


def end_with_owner() -> None:
    """Whoever started us has gone when our input ends."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_owner, daemon=True).start()
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:3]), *map(float, sys.argv[3:4])))
