"""How many items run at once, at which priority, and what becomes of an item when the engine refuses or goes."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

import argosy
from argosy.cluster.protocol.config import ServingConfig
from argosy.cluster.protocol.sampling import FinishReason
from argosy.cluster.request import BATCH_PRIORITY
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_app import HttpApp, build_http_app
from argosy.deploy.jobs_folder import JobFolder
from argosy.deploy.jobs_items import GatewayItems
from argosy.deploy.jobs_journal import Journal
from argosy.deploy.jobs_rows import ClaimedItem, Ended, JobRow
from argosy.deploy.scripted_engine import ScriptedClient, Submitted, delta, tokens_script
from argosy.deploy.tokenizer import Tokenizer

MODEL = Path(argosy.__file__).parent / "default_model"
TOKENIZER = Tokenizer.load(MODEL)
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi", "max_tokens": 2}}


def make(client: ScriptedClient, folder: Path, **options: Any) -> tuple[GatewayItems, JobRow]:
    """Items of one job with one line."""
    config = ServingConfig.from_mapping({"model": str(MODEL), "served_model_name": "tiny"})
    gateway = Gateway(client, TOKENIZER, config)
    place = JobFolder(folder)
    items = GatewayItems(gateway, HttpApp(gateway, config.server).job_works(), place, **options)
    place.file("file-1").write_bytes(json.dumps(LINE).encode())
    journal = Journal(place, clock=lambda: 1.0)
    job = journal.create_job(
        "",
        endpoint="/v1/completions",
        served=["tiny"],
        input_file_id="file-1",
        completion_window="1h",
        window_seconds=9,
    )
    return items, job


def run(items: GatewayItems, job: JobRow) -> Ended:
    item = ClaimedItem(1, "a", 0, len(json.dumps(LINE)), 1)
    return asyncio.run(asyncio.wait_for(items.run(job, item), 20))


def test_an_item_is_answered_behind_people(tmp_path: Path) -> None:
    """The engine sees the priority of jobs; the line holds what HTTP would have answered."""
    client = ScriptedClient(tokens_script(TOKENIZER.encode(" there is", add_special_tokens=False)))
    items, job = make(client, tmp_path)
    ended = run(items, job)
    assert client.submitted[0].priority == BATCH_PRIORITY
    assert ended.is_done
    assert ended.result is not None
    line = json.loads(ended.result)
    assert (line["custom_id"], line["response"]["status_code"], line["error"]) == ("a", 200, None)
    assert line["response"]["body"]["choices"][0]["text"] == " there is"


def test_items_that_are_taken_up_together_are_asked_together(tmp_path: Path) -> None:
    """All in one pass of the event loop, so that the engine's first step holds them all."""

    class Together(ScriptedClient):
        def submit(self, *args: Any, **more: Any) -> Any:
            asyncio.get_running_loop().call_soon(lambda: ends.append(len(self.submitted)))
            return super().submit(*args, **more)

    ends: list[int] = []
    client = Together()
    items, job = make(client, tmp_path)
    item = ClaimedItem(1, "a", 0, len(json.dumps(LINE)), 1)

    async def work() -> None:
        await asyncio.gather(*(items.run(job, item) for _ in range(9)))

    asyncio.run(asyncio.wait_for(work(), 20))
    assert ends == [9] * 9, "when the first pass ended all nine had been asked"


def test_seats_leave_room_for_people_and_vanish_with_the_engine(tmp_path: Path) -> None:
    """Seven eighths of a step, less who is being served; all and a few more when nobody else can come."""
    client, people = ScriptedClient(max_num_seqs=64), 0
    items, _ = make(client, tmp_path, num_interactive=lambda: people)
    assert items.num_seats() == 56
    people = 50
    assert items.num_seats() == 6
    people = 500
    assert items.num_seats() == 1
    client.closed = True
    assert items.num_seats() == 0
    assert make(ScriptedClient(max_num_seqs=64), tmp_path, is_alone=True)[0].num_seats() == 80
    assert make(ScriptedClient(max_num_seqs=1), tmp_path)[0].num_seats() == 1


def test_what_the_engine_can_not_do_now_is_done_later(tmp_path: Path) -> None:
    """A full queue costs nothing, a loss costs a try, and after either the items wait a little."""
    for code, status, is_innocent in (("overloaded", 503, True), ("request_lost", 500, False), ("aborted", 499, False)):

        def script(asked: Submitted, code: str = code, status: int = status) -> list[list[Any]]:
            more = {"error_code": code, "error_message": "no", "error_status": status}
            return [[delta(finish_reason=FinishReason.ERROR, **more)]]

        items, job = make(ScriptedClient(script), tmp_path / code)
        ended = run(items, job)
        assert (ended.result, ended.is_innocent) == (None, is_innocent), code
        assert items.num_seats() == 0


def test_a_mistake_of_ours_gives_an_error_line_without_the_prompt(tmp_path: Path) -> None:
    """Whatever happens to an item, it gets its line."""

    def script(asked: Submitted) -> list[list[Any]]:
        raise RuntimeError("Hi is a prompt")

    items, job = make(ScriptedClient(script), tmp_path)
    ended = run(items, job)
    assert not ended.is_done
    assert ended.result is not None
    line = json.loads(ended.result)
    assert line["response"]["status_code"] == 500
    assert "Hi is" not in str(line)


def test_each_key_has_files_and_jobs_of_its_own(tmp_path: Path) -> None:
    """Another tenant's ids are as unknown as made-up ones; without a key nothing is told; without a folder, why."""
    keys = tmp_path / "keys"
    keys.write_text("sk-the-first\nsk-the-second\n")
    settings = {"model": str(MODEL), "served_model_name": "tiny", "api_keys_file": str(keys)}

    def app(**more: Any) -> Any:
        config = ServingConfig.from_mapping({**settings, **more})
        return build_http_app(Gateway(ScriptedClient(), TOKENIZER, config), config.server)

    async def main() -> None:
        transport = httpx.ASGITransport(app=app(job_dir=str(tmp_path / "jobs")))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            one, two = ({"authorization": f"Bearer sk-the-{name}"} for name in ("first", "second"))
            form: dict[str, Any] = {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch"}}
            file = (await http.post("/v1/files", headers=one, **form)).json()["id"]
            body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
            job = (await http.post("/v1/batches", headers=one, json=body)).json()["id"]
            assert (await http.post("/v1/batches", headers=two, json=body)).json()["error"]["param"] == "input_file_id"
            for method, path in (
                ("GET", f"/v1/files/{file}"),
                ("GET", f"/v1/files/{file}/content"),
                ("DELETE", f"/v1/files/{file}"),
                ("GET", f"/v1/batches/{job}"),
                ("GET", f"/v1/batches/{job}/results"),
                ("POST", f"/v1/batches/{job}/cancel"),
                ("POST", f"/v1/batches/{job}/resume"),
            ):
                assert (await http.request(method, path, headers=two)).status_code == 404, path
                assert (await http.request(method, path)).status_code == 401, path
            for path in ("/v1/files", "/v1/batches"):
                assert len((await http.get(path, headers=one)).json()["data"]) == 1
                assert (await http.get(path, headers=two)).json()["data"] == []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app()), base_url="http://test") as http:
            told = await http.get("/v1/files", headers=one)
            assert (told.status_code, told.json()["error"]["code"]) == (404, "no_jobs")

    asyncio.run(asyncio.wait_for(main(), 30))
