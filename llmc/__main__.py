"""Run the command line as `python -m llmc`."""

from llmc.cli import program

if __name__ == "__main__":
    program()
