"""The command that compiles a case, and what it prints."""

import pytest

from pallasite.pallas_kernels.compile import Report
from pallasite.pallas_kernels.compile.__main__ import main
from tests.pallas_kernels.compilers import needs_tpu_compiler

CASES = "tests.pallas_kernels.compile_cases"


@needs_tpu_compiler
def test_the_command_prints_a_table_of_regions_and_leaves_dumps(capsys, tmp_path):
    main([f"{CASES}:ragged", "--target", "v6e", "--analyze", "--keep", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{CASES}:ragged for tpu:v6e: compiled in ")
    assert "kernel ragged (ragged.1): 384.0 KiB of VMEM" in lines
    cells = [line.split() for line in lines]
    table = {row[0]: row[1] for row in cells if len(row) == 13 and row[0] != "region"}
    assert table == {"ragged": "1", "each": "?", "rows": "16"}
    assert lines[-1] == "  In all: got no trip count for the loop 'each'; the program says none"
    assert list(tmp_path.glob("dump/*-ragged.1-*-final_bundles.txt"))


def test_the_command_prints_json(capsys):
    main([f"{CASES}:sums", "--target", "cpu", "--option", "num_devices=2", "--json"])
    report = Report.from_json(capsys.readouterr().out)
    assert report.memory is not None
    assert report.memory.arguments == 1024 * 1024 * 4 // 2


@pytest.mark.parametrize("name", ["dump/notes.txt", "dump/more/notes.txt", "result.json"])
def test_nothing_is_deleted_or_written_where_dumps_are_to_be_kept(tmp_path, name):
    mine = tmp_path / "kept" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    line = [f"{CASES}:sums", "--target", "cpu", "--keep"]
    for place in (tmp_path / "kept", mine):
        with pytest.raises(SystemExit, match="not empty; it must be empty or missing"):
            main([*line, str(place)])
    assert mine.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_a_folder_for_dumps_is_made_where_it_is_missing(tmp_path, capsys):
    main([f"{CASES}:sums", "--target", "cpu", "--keep", str(tmp_path / "new" / "kept")])
    made = {path.name for path in (tmp_path / "new" / "kept").iterdir()}
    assert made == {"dump", "log.txt", "result.json"}
    assert "compiled in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "v9"], "got the target 'v9'"),
        (["--target", "cpu", "--option", "num_devices"], "it must be NAME=VALUE"),
        (["--target", "gpu:h100", "--lower", "--option", "size=3"], "argument 'size'"),
    ],
)
def test_the_command_says_what_is_wrong_and_fails(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main([f"{CASES}:sums", *arguments])
