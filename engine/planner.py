"""How much memory a deployment needs, and how many pages that leaves. Decided before the cache is.

Bytes come from shapes and from the compiler's own analysis of the largest program, never from what
happens to be free after a guess.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax

from pallasite.engine.config import EngineConfig
from pallasite.models.errors import ConfigError

CPU_TOKENS_PER_REQUEST = 1024
"""What the default cache of a CPU holds for each request."""

CACHE_LIMIT = 0.97
"""The share of a device's memory that is filled, see `cache_limit`."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that the fullest device holds, by use.

    Attributes:
        loading: one more adapter's, while it is put beside the others.
        page: a page's, of the cache.
        temporaries: the largest program's, its results and its code included.
        limit: what the device has for us; None where it does not say.
    """

    weights: int
    adapters: int
    loading: int
    cache: int
    page: int
    sampler: int
    temporaries: int
    limit: int | None

    @property
    def total(self) -> int:
        held = self.weights + self.adapters + self.cache + self.sampler
        return held + self.loading + self.temporaries

    def check(self) -> None:
        """Raises ConfigError, with the numbers, where this does not fit."""
        if self.limit is not None and self.total > self.limit:
            raise self.error(f"the device has {_gb(self.limit)}")

    def error(self, reason: str) -> ConfigError:
        """Returns what says that this does not fit, why, and with the numbers."""
        return ConfigError(
            f"got a model that needs {_gb(self.total)} (weights {_gb(self.weights)}, adapters"
            f" {_gb(self.adapters + self.loading)}, cache {_gb(self.cache)}, sampler"
            f" {_gb(self.sampler)}, temporaries {_gb(self.temporaries)}); {reason}; lower"
            " --cache-tokens, --max-requests, --max-batch-tokens or --max-adapters, or take a"
            " smaller model"
        )


def choose_num_pages(config: EngineConfig, page_size: int) -> int | None:
    """Returns the pages that the operator asked for, or None where they left it to us."""
    if config.num_pages is None and config.cache_tokens is not None:
        return _for_all_shards(-(-config.cache_tokens // page_size), config)
    return config.num_pages


def default_cpu_pages(config: EngineConfig, page_size: int, max_context_len: int) -> int:
    """Returns the pages of the default cache on a CPU."""
    data = config.mesh.data
    tokens = max(CPU_TOKENS_PER_REQUEST * config.max_requests, data * max_context_len)
    return _for_all_shards(-(-tokens // page_size), config)


def pages_that_fit(plan: MemoryPlan) -> int:
    """Returns how many pages fit beside the rest of `plan`, on a device.

    Raises ConfigError where none does.
    """
    if plan.limit is None:
        raise ConfigError(
            "got no cache size, and this device does not say how much memory it has; allowed is"
            " any number of tokens; give --cache-tokens"
        )
    left = plan.limit - (plan.total - plan.cache)
    if left < plan.page:
        replace(plan, cache=plan.page).check()
    return left // plan.page


def _for_all_shards(num_pages: int, config: EngineConfig) -> int:
    """Rounds up to what the data shards divide."""
    return -(-num_pages // config.mesh.data) * config.mesh.data


def cache_limit(limit: int | None) -> int | None:
    """Returns how much of a device's memory a plan whose cache takes the rest may use.

    One array of nearly all that is left would need an allocator without a gap.
    """
    return None if limit is None else int(limit * CACHE_LIMIT)


def memory_limit(device: jax.Device) -> int | None:
    """Returns the bytes that this process may use on a device, or None where nothing says."""
    if device.platform != "cpu":
        stats = device.memory_stats()
        return stats.get("bytes_limit") if stats else None
    limits = [_meminfo("MemAvailable"), _cgroup_limit()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _meminfo(key: str) -> int | None:
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def _cgroup_limit() -> int | None:
    path = Path("/sys/fs/cgroup/memory.max")
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" else int(text)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
