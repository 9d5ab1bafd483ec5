import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from afterglow.core.errors import DataError, RunFolderError
from afterglow.core.run_folder import JsonlLog, RunFolder, is_current


def test_first_open_writes_config_and_manifest(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("{}\n")
    with RunFolder.open(tmp_path / "run", "filter", {"seed": 3, "output_dir": "x"}, inputs={"data": str(data)}) as run:
        assert not run.finished and not run.resumed
        run.finish({"rows": 7})
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["summary"] == {"rows": 7} and manifest["stage"] == "filter"
    assert {"torch", "transformers", "trl"} <= set(manifest["versions"])
    assert manifest["machine"]["cores"] == os.cpu_count()


def test_same_config_resumes_and_other_config_is_refused(tmp_path):
    RunFolder.open(tmp_path / "run", "filter", {"seed": 3, "logging_steps": 1}).close()
    with RunFolder.open(tmp_path / "run", "filter", {"seed": 3, "logging_steps": 9}) as run:
        assert run.resumed, "how often to log does not change the result"
    with pytest.raises(RunFolderError, match=r"`seed` was 3, is 4.*--overwrite"):
        RunFolder.open(tmp_path / "run", "filter", {"seed": 4})
    with pytest.raises(RunFolderError, match="holds a `filter` run, this is `train`"):
        RunFolder.open(tmp_path / "run", "train", {"seed": 3})
    with RunFolder.open(tmp_path / "run", "train", {"seed": 4}, overwrite=True) as run:
        assert not run.resumed


def test_a_key_that_is_younger_than_the_run_counts_only_with_another_value(tmp_path):
    RunFolder.open(tmp_path / "run", "filter", {"seed": 3}).close()
    new = {"seed": 3, "top": None}
    RunFolder.check(tmp_path / "run", "filter", new, defaults={"seed": 0, "top": None, "unused": 1})
    with pytest.raises(RunFolderError, match="`top` was 'not set', is None"):
        RunFolder.check(tmp_path / "run", "filter", new)
    with pytest.raises(RunFolderError, match="`top` was None, is 5"):
        RunFolder.check(tmp_path / "run", "filter", new | {"top": 5}, defaults={"top": None})
    with pytest.raises(RunFolderError, match="`seed` was 3, is 0"):
        RunFolder.check(tmp_path / "run", "filter", {"seed": 0}, defaults={"seed": 0})


def test_changed_input_data_is_refused(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("{}\n")
    RunFolder.open(tmp_path / "run", "filter", {}, inputs={"data": str(data)}).close()
    data.write_text("{}\n{}\n")
    with pytest.raises(RunFolderError, match="`data` has changed"):
        RunFolder.open(tmp_path / "run", "filter", {}, inputs={"data": str(data)})


def test_a_check_raises_what_open_would_and_writes_nothing(tmp_path):
    RunFolder.check(tmp_path / "run", "filter", {"seed": 3})
    assert not (tmp_path / "run").exists()
    RunFolder.open(tmp_path / "run", "filter", {"seed": 3}).close()
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    RunFolder.check(tmp_path / "run", "filter", {"seed": 3})
    with pytest.raises(RunFolderError, match="`seed` was 3, is 4"):
        RunFolder.check(tmp_path / "run", "filter", {"seed": 4})
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before


def test_a_run_is_current_until_an_input_changes(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("{}\n")
    assert not is_current(tmp_path / "run")
    with RunFolder.open(tmp_path / "run", "filter", {}, inputs={"data": str(data)}) as run:
        assert not is_current(run.path)
        run.finish({})
    assert is_current(tmp_path / "run")
    data.write_text("{}\n{}\n")
    assert not is_current(tmp_path / "run")


def test_a_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunFolder.open(tmp_path, "filter", {})
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunFolder.open(tmp_path, "filter", {}, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_two_processes_cannot_share_a_folder(tmp_path):
    with (
        RunFolder.open(tmp_path / "run", "filter", {}),
        pytest.raises(RunFolderError, match="another process is running"),
    ):
        RunFolder.open(tmp_path / "run", "filter", {})


def test_parents_are_found(tmp_path):
    with RunFolder.open(tmp_path / "a", "filter", {}) as run:
        (run.path / "kept.jsonl").write_text("{}\n")
    with RunFolder.open(tmp_path / "b", "train", {}, inputs={"data": str(tmp_path / "a" / "kept.jsonl")}) as run:
        assert run.manifest["parents"] == {"data": str(tmp_path / "a")}


@pytest.mark.parametrize("tail", ["", '{"x": 1', '{"x": ' + "9" * 200_000])
def test_a_cut_off_last_line_is_dropped(tmp_path, tail):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"i": 0}\n{"i": 1}\n' + tail)
    log = JsonlLog(path)
    log.append({"i": 2})
    assert [row["i"] for row in log.rows()] == [0, 1, 2]
    log.close()


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"i": 0}\nnonsense\n{"i": 2}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: not valid JSON"):
        list(JsonlLog(path).rows())


WRITER = """
import sys, time
from pathlib import Path
from afterglow.core.run_folder import JsonlLog
log = JsonlLog(Path(sys.argv[1]))
done = {row["i"] for row in log.rows()}
for i in range(2000):
    if i not in done:
        time.sleep(1e-4)
        log.append({"i": i, "text": "x" * (i % 500)})
"""


def test_rows_survive_kill_9_at_random_moments(tmp_path):
    path = tmp_path / "rows.jsonl"
    rng = random.Random(0)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        started = path.stat().st_size if path.exists() else 0
        while child.poll() is None and (not path.exists() or path.stat().st_size == started):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        assert child.poll() is None, "the writer must still be at work when it is killed"
        child.send_signal(signal.SIGKILL)
        child.wait()
    subprocess.run([sys.executable, "-c", WRITER, str(path)], check=True)
    assert [row["i"] for row in JsonlLog(path).rows()] == list(range(2000))
