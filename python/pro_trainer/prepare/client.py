"""Many requests to HTTP servers at once, from synchronous code: the answers in order, every one.

A request that fails for a reason that may pass is sent again, later and to the next server. What
a busy or absent server does (429, 502, 503, 504, no connection) costs a request nothing: it waits
until one of the servers answers again, at most ``server_patience`` seconds without any. What may
be the request's own fault (another 5xx, a time-out, a broken, malformed or too large answer) is
borne ``server_retries`` times. A refusal (another 4xx, a redirect) is final.

The key is read from the environment, sent as a bearer token, and cut out of what servers say.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from pro_trainer.data.read import decode_line
from pro_trainer.prepare import answers
from pro_trainer.prepare.answers import Failed, Failure, ServerError
from pro_trainer.prepare.options import ServerOptions

Request = tuple[str, Any]  # path behind a base URL; JSON to post, None: to get
T = TypeVar("T")

LONGEST_WAIT = 60.0  # seconds between two tries, unless a server asks for more
FIRST_WAIT = 0.5  # seconds before a second try; they double from try to try
MAX_BYTES = 4 << 20  # of an answer; a longer one is not read to its end
_WINDOW = 4  # requests under way or answered ahead of their turn, for each that may run


class _Server:
    """A base URL, until when it is left out, and until when it asked to be left alone."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.failed_in_a_row = 0
        self.out_until = self.rests_until = 0.0

    def count(self, failed: bool) -> None:
        """Leave it out for a while after the third failure in a row, ever longer."""
        self.failed_in_a_row = self.failed_in_a_row + 1 if failed else 0
        if self.failed_in_a_row >= 3:
            pause = min(LONGEST_WAIT, 2.0 ** (self.failed_in_a_row - 3))
            self.out_until = time.monotonic() + pause
        elif not failed:
            self.out_until = 0.0


