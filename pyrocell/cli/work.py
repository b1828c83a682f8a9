"""From a file of counts to a folder of results."""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrocell.cli.progress import Progress
from pyrocell.errors import DataError, QueryError, SetupError, list_some

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = ["run_command"]

CLUSTERS = "pyrocell_clusters"
LATENT = "X_pyrocell"
# A predictive check of more cells takes longer and tells no more.
_MOST_CELLS_CHECKED = 2000
_VALIDATE_EVERY = 5
_ASKED = ("get_latent_representation", "differential_expression", "posterior_predictive_check")


def run_command(args: argparse.Namespace, models: Mapping[str, Any] | None) -> None:
    """Do everything that either command does, and leave the settings as they were."""
    from pyrocell import settings

    before = settings.seed, settings.progress
    settings.seed, settings.progress = args.seed, sys.stderr.isatty()
    try:
        _work(args, models)
    finally:
        settings.seed, settings.progress = before


def _work(args: argparse.Namespace, models: Mapping[str, Any] | None) -> None:
    run = Progress()
    out = _prepare_folder(Path(args.out), overwrite=args.overwrite)
    with run.step("load", f"reading {args.data or 'the example data'}"):
        model_class = _find_model(args.model, models)
        _check_device(args.device)
        adata = _read(args)
        _check_groups(adata, args.groupby or args.labels_key)
    with run.step("set-up", f"checking {adata.n_obs} cells and {adata.n_vars} genes"):
        fitted = _most_variable(adata, args)
        _set_up(model_class, fitted, args)
        model = model_class(fitted, **_options(model_class, args.options))
    with run.step("training", f"fitting {args.model} to {fitted.n_obs} cells and {fitted.n_vars} genes"):
        model.train(**_training_options(model_class, args))
    with run.step("embedding", "latent space, neighbours, UMAP and clusters"):
        adata.obsm[LATENT] = model.get_latent_representation()
        _embed(adata, args.seed, run)
    table, groupby = None, args.groupby or args.labels_key or CLUSTERS
    if _n_groups(adata, groupby) < 2:
        run.warn(f"the cells form fewer than two groups in {groupby!r}, so that there is nothing to compare.")
    else:
        with run.step("differential expression", f"comparing the groups of {groupby!r}"):
            fitted.obs[groupby] = adata.obs[groupby]
            table = model.differential_expression(groupby=groupby)
    with run.step("predictive check", "simulating data from the fitted model"):
        check = model.posterior_predictive_check(indices=_sample_cells(adata.n_obs, args.seed))
    with run.step("writing", f"writing to {out}"):
        model.save(out / "model", overwrite=True)
        adata.write_h5ad(out / "adata.h5ad")
        if table is not None:
            table.to_csv(out / "differential_expression.csv", index_label="feature")
    _report(out / "report.html", run, args, model=model, adata=adata, table=table, check=check)
    print(f"Done in {time.perf_counter() - run.began:.0f} s. Open {out / 'report.html'} in a browser.")


