"""Which adapter is in which slot. The loop's thread changes it; any thread may ask."""

from collections.abc import Collection

from pallasite.engine.errors import ErrorCode, RequestError

MAX_NAME_LEN = 128


class AdapterTable:
    """Names of loaded adapters and their slots."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._slots: dict[str, int] = {}

    def names(self) -> list[str]:
        """Returns the loaded adapters, the first loaded first."""
        return list(self._slots)

    def slot_of(self, name: str) -> int:
        """Returns an adapter's slot, -1 for the empty name, which is none.

        Raises RequestError NOT_FOUND where it is not loaded.
        """
        return -1 if name == "" else self._loaded_slot(name)

    def slot_for(self, name: str, in_use: Collection[int]) -> int:
        """Returns a slot for an adapter of that name, which no open request uses.

        Raises RequestError where it may not have that name, or there is no room.
        """
        self._check_name(name)
        if self._num_slots == 0:
            raise RequestError(
                "got an adapter for a server without room for any; each takes one of its"
                " --max-adapters; start it with --max-adapters N",
                code=ErrorCode.FAILED_PRECONDITION,
            )
        taken = {*self._slots.values(), *in_use}
        free = next((slot for slot in range(self._num_slots) if slot not in taken), None)
        if free is None:
            raise RequestError(
                f"adapter: got one more while all {self._num_slots} slots are in use"
                f" ({len(self._slots)} loaded); unload one and let its requests end, or start the"
                " server with more --max-adapters",
                code=ErrorCode.RESOURCE_EXHAUSTED,
            )
        return free

    def add(self, name: str, slot: int) -> None:
        """Notes that a slot has an adapter."""
        self._slots[name] = slot

    def remove(self, name: str) -> None:
        """Forgets an adapter; requests that use it go on.

        Raises RequestError NOT_FOUND where it is not loaded.
        """
        self._loaded_slot(name)
        del self._slots[name]

    def clear(self) -> None:
        """Forgets all adapters, since the device has lost them."""
        self._slots.clear()

    def _check_name(self, name: str) -> None:
        if not 0 < len(name) <= MAX_NAME_LEN or not name.isprintable():
            raise RequestError(
                f"adapter: got a name of {len(name)} characters; allowed are 1 to {MAX_NAME_LEN}"
                " printable ones; choose another",
                field="adapter",
            )
        if name in self._slots:
            raise RequestError(
                f"adapter: got {name!r}, which is loaded; each name stands for one; unload it"
                " first, or choose another",
                code=ErrorCode.FAILED_PRECONDITION,
                field="adapter",
            )

    def _loaded_slot(self, name: str) -> int:
        slot = self._slots.get(name)
        if slot is None:
            known = ", ".join(self.names()) or "none"
            raise RequestError(
                f"adapter: got {name[:MAX_NAME_LEN]!r}, which is not loaded; loaded are: {known};"
                " choose one of them, or have it loaded",
                code=ErrorCode.NOT_FOUND,
                field="adapter",
            )
        return slot
