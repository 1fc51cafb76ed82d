"""The parser of every command's arguments."""

from argparse import ArgumentParser
from typing import NoReturn

EXIT_USAGE = 2


class Parser(ArgumentParser):
    """argparse's, which says what is wrong in one line instead of repeating all flags."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2, having said what is wrong and where the usage is."""
        line = "".join(each if each.isprintable() else " " for each in " ".join(message.split()))
        self.exit(EXIT_USAGE, f"{self.prog}: {line} (usage: {self.prog} --help)\n")