class Client:
    """Servers that do the same work, in turn; one that is dead is left out until it is back.

    A context manager: inside it requests run in a thread of their own.

    Attributes:
        failures: tries that failed, by reason; of a request that was answered later, too.
    """

    def __init__(self, urls: Sequence[str], options: ServerOptions | None = None) -> None:
        """Take base URLs, before all paths; ValueError for a URL or key that cannot be."""
        for url in urls:
            answers.check_url(url)
        self.options = options or ServerOptions()
        self.failures: Counter[str] = Counter()
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        self._key = answers.read_key(self.options.api_key_env)
        self._turn = 0
        self._next_start = 0.0
        self._answered = 0.0  # when any server last did
        self._good: tuple[Request, Callable] | None = None  # what it was asked

    def __enter__(self) -> Client:
        """Start the thread."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        headers = {"Accept-Encoding": "identity"}  # what is counted is what came
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._free = asyncio.Semaphore(self.options.concurrency)
        limits = httpx.Limits(max_connections=self.options.concurrency)
        connect = min(10.0, self.options.server_timeout)
        self._http = httpx.AsyncClient(
            headers=headers, limits=limits, timeout=httpx.Timeout(None, connect=connect)
        )
        return self

    def __exit__(self, *exception: object) -> None:
        """End what is under way, and the thread."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()

    def ask(
        self, requests: Iterable[Request], read: Callable[[Any], T] = lambda answer: answer
    ) -> Iterator[T | Failure]:
        """An answer for each request, in the order of the requests.

        Requests are taken from the iterable as answers are taken from here, some hundred ahead, and
        run on while the caller is busy with an answer. ``read`` makes what is yielded of the JSON
        of an answer; it raises ValueError for one that is malformed, which is asked for again.

        Raises:
            ServerError: no server answered for ``server_patience`` seconds; the key, the model or
                the path is refused (401, 403, 404); a request failed ``server_retries`` times, and
                one that was answered before is not answered any more.
        """
        pending: deque[Future[T | Failure | ServerError]] = deque()
        try:
            for request in requests:
                task = self._answer(request, read)
                pending.append(asyncio.run_coroutine_threadsafe(task, self._loop))
                if len(pending) == _WINDOW * self.options.concurrency:
                    yield _raised(pending.popleft().result())
            while pending:
                yield _raised(pending.popleft().result())
        finally:
            for future in pending:
                future.cancel()

    async def _answer(
        self, request: Request, read: Callable[[Any], T]
    ) -> T | Failure | ServerError:
        """Send a request until there is an answer or no hope."""
        # Errors are returned: of those raised in tasks that nobody waits for, asyncio complains.
        begun = time.monotonic()
        own_faults = tries = 0
        while True:
            async with self._free:
                await self._slot()
                server = self._next_server()
                await asyncio.sleep(max(0.0, server.rests_until - time.monotonic()))
                try:
                    answer = read(await self._send(server, request))
                except ValueError as error:
                    failed = Failed("malformed answer", "own", str(error))
                except Failed as error:
                    failed = error
                else:
                    server.count(failed=False)
                    self._answered, self._good = time.monotonic(), (request, read)
                    return answer
            self.failures[failed.reason] += 1
            server.count(failed=failed.kind in ("server", "both"))
            server.rests_until = max(server.rests_until, time.monotonic() + failed.wait)
            detail = answers.readable(failed.detail, self._key)
            told = f"{server.url}{request[0]}: {failed.reason}" + (f" ({detail})" if detail else "")
            if failed.kind == "all":
                return ServerError(told, for_all=True)
            if failed.kind == "final":
                self._answered = time.monotonic()
                return Failure(failed.reason, detail)
            own_faults += failed.kind in ("own", "both")
            if own_faults > self.options.server_retries:
                if await self._works():
                    return Failure(failed.reason, detail)
                return ServerError(f"{told}, {own_faults} times, and nothing else is answered")
            quiet = time.monotonic() - max(begun, self._answered)
            if quiet > self.options.server_patience:
                return ServerError(f"no answer from any server in {quiet:.0f} seconds; {told}")
            longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(tries, 16))
            tries += 1
            await asyncio.sleep(longest * random.uniform(0.5, 1))

    async def _works(self) -> bool:
        """Whether the request that was answered last is answered again."""
        for _ in range(3 if self._good else 0):
            with contextlib.suppress(ValueError, Failed):
                request, read = self._good
                read(await self._send(self._next_server(), request))
                return True
        return False

    async def _send(self, server: _Server, request: Request) -> Any:
        """One try: the JSON of the answer; Failed where there is none."""
        path, body = request

        async def answer() -> bytes:
            method = "GET" if body is None else "POST"
            async with self._http.stream(method, f"{server.url}{path}", json=body) as response:
                content = bytearray()
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > MAX_BYTES:
                        raise Failed("answer too large", "own", f"> {MAX_BYTES} B")
                if (status := response.status_code) != 200:
                    wait = answers.retry_after(response.headers.get("Retry-After", ""))
                    text = content[:2000].decode(errors="replace")
                    raise Failed(f"HTTP {status}", answers.kind_of(status), text, wait)
                return bytes(content)

        try:
            return decode_line(await asyncio.wait_for(answer(), self.options.server_timeout))
        except (asyncio.TimeoutError, httpx.TimeoutException) as error:
            kind = "server" if isinstance(error, httpx.ConnectTimeout) else "both"
            raise Failed("time-out", kind) from None
        except httpx.ConnectError as error:
            raise Failed("no connection", "server", str(error)) from None
        except httpx.HTTPError as error:
            raise Failed("broken connection", "both", str(error)) from None

    async def _slot(self) -> None:
        """Wait for this request's turn under the rate limit."""
        if rate := self.options.requests_per_second:
            now = time.monotonic()
            start = max(now, self._next_start)
            self._next_start = start + 1 / rate
            await asyncio.sleep(start - now)

    def _next_server(self) -> _Server:
        """The next one that is not left out, else the one that has been for longest."""
        n, now = len(self._servers), time.monotonic()
        turns = [self._servers[(self._turn + i) % n] for i in range(n)]
        server = min(turns, key=lambda s: max(0.0, s.out_until - now, s.rests_until - now))
        self._turn = (self._servers.index(server) + 1) % n
        return server


def _raised(answer: T | ServerError) -> T:
    if isinstance(answer, ServerError):
        raise answer
    return answer
