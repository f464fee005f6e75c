"""Our limits inside Ray Serve's own HTTP proxy, which sits in front of the application and obeys some headers.

Serve reads `x-request-timeout-seconds` and others before any replica is asked, and answers 500 when they hold no text;
its `/-/routes` tells everybody what runs. The environment variable that `ENVIRONMENT` names makes every proxy ask
`middlewares()` for what to put in front. It has to be set before Ray starts.
"""

from typing import Any, Final

from argosy.cluster.protocol.errors import RequestError
from argosy.deploy.http_limits import App, Receive, Scope, Send, check_head, refuse
from argosy.deploy.openai.errors import HttpRefusal

ENVIRONMENT: Final = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "argosy.deploy.proxy_guard:middlewares",
    # Serve runs an application in a thread of its own, so that it may block. Ours doesn't, and two threads that hand
    # each event over and fight for the interpreter cost a third of a door's time (78 -> 55 us a token, measured).
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    # Ray writes an arrow into HAProxy's configuration in the encoding of the locale: where that has none, no door opens
    "PYTHONUTF8": "1",
}
_UNBOUNDED: Final = 1 << 62  # the application knows the operator's limit of bodies


class ProxyGuard:
    """Judges heads where they arrive. Bodies are the application's affair: it stops waiting for one that trickles."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                if scope["path"].startswith("/-/") and scope["path"] != "/-/healthz":
                    raise HttpRefusal(404, "not_found", "there is nothing at this path")
                scope = {**scope, "headers": check_head(scope, _UNBOUNDED)}
            except RequestError as error:
                await refuse(error, send)
                return
        await self._app(scope, receive, send)


def middlewares() -> list[Any]:
    """What Serve's proxy puts in front of itself."""
    from starlette.middleware import Middleware  # comes with Ray Serve, which is the only one that asks

    return [Middleware(ProxyGuard)]
