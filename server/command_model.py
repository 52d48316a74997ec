"""`pallasite pull` and `pallasite info`: models as they lie on disk, and what they would need."""

import argparse
import importlib.metadata
import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from pallasite.engine.config import EngineConfig
from pallasite.engine.deployment import devices_for, plan_deployment, target_for
from pallasite.engine.planner import memory_limit
from pallasite.models import pull as models_pull
from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.registry import matrix_forms
from pallasite.models.sharding import make_mesh
from pallasite.models.weights import num_bytes
from pallasite.pallas_kernels.cpu import library_path
from pallasite.pallas_kernels.target import Target
from pallasite.server.arguments import engine_config
from pallasite.server.progress import progress_printer


def pull(args: argparse.Namespace) -> int:
    """Fetches a model."""
    models_pull.pull(args.name, progress_printer())
    return 0


def info(args: argparse.Namespace) -> int:
    """Prints what runs here and, of a model, its sizes and memory plan."""
    config = engine_config(args)
    devices = devices_for(config.mesh)
    make_mesh(config.mesh, devices)  # one that is too large is refused without a MODEL, too
    target = target_for(devices[0])
    facts: dict[str, Any] = {
        "versions": {
            "pallasite": importlib.metadata.version("pallasite"),
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "python": platform.python_version(),
        },
        "target": {
            "name": target.name,
            "device": devices[0].device_kind,
            "num_devices": len(devices),
            "page_size": target.page_size,
            "bodies": _bodies(target),
        },
        "compile_cache": _compile_cache(config.compile_cache),
    }
    if args.model is not None:
        facts |= _model_facts(models_pull.locate(args.model), config)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for title, rows in facts.items():
        print(title.replace("_", " "))
        for name, value in rows.items():
            print(f"  {name.replace('_', ' '):22} {_shown(name, value)}")
    return 0


def _bodies(target: Target) -> str:
    """What products and attention run as."""
    if target.platform != "cpu":
        return "Pallas kernels"
    if target.instructions:
        return f"C++ for {target.instructions}"
    is_built = library_path() is not None
    why = "this processor has none of their instruction sets" if is_built else "they are not built"
    return f"XLA's own operations: C++ bodies do not run here, since {why}"


def _compile_cache(folder: Path | None) -> dict[str, int]:
    """How many files of compiled programs a compile cache holds, and their bytes."""
    kinds = ("*.programs", "*-cache")
    files = [] if folder is None else [path for kind in kinds for path in folder.glob(kind)]
    return {"num_files": len(files), "num_bytes": sum(path.stat().st_size for path in files)}


def _model_facts(path: Path, config: EngineConfig) -> dict[str, Any]:
    """A model's sizes, and the bytes that it takes before any program runs."""
    checkpoint = open_checkpoint(path)
    model = checkpoint.config
    deployment = plan_deployment(model, config)
    spec = deployment.cache_spec
    num_pages = spec.num_pages or None  # an accelerator's is known once it is compiled
    limit = memory_limit(jax.devices()[0])
    plan = deployment.memory_plan(0, limit)
    memory: dict[str, Any] = {
        "weights_bytes": num_bytes(deployment.model),
        "page_bytes": spec.page_bytes,
        "cached_token_bytes": spec.page_bytes // spec.target.page_size,
        "num_pages": num_pages,
        "cached_tokens": None if num_pages is None else num_pages * spec.target.page_size,
        "cache_bytes": None if num_pages is None else spec.num_bytes,
        "device_weights_bytes": plan.weights,
        "device_adapters_bytes": plan.adapters,
        "device_cache_bytes": None if num_pages is None else plan.cache,
        "device_limit_bytes": plan.limit,
        "layout": "; ".join(deployment.model.partition.notes()) or "even",
    }
    sizes = {
        "num_parameters": sum(math.prod(shape) for shape in checkpoint.shapes.values()),
        "weights": config.weights,
        "weight_forms": matrix_forms(deployment.model),
        "cache": config.cache_form,
        "mesh": str(config.mesh),
        "speculate": config.speculate,
        "speculate_tokens": config.num_drafts,
        **asdict(model),
    }
    return {"model": sizes, "memory": memory}


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "known once it is compiled" if name in ("num_pages", "cached_tokens") else "-"
    if name == "weight_forms":
        names = {form: [n for n in value if value[n] == form] for form in value.values()}
        return "; ".join(f"{form}: {', '.join(named)}" for form, named in names.items())
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value:,} bytes"
    return f"{value:,}" if type(value) is int else str(value)
