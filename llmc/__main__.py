"""`python -m llmc`."""

from llmc.cli import program

if __name__ == "__main__":
    program()
