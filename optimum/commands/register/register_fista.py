"""Registers `optimum-cli fista`; Optimum finds this file by its place."""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_fista.cli.main import add_commands, execute


class FistaCommand(BaseOptimumCLICommand):
    """`optimum-cli fista`, with the subcommands of `optimum-fista`."""

    COMMAND = CommandInfo(name="fista", help="Prune language models in one shot (optimum-fista).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the subcommands, such as `prune`, to the parser of `optimum-cli fista`."""
        add_commands(parser)

    def run(self) -> None:
        """Run the subcommand of the parsed arguments `self.args`, and end the process with its exit code."""
        raise SystemExit(execute(self.args))


REGISTER_COMMANDS = [FistaCommand]
