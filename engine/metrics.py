"""What an engine counts, and how busy it is."""

import time
from dataclasses import dataclass, field

from pallasite.engine.programs import Programs


@dataclass(kw_only=True)
class EngineMetrics:
    """Counters since the start; only the engine's loop writes them.

    Attributes:
        last_step_monotonic_s: when the loop last came round, busy or idle.
        padded_tokens: tokens that steps computed for nothing, to fill their buckets.
        num_drafts: drafts that were verified, of one sequence in one step each.
        draft_tokens: their tokens.
        accepted_tokens: those of them that were right.
    """

    programs: Programs
    num_steps: int = 0
    prompt_tokens: int = 0
    padded_tokens: int = 0
    generation_tokens: int = 0
    num_drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    num_requests: int = 0
    num_preemptions: int = 0
    last_step_monotonic_s: float = field(default_factory=time.monotonic)
    is_alive: bool = True

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were right; 0 without any."""
        return self.accepted_tokens / max(1, self.draft_tokens)

    @property
    def compilations(self) -> int:
        """Programs compiled since the engine began to serve; 0 is the promise."""
        return self.programs.compilations

    @property
    def misses(self) -> int:
        """Steps for which no compiled program was found; 0 is the promise."""
        return self.programs.misses


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """How busy an engine is at a moment."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_leased_pages: int
