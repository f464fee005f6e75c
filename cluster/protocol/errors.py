"""Every error that we raise across a process or room border.

    ServingError
        RequestError                what one caller sent; costs only that request
            InvalidRequest          a field holds a value that can't be served (HTTP 400)
            ContextTooLong          prompt and answer exceed the model's length (400)
            UnknownModel            no model of that name here (404)
            Unauthorized            no key, or not one of ours (401)
            PayloadTooLarge         more bytes than we read (413)
            Overloaded              the queue is full, come back later (503 + Retry-After)
            DeadlineExceeded        the request's own time is up (408)
            RequestAborted          its owner went away
            RequestLost             the cluster lost it more often than it may be retried (500)
        ConfigError                 a setting, refused at start
        WeightError                 a model folder: file, key, value
            UnsupportedModel        an architecture or format we don't have
        ClusterError                the machines
            PlacementImpossible     the plan does not fit what the cluster offers
            PreflightFailed         nodes that can't work together, each with what is wrong and how to mend it
            WorkerLost              a rank died
            WorkerFailed            a rank said why it can't go on
            StartupTimeout          something did not answer within its deadline
            ChannelClosed           the other side of a connection went away
    InvariantBroken                 our own mistake (an AssertionError: never caught to go on)

Errors keep their fields as `args`, so that they survive pickling (Ray) and can be rebuilt on the other side.
"""


class ServingError(Exception):
    """Base of all errors of ours that a user may see. `code` is stable, for programs."""

    code = "serving_error"
    http_status = 500


class RequestError(ServingError):
    """One request is refused or ended; no other request is touched."""

    code = "invalid_request_error"
    http_status = 400
    param: str | None = None


class InvalidRequest(RequestError):
    """A field of a request holds a value that can't be served.

    `field` is the name the user wrote, `value` what they gave (shown shortened), `fix` says what would be accepted.
    """

    def __init__(self, field: str, value: object, fix: str):
        super().__init__(field, _short(value), fix)
        self.field, self.value, self.fix = field, _short(value), fix
        self.param = field

    def __str__(self) -> str:
        return f"{self.field}={self.value}: {self.fix}"


class ContextTooLong(RequestError):
    """The prompt (and at least one new token) does not fit the model's length."""

    code = "context_length_exceeded"
    param = "prompt"

    def __init__(self, num_prompt_tokens: int, max_model_len: int, is_least: bool = False):
        super().__init__(num_prompt_tokens, max_model_len, is_least)
        self.num_prompt_tokens, self.max_model_len = num_prompt_tokens, max_model_len
        self.is_least = is_least  # a text so long that it was not tokenised: it has this many tokens or more

    def __str__(self) -> str:
        number = f"at least {self.num_prompt_tokens}" if self.is_least else str(self.num_prompt_tokens)
        return (
            f"the prompt has {number} tokens and this model takes at most {self.max_model_len}, "
            "answer included; shorten the prompt or start the server with a larger --max-model-len"
        )


class UnknownModel(RequestError):
    """The request names a model that is not served here."""

    code = "model_not_found"
    http_status = 404
    param = "model"

    def __init__(self, model: str, served: tuple[str, ...]):
        super().__init__(_short(model), tuple(served))
        self.model, self.served = _short(model), tuple(served)

    def __str__(self) -> str:
        return f"model={self.model} is not served here; this server has {', '.join(self.served)}"


class Unauthorized(RequestError):
    """No API key, or not one of ours. Says nothing of the key."""

    code = "invalid_api_key"
    http_status = 401

    def __str__(self) -> str:
        return "a valid API key is needed: send the header 'Authorization: Bearer <key>'"


class PayloadTooLarge(RequestError):
    """A part of the HTTP message is larger than we read."""

    code = "payload_too_large"
    http_status = 413

    def __init__(self, what: str, limit: int):
        super().__init__(what, limit)
        self.what, self.limit = what, limit

    def __str__(self) -> str:
        return f"the {self.what} is larger than {self.limit}; send less"


class Overloaded(RequestError):
    """The waiting queue is full. `retry_after_seconds` estimates when there will be room."""

    code = "overloaded"
    http_status = 503

    def __init__(self, num_waiting: int, retry_after_seconds: float):
        super().__init__(num_waiting, retry_after_seconds)
        self.num_waiting, self.retry_after_seconds = num_waiting, retry_after_seconds

    def __str__(self) -> str:
        return f"{self.num_waiting} requests are already waiting; try again in {self.retry_after_seconds:.0f} s"


