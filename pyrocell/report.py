"""One self-contained HTML page about a fitted model: pictures inside, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyrocell import plotting

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from pyrocell.infer.criticism import PredictiveCheck

__all__ = ["Findings", "write_report"]

# Columns of the table of markers: heading, unit or meaning, and format.
_COLUMNS = {
    "lfc_mean": ("log2 fold change", "{:+.2f}"),
    "proba_de": ("probability", "{:.3f}"),
    "raw_normalized_mean1": ("mean in group, per 10k", "{:.2f}"),
    "raw_normalized_mean2": ("mean in others, per 10k", "{:.2f}"),
    "non_zeros_proportion1": ("cells with it, group", "{:.0%}"),
    "non_zeros_proportion2": ("cells with it, others", "{:.0%}"),
}

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem;
border-bottom: 1px solid #ddd; padding-bottom: .2rem; } .cards { display: flex; flex-wrap: wrap; gap: .6rem;
margin: 1rem 0; padding: 0; list-style: none; } .cards li { border: 1px solid #ddd; border-radius: .5rem;
padding: .4rem .9rem; } .cards strong { display: block; font-size: 1.25rem; } .warning { border-left: .3rem
solid #d55e00; background: #fdf3ec; padding: .5rem .9rem; margin: .6rem 0; } .figures { display: grid;
grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.2rem; } figure { margin: 0; }
figure img { max-width: 100%; height: auto; display: block; } figcaption { color: #444; font-size: .92rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric:
tabular-nums; } th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: right;
vertical-align: top; } th { text-align: right; } th:first-child, td:first-child, th[scope=row], .text {
text-align: left; } .scroll, pre { overflow-x: auto; } .facts td { text-align: left; overflow-wrap: anywhere; }
footer { margin: 2.5rem 0 1rem; color: #555; font-size: .9rem; } </style> </head> <body>
<header> <h1>$title</h1> <p>$lead</p> $cards
</header> <main> $body </main> <footer>Written by pyrocell on $date. This page is complete in itself and can
be sent on as one file.</footer> </body> </html>
""")


@dataclass(frozen=True)
class Findings:
    """What a report tells of; every part but the history may be missing.

    Parameters
    ----------
    history
        ``model.history``.
    adata
        Data with an embedding of cells in ``obsm``.
    colors
        Columns of ``adata.obs`` to colour the embedding by, one picture each.
    basis
        Key of the embedding in ``adata.obsm``.
    table
        Result of ``differential_expression``.
    check
        Result of ``posterior_predictive_check``.
    cards
        Few numbers for the head of the page, as name and text.
    facts
        How the result came about: options, seed, versions, seconds.
    manifest
        Result of ``manifest``: the whole of it.
    messages
        Warnings that the reader must see.
    """

    history: pd.DataFrame
    adata: AnnData | None = None
    colors: Sequence[str] = ()
    basis: str = "X_umap"
    table: pd.DataFrame | None = None
    check: PredictiveCheck | None = None
    cards: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    manifest: Mapping[str, object] = field(default_factory=dict)
    messages: Sequence[str] = ()


