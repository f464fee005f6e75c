"""The HTTP application: routes, who may use them, and one place where errors become answers. Knows nothing of Ray.

Every route needs a key when there are keys, unless the table says that it is public; a path that is not in the table
needs one too. Handlers raise our typed errors and know no status codes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import unquote

from argosy.cluster.protocol.config import ServerConfig
from argosy.cluster.protocol.errors import ClusterError, ServingError
from argosy.cluster.protocol.messages import StatsReply
from argosy.deploy.gateway import Gateway
from argosy.deploy.http_auth import ApiKeys
from argosy.deploy.http_io import ClientGone, HttpRequest, Responder, run_while_client_stays
from argosy.deploy.http_limits import App, LimitsMiddleware, Receive, Scope, Send
from argosy.deploy.jobs_folder import JobFolder
from argosy.deploy.jobs_service import JobService
from argosy.deploy.metrics_export import CONTENT_TYPE, EdgeMetrics, render
from argosy.deploy.openai.batches import serve_batches
from argosy.deploy.openai.chat import serve_chat
from argosy.deploy.openai.completions import serve_completions
from argosy.deploy.openai.errors import (
    HttpRefusal,
    error_body,
    error_bytes,
    error_headers,
    log_unexpected,
    status_of,
)
from argosy.deploy.openai.files import serve_files
from argosy.deploy.openai.serving import encode
from argosy.deploy.openai.tokenization import serve_detokenize, serve_tokenize

FILES: Final = "/v1/files"
BATCHES: Final = "/v1/batches"
HEALTH_SECONDS: Final = 1.0  # how old the engine's figures may be that health is judged by
HEALTH_DEADLINE_SECONDS: Final = 3.0
_NOT_YET: Final = {  # paths of OpenAI's and vLLM's, and what they are for
    "/embeddings": "embeddings",
    "/responses": "responses of OpenAI's newer kind",
    "/messages": "messages of Anthropic's kind",
    "/score": "scores",
    "/rerank": "rankings",
    "/pooling": "poolings",
    "/classify": "classes",
    "/images/generations": "images",
    "/audio/transcriptions": "transcriptions",
    "/audio/speech": "voices",
    "/moderations": "moderations",
    "/load_lora_adapter": "LoRA adapters",
    "/unload_lora_adapter": "LoRA adapters",
}

Ask: TypeAlias = Callable[[HttpRequest, Responder], Awaitable[None]]
Work: TypeAlias = Callable[[Gateway, Mapping[str, Any], HttpRequest, Responder], Awaitable[None]]


class Route(NamedTuple):
    """One row of the routing table: `ask` answers a GET at once, `work` takes the JSON of a POST, `act` does all."""

    name: str  # also its label in metrics
    ask: Ask | None = None
    work: Work | None = None
    public: bool = False
    act: Ask | None = None  # looks at the method itself


def _nothing_at(path: str, known: Iterable[str]) -> str:
    """What is wrong with a path: what we lack is not a slip of the pen; one /v1 too few or a slash at the end is."""
    path = f"/{path.strip('/')}"
    if what := _NOT_YET.get(path.removeprefix("/v1").removeprefix("/v2")):
        return f"{what} are not served yet; this server continues texts (/v1/completions, /v1/chat/completions)"
    near = [one for one in (path, f"/v1{path}", path.removeprefix("/v1")) if one in known]
    return f"there is nothing at this path; {f'did you mean {near[0]}?' if near else 'see /v1/models and the README'}"


class HttpApp:
    """The ASGI application behind the limits."""

    def __init__(
        self,
        gateway: Gateway,
        server: ServerConfig,
        *,
        door: str = "",
        sends_ids: bool = True,
    ):
        self.gateway = gateway
        self.metrics = EdgeMetrics(door)
        self._sends_ids = sends_ids
        self.num_working = 0  # requests that the engine works for
        self._keys = ApiKeys.read(server.api_keys_file)
        self._engine = _EngineFigures(gateway)
        self._started = int(time.time())
        self.routes: dict[str, Route] = {
            "/v1/completions": Route("completions", work=serve_completions),
            "/v1/chat/completions": Route("chat_completions", work=serve_chat),
            "/v1/models": Route("models", ask=self._models),
            "/tokenize": Route("tokenize", work=serve_tokenize),
            "/detokenize": Route("detokenize", work=serve_detokenize),
            "/health": Route("health", ask=self._health, public=True),
            "/ping": Route("ping", ask=self._health, work=None, public=True),
            "/version": Route("version", ask=self._version),
            "/metrics": Route("metrics", ask=self._metrics),
        }
        self._one_model = Route("model", ask=self._one)
        self.jobs = self._open_jobs(server.job_dir)
        self._files, self._batches = Route("files", act=self._serve_files), Route("batches", act=self._serve_batches)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        request = HttpRequest(scope, receive)
        responder = Responder(send, request.request_id if self._sends_ids else "")
        route = self._find(request.path)
        self.metrics.in_flight += 1
        try:
            await self._serve(route, request, responder)
        except ClientGone:
            self.metrics.disconnects += 1
        except asyncio.CancelledError:  # how Ray Serve says that the client has left
            self.metrics.disconnects += 1
            raise
        except Exception as error:  # the top of the loop: whatever happens, the client gets an answer
            await self._answer_error(error, request, responder)
        finally:
            self.metrics.in_flight -= 1
            self.metrics.answered(route.name if route is not None else "other", responder.status)

    def _find(self, path: str) -> Route | None:
        if path == FILES or path.startswith(f"{FILES}/"):
            return self._files
        if path == BATCHES or path.startswith(f"{BATCHES}/"):
            return self._batches
        return self.routes.get(path) or (self._one_model if path.startswith("/v1/models/") else None)

    async def _serve(self, route: Route | None, request: HttpRequest, responder: Responder) -> None:
        if route is None or not route.public:
            request.tenant = self._keys.tenant_of(request.headers.get(b"authorization"))
        if route is None:
            raise HttpRefusal(404, "not_found", _nothing_at(request.path, self.routes))
        ask, work = route.ask, route.work
        if route.act is not None:
            await route.act(request, responder)
        elif ask is not None and request.method in ("GET", "HEAD"):
            await ask(request, responder)
        elif work is not None and request.method == "POST":
            body = await request.json()
            self.num_working += 1
            try:
                if not await run_while_client_stays(
                    lambda: work(self.gateway, body, request, responder), request, responder
                ):
                    self.metrics.disconnects += 1
            finally:
                self.num_working -= 1
        else:
            allowed = "GET" if ask is not None else "POST"
            responder.add_header(b"allow", allowed.encode())
            raise HttpRefusal(405, "method_not_allowed", f"this path takes {allowed} only")

    async def _answer_error(self, error: Exception, request: HttpRequest, responder: Responder) -> None:
        log_unexpected(error, request.request_id)
        if responder.ended:
            return
        if responder.started:
            # no [DONE] follows: a stream counts as whole only with it, so the client can tell
            self.metrics.broken_streams += 1
            await responder.events(b"data: " + encode(error_body(error, request.request_id)) + b"\n\n")
            await responder.end()
            return
        for name, value in error_headers(error):
            responder.add_header(name, value)
        unread = request.method == "POST" and not request.body_was_read
        await responder.whole(error_bytes(error, request.request_id), status=status_of(error), close=unread)

    # --------------------------------------------------------------------------------------------------------- jobs

    def _open_jobs(self, folder: str | None) -> JobService | None:
        """The jobs in a folder."""
        if folder is None:
            return None
        works = self.job_works()
        return JobService(JobFolder(folder), self.gateway, works, num_interactive=lambda: self.num_working)

    def job_works(self) -> dict[str, Work]:
        """Where a job's items may go: every door below /v1 that takes JSON."""
        return {path: route.work for path, route in self.routes.items() if route.work and path.startswith("/v1/")}

    async def _serve_files(self, request: HttpRequest, responder: Responder) -> None:
        await serve_files(self._jobs(), request.path.removeprefix(FILES), request, responder)

    async def _serve_batches(self, request: HttpRequest, responder: Responder) -> None:
        await serve_batches(self._jobs(), request.path.removeprefix(BATCHES), request, responder)

    def _jobs(self) -> JobService:
        if self.jobs is None:
            raise HttpRefusal(404, "no_jobs", "this server keeps no jobs; start it with --job-dir FOLDER")
        return self.jobs

    async def _live(self, receive: Receive, send: Send) -> None:
        """The application's own start and end, as uvicorn and Ray Serve announce them."""
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.startup":
                await self.gateway.start_templates()
                if self.jobs is not None:
                    self.jobs.start()
            else:
                if self.jobs is not None:
                    await self.jobs.stop()
                await self.gateway.stop_templates()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    # ------------------------------------------------------------------------------------------------ small answers

    async def _models(self, request: HttpRequest, responder: Responder) -> None:
        await responder.json({"object": "list", "data": [self._card(name) for name in self.gateway.model_names]})

    async def _one(self, request: HttpRequest, responder: Responder) -> None:
        await responder.json(self._card(self.gateway.check_model(unquote(request.path.removeprefix("/v1/models/")))))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "argosy",
            "root": self.gateway.model_names[0],
            "parent": None,
            "max_model_len": self.gateway.info.max_model_len,
            "permission": [],
        }

    async def _health(self, request: HttpRequest, responder: Responder) -> None:
        stats = await self._engine.read()
        healthy = stats is not None and stats.healthy
        status = stats.status if stats is not None else "no answer from the engine"
        if not healthy:
            responder.add_header(b"retry-after", b"1")
        await responder.json(
            {
                "status": status,
                "healthy": healthy,
                "step_id": stats.step_id if stats is not None else -1,
                "seconds_since_progress": round(stats.seconds_since_progress, 3) if stats is not None else None,
            },
            status=200 if healthy else 503,
        )

    async def _version(self, request: HttpRequest, responder: Responder) -> None:
        await responder.json({"version": _package_version()})

    async def _metrics(self, request: HttpRequest, responder: Responder) -> None:
        text = render(await self._engine.read(), self.metrics, self.gateway.model_names[0])
        await responder.whole(text, content_type=(b"content-type", CONTENT_TYPE))


