"""The main line at smoke scale: its notebooks run through papermill, in this process or in a kernel."""

import atexit
import json
import logging
import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import datasets
import matplotlib
import nbformat
import pandas as pd
import papermill
import torch
import yaml
from conftest import ROOT
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from papermill.engines import Engine, papermill_engines

from awares.config import load_params
from awares.study import publish

NOTEBOOKS = ROOT / "notebooks"
# The sizes of a smoke run. A random model never calls by itself, so the call has a bias
SMOKE = yaml.safe_load("""
{threads: 1, data.train_rows: 8, data.validation_rows: 4, curation.judge: anls, curation.anls_threshold: 0.0,
 curation.max_new_tokens: 12, protocol.max_new_tokens: 12, sft.batch_size: 8, sft.per_device_batch_size: 4,
 sft.epochs: 1, sft.checkpoints: 2, sft.selection_rows: 4, grpo.batch_size: 8, grpo.per_device_batch_size: 4,
 grpo.generations: 4, grpo.max_steps: 2, grpo.max_completion_length: 16, grpo.save_steps: 1, evaluation.rows: 2,
 evaluation.frontier_rows: 2, evaluation.study_rows: 2, evaluation.graded_rows: 3, evaluation.shifted_rows: 1,
 evaluation.bootstrap: 50, evaluation.call_bias: 30.0, evaluation.dial_biases: [-30.0, 0.0], evaluation.dial_rows: 8,
 ablations.curation: [], ablations.sft: [weight_1], ablations.grpo: [no_area_cost], ablations.systems: [],
 latency.rows: 6, latency.repetitions: 2, latency.batch_tokens: [4096], report.gallery: 2, seeds: [2, 3]}
""")


class Line:
    """The stages' notebooks under ``profile``, executed into ``folder``, which has the base model in ``base``."""

    def __init__(self, folder, values, profile="mini", **environment):
        places = {"paths.runs": folder / "runs", "paths.reports": folder / "reports", "base.model": folder / "base"}
        self.values = {**values, **{key: str(path) for key, path in places.items()}}
        self.folder, self.profile, self.params = folder, profile, load_params(profile, "main", self.values)
        self.environment = {"PYTHONPATH": str(ROOT / "src"), "IPYTHONDIR": str(folder / "ipython"), **environment}
        self.printed = folder / "printed.txt"  # what the notebooks print: the pipeline shows it
        self.written = {}  # stage -> its files as it left them

    def with_values(self, variant="main", **more):
        return load_params(self.profile, variant, {**self.values, **more})

    def run(self, name, stage, variant="main", kernel=False, **more):
        """Execute notebook ``name`` (or an edited copy, by its path); the executed copy."""
        executed = self.with_values(variant, **more).run_dir(stage) / "notebook.ipynb"
        executed.parent.mkdir(parents=True, exist_ok=True)
        parameters = {"profile": self.profile, "variant": variant, "overrides": json.dumps({**self.values, **more})}
        source = name if isinstance(name, Path) else NOTEBOOKS / f"{name}.ipynb"
        options = {"kernel_name": "python3", "progress_bar": False, "cwd": NOTEBOOKS}
        options["engine_name"] = "nbclient" if kernel else "in_process"
        cache = mock.patch.object(datasets.config, "HF_DATASETS_CACHE", self.folder / "cache")
        stale = self.params.report_dir() / {"report": "tables"}.get(stage, stage) / "of_an_earlier_run.csv"
        if stage in ("report", *publish.PAGES) and stage != "base_model":  # which publishes its notebook alone
            stale.parent.mkdir(parents=True, exist_ok=True)
            stale.touch()
        with self.printed.open("a") as log, mock.patch.dict(os.environ, self.environment), cache:
            papermill.execute_notebook(source, executed, parameters, **options, stdout_file=log, stderr_file=log)
        assert not stale.exists(), f"{name} leaves tables of an earlier run in {stale.parent}"
        return executed

    def run_main_line(self):
        for name, stage in publish.STAGES.items():
            self.run(name, stage)
            self.written[stage] = self.files(stage)

    def run_edited(self, name, stage, cell, source, folder):
        """Run ``name`` in a kernel on a copy of the runs, the code cell with ``cell`` replaced by ``source``."""
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        next(one for one in notebook.cells if one.cell_type == "code" and cell in one.source).source = source
        nbformat.write(notebook, folder / "mine.ipynb")
        shutil.copytree(self.params.path(self.params.paths.runs), folder / "runs")
        more = {"paths.runs": str(folder / "runs")}
        return self.run(folder / "mine.ipynb", stage, kernel=True, **more).parent

    def files(self, stage):
        return {(str(path), path.stat().st_size) for path in self.params.run_dir(stage).rglob("*") if path.is_file()}

    def table(self, stage, name):
        return pd.read_csv(self.params.run_dir(stage) / "tables" / f"{name}.csv")


class InProcess(Engine):
    """Runs the cells in this process: a kernel needs longer to start and import torch than most notebooks to run."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, stdout_file, **options):
        shell = InteractiveShell.instance()
        try:
            with isolated(stdout_file):
                for cell in [cell for cell in nb_man.nb.cells if cell.cell_type == "code"]:
                    nb_man.cell_start(cell)
                    cls.run_cell(shell, cell, stdout_file)
                    nb_man.cell_complete(cell)
        finally:
            shell.atexit_operations()  # frees the notebook's models and closes the history, whose folder pytest removes
            atexit.unregister(shell.atexit_operations)
            shell.cleanup()
            InteractiveShell.clear_instance()

    @staticmethod
    def run_cell(shell, cell, log):
        with capture_output() as captured:
            shell.display_trap.hook = sys.displayhook  # captures the value of the last line, too
            result = shell.run_cell(cell.source, store_history=True)
        log.write(captured.stdout + captured.stderr)
        shown = [nbformat.v4.new_output("display_data", one.data, metadata=one.metadata) for one in captured.outputs]
        cell.outputs, cell.execution_count = nbformat.from_dict(shown), result.execution_count
        result.raise_error()


@contextmanager
def isolated(log):
    """Undo what a notebook changes in its process, but for random states; warnings of all loggers go to ``log``."""
    threads = torch.get_num_threads()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    try:
        with matplotlib.rc_context(), warnings.catch_warnings(), torch.random.fork_rng([]):
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        torch.set_num_threads(threads)


papermill_engines.register("in_process", InProcess)
