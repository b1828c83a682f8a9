"""The code on the pages runs, and the pages agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python_blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(blocks: list[str]) -> dict[str, object]:
    """Run blocks one after the other in one namespace."""
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "page", "exec"), names)
    return names


def quick(block: str) -> str:
    """Train for a moment only."""
    return block.replace("model.train()", "model.train(max_epochs=2)").replace(
        "max_epochs=50", "max_epochs=2"
    )


def test_the_custom_model_of_the_guide_runs():
    model, use = python_blocks("docs/developer/add_a_model.md")[:2]
    names = run([model, quick(use)])
    assert names["model"].is_trained


def test_readme_and_guide_show_the_same_model():
    model = python_blocks("docs/developer/add_a_model.md")[0]
    assert model in python_blocks("README.md")


def test_the_steps_of_the_guide_are_pieces_of_the_model():
    whole, _, *steps = python_blocks("docs/developer/add_a_model.md")
    lines = {line.strip() for line in whole.splitlines()}
    for step in steps:
        if "check_model" not in step:
            assert {line.strip() for line in step.splitlines()} <= lines


@pytest.mark.parametrize("page", ["README.md", "docs/user_guide/quickstart.md"])
def test_quick_start_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in python_blocks(page) if "class BatchVAE" not in block]
    names = run([quick(block) for block in blocks if "scanpy" not in block])  # no drawing here
    assert (tmp_path / "my_model" / "model.json").exists()
    assert len(names["table"])


def test_the_page_about_keeping_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks("docs/user_guide/keeping.md")
    names = run([quick(block).replace("max_epochs=20", "max_epochs=2") for block in blocks])
    assert names["manifest"]["trainings"][0]["n_epochs"] == 2


def test_links_between_pages_lead_somewhere():
    rows = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http") and not (page.parent / target).exists():
                rows.append(f"{page.relative_to(ROOT)}: {target}")
    assert not rows, "\n" + "\n".join(rows)


def test_the_page_of_the_diagnosis_runs():
    names = run([quick(block) for block in python_blocks("docs/user_guide/diagnosis.md")[:1]])
    assert len(names["found"].table) == 6


def test_the_page_about_large_data_runs(tmp_path, monkeypatch):
    pytest.importorskip("zarr")
    monkeypatch.chdir(tmp_path)
    names = run([quick(block) for block in python_blocks("docs/user_guide/large_data.md")])
    assert (names["stored"][:] == names["adata"].layers["denoised_on_disk"]).all()
    assert (names["draws"] > 0).all()