class _EngineFigures:
    """The engine's figures, asked for at most once a second however many ask us, and never waited for too long."""

    def __init__(self, gateway: Gateway):
        self._gateway = gateway
        self._last: StatsReply | None = None
        self._read_at = float("-inf")
        self._asking: asyncio.Task[StatsReply | None] | None = None

    async def read(self) -> StatsReply | None:
        """The figures, or None when the engine does not answer."""
        if self._gateway.client.closed:
            return None
        if time.monotonic() - self._read_at < HEALTH_SECONDS:
            return self._last
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> StatsReply | None:
        try:
            async with asyncio.timeout(HEALTH_DEADLINE_SECONDS):
                self._last = await self._gateway.client.stats()
        except (TimeoutError, ClusterError, ServingError, OSError):
            self._last = None
        finally:
            self._read_at = time.monotonic()
            self._asking = None
        return self._last


def build_http_app(gateway: Gateway, server: ServerConfig, *, door: str = "", sends_ids: bool = True) -> App:
    """The application with the limits in front of it, ready for uvicorn or Ray Serve. `door`: of several, its name.

    Without `sends_ids` answers carry no x-request-id: Ray Serve adds it, and clients read two as "id, id".
    """
    return LimitsMiddleware(
        HttpApp(gateway, server, door=door, sends_ids=sends_ids),
        max_body_bytes=server.max_body_bytes,
        max_upload_bytes=server.max_upload_bytes,
        upload_path=FILES,
    )


def _package_version() -> str:
    try:
        return version("argosy")
    except PackageNotFoundError:
        return "unknown"
