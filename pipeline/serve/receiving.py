"""How much a client may send and how long it may take to: uvicorn's httptools bounds neither."""

import asyncio
from http import HTTPStatus

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pipeline.errors import RequestError
from pipeline.serve.api.exchange import MAX_BODY_BYTES
from pipeline.serve.schema import error_body

MAX_HEAD_BYTES = 64 * 1024
"""Of the request line and all headers."""
MAX_HEADERS = 100
MAX_REQUEST_BYTES = MAX_HEAD_BYTES + 2 * MAX_BODY_BYTES
"""As it comes: a body in chunks has more than its own bytes, and there may be trailers."""
RECEIVE_S = 60.0
"""For a whole request, from its first byte or, of the first one, from the connection's start."""
LINGER_S = 2.0
"""Who is refused may send for so long until it reads that; a closed port would take it away."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. What breaks a bound is refused in the API's shape, and the connection ends.

    The application's own bound, on a body, is lower: it answers in the request's dialect.
    """

    _is_in_head = True
    """Also before the first byte of a request."""
    _num_bytes = 0
    """Of the request that is coming."""
    _fault: RequestError | None = None
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Time runs at once: a connection on which nothing comes is one, too."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(RECEIVE_S, self._end_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever ended it."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """At most as much of a head at once as there may be of it."""
        room = MAX_HEAD_BYTES - self._num_bytes
        if self._is_in_head and len(data) > room:
            self._take(data[:room])
            data = data[room:]
        self._take(data)

    def on_headers_complete(self) -> None:
        """The head is there."""
        if len(self.headers) > MAX_HEADERS:
            what = f"the request has more than {MAX_HEADERS} headers"
            self._fault = RequestError(what, 431, "payload_too_large")
            raise self._fault  # to the parser, which gives up
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is there: what comes next begins another."""
        super().on_message_complete()
        self._is_in_head, self._num_bytes = True, 0
        self._stop_clock()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """In place of uvicorn's plain text."""
        self._refuse(self._fault or RequestError("this is not a request of HTTP/1.1"))

    def _take(self, data: bytes) -> None:
        if not data or self._fault or self.transport.is_closing():
            return
        self._num_bytes += len(data)
        super().data_received(data)
        if self._fault or not self._num_bytes:
            return
        if self._is_in_head and self._num_bytes >= MAX_HEAD_BYTES:
            what = f"the request's headers are larger than {MAX_HEAD_BYTES} bytes"
            self._refuse(RequestError(what, 431, "payload_too_large"))
        elif self._num_bytes > MAX_REQUEST_BYTES:
            what = f"the request is larger than {MAX_REQUEST_BYTES} bytes"
            self._refuse(RequestError(what, 413, "payload_too_large"))
        elif self._deadline is None:
            self._deadline = self.loop.call_later(RECEIVE_S, self._end_late)

    def _end_late(self) -> None:
        if self._is_answering or self.flow.read_paused:  # it is not the client who is slow
            self._deadline = self.loop.call_later(RECEIVE_S, self._end_late)
        elif not self._num_bytes:
            self.transport.close()
        else:
            what = f"the request has not come within {RECEIVE_S:g} seconds"
            self._refuse(RequestError(what, 408, "timeout"))

    @property
    def _is_answering(self) -> bool:
        """Whether a response has begun and not ended."""
        cycle = self.cycle
        return bool(cycle and cycle.response_started and not cycle.response_complete)

    def _refuse(self, fault: RequestError) -> None:
        """For good. What was answered before its request had ended is answered."""
        self._fault = fault
        self._stop_clock()
        has_answer = not self._is_in_head and self.cycle and self.cycle.response_started
        if self._is_answering or has_answer or self.transport.is_closing():
            self.transport.close()
            return
        if not self._is_in_head:
            self.cycle.disconnected = True  # the application waits for what will not come
            self.cycle.message_event.set()
        body = orjson.dumps(error_body(fault))
        status = HTTPStatus(fault.status)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.close)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
