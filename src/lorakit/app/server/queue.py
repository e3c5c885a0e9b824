"""A bounded queue of texts, and a thread that answers whatever waits in batches, by a pool of adapters."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lorakit.inference.adapter_pool import AdapterPool, Query

MOST_TEXTS = 64  # answered together; with more the first would wait for the last
Answers = list[dict[str, Any]]


class Overloaded(Exception):
    """The queue is full."""


class Closed(Exception):
    """The server is stopping and accepts no more texts."""


class TooLong(Exception):
    """A text exceeds its adapter's limit and must not be cut."""


@dataclass(eq=False)
class Job:
    """The texts of one request, answered together."""

    queries: Sequence[Query]
    truncate: bool
    future: Future[Answers] = field(default_factory=Future)


class Batcher:
    """Takes jobs from any thread; its own thread answers them in order.

    If a batch fails, its jobs are answered one by one, so that only the faulty request fails.
    """

    def __init__(self, pool: AdapterPool, most_waiting: int, watch: Callable[[int], None] = lambda texts: None) -> None:
        self._pool, self._most_waiting, self._watch = pool, most_waiting, watch
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0  # texts
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of texts not answered yet."""
        return self._waiting

    def is_full(self, asking: int) -> bool:
        """Whether the queue has no room for another text, counting `asking` requests of one text each."""
        return max(self._waiting, asking) >= self._most_waiting

    def submit(self, queries: Sequence[Query], *, truncate: bool = True) -> Future[Answers]:
        """Queue texts; the future gives the answers, or TooLong if a text would be cut. Cancelled in time, it costs nothing.

        Raises:
            Overloaded: the queue has no room for the texts; an empty queue takes any request.
            Closed: after `close`.
        """
        job = Job(queries, truncate)
        with self._lock:
            if self._is_closed:
                raise Closed
            if self._waiting and self._waiting + len(queries) > self._most_waiting:
                raise Overloaded
            self._waiting += len(queries)
            self._jobs.put(job)
        return job.future

    def close(self, most_s: float | None = None) -> None:
        """Answer all waiting texts, then stop; after `most_s` seconds, return anyway."""
        with self._lock:
            self._is_closed = True
            self._jobs.put(None)
        self._thread.join(most_s)

    def _work(self) -> None:
        last: Job | None = None
        while True:
            first = last or self._jobs.get()
            if first is None:
                return
            jobs, last = self._neighbours(first)
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if running:
                self._answer(running)
            with self._lock:
                self._waiting -= sum(len(job.queries) for job in jobs)

    def _neighbours(self, first: Job) -> tuple[list[Job], Job | None]:
        """The job and the following ones that fit into a batch, and the first one that does not fit."""
        jobs, texts = [first], len(first.queries)
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return jobs, None
            if job is None:
                self._jobs.put(None)  # so that it is seen again after the jobs before it
                return jobs, None
            if texts + len(job.queries) > MOST_TEXTS:
                return jobs, job
            jobs.append(job)
            texts += len(job.queries)

    def _answer(self, jobs: Sequence[Job]) -> None:
        queries = [each for job in jobs for each in job.queries]
        try:
            if any(not job.truncate and any(map(self._pool.is_cut, job.queries)) for job in jobs):
                raise TooLong
            answers = iter(self._pool.answer(queries))
        except Exception as err:
            if len(jobs) == 1:
                jobs[0].future.set_exception(err)
                return
            for job in jobs:
                self._answer([job])
            return
        self._watch(len(queries))
        for job in jobs:
            job.future.set_result([next(answers) for _ in job.queries])
