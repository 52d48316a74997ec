"""The generated code is what the .proto files say, made by the generator that is installed."""

import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).parent.parent / "proto"
NAMES = ("admin", "control", "inference")


def test_the_committed_code_is_what_protoc_makes(tmp_path):
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-Ipallasite/proto={PROTO}", *outputs]
        + [f"pallasite/proto/{name}.proto" for name in NAMES],
        check=True,
    )
    made = {path.name: path.read_text() for path in (tmp_path / "pallasite/proto").iterdir()}
    committed = {path.name: path.read_text() for path in PROTO.glob("*_pb2*")}
    assert {path.stem for path in PROTO.glob("*.proto")} == set(NAMES)
    assert made.keys() == committed.keys()
    for name, text in made.items():
        assert committed[name] == text, f"{name} is stale; run `make proto`"
