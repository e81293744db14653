from __future__ import annotations

from pathlib import Path

from strank.studies.workers import each


def test_workers_that_are_kept_follow_to_another_folder(tmp_path, monkeypatch):
    """`benchmark("cohort", output="out")` wrote into the folder of the call before."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        places = set(each(Path.absolute, [Path("x"), Path("y")], jobs=2))
        assert places == {tmp_path / name / "x", tmp_path / name / "y"}
