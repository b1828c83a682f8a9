"""The arguments of the command, and their help."""

from __future__ import annotations

import argparse

from pyrocell import __version__

__all__ = ["make_parser"]

_FILES = """\
files written:
  report.html                   pictures, top genes, how it was made: one file, open it in a browser
  adata.h5ad                    the data with obsm["X_pyrocell"] (latent space), obsm["X_umap"] and
                                obs["pyrocell_clusters"]
  differential_expression.csv   every gene in every group against all other cells
  model/                        the fitted model: pyrocell.SCVI.load("DIR/model", adata)
"""

_FIT_EXAMPLES = """\
examples:
  pyrocell fit pbmc.h5ad --layer counts --batch-key donor --out fitted
  pyrocell fit atlas.h5ad --layer counts --batch-key donor --n-top-genes 2000 \\
      --set n_latent=30 --set n_layers=2 --set gene_likelihood=nb --early-stopping --out fitted
  pyrocell fit pbmc.h5ad --layer counts --labels-key cell_type --groupby condition --out fitted
  pyrocell fit pbmc.h5ad --model SCANVI --labels-key cell_type --setup unlabeled_category=Unknown --out fitted
  pyrocell fit cite.h5ad --model TOTALVI --setup protein_expression_obsm_key=protein_counts --out fitted

The counts must be raw: whole numbers, not normalised. Errors go to standard error, and the exit status is
then 2.
"""

_DEMO_EXAMPLES = """\
examples:
  pyrocell demo                                       700 blood cells that need no download; 1 to 3 minutes
  pyrocell demo mine.h5ad --batch-key donor           the same for your own counts
  pyrocell demo mine.h5ad --layer counts --labels-key cell_type --max-epochs 100
"""


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the line breaks of examples, and show defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def make_parser() -> argparse.ArgumentParser:
    """Describe both commands."""
    parser = argparse.ArgumentParser(
        prog="pyrocell",
        description="Probabilistic models for single-cell omics. Start with: pyrocell demo",
        epilog="pyrocell COMMAND --help tells everything about a command. In a notebook: import pyrocell",
    )
    parser.add_argument("--version", action="version", version=f"pyrocell {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    demo = commands.add_parser(
        "demo",
        help="fit SCVI to example data or to your own file, with few choices to make",
        description="Fit SCVI, cluster the cells, compare the groups, check the fit, and write a report.",
        epilog=f"{_FILES}\n{_DEMO_EXAMPLES}",
        formatter_class=_Formatter,
    )
    demo.add_argument("data", nargs="?", metavar="DATA.h5ad", help="raw counts; the example data if left out")
    demo.set_defaults(model="SCVI", options=["gene_likelihood=nb"], setup=[], overwrite=True)
    fit = commands.add_parser(
        "fit",
        help="fit a model to a file, with all choices",
        description="Fit a model to raw counts, cluster the cells, compare the groups, check the fit, report.",
        epilog=f"{_FILES}\n{_FIT_EXAMPLES}",
        formatter_class=_Formatter,
    )
    fit.add_argument("data", metavar="DATA.h5ad", help="raw counts")
    fit.add_argument("--model", default="SCVI", help="name of the model class")
    _add_data_arguments(demo, out="pyrocell_demo")
    _add_data_arguments(fit, out=None)
    _add_fit_arguments(fit)
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser, *, out: str | None) -> None:
    """Add what both commands know."""
    data = parser.add_argument_group("data")
    data.add_argument("--layer", help='where the raw counts are; else the layer "counts", if any, else X')
    data.add_argument("--batch-key", metavar="COLUMN", help="column of obs with the experimental batch")
    data.add_argument("--labels-key", metavar="COLUMN", help="column of obs with known cell types")
    data.add_argument(
        "--groupby",
        metavar="COLUMN",
        help="column of obs whose groups to compare; else the labels, else clusters",
    )
    data.add_argument(
        "--n-top-genes",
        type=_positive,
        metavar="N",
        help="fit the N most variable genes only; else all genes",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--max-epochs", type=_positive, metavar="N", help="passes over the cells; else by their number"
    )
    training.add_argument("--device", help="such as cpu, cuda or cuda:1; else the best one present")
    training.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--out", default=out, required=out is None, metavar="DIR", help="folder to write")


def _add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only ``fit`` knows."""
    many = {"nargs": "+", "default": [], "metavar": "COLUMN"}
    parser.add_argument("--size-factor-key", metavar="COLUMN", help="column of obs with sizes of the cells")
    parser.add_argument("--categorical-covariate-keys", help="further categories to correct for", **many)  # type: ignore[arg-type]
    parser.add_argument("--continuous-covariate-keys", help="numbers to correct for", **many)  # type: ignore[arg-type]
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="cells in a minibatch; else the model's"
    )
    parser.add_argument(
        "--early-stopping",
        action=argparse.BooleanOptionalAction,
        help="stop when held-out cells no longer gain, and keep the best; else the model's habit",
    )
    parser.add_argument(
        "--set",
        dest="options",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the model's constructor, such as n_latent=30; may be repeated",
    )
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="further argument of the model's setup_anndata, such as unlabeled_category=Unknown; may be repeated",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the results of an earlier run in --out"
    )


def _positive(text: str) -> int:
    """Parse a number of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number
