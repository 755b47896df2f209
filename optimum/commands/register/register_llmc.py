"""`optimum-cli llmc …`: hands everything after `llmc` to llmc's own command line.

optimum-cli imports every module of the namespace `optimum.commands.register` and adds what it lists
in REGISTER_COMMANDS (optimum/commands/optimum_cli.py, load_optimum_namespace_cli_commands). Neither
`optimum` nor the folders below it may have an __init__.py here: they are namespace packages.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class LlmcCommand(BaseOptimumCLICommand):
    """The command `llmc` of optimum-cli."""

    COMMAND = CommandInfo(
        name="llmc", help="Compile a causal language model into a verified artifact: `llmc --help`."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=REMAINDER, help="a command of llmc and its arguments")

    def run(self) -> None:
        from llmc.cli import main

        main(self.args.arguments)


# An iterator, so that it is registered once even where two installations put this file on the path.
REGISTER_COMMANDS = iter([LlmcCommand])