class DeadlineExceeded(RequestError):
    """The request did not end within the time it was given."""

    code = "deadline_exceeded"
    http_status = 408

    def __init__(self, seconds: float):
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return f"the request did not end within its {self.seconds:g} s; ask for fewer tokens or allow more time"


class RequestAborted(RequestError):
    """The owner of the request went away or called it off."""

    code = "aborted"
    http_status = 499

    def __str__(self) -> str:
        return "the request was aborted by its owner"


class RequestLost(RequestError):
    """The cluster lost the request's worker more often than a request may be retried."""

    code = "request_lost"
    http_status = 500

    def __init__(self, num_recoveries: int, cause: str = ""):
        super().__init__(num_recoveries, cause)
        self.num_recoveries, self.cause = num_recoveries, cause

    def __str__(self) -> str:
        return f"the request was lost after {self.num_recoveries} recoveries{': ' + self.cause if self.cause else ''}"


class ConfigError(ServingError):
    """A setting is unknown, has the wrong type, or contradicts another one. Refused at start."""

    code = "config_error"


class WeightError(ServingError):
    """A model folder can't be served. Names the file, the key in it and what is wrong with its value."""

    code = "weight_error"

    def __init__(self, file: str, key: str, problem: str):
        super().__init__(file, key, problem)
        self.file, self.key, self.problem = file, key, problem

    def __str__(self) -> str:
        return f"{self.file}: {self.key}: {self.problem}" if self.key else f"{self.file}: {self.problem}"


class UnsupportedModel(WeightError):
    """The folder is sound, and holds an architecture or a format that we don't have."""

    code = "unsupported_model"


class ClusterError(ServingError):
    """The machines: too few, gone, or silent."""

    code = "cluster_error"
    http_status = 503


class PlacementImpossible(ClusterError):
    """What was asked for does not fit what the cluster offers; `reason` names both."""

    code = "placement_impossible"


class PreflightFailed(ClusterError):
    """What was found on the nodes before anything started; `faults` has a line each, with node and fix."""

    code = "preflight_failed"

    def __init__(self, faults: tuple[str, ...]):
        super().__init__(tuple(faults))
        self.faults = tuple(faults)

    def __str__(self) -> str:
        return "the cluster can't serve this as it is:\n" + "\n".join(f"  {fault}" for fault in self.faults)


class WorkerLost(ClusterError):
    """A rank died or stopped answering. The replica is rebuilt; its requests are recomputed."""

    code = "worker_lost"

    def __init__(self, global_rank: int, node: str, epoch: int):
        super().__init__(global_rank, node, epoch)
        self.global_rank, self.node, self.epoch = global_rank, node, epoch

    def __str__(self) -> str:
        return f"rank {self.global_rank} on {self.node} was lost in epoch {self.epoch}; see that worker's log"


class WorkerFailed(ClusterError):
    """A rank reported that it can't go on (bad weights, out of memory), with its own error's code and text."""

    code = "worker_failed"

    def __init__(self, global_rank: int, error_code: str, message: str):
        super().__init__(global_rank, error_code, message)
        self.global_rank, self.error_code, self.message = global_rank, error_code, message

    def __str__(self) -> str:
        return f"rank {self.global_rank}: {self.message}"


class StartupTimeout(ClusterError):
    """Something did not answer within its deadline; says what was waited for."""

    code = "startup_timeout"

    def __init__(self, waited_for: str, seconds: float):
        super().__init__(waited_for, seconds)
        self.waited_for, self.seconds = waited_for, seconds

    def __str__(self) -> str:
        return f"{self.waited_for} did not answer within {self.seconds:g} s"


class ChannelClosed(ClusterError):
    """The other side of a connection went away."""

    code = "channel_closed"


class InvariantBroken(AssertionError):
    """Our own mistake, with the story so far. Nothing catches it to go on."""


def _short(value: object, limit: int = 200) -> str:
    """The value as text that is safe in a log and an answer: one line, no surrogates, at most `limit` characters."""
    text: str = value if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "..."
