"""Opens MODEL as a Source."""

import click

from qcompress.sources.base import Source, SourceOptions
from qcompress_cli.inputs.project import RunOptions, require_model
from qcompress_cli.terminal.console import Ui


def open_model(given: RunOptions, ui: Ui | None = None) -> Source:
    """Open the MODEL of this run, whatever kind of file it is.

    Args:
        given: the run's options.
        ui: shows which of several models in a file was taken.

    Raises:
        ConfigError: no MODEL was given.
        SourceError: it cannot be read.
    """
    path = require_model(given, click.get_current_context().find_root().obj)
    from qcompress.openers import load_source

    source = load_source(path, options=source_options(given))
    note = getattr(source, "note", None)
    if ui is not None and note:
        ui.note(note)
    return source


def source_options(given: RunOptions) -> SourceOptions:
    """Return how the model files of this run may be read."""
    return SourceOptions(
        arch=given.arch,
        arch_kwargs=given.arch_kwargs,
        allow_classes=given.allow_class,
        trust_pickle=given.trust_pickle,
    )
