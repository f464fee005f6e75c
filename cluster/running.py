"""Who runs: which request has which handle, who decodes, and who still has more than one token to compute."""

from collections.abc import Iterable

from argosy.cluster.request import Request, RequestStatus


class RunningSet:
    """Requests on the ranks. A handle that was given back is named to the ranks with the next step."""

    def __init__(self, max_rows: int):
        self.by_handle: dict[int, Request] = {}
        self.decoding: list[Request] = []  # never changed in place: steps in flight hold it
        self.decode_rows: list[int] = []  # the handles of `decoding`
        self.prefilling: list[Request] = []
        self.is_stale = False  # somebody left `decoding`
        self._max_rows = max_rows
        self._free_handles = list(range(max_rows - 1, -1, -1))
        self._given_back: list[int] = []

    def __len__(self) -> int:
        return len(self.by_handle)

    @property
    def num_free(self) -> int:
        """How many more may run."""
        return len(self._free_handles)

    def take(self, request: Request) -> None:
        """The request gets a handle, and has tokens to compute."""
        request.handle = self._free_handles.pop()
        self.by_handle[request.handle] = request
        self.prefilling.append(request)

    def give_back(self, request: Request) -> None:
        """The request leaves the ranks."""
        del self.by_handle[request.handle]
        self._free_handles.append(request.handle)
        self._given_back.append(request.handle)
        request.handle = -1
        if request.is_decoding:
            self.stop_decoding(request)
        elif request in self.prefilling:
            self.prefilling.remove(request)

    def stop_decoding(self, request: Request) -> None:
        """Nothing is left to schedule for it, or it leaves."""
        request.is_decoding = False
        self.is_stale = True

    def start_decoding(self, computed: Iterable[Request]) -> None:
        """These have all their tokens computed: one token a step from now on, if more is to come."""
        joining = []
        for request in computed:
            self.prefilling.remove(request)
            request.is_decoding = not request.is_fully_scheduled
            if request.is_decoding:
                joining.append(request)
        if joining:
            self.decoding = [*self.decoding, *joining]
            self.decode_rows = [*self.decode_rows, *(request.handle for request in joining)]

    def drop_stale(self) -> None:
        """Leave out those who stopped decoding."""
        self.decoding = [request for request in self.decoding if request.is_decoding]
        self.decode_rows = [request.handle for request in self.decoding]
        self.is_stale = False

    def take_given_back(self) -> list[int]:
        """The handles that the ranks must forget with the next step."""
        given_back, self._given_back = self._given_back, []
        return given_back

    def check(self) -> None:
        """Handles, lists and statuses agree."""
        assert sorted([*self.by_handle, *self._free_handles]) == list(range(self._max_rows)), "a handle is lost"
        for handle, request in self.by_handle.items():
            assert request.handle == handle, request
            assert request.status is RequestStatus.RUNNING, request
            places = request.is_decoding + self.prefilling.count(request)
            assert places == 1 or (places == 0 and request.is_fully_scheduled), request
        if not self.is_stale:
            assert self.decode_rows == [request.handle for request in self.decoding]
            assert all(request.is_decoding for request in self.decoding)
