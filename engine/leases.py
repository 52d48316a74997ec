"""Leases on computed prompts: who may decode from which handle, and until when.

Doors ask from their own threads and are answered at once; the pages themselves are given back by
the engine's loop, which collects what has ended.
"""

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from pallasite.engine.errors import ErrorCode, RequestError
from pallasite.engine.request import KvHandle
from pallasite.engine.sequence import Sequence

_REMEMBERED = 4096
"""Ended handles that are still told apart from ones that never were."""


@dataclass(eq=False, kw_only=True)
class _Lease:
    sequence: Sequence
    tenant: str
    expires_s: float


class LeaseTable:
    """Handles by id. Each ends once: taken by a decode, released, or expired.

    Attributes:
        epoch: this engine's name; handles of another engine, or of an earlier start, have another.
    """

    def __init__(self, max_leases: int, max_lease_s: float) -> None:
        self.epoch = secrets.token_hex(8)
        self._max_leases = max_leases
        self._max_lease_s = max_lease_s
        self._leases: dict[str, _Lease] = {}
        self._promised = 0
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._released: list[Sequence] = []
        self._lock = threading.Lock()

    def sequences(self) -> list[Sequence]:
        """Returns the sequences whose pages are leased, or released and not yet collected."""
        with self._lock:
            return [lease.sequence for lease in self._leases.values()] + self._released

    def num_pages(self) -> int:
        """Returns how many pages the leases hold."""
        return sum(len(sequence.pages) for sequence in self.sequences())

    def check(self, lease_s: float) -> None:
        """Raises RequestError for a lease that may not be asked for."""
        if not 0 < lease_s <= self._max_lease_s:
            raise RequestError(
                f"lease_s: got {lease_s}; allowed is above 0 up to {self._max_lease_s:g};"
                " change it",
                field="lease_s",
            )

    def max_held(self, num_pages: int, num_promised: int, num_all: int) -> int:
        """Returns the pages that leases may hold beside one more of num_pages.

        So many that all leases, and the num_promised pages of open prefills, hold half of a cache
        of num_all at most, or a single one more.
        """
        if num_promised + self.num_pages() == 0:
            return num_all
        return num_all // 2 - num_promised - num_pages

    def reserve(self, max_pages: int) -> None:
        """Promises a lease to a prefill.

        Raises RESOURCE_EXHAUSTED where there are too many, or they hold more than max_pages.
        """
        num_pages = self.num_pages()
        with self._lock:
            if len(self._leases) + self._promised >= self._max_leases or num_pages > max_pages:
                raise RequestError(
                    f"got a prefill while {len(self._leases)} handles hold {num_pages} pages;"
                    f" allowed are {self._max_leases} handles and {max_pages} pages; decode or"
                    " release some, or try again later",
                    code=ErrorCode.RESOURCE_EXHAUSTED,
                    retry_after_s=1.0,
                )
            self._promised += 1

    def cancel(self) -> None:
        """Takes a promise back: the prefill ended without a handle."""
        with self._lock:
            self._promised -= 1

    def grant(self, sequence: Sequence, lease_s: float) -> KvHandle:
        """Keeps a promise: leases a held sequence for lease_s seconds."""
        handle_id = secrets.token_hex(16)
        expires = time.monotonic() + lease_s
        with self._lock:
            self._promised -= 1
            tenant = sequence.request.tenant
            self._leases[handle_id] = _Lease(sequence=sequence, tenant=tenant, expires_s=expires)
        return KvHandle(handle_id=handle_id, epoch=self.epoch, expires_in_s=lease_s)

    def take(self, handle_id: str, epoch: str, tenant: str) -> Sequence:
        """Ends a lease in order to decode from it. Raises RequestError where there is none."""
        with self._lock:
            lease = self._find(handle_id, epoch, tenant)
            self._end(handle_id, "was decoded from")
            return lease.sequence

    def release(self, handle_id: str, epoch: str, tenant: str) -> None:
        """Ends a lease for good. Raises RequestError where there is none."""
        with self._lock:
            lease = self._find(handle_id, epoch, tenant)
            self._end(handle_id, "was released")
            self._released.append(lease.sequence)

    def extend(self, handle_id: str, epoch: str, tenant: str, lease_s: float) -> KvHandle:
        """Makes a lease end lease_s seconds from now. Raises RequestError where there is none."""
        with self._lock:
            self._find(handle_id, epoch, tenant).expires_s = time.monotonic() + lease_s
        return KvHandle(handle_id=handle_id, epoch=epoch, expires_in_s=lease_s)

    def collect(self, now: float) -> list[Sequence]:
        """Returns the sequences whose leases have expired or were released, each once."""
        with self._lock:
            late = [key for key, lease in self._leases.items() if lease.expires_s <= now]
            for handle_id in late:
                self._released.append(self._leases[handle_id].sequence)
                self._end(handle_id, "has expired")
            released, self._released = self._released, []
            return released

    def revoke_all(self, why: str) -> list[Sequence]:
        """Ends every lease, since the pages are lost; returns their sequences."""
        with self._lock:
            sequences = [lease.sequence for lease in self._leases.values()]
            for handle_id in list(self._leases):
                self._end(handle_id, why)
            return sequences

    def _find(self, handle_id: str, epoch: str, tenant: str) -> _Lease:
        if epoch != self.epoch:
            raise RequestError(
                "got a handle of another epoch; the engine has restarted since, and its pages are"
                " gone; prefill again",
                code=ErrorCode.FAILED_PRECONDITION,
                field="handle.epoch",
            )
        lease = self._leases.get(handle_id)
        if lease is not None and lease.tenant != tenant:
            raise RequestError(
                "got a handle that belongs to another tenant; use one of your own",
                code=ErrorCode.PERMISSION_DENIED,
                field="handle",
            )
        if lease is not None and lease.expires_s > time.monotonic():
            return lease
        if lease is not None or handle_id in self._ended:
            how = self._ended.get(handle_id, "has expired")
            raise RequestError(
                f"got a handle that {how}; a handle serves once, within its lease; prefill again",
                code=ErrorCode.FAILED_PRECONDITION,
                field="handle",
            )
        raise RequestError(
            "got a handle that this engine never gave; use one that Prefill returned",
            code=ErrorCode.NOT_FOUND,
            field="handle",
        )

    def _end(self, handle_id: str, how: str) -> None:
        del self._leases[handle_id]
        self._ended[handle_id] = how
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