def write_report(path: str | Path, findings: Findings, *, title: str, lead: str = "") -> Path:
    """Write a report as one HTML file that needs no other file and no network.

    Parameters
    ----------
    path
        Where to write.
    findings
        What to tell.
    title
        Heading of the page.
    lead
        What was done, in a sentence or two.

    Returns
    -------
    Path
        The file written.
    """
    sections = [
        _warnings(findings.messages),
        _training(findings),
        _cells(findings),
        _differences(findings.table),
        _prediction(findings.check),
        _facts(findings.facts),
        _manifest(findings.manifest),
    ]
    cards = "".join(f"<li><strong>{_text(v)}</strong>{_text(k)}</li>" for k, v in findings.cards.items())
    page = _PAGE.substitute(
        title=_text(title),
        lead=_text(lead),
        cards=f'<ul class="cards">{cards}</ul>' if cards else "",
        body="\n".join(section for section in sections if section),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _warnings(messages: Sequence[str]) -> str:
    if not messages:
        return ""
    rows = "".join(f'<p class="warning">{_text(message)}</p>' for message in messages)
    return _section("Warnings", rows)


def _training(findings: Findings) -> str:
    history = findings.history
    last = history.iloc[-1]
    caption = f"After {len(history)} epochs the loss is {last['elbo_train']:.1f} nats per cell on the training cells"
    alt = f"Line plot of the loss over {len(history)} epochs, falling to {last['elbo_train']:.1f} nats per cell."
    if "elbo_validation" in history and history["elbo_validation"].notna().any():
        held_out = history["elbo_validation"].dropna().iloc[-1]
        caption += f", and {held_out:.1f} on cells held out"
    caption += (
        ". Curves that still fall steeply at the end ask for more epochs; a held-out curve that rises, for fewer. "
        "The first tenth may lie above the frame."
    )
    picture = _figure(lambda ax: plotting.training_curves(history, ax=ax), alt=alt, caption=caption)
    return _section("Training", _figures([picture]))


def _cells(findings: Findings) -> str:
    adata, basis = findings.adata, findings.basis
    if adata is None or basis not in adata.obsm:
        return ""

    def picture(color: str) -> str:
        return _figure(
            lambda ax: plotting.latent(adata, basis=basis, color=color, ax=ax),
            alt=f"Scatter plot of {adata.n_obs} cells in two dimensions, coloured by {color}.",
            caption=f"Each point is a cell, coloured by {color}.",
            size=(7, 4.6),
        )

    pictures = [picture(color) for color in findings.colors]
    note = (
        "<p>A UMAP of the model's latent space. Neighbours in it are alike after batches and sequencing depth are "
        "accounted for; distances between far groups and sizes of groups mean little.</p>"
    )
    return _section("Cells", note + _figures(pictures)) if pictures else ""


def _differences(table: pd.DataFrame | None) -> str:
    if table is None or not len(table) or "proba_de" not in table:
        return ""
    called = _called(table)
    counts = called.groupby(table["group1"].astype(str), sort=False).sum()
    group = str(counts.idxmax())
    one = table[table["group1"].astype(str) == group]
    other = str(one["group2"].iloc[0])
    picture = _figure(
        lambda ax: plotting.volcano(one, ax=ax),
        alt=f"Volcano plot of {len(one)} genes, {group} against {other}: {counts[group]} called different.",
        caption=f"{group} against {other}, the comparison with the most genes called ({counts[group]} of {len(one)}).",
        size=(6.5, 5),
    )
    rows = [f"<tr><td>{_text(name)}</td><td>{n}</td></tr>" for name, n in counts.items()]
    head = "<thead><tr><th scope='col'>group</th><th scope='col'>genes called</th></tr></thead>"
    summary = f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'
    target = next(
        (str(name).removeprefix("is_de_fdr_") for name in table if str(name).startswith("is_de")), "0.05"
    )
    note = (
        "<p>Each group against all other cells. A gene is called when the model is sure enough of a difference, such "
        f"that the expected share of false calls is at most {_text(target)}; groups that "
        "resemble others, or are mixed in themselves, have few calls. All numbers are in the file "
        "<code>differential_expression.csv</code>.</p>"
    )
    return _section("Differential expression", note + _figures([picture, summary]) + _markers(table, called))


def _markers(table: pd.DataFrame, called: pd.Series, n_each: int = 5) -> str:
    """Table of the surest features that are higher in each group, called or not."""
    columns = [name for name in _COLUMNS if name in table]
    effect = next(name for name in ("lfc_mean", "effect_mean") if name in table)
    higher = table.assign(_called=called)[(table[effect] > 0).to_numpy()]
    order = {group: place for place, group in enumerate(table["group1"].unique())}
    if "lfsr" not in table:  # a table of means comes with the clearest first
        higher = higher.sort_values("proba_de", ascending=False, kind="stable")
    best = higher.groupby("group1", observed=True).head(n_each)
    best = best.sort_values("group1", key=lambda groups: groups.map(order), kind="stable")
    names = ["group", "gene", "called", *(_COLUMNS[name][0] for name in columns)]
    head = "".join(
        f'<th scope="col"{" class=text" if i < 3 else ""}>{name}</th>' for i, name in enumerate(names)
    )
    rows = []
    for gene, row in best.iterrows():
        cells = "".join(f"<td>{_COLUMNS[name][1].format(row[name])}</td>" for name in columns)
        texts = (row["group1"], gene, "yes" if row["_called"] else "no")
        rows.append(f"<tr>{''.join(f'<td class=text>{_text(text)}</td>' for text in texts)}{cells}</tr>")
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<h3>Surest {n_each} genes higher in each group</h3><div class="scroll">{body}</div>'


def _prediction(check: PredictiveCheck | None) -> str:
    if check is None:
        return ""
    numbers = check.summary
    captions = {
        "variance": f"Variance over cells. The median gene is predicted {numbers['variance_ratio']:.2f} times its "
        "observed variance; points below the line are genes that vary more than the model thinks.",
        "zero_fraction": "Share of cells without any count, predicted and observed. The mean difference is "
        f"{numbers['mae_zero_fraction']:.3f}.",
        "calibration": f"Where observed counts fall among predicted ones. Of all counts, {numbers['coverage_90']:.1%} "
        f"lie in 90 % intervals and {numbers['coverage_50']:.1%} in 50 % intervals. Flat bars are right; horns at "
        "both ends mean overconfidence.",
    }
    pictures = [
        _figure(
            lambda ax, what=what: plotting.predictive_check(check, what=what, ax=ax),  # type: ignore[misc]
            alt=f"Predictive check, {what.replace('_', ' ')}. {caption}",
            caption=caption,
        )
        for what, caption in captions.items()
    ]
    note = (
        f"<p>Would data simulated from the fitted model look like the data measured? {int(numbers['n_draws'])} data "
        f"sets of {int(numbers['n_cells'])} cells were simulated and compared, gene by gene.</p>"
    )
    return _section("Predictive check", note + _figures(pictures))


def _facts(facts: Mapping[str, object]) -> str:
    if not facts:
        return ""
    rows = "".join(f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>' for k, v in facts.items())
    return _section(
        "How it was made", f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'
    )


def _manifest(manifest: Mapping[str, object]) -> str:
    if not manifest:
        return ""
    note = (
        "<p>Versions, seed, data and all options, as they are saved with the model: with the same data (the SHA-256 "
        "tells) and the same versions, the same machine gives the same model to the last bit.</p>"
    )
    text = _text(json.dumps(manifest, indent=2))
    return _section("Manifest", f"{note}<details><summary>Show it</summary><pre>{text}</pre></details>")


def _called(table: pd.DataFrame) -> pd.Series:
    columns = [name for name in table if str(name).startswith("is_de")]
    return table[columns[0]].astype(bool) if columns else table["proba_de"] > 0.95


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{body}\n</section>"


def _figures(parts: Iterable[str]) -> str:
    return f'<div class="figures">{"".join(parts)}</div>'


def _figure(
    draw: Callable[[Axes], object], *, alt: str, caption: str, size: tuple[float, float] = (5.2, 4.2)
) -> str:
    """Draw a picture and put it inline, with a text for those who cannot see it."""
    from matplotlib.figure import Figure

    # Not through pyplot: a report must not open windows, nor touch the figures of the caller.
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.add_subplot())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    width, height = (np.array(size) * 130).astype(int)
    image = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{_text(alt)}">'
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
