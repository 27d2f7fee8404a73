"""The command line: ``omnimem run``, ``plan``, ``pack``, ``synth``, ``doctor`` and so on.

Commands live in a module each; torch is imported only by the one that computes. What goes wrong is
one line on stderr: exit code 2 for a wrong command line, 1 for anything else, 130 for Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from omnimem import __version__
from omnimem.cli.config import config_command
from omnimem.cli.demo import demo_command
from omnimem.cli.doctor import doctor_command
from omnimem.cli.pack import pack_command, unpack_command
from omnimem.cli.plan import plan_command
from omnimem.cli.run import run_command
from omnimem.cli.synth import synth_command
from omnimem.errors import Error

__all__ = ["main"]


class _InOrder(click.Group):
    """Lists commands as they were added: the ones that are needed first come first."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="omnimem")
def cli() -> None:
    """Run large models in less memory than their weights need."""


for _command in (
    run_command,
    plan_command,
    doctor_command,
    pack_command,
    unpack_command,
    synth_command,
    config_command,
    demo_command,
):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after the program's name; those of the process by default.

    Returns
    -------
    int
        The exit code.
    """
    try:
        result = cli.main(args=arguments, prog_name="omnimem", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("omnimem: interrupted", err=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:
        need = f"{error}; install what models need: pip install 'omnimem[transformers]'"
        click.echo(f"omnimem: {need}", err=True)
        return 1
    except (Error, OSError, ValueError) as error:
        click.echo(f"omnimem: {_one_line(error)}", err=True)
        return 1
    return result if isinstance(result, int) else 0


def _one_line(error: Exception) -> str:
    """Return an error's text on one line; a system error is its file and its reason."""
    if type(error).__module__ == "builtins" and isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
