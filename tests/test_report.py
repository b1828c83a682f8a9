"""The report: valid, self-contained, complete, safe with odd names."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from pyrocell.infer.criticism import check_predictions
from pyrocell.models.manifest import versions
from pyrocell.report import Findings, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collect what a test asks about, and check that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(part for part in self.texts if part)


@pytest.fixture(scope="module")
def findings():
    rng = np.random.default_rng(0)
    n = 50
    obs = pd.DataFrame(
        {"cell_type": rng.choice(["B & T <cells>", "NK"], n), "phase": rng.choice(["G1", "S"], n)},
        index=[f"cell{i}" for i in range(n)],
    )
    adata = anndata.AnnData(rng.poisson(1.0, (n, 3)).astype(np.float32), obs=obs)
    adata.obsm["X_umap"] = rng.normal(size=(n, 2))
    rows = [
        ("B & T <cells>", "MS4A1", 3.0, 0.999, True),
        ("B & T <cells>", "CD79A", -1.0, 0.99, True),
        ("B & T <cells>", "ACTB", 0.1, 0.1, False),
        ("NK", "<script>alert(1)</script>", 2.0, 0.98, True),
        ("NK", "ACTB", -0.1, 0.2, False),
    ]
    table = pd.DataFrame(rows, columns=["group1", "gene", "lfc_mean", "proba_de", "is_de_fdr_0.05"])
    table = table.set_index("gene").assign(
        group2="rest", raw_normalized_mean1=1.5, non_zeros_proportion1=0.25
    )
    table["comparison"] = table["group1"] + " vs rest"
    mean = np.array([0.5, 2.0, 8.0])
    observed = torch.from_numpy(rng.poisson(mean, (n, 3)).astype(np.float32))
    draws = torch.from_numpy(rng.poisson(mean, (10, n, 3)).astype(np.float32))
    return Findings(
        history=pd.DataFrame(
            {"elbo_train": np.linspace(900, 500, 40), "elbo_validation": np.linspace(900, 510, 40)}
        ),
        adata=adata,
        colors=["cell_type", "phase"],
        table=table,
        check=check_predictions([(observed, draws)], feature_names=list("abc")),
        cards={"cells": "50"},
        facts={"seed": 7, "options": {"n_latent": 10}, **versions()},
        manifest={"trainings": [{"data": "0123abcd", "options": {"optimizer": "<script>"}}]},
        messages=["lane and donor are confounded"],
    )


@pytest.fixture(scope="module")
def path(findings, tmp_path_factory):
    target = tmp_path_factory.mktemp("report") / "report.html"
    assert write_report(target, findings, title="SCVI on <data>", lead="Fitted SCVI.") == target
    return target


@pytest.fixture(scope="module")
def page(path):
    return Page(path.read_text(encoding="utf-8"))


def test_page_is_html_and_readable_on_a_phone(path, page):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert {"lang": "en"} in page.all("html")
    assert {"charset": "utf-8"} in page.all("meta")
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert "overflow-x: auto" in text
    assert "max-width: 100%" in text
    assert "$" not in re.sub(r"base64,[^\"]*", "", text)


def test_page_needs_nothing_from_elsewhere(path, page):
    assert not page.all("script")
    assert not page.all("link")
    sources = [img["src"] for img in page.all("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|url\(|@import", path.read_text(encoding="utf-8"))


def test_every_picture_is_a_png_with_a_text(page):
    images = page.all("img")
    assert len(images) == 1 + 2 + 1 + 3
    for image in images:
        assert base64.b64decode(image["src"].split(",")[1]).startswith(b"\x89PNG")
        assert len(image["alt"]) > 30
    assert "40 epochs" in images[0]["alt"]
    assert "coloured by phase" in images[2]["alt"]


def test_page_tells_everything(page):
    for words in ("Training", "Cells", "Differential expression", "Predictive check", "How it was made"):
        assert words in page.texts
    assert "lane and donor are confounded" in page.texts
    assert "SCVI on <data>" in page.texts
    assert "seed" in page.texts
    assert "7" in page.texts
    assert versions()["torch"] in page.texts
    assert "500.0 nats per cell" in page.text
    assert "510.0 on cells held out" in page.text
    assert "Manifest" in page.texts and '"data": "0123abcd"' in page.text


def test_markers_are_the_surest_features_that_are_higher(page):
    texts = page.texts
    start = texts.index("Surest 5 genes higher in each group")
    markers = " ".join(texts[start : texts.index("Predictive check")])
    assert "B & T <cells> MS4A1 yes +3.00 0.999 1.50 25%" in markers
    assert "B & T <cells> ACTB no +0.10 0.100" in markers
    assert "CD79A" not in markers  # lower in the group
    assert "NK ACTB" not in markers
    assert markers.index("MS4A1") < markers.index("ACTB") < markers.index("NK <script>")


def test_names_from_data_stay_text(path):
    text = path.read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "B &amp; T &lt;cells&gt;" in text


def test_parts_that_are_missing_are_left_out(tmp_path, findings):
    history = findings.history[["elbo_train"]]
    page = Page(write_report(tmp_path / "r.html", Findings(history), title="t").read_text(encoding="utf-8"))
    assert [text for text in page.texts if text in ("Training", "Cells", "Predictive check")] == ["Training"]
    assert len(page.all("img")) == 1
    assert "held out" not in page.text.split(".")[0]


def test_figures_of_the_caller_are_left_alone(tmp_path, findings):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    write_report(tmp_path / "r.html", Findings(findings.history), title="t")
    assert pyplot.get_fignums() == before