def _prepare_folder(out: Path, *, overwrite: bool) -> Path:
    if not overwrite and any((out / name).exists() for name in ("report.html", "model", "adata.h5ad")):
        raise SetupError(
            f"{out} holds the results of an earlier run. Choose another --out, or give --overwrite."
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


def _find_model(name: str, models: Mapping[str, Any] | None) -> Any:
    """Find a model class by name, of those that have what the command asks."""
    if models is None:
        import pyrocell

        public = {key: getattr(pyrocell, key) for key in pyrocell.__all__}
        models = {
            k: v for k, v in public.items() if isinstance(v, type) and issubclass(v, pyrocell.CellModel)
        }
        del models["CellModel"]
    fit = {key: value for key, value in models.items() if all(hasattr(value, verb) for verb in _ASKED)}
    if name in models and name not in fit:
        lacking = [verb for verb in _ASKED if not hasattr(models[name], verb)]
        raise SetupError(
            f"this command cannot fit {name}, which has no {list_some(lacking)}: use it in Python. Models for the "
            f"command are: {list_some(fit, limit=40)}."
        )
    if name not in models:
        raise SetupError(f"there is no model {name!r}. Models are: {list_some(fit, limit=40)}.")
    return models[name]


def _check_device(name: str | None) -> None:
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SetupError(
            f"the device {name!r} cannot be used here ({str(error).splitlines()[0]})."
        ) from error


def _read(args: argparse.Namespace) -> AnnData:
    """Read the user's file, or make the example data; fill in the layer."""
    if args.data is None:
        from pyrocell.data import pbmc68k

        adata = pbmc68k()
        if args.labels_key is None and "cell_type" in adata.obs:
            args.labels_key = "cell_type"
    else:
        from anndata import read_h5ad

        path = Path(args.data)
        if not path.is_file():
            raise DataError(f"there is no file {args.data!r}. Give the path of an .h5ad file.")
        try:
            adata = read_h5ad(path)
        except OSError as error:
            raise DataError(
                f"{args.data!r} cannot be read as an .h5ad file ({error}). Is it complete?"
            ) from error
    if args.layer is None and "counts" in adata.layers:
        args.layer = "counts"
    return adata


def _check_groups(adata: AnnData, groupby: str | None) -> None:
    """Refuse groups that cannot be compared now rather than after training."""
    if groupby is None:
        return
    if groupby not in adata.obs:
        raise SetupError(
            f"there is no column {groupby!r} in obs. It has {list_some(adata.obs, limit=40) or 'none'}."
        )
    n_groups = _n_groups(adata, groupby)
    if not 2 <= n_groups <= 200:
        raise QueryError(
            f"the column {groupby!r} has {n_groups} different values. To compare groups, choose a column with 2 to 200."
        )


def _n_groups(adata: AnnData, groupby: str) -> int:
    return int(adata.obs[groupby].nunique()) if groupby in adata.obs else 0


def _most_variable(adata: AnnData, args: argparse.Namespace) -> AnnData:
    """Return the data to fit: all genes, or a copy with the most variable ones."""
    if args.n_top_genes is None or args.n_top_genes >= adata.n_vars:
        return adata
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = scanpy.experimental.pp.highly_variable_genes(
            adata, n_top_genes=args.n_top_genes, layer=args.layer, batch_key=args.batch_key, inplace=False
        )
    return adata[:, chosen["highly_variable"].to_numpy()].copy()


def _set_up(model_class: Any, adata: AnnData, args: argparse.Namespace) -> None:
    """Call ``setup_anndata`` with what was given, and refuse what the model does not know."""
    known = inspect.signature(model_class.setup_anndata).parameters
    names = ["layer", "batch_key", "labels_key", "size_factor_key"]
    names += ["categorical_covariate_keys", "continuous_covariate_keys"]
    given = {name: getattr(args, name, None) for name in names}
    given = {name: value for name, value in given.items() if value}
    unknown = [f"--{name.replace('_', '-')}" for name in given if name not in known]
    if unknown:
        raise SetupError(f"{args.model} has no use for {list_some(unknown)}. Leave it out.")
    given |= _assignments(args.setup, known, f"setup_anndata of {args.model}", "--setup")
    missing = [n for n, p in known.items() if p.default is p.empty and n not in given and n != "adata"]
    if missing:
        raise SetupError(
            f"{args.model} needs {list_some(missing)}: give it with --setup, such as --setup {missing[0]}=VALUE."
        )
    model_class.setup_anndata(adata, **given)


def _options(model_class: Any, assignments: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE options of the constructor."""
    return _assignments(assignments, inspect.signature(model_class.__init__).parameters, "the model", "--set")


def _assignments(
    assignments: Sequence[str], parameters: Iterable[str], of: str, option: str
) -> dict[str, Any]:
    """Parse NAME=VALUE pairs, the names being among those of a function."""
    known = [name for name in parameters if name not in ("self", "adata")]
    options: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise SetupError(f"{option} {assignment} has no value. Write {option} NAME=VALUE.")
        if name not in known:
            raise SetupError(f"{of} has no option {name!r}. It has {list_some(known, limit=40)}.")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a bare word is a string
            options[name] = value
    return options


def _training_options(model_class: Any, args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name, None) for name in ("batch_size", "early_stopping")}
    options = {name: value for name, value in given.items() if value is not None}
    stops = options.get("early_stopping", model_class.default_early_stopping)
    # Often enough for a curve of held-out cells that can be judged.
    plan = replace(model_class.default_plan, validate_every=None if stops else _VALIDATE_EVERY)
    return options | {"max_epochs": args.max_epochs, "device": args.device, "plan": plan}


def _embed(adata: AnnData, seed: int, run: Progress) -> None:
    """Add neighbours, UMAP and clusters of the latent space."""
    import scanpy

    scanpy.pp.neighbors(adata, use_rep=LATENT, n_neighbors=min(15, adata.n_obs - 1), random_state=seed)
    scanpy.tl.umap(adata, random_state=seed)
    try:
        import igraph  # noqa: F401
    except ImportError:
        run.warn("clusters need the package igraph, which is not installed: pip install 'pyrocell[report]'.")
        return
    scanpy.tl.leiden(
        adata, flavor="igraph", n_iterations=2, directed=False, key_added=CLUSTERS, random_state=seed
    )


def _sample_cells(n_cells: int, seed: int) -> Any:
    """Positions of the cells for the predictive check, in order."""
    import numpy as np

    if n_cells <= _MOST_CELLS_CHECKED:
        return np.arange(n_cells)
    return np.sort(np.random.default_rng(seed).choice(n_cells, _MOST_CELLS_CHECKED, replace=False))


def _report(
    path: Path,
    run: Progress,
    args: argparse.Namespace,
    *,
    model: Any,
    adata: AnnData,
    table: pd.DataFrame | None,
    check: Any,
) -> None:
    from pyrocell.report import Findings, write_report

    wanted = [args.groupby, args.labels_key, "cell_type", "phase", args.batch_key, CLUSTERS]
    source = args.data or "example data: 700 blood cells (pbmc68k)"
    cards = {"cells": f"{adata.n_obs:,}", "genes": f"{adata.n_vars:,}", "epochs": str(len(model.history))}
    if CLUSTERS in adata.obs:
        cards["clusters"] = str(_n_groups(adata, CLUSTERS))
    findings = Findings(
        history=model.history,
        adata=adata,
        colors=[name for name in dict.fromkeys(wanted) if name in adata.obs],
        table=table,
        check=check,
        cards=cards | {"seconds in all": f"{time.perf_counter() - run.began:.0f}"},
        facts=_facts(run, args, model=model, source=source),
        manifest=model.manifest() if hasattr(model, "manifest") else {},
        messages=run.messages,
    )
    lead = f"{args.model} was fitted to {adata.n_obs:,} cells ({source})."
    write_report(path, findings, title=f"{args.model} on {Path(source).name}", lead=lead)


def _facts(run: Progress, args: argparse.Namespace, *, model: Any, source: str) -> dict[str, object]:
    from pyrocell.models.manifest import versions

    options = getattr(model, "constructor", {})
    facts: dict[str, object] = {
        "data": source,
        "counts in": f"layers[{args.layer!r}]" if args.layer else "X",
        "batch": args.batch_key or "none",
        "seed": args.seed,
        "model options": ", ".join(f"{name}={value}" for name, value in options.items()) or "defaults",
        "device": getattr(model, "device", "cpu"),
    }
    facts |= {f"seconds, {name}": f"{seconds:.1f}" for name, seconds in run.seconds.items()}
    return facts | {f"version of {name}": number for name, number in versions().items()}
